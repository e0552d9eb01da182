"""What the chat page says when something goes wrong, and what it does then."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from tests import openai_server
from tests.chat_page import (
    SHAPES,
    NeverClosed,
    answered,
    ask,
    of_engine,
    opened,
    page_by,
    page_of,
    page_over,
    set_field,
)
from tests.openai_server import Script, answer_of, chunk, refusal


def test_a_broken_picture_is_told_plainly(tab, engine, tmp_path):
    """Catches a file that is no picture and goes through, and a refusal that nobody sees."""
    text = tmp_path / "notes.png"
    text.write_text("no picture")
    cut = tmp_path / "cut.png"
    cut.write_bytes(SHAPES.read_bytes()[: len(SHAPES.read_bytes()) // 2])
    with page_of(engine) as url:
        opened(tab, url)
        tab.choose("#files", [text])
        tab.wait("document.querySelector('#notes').innerText.includes('notes.png cannot be read')")
        tab.find("#tray li", 0)
        # A browser may show the upper half of a picture that was cut; the server takes no half.
        tab.see(f"""(() => {{
            const real = createImageBitmap;
            globalThis.createImageBitmap = async (file) =>
                real(new ImageData({224}, {224}));
        }})()""")
        tab.choose("#files", [cut])
        tab.find("#tray li", 1)
        ask(tab, "what is this?")
        answered(tab)
        said = tab.text(".error")
        assert "The server refused the question." in said
        assert "messages[0]" in said
        set_field(tab, "temperature", "0")
        ask(tab, "你好")  # what was refused is not in the way of what comes next
        assert answered(tab, 2)[1] == of_engine(engine, [{"role": "user", "content": "你好"}])


def test_a_key_is_asked_for_and_kept_for_this_tab_only(tab, engine):
    """Catches a 401 that leads nowhere, and a key that stays on a shared computer's disk."""
    need = refusal(401, "an API key is needed: Authorization: Bearer KEY")
    with page_by(engine, need, answer_of("welcome")) as (url, script):
        opened(tab, url)
        ask(tab, "hello")
        answered(tab)
        assert "asks for an API key" in tab.text(".error")
        tab.click(".error button:first-child")
        tab.wait("document.activeElement.id == 'set-key'")
        tab.type("sk-secret")
        tab.click("#settings-done")
        tab.click(".error button:last-child")
        tab.wait("document.querySelector('.answer .text').innerText == 'welcome'")
        assert script.keys == [None, "Bearer sk-secret"]
        assert "sk-secret" not in tab.see("JSON.stringify(localStorage)")
        assert "sk-secret" in tab.see("JSON.stringify(sessionStorage)")


def test_a_busy_server_is_asked_again(tab, engine):
    """Catches a 429 that is shown as a failure although a second later there is room."""
    busy = refusal(429, "2 answers are running", **{"Retry-After": "1"})
    with page_by(engine, busy, busy, answer_of("now")) as (url, script):
        opened(tab, url)
        ask(tab, "hello")
        tab.wait("document.querySelector('.waiting')?.innerText.includes('busy')")
        assert answered(tab) == ["now"]
        assert len(script.bodies) == 3


def test_a_server_that_stays_busy_is_told_and_can_be_asked_again_by_hand(tab, engine):
    """Catches a page that asks for ever, or that leaves no way to ask again."""
    busy = refusal(429, "2 answers are running", **{"Retry-After": "0"})
    with page_by(engine, *[busy] * 4, answer_of("now")) as (url, _):
        opened(tab, url)
        ask(tab, "hello")
        answered(tab)
        assert "too many questions" in tab.text(".error")
        assert "2 answers are running" in tab.text(".error")
        tab.click(".error button")
        tab.wait("document.querySelector('.answer .text').innerText == 'now'")


def test_a_question_waits_for_a_model_that_still_loads(tab, engine):
    """Catches a 503 that throws the question away while the model loads."""
    may_load = threading.Event()

    def load() -> Any:
        may_load.wait(30)
        return NeverClosed(engine)

    away = refusal(503, "the model is still loading", **{"Retry-After": "1"})
    script = Script(lambda number: answer_of("hello") if may_load.is_set() else away)
    with page_over(load, script.app(), waits=False) as url:
        tab.problems.clear()
        tab.open(url)
        tab.wait("document.querySelector('#model').innerText == 'loading…'")
        tab.click("#question")
        ask(tab, "hello")
        tab.wait("document.querySelector('.waiting')?.innerText.includes('still loading')")
        may_load.set()
        assert answered(tab) == ["hello"]


@pytest.mark.parametrize(
    ("step", "said"),
    [
        ([chunk(text="half")], "ended in the middle"),
        # what had come when the connection broke may be lost with it
        ([openai_server.BREAK], "ended in the middle"),
        (
            [chunk(text="half"), openai_server.event({"error": {"message": "row failed"}})],
            "row failed",
        ),
        (refusal(413, "at most 9 bytes"), "too large together"),
        (refusal(500, "its log says why"), "The server failed."),
    ],
    ids=["ended", "broken", "event", "too-large", "failed"],
)
def test_other_failures_are_told(tab, engine, step, said):
    """Catches an answer that ends early and looks whole."""
    with page_by(engine, step) as (url, _):
        opened(tab, url)
        ask(tab, "hello")
        (text,) = answered(tab)
        assert said in text
        has_begun = isinstance(step, list) and step[0] != openai_server.BREAK
        assert ("half" in text) == has_begun
