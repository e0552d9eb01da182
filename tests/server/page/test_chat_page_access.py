"""The chat page by keyboard, by screen reader, in two languages and on narrow screens."""

from __future__ import annotations

import re

import pytest
from tests.chat_page import (
    BOOT,
    EXAMPLES,
    NARROW,
    PHONE,
    SHAPES,
    answered,
    ask,
    choose,
    opened,
    page_by,
)
from tests.chromium import SHIFT
from tests.openai_server import HANG, answer_of, chunk

from glimt.server.app import PAGE


def test_everything_can_be_done_by_keyboard(tab, engine):
    """Catches a control that only a mouse reaches, and a focus that is lost on the way."""
    pieces = [chunk(text="a long answer"), HANG]
    with page_by(engine, answer_of("first"), pieces, answer_of("third")) as (url, script):
        opened(tab, url)
        assert tab.see("document.activeElement.id") == "question"
        tab.type("line one")
        tab.press("Enter", SHIFT)
        ask(tab, "line two")
        answered(tab)
        assert script.bodies[0]["messages"][0]["content"] == "line one\nline two"
        ask(tab, "more")
        tab.wait("document.querySelectorAll('.answer .text')[1]?.innerText.includes('long')")
        tab.press("Escape")
        answered(tab, 2)
        assert tab.see("document.activeElement.id") == "question"
        tab.tab_to("e.getAttribute('aria-label') == 'Answer again'")
        assert tab.see("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        tab.press("Enter")
        tab.wait("document.querySelectorAll('.answer .text')[1]?.innerText == 'third'")
        tab.tab_to("e.id == 'settings-open'")
        tab.press("Enter")
        tab.wait("document.querySelector('#settings').open")
        tab.press("Escape")
        tab.wait("!document.querySelector('#settings').open")
        tab.tab_to("e.id == 'choose'")
        tab.tab_to("e.id == 'new'")
        tab.press("Enter")
        tab.find(".turn", 0)


def test_enter_that_chooses_a_character_sends_nothing(tab, engine):
    """Catches half a Chinese question that is sent by the Enter of its input method."""
    with page_by(engine, answer_of("fine")) as (url, script):
        opened(tab, url)
        tab.type("ni hao")
        for event in ("{isComposing: true}", "{keyCode: 229}"):
            tab.see(f"""document.querySelector('#question').dispatchEvent(new KeyboardEvent(
                'keydown', Object.assign({{key: 'Enter', bubbles: true}}, {event})))""")
        assert tab.see("document.querySelector('#question').value") == "ni hao"
        tab.press("Enter")
        answered(tab)
        assert len(script.bodies) == 1


def test_every_control_has_a_name_in_both_languages(tab, engine):
    """Catches a button that a screen reader calls "button", or one whose name is not translated."""
    nameless = """[...document.querySelectorAll('button, input, textarea')].filter((e) =>
        !e.hidden && !(e.getAttribute('aria-label') || e.innerText?.trim()
                       || e.labels?.[0]?.innerText.trim())).map((e) => e.outerHTML)"""
    with page_by(engine, answer_of("fine")) as (url, _):
        opened(tab, url)
        tab.click("#settings-open")
        assert tab.see(nameless) == []
        tab.press("Escape")
        tab.click("#language")
        assert tab.text("#new") == "新对话"
        assert tab.see("document.querySelector('#send').ariaLabel") == "发送"
        assert tab.see("document.querySelector('#question').placeholder") == "请输入问题…"
        tab.open(url)
        assert tab.see("document.documentElement.lang") == "zh-CN"
        tab.click("#language")
        assert tab.text("#new") == "New conversation"
    words = (PAGE / "words.js").read_text(encoding="utf-8")
    english, chinese = words.split("const ZH")
    names = [re.findall(r"(?:^|[{,]) *(\w+):", part, re.M) for part in (english, chinese)]
    assert set(names[0]) <= set(names[1])


WIDE = """A very-long-word-{} and https://example.org/{}

```python
print("{}")
```

| one | two | three |
|---|--:|---|
| {} | 2 | 3 |
""".format("x" * 200, "path/" * 40, "y" * 300, "cell " * 60)

OUTSIDE = """[...document.querySelectorAll('body *')].filter((e) => {
    const mayScroll = '.code pre, .table, #side, [hidden], svg, .unseen, .skip';
    if (e.closest(`${mayScroll}, dialog:not([open])`)) return false;
    const box = e.getBoundingClientRect();
    return box.width && (box.left < -1 || box.right > innerWidth + 1);
}).map((e) => e.outerHTML.slice(0, 200))"""


@pytest.mark.parametrize("size", [NARROW, PHONE], ids=["320", "390"])
def test_nothing_is_wider_than_a_phone(tab, engine, size):
    """Catches a table, a word or a button that makes the page scroll sideways."""
    with page_by(engine, answer_of(*WIDE.splitlines(keepends=True))) as (url, _):
        opened(tab, url, size)
        assert tab.see(OUTSIDE) == []
        choose(tab, BOOT, SHAPES, EXAMPLES / "pair.png")
        tab.click("#question")
        ask(tab, "word" * 100)
        answered(tab)
        tab.find(".answer table")
        assert tab.see(OUTSIDE) == []
        assert tab.see(
            "[document.documentElement, document.querySelector('#scroll')]"
            ".every((e) => e.scrollWidth <= e.clientWidth)"
        )
        tab.click("#settings-open")
        assert tab.see(OUTSIDE) == []
        tab.press("Escape")
        tab.click("#side-open")
        tab.wait("document.querySelector('#side').getBoundingClientRect().x == 0")
        tab.click("#new")
        tab.wait("!document.body.classList.contains('side-open')")
        tab.find("#welcome:not([hidden])")
