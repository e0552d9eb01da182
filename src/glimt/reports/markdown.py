"""A document as Markdown, for a pull request: plots by their files' names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from glimt.reports.document import Cards, Document, Paragraph, Plot, Section, Table


def to_markdown(document: Document) -> str:
    """The whole text. What a model, a file or an error says stays as it is written."""
    sign = "" if document.is_whole else "⚠ "
    facts = _rows(("", ""), list(document.facts.items()))
    parts = [
        f"**{sign}{_plain(document.status)}**",
        f"## {_plain(document.title)}",
        *(_section(section) for section in document.sections),
        "<details><summary>What this belongs to</summary>",
        facts,
        "</details>",
    ]
    return "\n\n".join(parts) + "\n"


def _section(section: Section) -> str:
    if isinstance(section, Paragraph):
        return _plain(section.text)
    note = getattr(section, "note", "")
    return "\n\n".join(
        [f"### {_plain(section.title)}", _body(section), *([_plain(note)] * bool(note))]
    )


def _body(section: Table | Plot | Cards) -> str:
    if isinstance(section, Table):
        return _rows(section.headings, section.rows)
    if isinstance(section, Plot):
        return f"![{_plain(section.said)}]({section.name}.png)"
    lines = [(card.name, *(said for _, said in card.lines)) for card in section.cards]
    names = [who for who, _ in section.cards[0].lines] if section.cards else []
    return _rows(("picture", *names), lines)


def _rows(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    aligned = ["---", *["---:"] * (len(headings) - 1)]
    return "\n".join(_line(cells) for cells in (headings, aligned, *rows))


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(_plain(cell) for cell in cells)} |"


def _plain(text: str) -> str:
    """One line whose letters Markdown does not obey."""
    one_line = " ".join(text.split())
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", one_line) if one_line.strip("-:") else one_line
