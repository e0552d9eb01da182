"""A caption's words, and how its text compares with others' word by word: BLEU, ROUGE-L.

The published scores cut text with the Penn Treebank tokenizer, a Java program, and drop
punctuation. Here: lower case, punctuation dropped, a word's hyphens kept, contractions cut before
the apostrophe, and every Chinese character a word of its own.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import TypeAlias

Words: TypeAlias = tuple[str, ...]
MAX_ORDER = 4  # words of the longest n-gram that counts

_HAN = r"\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f"
_PLAIN = rf"[^\W{_HAN}]"
_WORD = re.compile(rf"[{_HAN}]|'(?:s|m|d|re|ve|ll)\b|{_PLAIN}+(?:-{_PLAIN}+)*")


def words(text: str) -> Words:
    """The words that count."""
    return tuple(_WORD.findall(text.lower().replace("\u2019", "'")))


def ngrams(caption: Words) -> list[Counter[Words]]:
    """How often each n-gram occurs, by n from 1 to MAX_ORDER."""
    return [
        Counter(caption[i : i + n] for i in range(len(caption) - n + 1))
        for n in range(1, MAX_ORDER + 1)
    ]


# --- BLEU ------------------------------------------------------------------------------------


def bleu(answers: Sequence[Words], references: Sequence[Sequence[Words]]) -> tuple[float, ...]:
    """BLEU-1 to BLEU-4 of all answers together; 0 from the first order on that nothing matches.

    Source: Papineni et al., ACL 2002, section 2: clipped n-gram precision over the corpus, brevity
    penalty against the reference that is nearest in length.
    """
    matched, offered = [0] * MAX_ORDER, [0] * MAX_ORDER
    for answer, refs in zip(answers, references, strict=True):
        most = _most_in_one(refs)
        for n, grams in enumerate(ngrams(answer)):
            matched[n] += sum((grams & most[n]).values())
            offered[n] += sum(grams.values())
    penalty = _brevity_penalty(answers, references)
    shares = [m / o if o else 0.0 for m, o in zip(matched, offered, strict=True)]
    return tuple(penalty * _geometric_mean(shares[:n]) for n in range(1, MAX_ORDER + 1))


def _most_in_one(references: Sequence[Words]) -> list[Counter[Words]]:
    """Of each n-gram, how often it occurs in the reference that has the most of it."""
    most: list[Counter[Words]] = [Counter() for _ in range(MAX_ORDER)]
    for reference in references:
        most = [have | more for have, more in zip(most, ngrams(reference), strict=True)]
    return most


def _brevity_penalty(answers: Sequence[Words], references: Sequence[Sequence[Words]]) -> float:
    length = sum(map(len, answers))
    wanted = sum(
        min((abs(len(ref) - len(answer)), len(ref)) for ref in refs)[1]
        for answer, refs in zip(answers, references, strict=True)
    )
    if length >= wanted:
        return 1.0
    return math.exp(1 - wanted / length) if length else 0.0


def _geometric_mean(shares: Sequence[float]) -> float:
    return math.prod(shares) ** (1 / len(shares))


# --- ROUGE-L ---------------------------------------------------------------------------------

_BETA = 1.2  # recall counts more than precision, as in the COCO caption evaluation


def rouge_l(answer: Words, references: Sequence[Words]) -> float:
    """F-measure of the longest common subsequence, best precision and best recall.

    Source: Lin, ROUGE, 2004, section 3; taking the best of several references and beta 1.2 as in
    Chen et al., Microsoft COCO Captions, arXiv 1504.00325, section 3.3.
    """
    if not answer:
        return 0.0
    common = [(_common(answer, ref), len(ref)) for ref in references if ref]
    precision = max((length / len(answer) for length, _ in common), default=0.0)
    recall = max((length / size for length, size in common), default=0.0)
    if not precision or not recall:
        return 0.0
    return (1 + _BETA**2) * precision * recall / (recall + _BETA**2 * precision)


def _common(first: Words, second: Words) -> int:
    """Length of the longest common subsequence, by the table's rows."""
    row = [0] * (len(second) + 1)
    for word in first:
        above, row = row, [0]
        for i, other in enumerate(second):
            row.append(above[i] + 1 if word == other else max(above[i + 1], row[i]))
    return row[-1]
