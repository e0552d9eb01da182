"""Texts of a wanted length that no other request shares, from a seed."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

CountTokens = Callable[[str], int]

# Short and everyday, so that any tokenizer has most of them whole.
_WORDS = """the a is of in on at to and or not this that what who where when how many much red blue
green black white car dog cat tree house street sign people man woman child table chair book phone
window door light water food cup left right above below front behind large small old new one two
three four five six seven eight nine ten day"""
_FILLERS = (" the", " a", ".", ",", " 1", "?", "a", "1")


def words(num_words: int, seed: str) -> str:
    """So many words with blanks between; equal seeds give equal texts."""
    generator, known = random.Random(seed), _WORDS.split()
    return " ".join(generator.choice(known) for _ in range(num_words))


def text_of_length(num_tokens: int, seed: str, count: CountTokens) -> str:
    """A text of exactly so many tokens, or of as few less as can be made.

    count: tokens of a text, without any template
    """
    drawn = words(num_tokens, seed).split(" ")  # a word is one token or more
    text = " ".join(drawn[: _longest_start(drawn, num_tokens, count)])
    while (missing := num_tokens - count(text)) > 0:
        longer = [text + filler for filler in _FILLERS if count(text + filler) == count(text) + 1]
        if not longer:
            break
        text = longer[missing % len(longer)]
    return text


def _longest_start(drawn: Sequence[str], num_tokens: int, count: CountTokens) -> int:
    """How many of the words have at most so many tokens: by halving, as counts rise with them."""
    low, high = 0, len(drawn)
    while low < high:
        middle = (low + high + 1) // 2
        if count(" ".join(drawn[:middle])) <= num_tokens:
            low = middle
        else:
            high = middle - 1
    return low
