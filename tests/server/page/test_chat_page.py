"""The chat page in a real browser: what is asked, answered, kept and sent."""

from __future__ import annotations

import base64
import io
import re
import threading
from pathlib import Path
from typing import Any

from PIL import Image
from tests.chat_page import (
    ANSWERED,
    BOOT,
    SHAPES,
    NeverClosed,
    answered,
    ask,
    choose,
    loaded_engine,
    of_engine,
    opened,
    output_of_engine,
    page_by,
    page_of,
    page_over,
    reopen,
    sent_pictures,
    set_field,
)
from tests.openai_server import HANG, Script, answer_of, chunk

from glimt.server.config import ServerConfig


def asked(text: str, *pictures: Path) -> dict[str, Any]:
    parts = [{"type": "image", "image": picture.read_bytes()} for picture in pictures]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def test_two_pictures_and_a_second_turn_are_answered_as_the_engine_does(tab, engine):
    """Catches a picture, a turn or a setting that is lost between the page and the engine."""
    first, second = "红色圆形在蓝色正方形的左边还是右边？", "图片里是什么？"
    with page_of(engine) as url:
        opened(tab, url, language="zh-CN")
        assert tab.see("document.documentElement.lang") == "zh-CN"
        set_field(tab, "temperature", "0")
        choose(tab, BOOT, SHAPES)
        ask(tab, first)
        answers = answered(tab)
        ask(tab, second)
        answers = answered(tab, 2)
        facts = tab.text(".answer .facts")
    turns = [asked(first, BOOT, SHAPES)]
    one = output_of_engine(engine, turns)
    turns += [{"role": "assistant", "content": one.text}, {"role": "user", "content": second}]
    assert answers == [one.text.strip(), of_engine(engine, turns)]
    assert f"{one.usage.completion_tokens} 个词元" in facts
    assert f"提示 {one.usage.prompt_tokens} (图片 {one.usage.image_tokens}" in facts
    assert "首个词元" in facts
    assert tab.problems == []


def test_stopping_ends_the_answer_here_and_in_the_engine(tab, folders):
    """Catches a stop button that hides the answer while the engine goes on computing it."""
    with loaded_engine(str(folders["glm4v_9b"])) as noise, page_of(noise) as url:
        opened(tab, url)
        set_field(tab, "temperature", "0")
        ask(tab, "count")  # of what this model says to it there is no end
        tab.wait("document.querySelector('.answer .text')?.innerText.length > 20")
        assert noise.stats().num_running == 1
        tab.press("Escape")
        (text,) = answered(tab)
        assert len(text) > 15
        assert "stopped" in tab.text(".facts")
        assert re.search(r"\d+ tokens\n", tab.text(".facts"))  # counted although it was cut off
        assert tab.see("document.activeElement.id") == "question"
        for _ in range(200):
            if not noise.stats().num_running:
                break
            threading.Event().wait(0.05)
        assert noise.stats().num_running == 0
        tab.click("#new")
        ask(tab, "wait")
        tab.wait("document.querySelector('.answer .text')?.innerText.length > 20")
        tab.click("#stop")
        assert answered(tab)[0] != text


def test_pictures_come_by_drag_and_by_paste_and_can_be_taken_back(tab, engine):
    """Catches a dropped picture that the browser opens in place of the page, and a lost paste."""
    with page_by(engine, answer_of("fine")) as (url, script):
        opened(tab, url)
        tab.drop([BOOT, SHAPES])
        tab.find("#tray li", 2)
        tab.click("#tray .remove")
        tab.find("#tray li", 1)
        tab.see(f"""(() => {{
            const bytes = Uint8Array.from(atob("{base64.b64encode(BOOT.read_bytes()).decode()}"),
                                          (c) => c.charCodeAt(0));
            const clipboardData = new DataTransfer();
            clipboardData.items.add(new File([bytes], "pasted.png", {{type: "image/png"}}));
            document.dispatchEvent(new ClipboardEvent("paste", {{clipboardData, bubbles: true}}));
        }})()""")
        tab.find("#tray li", 2)
        ask(tab, "which?")
        answered(tab)
    assert sent_pictures(script.bodies[0]) == [SHAPES.read_bytes(), BOOT.read_bytes()]
    assert script.bodies[0]["messages"][0]["content"][-1] == {"type": "text", "text": "which?"}
    assert tab.problems == []


def test_a_picture_beyond_the_limit_is_made_smaller(tab, engine, tmp_path):
    """Catches a photograph that the server refuses although the page could have shrunk it."""
    large, many = tmp_path / "large.png", [SHAPES, SHAPES]
    Image.new("RGB", (640, 480), (200, 30, 30)).save(large)
    script = Script(lambda number: answer_of("fine"))
    config = ServerConfig(num_decoders=0, max_image_pixels=160 * 120, limit_images=2)
    with page_over(lambda: NeverClosed(engine), script.app(), config) as url:
        opened(tab, url)
        choose(tab, large)
        assert "sent as 159 × 119" in tab.text("#notes")
        ask(tab, "what?")
        answered(tab)
        tab.choose("#files", many)
        tab.wait("document.querySelector('#notes').innerText.includes('At most 2 pictures')")
        tab.find("#tray li", 1)
    (content,) = sent_pictures(script.bodies[0])
    assert Image.open(io.BytesIO(content)).size == (159, 119)


