"""Document: a report as plain data, before it is HTML or Markdown. Knows no kind of run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class Paragraph:
    """Words, one paragraph."""

    text: str


@dataclass(frozen=True, slots=True)
class Table:
    """Figures under headings; the first column names its row.

    marked: places of the rows that a reader must see, such as those that fail
    """

    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    marked: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Plot:
    """A drawn figure.

    name: of its PNG file, without the ending
    said: what it shows, for whoever cannot see it
    """

    title: str
    name: str
    png: bytes
    said: str


@dataclass(frozen=True, slots=True)
class Card:
    """A picture with what was said about it.

    jpeg:  the picture, made small
    lines: who said it, and what; or the name of a figure, and the figure
    """

    name: str
    jpeg: bytes
    lines: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Cards:
    """Pictures side by side."""

    title: str
    cards: tuple[Card, ...]
    note: str = ""


Section: TypeAlias = Paragraph | Table | Plot | Cards


@dataclass(frozen=True, slots=True)
class Document:
    """A report.

    status:   the first thing said: whether the run is whole, and what it found
    is_whole: false for a run that was cut, or had errors
    facts:    what the figures belong to: model, commit, machine, settings, repeats and spread
    """

    title: str
    status: str
    is_whole: bool
    facts: Mapping[str, str]
    sections: tuple[Section, ...]
