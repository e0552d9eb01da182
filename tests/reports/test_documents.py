"""Documents as HTML and Markdown: everything is shown, and nothing is obeyed."""

from __future__ import annotations

import base64
import math
import re
from html.parser import HTMLParser
from io import BytesIO

import pytest
from PIL import Image

from glimt.commands.reporting import write_report
from glimt.reports.document import Card, Cards, Document, Paragraph, Plot, Table
from glimt.reports.html import to_html
from glimt.reports.markdown import to_markdown
from glimt.reports.plots import Axis, Series, draw_bars, draw_histogram, draw_lines

EVIL = '<script>alert(1)</script> & "x" | `y`'
PNG = b"\x89PNG fake"


def document(is_whole: bool = True) -> Document:
    table = Table(
        "Speed", ("what", "ms"), (("first", "1.5"), (EVIL, "2")), "by hand", frozenset({1})
    )
    cards = Cards("Pictures", (Card("a.jpg", b"JPEG", (("ours", EVIL), ("theirs", "a cat"))),))
    plot = Plot("Curve", "curve", PNG, "speed by length")
    sections = (Paragraph(EVIL), table, plot, cards)
    return Document("A run", "whole: 2 rows", is_whole, {"model": EVIL, "seed": "0"}, sections)


class Reader(HTMLParser):
    """Collects tags, sources and text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.words: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data):
        self.words.append(data)


def read(html: str) -> Reader:
    reader = Reader()
    reader.feed(html)
    return reader


def test_html_holds_all_and_needs_no_other_file():
    """Catches a section that is dropped, and a picture that is only linked."""
    reader = read(to_html(document()))
    text = "".join(reader.words)
    for said in ("A run", "Speed", "1.5", "by hand", "Curve", "Pictures", "a cat", "seed"):
        assert said in text
    assert all(source.startswith("data:image/") for source in reader.sources)
    kept = [base64.b64decode(source.partition(",")[2]) for source in reader.sources]
    assert kept == [PNG, b"JPEG"]


def test_figures_stand_right_and_words_left():
    """Catches words at the right edge, and a column of figures that does not line up."""
    table = Table("t", ("name", "value", "why"), (("a", "1.5", "1 of x"), ("b", "-", "late")))
    html = to_html(Document("d", "s", True, {}, (table,)))
    assert '<th>name</th><th class="figure">value</th><th>why</th>' in html
    assert '<td>b</td><td class="figure">-</td><td>late</td>' in html
    empty = to_html(Document("d", "s", True, {}, (Table("t", ("name",), ()),)))
    assert "<th>name</th>" in empty


def test_what_a_model_says_is_not_markup():
    """Catches an answer that runs as a script in whoever's browser opens the report."""
    reader = read(to_html(document()))
    assert "script" not in reader.tags
    assert "".join(reader.words).count(EVIL) == 4


@pytest.mark.parametrize("is_whole", [True, False])
def test_the_first_line_says_whether_the_run_is_whole(is_whole):
    """Catches a report of a run with errors that looks like any other until its end."""
    html = to_html(document(is_whole))
    body = html[html.index("<body>") :]
    assert re.match(r'<body>\n<p class="status( cut)?">whole: 2 rows</p>', body)
    assert ('class="status cut"' in body) is not is_whole
    first = to_markdown(document(is_whole)).splitlines()[0]
    assert first == ("**whole: 2 rows**" if is_whole else "**⚠ whole: 2 rows**")


def test_markdown_tables_keep_their_columns():
    """Catches a bar in an answer that opens a column of its own."""
    lines = to_markdown(document()).splitlines()
    start = lines.index("| what | ms |")
    assert lines[start + 1] == "| --- | ---: |"
    assert len(re.findall(r"(?<!\\)\|", lines[start + 3])) == 3
    assert "![speed by length](curve.png)" in lines
    assert "| picture | ours | theirs |" in lines


def test_a_report_is_html_markdown_and_its_plots(tmp_path):
    """Catches Markdown that names a plot which nobody wrote."""
    write_report(document(), tmp_path, "speed")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "curve.png",
        "speed.html",
        "speed.md",
    ]
    assert (tmp_path / "curve.png").read_bytes() == PNG


def drawn(png: bytes) -> Image.Image:
    image = Image.open(BytesIO(png))
    assert image.format == "PNG"
    return image.convert("RGB")


def test_plots_are_drawn_without_a_screen(monkeypatch):
    """Catches a plot that asks for a display, and one that comes out blank."""
    monkeypatch.delenv("DISPLAY", raising=False)
    line = Series("a", [1, 2, 4], [3.0, 2.0, 1.0], [2.5, 1.5, 0.5], [3.5, 2.5, 1.5])
    limit = Series("limit", [1, 4], [4.0, 4.0], is_limit=True)
    for png in (
        draw_lines([line, limit], Axis("length", is_log=True), Axis("ms", is_log=True)),
        draw_lines([line], Axis("stage", ticks=("pixels", "tower", "head")), Axis("cosine")),
        draw_bars(["one", "two"], [("zh", [50.0, 70.0]), ("en", [60.0, math.nan])], Axis("%")),
        draw_histogram([("a", [0.1, 0.2, 0.2]), ("b", [])], Axis("score")),
        draw_histogram([], Axis("score")),
        draw_histogram([("a", [math.nan, 0.5, math.inf]), ("b", [math.nan])], Axis("score")),
    ):
        assert len(drawn(png).getcolors(maxcolors=1 << 20) or []) > 10
