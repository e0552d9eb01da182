"""A document as one HTML file that needs nothing else: no script, no font, no other file."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from html import escape
from itertools import zip_longest

from glimt.reports.document import Card, Cards, Document, Paragraph, Plot, Section, Table

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --dim: #5b6470; --line: #d9dee4;
  --paper: #fff; --soft: #f5f7f9; --good: #1a7f4b; --bad: #b3261e; --mark: #fdeceb; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ec; --dim: #9aa4af; --line: #333b44;
  --paper: #14181c; --soft: #1d2329; --good: #58c08a; --bad: #ff8a80; --mark: #3a2220; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 68rem; padding: 2rem 1.25rem 4rem; color: var(--ink);
  background: var(--paper); font: 16px/1.5 system-ui, "Noto Sans CJK SC", sans-serif; }
h1 { font-size: 1.6rem; margin: .25rem 0 1.5rem; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .75rem; }
.status { padding: .75rem 1rem; border-left: 4px solid var(--good); background: var(--soft);
  font-weight: 600; overflow-wrap: anywhere; }
.status.cut { border-color: var(--bad); color: var(--bad); }
.note { color: var(--dim); font-size: .9rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums;
  font-size: .92rem; }
th, td { padding: .35rem .75rem; border-bottom: 1px solid var(--line); text-align: left;
  vertical-align: top; }
th.figure, td.figure { text-align: right; } thead th { color: var(--dim); }
tr.marked td { background: var(--mark); }
table.facts td:first-child { color: var(--dim); white-space: nowrap; width: 1%; }
table.facts td { text-align: left; overflow-wrap: anywhere; }
figure { margin: 0; } figure img { max-width: 100%; height: auto; border-radius: 6px;
  border: 1px solid var(--line); background: #fff; }
.cards { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); }
.card { border: 1px solid var(--line); border-radius: 8px; overflow: hidden;
  background: var(--soft); }
.card img { width: 100%; height: 11rem; object-fit: contain; background: #0001; display: block; }
.card .name { padding: .5rem .75rem 0; color: var(--dim); font-size: .8rem;
  overflow-wrap: anywhere; }
.card dl { margin: 0; padding: .25rem .75rem .75rem; }
.card dt { color: var(--dim); font-size: .8rem; margin-top: .4rem; }
.card dd { margin: 0; overflow-wrap: anywhere; }
"""


def to_html(document: Document) -> str:
    """The whole file. Nothing that a model, a file or an error says is read as markup."""
    kind = "status" if document.is_whole else "status cut"
    body = "\n".join(_section(section) for section in document.sections)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(document.title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f'<p class="{kind}">{escape(document.status)}</p>\n<h1>{escape(document.title)}</h1>\n'
        f"{body}\n{_facts(document)}\n</body>\n</html>\n"
    )


def _facts(document: Document) -> str:
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>"
        for name, value in document.facts.items()
    )
    return f'<h2>What this belongs to</h2>\n<table class="facts"><tbody>{rows}</tbody></table>'


def _section(section: Section) -> str:
    if isinstance(section, Paragraph):
        return f"<p>{escape(section.text)}</p>"
    head = f"<h2>{escape(section.title)}</h2>\n"
    if isinstance(section, Table):
        return head + _table(section)
    if isinstance(section, Plot):
        return head + _plot(section)
    return head + _cards(section)


def _table(table: Table) -> str:
    kinds = [_kind(column) for column in zip(*table.rows, strict=True)]
    heads = zip_longest(table.headings, kinds, fillvalue="")
    headings = "".join(f"<th{kind}>{escape(heading)}</th>" for heading, kind in heads)
    rows = "\n".join(_row(row, kinds, i in table.marked) for i, row in enumerate(table.rows))
    return (
        f'<div class="wide"><table><thead><tr>{headings}</tr></thead>\n<tbody>\n{rows}\n'
        f"</tbody></table></div>{_note(table.note)}"
    )


_FIGURE = re.compile(r"[≥≤<>+−±~-]?\s*\d.*|[-–—]|exact|")


def _kind(column: Sequence[str]) -> str:
    """Figures stand right, one under the other; words stand left."""
    is_figure = any(column) and all(_FIGURE.fullmatch(cell) for cell in column)
    return ' class="figure"' if is_figure else ""


def _row(cells: tuple[str, ...], kinds: Sequence[str], is_marked: bool) -> str:
    mark = ' class="marked"' if is_marked else ""
    pairs = zip(cells, kinds, strict=True)
    return f"<tr{mark}>{''.join(f'<td{kind}>{escape(cell)}</td>' for cell, kind in pairs)}</tr>"


def _plot(plot: Plot) -> str:
    image = base64.b64encode(plot.png).decode()
    return (
        f'<figure><img alt="{escape(plot.said)}" src="data:image/png;base64,{image}"></figure>'
        f"{_note(plot.said)}"
    )


def _cards(cards: Cards) -> str:
    shown = "\n".join(_card(card) for card in cards.cards)
    return f'<div class="cards">\n{shown}\n</div>{_note(cards.note)}'


def _card(card: Card) -> str:
    image = base64.b64encode(card.jpeg).decode()
    lines = "".join(f"<dt>{escape(who)}</dt><dd>{escape(said)}</dd>" for who, said in card.lines)
    return (
        f'<div class="card"><img alt="{escape(card.name)}" src="data:image/jpeg;base64,{image}">'
        f'<div class="name">{escape(card.name)}</div><dl>{lines}</dl></div>'
    )


def _note(text: str) -> str:
    return f'\n<p class="note">{escape(text)}</p>' if text else ""
