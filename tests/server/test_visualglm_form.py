"""VisualGLM's own HTTP form."""

from __future__ import annotations

import re

import pytest

import glimt
from forms import BASE64, DATA_URL, call
from glimt.errors import GlimtError
from glimt.server.config import ServerConfig
from glimt.server.visualglm import parse
from serving import serving


@pytest.fixture(scope="module")
def served():
    with serving("demo-visualglm", ServerConfig(num_decoders=0, visualglm_api=True)) as served:
        yield served


def test_defaults_are_the_originals():
    """Catches the engine's own defaults, or a limit that counts the answer alone."""
    ask, _ = parse({"text": "hi"}, "r")
    s = ask.sampling
    assert (s.temperature, s.top_p, s.top_k, s.repetition_penalty) == (0.8, 0.4, 100, 1.2)
    assert ask.total_tokens == (50, 2048)


@pytest.mark.parametrize("image", [BASE64, DATA_URL])
def test_the_reply_is_the_engines_and_the_history_grows(served, image):
    """Catches a picture that is lost, a history that is not read, and a time in another form."""
    history = [["图里有什么?", "一个红色的方块。"]]
    body = {
        "text": "什么颜色?",
        "image": image,
        "history": history,
        "temperature": 0,
        "repetition_penalty": 1.0,
        "max_length": 200,
        "min_length": 0,
    }
    llm = glimt.LLM("demo-visualglm")
    first = [{"type": "image", "image": DATA_URL}, {"type": "text", "text": history[0][0]}]
    messages = [
        {"role": "user", "content": first},
        {"role": "assistant", "content": history[0][1]},
        {"role": "user", "content": "什么颜色?"},
    ]
    greedy = glimt.SamplingParams(
        temperature=0, min_tokens=0, repetition_penalty=1.0, max_tokens=150
    )
    expected = llm.chat(messages, greedy).text
    told = call(served.url, "/", body).json
    assert told["result"] == expected
    assert told["history"] == [*history, ["什么颜色?", expected]]
    assert told["status"] == 200
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", told["time"])


def test_lengths_count_the_prompt(served):
    """Catches a max_length that is taken for a number of new tokens."""
    prompt = len(
        served.engine.engine.prepare_chat(
            [{"role": "user", "content": "hi"}]
        ).prompt.original_token_ids
    )
    body = {"text": "hi", "temperature": 0, "max_length": prompt + 2, "min_length": 0}
    text = call(served.url, "/", body).json["result"]
    ids = served.engine.engine.opened.processor.tokenizer.encode(text)
    assert len(ids) <= 3
    body["max_length"] = 1  # below the prompt: one token, as long as an answer must be
    assert call(served.url, "/", body).status == 200


@pytest.mark.parametrize(
    "body",
    [
        {"text": ""},
        {"text": 5},
        {"text": "a", "history": [["a"]]},
        {"text": "a", "history": "x"},
        {"text": "a", "image": "/etc/passwd"},
        {"text": "a", "temperature": -1},
        {"text": "a", "top_p": 0},
    ],
)
def test_what_is_none_of_it_is_refused(body):
    """Catches a crash on what a hand-written client sends."""
    with pytest.raises(GlimtError):
        parse(body, "r")


def test_it_is_off_unless_asked_for(upstream):
    """Catches a form that answers on every server."""
    assert call(upstream.url, "/", {"text": "hi"}).status == 422
