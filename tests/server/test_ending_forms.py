"""How an answer ends that somebody or something ends early, in every form, whole and streamed."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest

from forms import Reply, call
from glimt.server.config import ServerConfig
from glimt.server.preparation import Preparation
from serving import Served, serving

TRITON = "/v2/models/demo"
LIMIT = 3000
OPENAI = {"max_tokens": LIMIT, "ignore_eos": True}
HF = {"parameters": {"max_new_tokens": LIMIT, "ignore_eos": True, "details": True}}
CHAT = {"messages": [{"role": "user", "content": "hi"}], **OPENAI}


@dataclass(frozen=True)
class Form:
    """path, body: of a request that runs for long; family: of the table below"""

    family: str
    path: str
    body: dict[str, Any]
    is_stream: bool = False


FORMS = {
    "chat": Form("openai", "/v1/chat/completions", CHAT),
    "chat stream": Form("openai", "/v1/chat/completions", {**CHAT, "stream": True}, True),
    "completion": Form("openai", "/v1/completions", {"prompt": "hi", **OPENAI}),
    "completion stream": Form(
        "openai", "/v1/completions", {"prompt": "hi", **OPENAI, "stream": True}, True
    ),
    "tgi": Form("tgi", "/generate", {"inputs": "hi", **HF}),
    "tgi stream": Form("tgi", "/generate_stream", {"inputs": "hi", **HF}, True),
    "triton": Form(
        "triton",
        f"{TRITON}/generate",
        {"text_input": "hi", **OPENAI, "return_finish_reason": True},
    ),
    "triton stream": Form(
        "triton",
        f"{TRITON}/generate_stream",
        {"text_input": "hi", **OPENAI, "return_finish_reason": True},
        True,
    ),
    "vllm": Form("vllm", "/generate", {"prompt": "hi", **OPENAI}),
    "vllm stream": Form("vllm", "/generate", {"prompt": "hi", **OPENAI, "stream": True}, True),
    "mindie": Form("mindie", "/infer", {"inputs": "hi", **HF}),
    "mindie stream": Form("mindie", "/infer", {"inputs": "hi", **HF, "stream": True}, True),
}
WORD = re.compile(rb'"finish_reason":\s*"(\w+)"')
STATUSES = {
    "engine": {"openai": 500, "tgi": 500, "triton": 500, "vllm": 500, "mindie": 500},
    "deadline": {"openai": 504, "tgi": 424, "triton": 504, "vllm": 504, "mindie": 424},
    "drain": {"openai": 503, "tgi": 503, "triton": 503, "vllm": 503, "mindie": 503},
}


def ask_all(url: str) -> tuple[ThreadPoolExecutor, dict[str, Future[Reply]]]:
    """Every form at once, with its name as its id."""
    pool = ThreadPoolExecutor(len(FORMS))
    asked = {
        name: pool.submit(call, url, form.path, form.body, {"X-Request-Id": name.replace(" ", "-")})
        for name, form in FORMS.items()
    }
    return pool, asked


def until(is_true: Callable[[], bool]) -> None:
    for _ in range(3000):
        if is_true():
            return
        time.sleep(0.01)
    raise AssertionError("waited for nothing")


def in_its_loop(served: Served, work: Callable[[], None]) -> None:
    """Run something where the server runs."""
    watcher = served.context.service.host._watcher
    assert watcher is not None
    watcher.get_loop().call_soon_threadsafe(work)


def break_engine(served: Served) -> None:
    def step() -> Any:
        raise RuntimeError("the driver is gone")

    served.engine.engine.step = step  # type: ignore[method-assign]


def slow_down(served: Served, monkeypatch: pytest.MonkeyPatch, step_s: float) -> None:
    """Steps that take so long that no answer comes to its end by itself: some have 21 tokens."""
    step = type(served.engine.engine).step

    def slow() -> Any:
        time.sleep(step_s)
        return step(served.engine.engine)

    monkeypatch.setattr(served.engine.engine, "step", slow)


def end_server(served: Served) -> None:
    def end() -> None:
        served.context.service.host.drain()
        served.context.service.give_up()

    in_its_loop(served, end)


def last_piece(reply: Reply) -> bytes:
    """The last event or object, but for OpenAI's mark of the end."""
    content = reply.content.removesuffix(b"data: [DONE]\n\n").strip()
    return re.split(rb"\n\n?|\0", content)[-1]