def test_settings_are_sent_and_remembered(tab, engine):
    """Catches a setting that is shown and not sent, or one that is gone after reloading."""
    with page_by(engine, answer_of("fine")) as (url, script):
        opened(tab, url)
        given = {"temperature": 0.25, "top_p": 0.5, "max_tokens": 16, "seed": 7}
        for name, value in given.items():
            set_field(tab, name, str(value))
        set_field(tab, "system", "Be brief.")
        reopen(tab, url)
        ask(tab, "hello")
        answered(tab)
        (body,) = script.bodies
        tab.click("#settings-open")
        tab.click("#settings-reset")
        tab.press("Escape")
        tab.click("#new")
        ask(tab, "hello")
        answered(tab)
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert {name: body[name] for name in given} == given
    assert body["stream_options"]["include_usage"] is True
    assert given.keys().isdisjoint(script.bodies[1])
    assert len(script.bodies[1]["messages"]) == 1


def test_the_last_question_can_be_answered_again_and_edited(tab, engine):
    """Catches a second answer that is asked with the first one in its history."""
    with page_by(engine, answer_of("one"), answer_of("two"), answer_of("three")) as (url, script):
        opened(tab, url)
        choose(tab, BOOT)
        ask(tab, "what?")
        answered(tab)
        tab.click(".answer button[aria-label='Answer again']")
        tab.wait("document.querySelector('.answer .text').innerText == 'two'")
        tab.wait(ANSWERED)
        tab.click("button[aria-label='Edit question']")
        tab.find("#tray li", 1)
        assert tab.see("document.querySelector('#question').value") == "what?"
        ask(tab, " Really?")
        tab.wait("document.querySelector('.answer .text').innerText == 'three'")
        assert answered(tab) == ["three"]
    assert script.bodies[0] == script.bodies[1]
    (only,) = script.bodies[2]["messages"]
    assert only["content"][-1]["text"] == "what? Really?"
    assert sent_pictures(script.bodies[2]) == [BOOT.read_bytes()]


def test_conversations_are_kept_renamed_and_deleted(tab, engine):
    """Catches a conversation, or its pictures, that reloading the page loses or brings back."""
    with page_by(engine, answer_of("fine")) as (url, script):
        opened(tab, url)
        choose(tab, SHAPES)
        ask(tab, "first question")
        answered(tab)
        tab.click("#new")
        ask(tab, "second question")
        answered(tab)
        reopen(tab, url)
        tab.find(".history-open", 2)
        tab.click("#history li:nth-child(2) .history-open")
        tab.wait("document.querySelector('.question img')?.naturalWidth == 288")
        ask(tab, "and now?")
        answered(tab, 2)
        assert sent_first_picture(script.bodies[-1]) == SHAPES.read_bytes()

        tab.click("#history li:first-child button[aria-label='Rename']")
        tab.see("document.activeElement.select()")
        tab.type("shapes & boots")
        tab.press("Enter")
        tab.wait("document.querySelector('#title').innerText == 'shapes & boots'")
        tab.click("#history li:first-child button[aria-label='Delete']")
        tab.find(".history-open", 1)
        assert tab.text("#title") == "New conversation"
        tab.click("#notes button")
        tab.find(".history-open", 2)
        tab.click("#history li:first-child button[aria-label='Delete']")
        tab.find(".history-open", 1)
        reopen(tab, url)
        tab.find(".history-open", 1)
        assert tab.text("#history") == "second question"


def sent_first_picture(body: dict[str, Any]) -> bytes:
    return sent_pictures({"messages": body["messages"][:1]})[0]


def test_another_conversation_ends_the_answer_and_mixes_nothing_up(tab, engine):
    """Catches an answer that lands in the conversation that was opened meanwhile, or is lost."""
    pieces = [chunk(text="half an answer"), HANG]
    with page_by(engine, pieces, answer_of("fine")) as (url, _):
        opened(tab, url)
        ask(tab, "first question")
        tab.wait("document.querySelector('.answer .text')?.innerText == 'half an answer'")
        tab.click(".history-open")  # the one that is shown: it goes on
        assert tab.see(f"!({ANSWERED})")
        tab.click("#new")
        ask(tab, "second question")
        assert answered(tab) == ["fine"]
        tab.click("#history li:nth-child(2) .history-open")
        tab.wait("document.querySelector('.asked')?.innerText == 'first question'")
        assert answered(tab) == ["half an answer"]
        assert "stopped" in tab.text(".facts")


def test_a_conversation_deleted_while_it_is_answered_stays_deleted(tab, engine):
    """Catches a late answer that brings its conversation back into the list."""
    with page_by(engine, [chunk(text="half an answer"), HANG]) as (url, _):
        opened(tab, url)
        ask(tab, "question")
        tab.wait("document.querySelector('.answer .text')?.innerText == 'half an answer'")
        tab.click("button[aria-label='Delete']")
        tab.find(".history-open", 0)
        tab.find(".turn", 0)
        reopen(tab, url)
        tab.find(".history-open", 0)
