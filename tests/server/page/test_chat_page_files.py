"""The files of the chat page: nothing from elsewhere, nothing inline."""

from __future__ import annotations

import re

from glimt.server.app import PAGE, PAGE_HEADERS


def test_the_page_needs_nothing_from_elsewhere():
    """Catches a font, script or style from another host, and anything inline, which CSP blocks."""
    html = (PAGE / "index.html").read_text(encoding="utf-8")
    assert (
        re.findall(
            r"<script(?! type=\"module\" src=\"/page/page\.js\"></script>)|<style| style=| on\w+=",
            html,
        )
        == []
    )
    for file in PAGE.iterdir():
        text = file.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"(?:src|href|url|import|from)\W{1,3}(?:https?:)?//", text), file.name
        assert "innerHTML" not in text.replace("// ", ""), file.name
        assert len(text.splitlines()) <= 300, file.name
        assert max(map(len, text.splitlines())) < 400, file.name
    assert "unsafe" not in PAGE_HEADERS["Content-Security-Policy"]
