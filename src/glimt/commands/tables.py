"""Plain tables, the same for every command."""

from __future__ import annotations

from collections.abc import Mapping

from rich.table import Table


def figures(*headings: str, title: str) -> Table:
    """An empty table whose first column is text and whose others are figures."""
    table = Table(title=title, title_justify="left", show_edge=False, pad_edge=False)
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="right" if i else "left", overflow="fold", no_wrap=i == 0)
    return table


def key_values(title: str, rows: Mapping[str, str]) -> Table:
    """A table of names and texts, without headings."""
    table = Table(
        title=title, title_justify="left", show_edge=False, pad_edge=False, show_header=False
    )
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, value)
    return table
