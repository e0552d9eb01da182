"""A page of another site, in a real browser, before a server on its reader's machine."""

from __future__ import annotations

import urllib.request
from typing import Any

import pytest
from tests.chat_page import page_of
from tests.serving import running

ASK = """(async () => {{
  const body = JSON.stringify({{prompt: "hi", max_tokens: 1, temperature: 0, stream: {stream}}});
  try {{
    const reply = await fetch("{url}/v1/completions", {{method: "POST", body, {options}}});
    return [reply.status, await reply.text()];
  }} catch (error) {{ return error.name; }}
}})()"""
SIMPLE = "headers: {'Content-Type': 'text/plain'}"  # sent without asking the server first
ASKING = "headers: {'Content-Type': 'application/json', 'Authorization': 'Bearer x'}"


async def other_site(scope: Any, receive: Any, send: Any) -> None:
    """An empty page."""
    if scope["type"] == "http":
        html = [(b"content-type", b"text/html")]
        await send({"type": "http.response.start", "status": 200, "headers": html})
        await send({"type": "http.response.body", "body": b"<title>other</title>"})


def metrics(url: str) -> str:
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as reply:
        return reply.read().decode()


def script(url: str, options: str, stream: str = "false") -> str:
    return ASK.format(url=url, options=options, stream=stream)


@pytest.mark.parametrize("options", [SIMPLE, ASKING])
def test_a_page_of_another_site_uses_nothing(tab, engine, options):
    """Catches a server that any page may drive, though no page may read its answer."""
    with page_of(engine) as url, running(other_site) as other:
        tab.open(other)
        tab.wait("document.title == 'other'")
        assert tab.see(script(url, options)) == "TypeError"
        tab.problems.clear()
        assert "glimt:requests_total{" not in metrics(url)


def test_an_allowed_page_reads_answers_and_streams(tab, engine):
    """Catches a preflight or a header that a browser does not take for a yes."""
    with running(other_site) as other, page_of(engine, allowed_origins=(other,)) as url:
        tab.open(other)
        tab.wait("document.title == 'other'")
        for options in (SIMPLE, ASKING):
            status, text = tab.see(script(url, options))
            assert (status, '"text_completion"' in text) == (200, True)
        status, text = tab.see(script(url, ASKING, "true"))
        assert (status, text.endswith("data: [DONE]\n\n")) == (200, True)
        assert "glimt:requests_total{" in metrics(url)
