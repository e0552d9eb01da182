"""What training data is: a picture with true questions and answers, and who draws such samples.

Knows nothing of any task, and nothing of tokens.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from PIL import Image

Language = Literal["zh", "en"]


class DataMissing(Exception):
    """Data that the training needs is not on this machine; the message names what to install."""


@dataclass(frozen=True, slots=True)
class Exchange:
    """One question and its only right answer.

    kind:      which sort of question, so that accuracy can be told apart ("count", "yes_no")
    follow_up: a question that makes sense only after this one ("它是什么颜色的？")
    """

    question: str
    answer: str
    kind: str
    follow_up: Exchange | None = None


@dataclass(frozen=True, slots=True)
class Sample:
    """One picture (RGB, of any size) or none, and exchanges about it, each true on its own.

    label:  which garment the picture shows, for a classification loss; -1 where it shows none
    layout: what is where in it (training.data.layout), None where nobody knows
    middles: of its objects, x and y as shares of width and height; None where nobody knows
    """

    image: Image.Image | None
    exchanges: tuple[Exchange, ...]
    task: str
    language: Language
    label: int = -1
    layout: Image.Image | None = None
    middles: tuple[tuple[float, float], ...] | None = None


class Source(Protocol):
    """Draws the samples of one task; equal states of `rng` give equal samples."""

    @property
    def task(self) -> str:
        """Name of the task, which its samples bear."""

    def draw(self, rng: random.Random, language: Language) -> Sample:
        """One sample with at least one exchange."""


class Words(NamedTuple):
    """The same words in both languages."""

    zh: str
    en: str

    def said(self, language: Language) -> str:
        """The words in one language."""
        return self.zh if language == "zh" else self.en


class Wordings(NamedTuple):
    """Several ways to ask the same question, in both languages."""

    zh: tuple[str, ...]
    en: tuple[str, ...]

    def choose(self, rng: random.Random, language: Language) -> str:
        """One of the ways in one language."""
        return rng.choice(self.zh if language == "zh" else self.en)


YES_NO = {True: Words("是的。", "Yes."), False: Words("不是。", "No.")}  # of every task
