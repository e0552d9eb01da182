"""Reference captions of pictures: a file of them, and every score against them.

captions.jsonl   one object a line: file (a path), captions (a list of texts); more is ignored
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from glimt.errors import ConfigError
from glimt.evaluate.caption_words import Words, bleu, rouge_l, words
from glimt.evaluate.cider import Rarity, cider_d, rarity

_SHOWN_PROBLEMS = 8
References = Mapping[str, tuple[str, ...]]  # captions by the picture's file name, without folders


def read_captions(path: Path) -> References:
    """All captions of a file, by the name of the picture.

    Raises ConfigError listing what is wrong, names that two pictures share among it.
    """
    captions: dict[str, tuple[str, ...]] = {}
    problems = []
    for number, line in enumerate(_lines(path), 1):
        try:
            name, texts = _row(line)
        except ValueError as error:
            problems.append(f"line {number} of {path}: {error}")
            continue
        if name in captions:
            problems.append(f"line {number} of {path}: a picture named {name} was there before")
        captions[name] = texts
    if problems or not captions:
        more = len(problems) - _SHOWN_PROBLEMS
        shown = [*problems[:_SHOWN_PROBLEMS], *([f"and {more} more"] if more > 0 else [])]
        raise ConfigError("captions", shown or [f"{path} holds no caption"])
    return captions


def _lines(path: Path) -> list[str]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        said = f"{path} cannot be read: {error.strerror or error}"
        raise ConfigError("captions", [f"{said}; name a JSON Lines file"]) from error
    except UnicodeDecodeError as error:
        raise ConfigError("captions", [f"{path} is not UTF-8: {error}"]) from error
    return [line for line in text.split("\n") if line.strip()]


def _row(line: str) -> tuple[str, tuple[str, ...]]:
    """Name and captions. Raises ValueError saying what is wrong."""
    try:
        raw: Any = json.loads(line)
    except RecursionError as error:
        raise ValueError("is nested too deep") from error
    if not isinstance(raw, dict) or not isinstance(raw.get("file"), str):
        raise ValueError("is no object with a file")
    texts = raw.get("captions")
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError("captions must be a list of texts")
    if not any(map(words, texts)):
        raise ValueError("captions hold no word")
    return PurePath(raw["file"]).name, tuple(text for text in texts if words(text))


# --- scores ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CaptionScores:
    """Of each answer, and of all together.

    cider_d, rouge_l, exact_match: one figure for each answer
    bleu: BLEU-1 to BLEU-4
    """

    cider_d: tuple[float, ...]
    rouge_l: tuple[float, ...]
    exact_match: tuple[float, ...]
    bleu: tuple[float, ...]


def rarity_of(captions: Iterable[Sequence[str]]) -> Rarity:
    """How rare n-grams are among the captions of the pictures that are judged."""
    return rarity([words(text) for text in texts] for texts in captions)


def caption_scores(
    answers: Sequence[str], captions: Sequence[Sequence[str]], rare: Rarity
) -> CaptionScores:
    """Every score of answers against the captions of their pictures."""
    said = [words(answer) for answer in answers]
    references = [[words(text) for text in texts] for texts in captions]
    pairs = list(zip(said, references, strict=True))
    return CaptionScores(
        tuple(cider_d(answer, refs, rare) for answer, refs in pairs),
        tuple(rouge_l(answer, refs) for answer, refs in pairs),
        tuple(_matches(answer, refs) for answer, refs in pairs),
        bleu(said, references),
    )


def _matches(answer: Words, references: Sequence[Words]) -> float:
    """1 if the answer has the same words in the same order as one of the references."""
    return float(answer in references)