@pytest.mark.parametrize("cause", STATUSES)
def test_what_the_server_ends_is_an_error_and_never_a_finish_reason(cause, monkeypatch):
    """Catches a cut answer that reads as a whole one, and a status of another family."""
    limit_s = 4.0 if cause == "deadline" else 600.0
    config = ServerConfig(num_decoders=0, request_timeout_s=limit_s)
    with serving("demo", config) as served:
        slow_down(served, monkeypatch, 0.02)
        pool, asked = ask_all(served.url)
        with pool:
            until(lambda: served.engine.stats().num_running == len(FORMS))
            slow_down(served, monkeypatch, 0.4)
            tokens = served.engine.stats().decode_tokens
            until(lambda: served.engine.stats().decode_tokens >= tokens + 2 * len(FORMS))
            {"engine": break_engine, "drain": end_server, "deadline": lambda _: None}[cause](served)
            found = {name: each.result() for name, each in asked.items()}
        for name, reply in found.items():
            form = FORMS[name]
            assert not WORD.search(reply.content), name
            assert b'"error"' in last_piece(reply), name
            expected = 200 if form.is_stream else STATUSES[cause][form.family]
            assert reply.status == expected, (name, reply.content[-300:])
            if cause == "drain" and not form.is_stream:
                assert reply.headers["retry-after"] == "1"
        until(lambda: served.context.service.num_open == 0)


# How an answer says that somebody stopped it by its id; None: its form has no such field.
STOPPED = {
    "upstream": {"openai": b"stop", "triton": b"stop_sequence", "mindie": b"stop_sequence"},
    "mindie": {
        "openai": b"stop", "tgi": b"stop_sequence", "triton": b"stop_sequence",
        "mindie": b"stop_sequence",
    },
}  # fmt: skip


async def for_ever(*given: Any) -> Any:
    await asyncio.Event().wait()


@pytest.mark.parametrize("profile", STOPPED)
@pytest.mark.parametrize("stage", ["prepared", "answered"])
def test_what_is_stopped_by_its_id_ends_with_what_it_has(profile, stage, monkeypatch, request):
    """Catches a form that makes an error of a stop, two outcomes of one, or a word of its own."""
    served = request.getfixturevalue(profile)
    slow_down(served, monkeypatch, 0.1)
    if stage == "prepared":
        monkeypatch.setattr(Preparation, "prepare", for_ever)
    pool, asked = ask_all(served.url)
    with pool:
        service, engine = served.context.service, served.engine
        until(lambda: service.num_open == len(FORMS))
        if stage == "answered":
            until(lambda: engine.stats().num_running == len(FORMS))
        for name in FORMS:
            reply = call(served.url, f"{TRITON}/stopInfer", {"id": name.replace(" ", "-")})
            assert reply.status == 200, name
        found = {name: each.result() for name, each in asked.items()}
    for name, reply in found.items():
        check_stopped(name, reply, STOPPED[profile].get(FORMS[name].family), profile)
    until(lambda: service.num_open == 0)
    assert call(served.url, f"{TRITON}/stopInfer", {"id": "chat"}).status == 404


def check_stopped(name: str, reply: Reply, word: bytes | None, profile: str) -> None:
    form = FORMS[name]
    if form.family == "tgi" and profile == "upstream":  # it has no word for such an end
        assert b'"incomplete_generation"' in reply.content, name
        assert reply.status == (200 if form.is_stream else 500)
        return
    assert reply.status == 200, (name, reply.content[-300:])
    assert b'"error"' not in reply.content, name
    assert WORD.findall(reply.content) == ([] if word is None else [word]), name
    if form.family == "openai" and form.is_stream:
        assert reply.content.endswith(b"data: [DONE]\n\n")


def test_a_drain_ends_no_answer(monkeypatch):
    """Catches a finished answer that becomes a 503 because the server drains meanwhile."""
    with serving("demo", ServerConfig(num_decoders=0)) as served:
        bodies = {
            name: json.loads(json.dumps(form.body).replace(str(LIMIT), "40"))
            for name, form in FORMS.items()
        }
        with ThreadPoolExecutor(len(FORMS)) as pool:
            slow_down(served, monkeypatch, 0.02)
            asked = {
                name: pool.submit(call, served.url, FORMS[name].path, body)
                for name, body in bodies.items()
            }
            until(lambda: served.engine.stats().num_running == len(FORMS))
            in_its_loop(served, served.context.service.host.drain)
            found = {name: each.result() for name, each in asked.items()}
        assert {name: each.status for name, each in found.items()} == dict.fromkeys(FORMS, 200)
        assert not any(b'"error"' in each.content for each in found.values())
        assert call(served.url, "/v1/chat/completions", CHAT).status == 503
