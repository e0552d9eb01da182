"""Stopping a request by its id at every stage of its life: one outcome, and nothing left behind."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest

import glimt
from glimt.inputs.chat import parse_messages
from glimt.server import decoding
from glimt.server.host import EngineHost, EngineUnavailable
from glimt.server.preparation import unprepared
from glimt.server.service import Ask, Service
from glimt.types import RequestOutput
from services import NUM_BLOCKS, ask, run, settled

LONG = {"max_tokens": 300}


async def until(is_true: Callable[[], bool]) -> None:
    for _ in range(2000):
        if is_true():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("the stage was not reached")


async def whole(opened: Service, asked: Ask) -> RequestOutput:
    async with opened.answer(asked) as answer:
        return await answer.whole()


class Gate:
    """Holds up whoever calls `wait`, in a thread, until the test is done with it."""

    def __init__(self) -> None:
        self.is_reached = threading.Event()
        self._opened = threading.Event()

    def wait(self) -> None:
        self.is_reached.set()
        assert self._opened.wait(30)

    def open(self) -> None:
        self._opened.set()


@contextmanager
def held(target: Any, name: str) -> Iterator[Gate]:
    """A function that waits at a gate before it does its work."""
    gate, original = Gate(), getattr(target, name)

    def waiting(*given: Any) -> Any:
        gate.wait()
        return original(*given)

    setattr(target, name, waiting)
    try:
        yield gate
    finally:
        setattr(target, name, original)
        gate.open()


# --- stages: each starts a request "r" and gives it once it is there ------------------------------


@asynccontextmanager
async def waiting_to_be_prepared(opened: Service) -> AsyncGenerator[Any, None]:
    async with AsyncExitStack() as stack:
        for _ in range(4):
            await stack.enter_async_context(opened._preparing)
        task = asyncio.create_task(whole(opened, ask(sampling=LONG)))
        await until(opened._preparing.locked)
        await asyncio.sleep(0)
        yield task


@asynccontextmanager
async def fetching(opened: Service) -> AsyncGenerator[Any, None]:
    is_asked, is_over = asyncio.Event(), asyncio.Event()

    async def silent(reader: Any, writer: Any) -> None:
        is_asked.set()
        await is_over.wait()
        writer.close()

    host = await asyncio.start_server(silent, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{host.sockets[0].getsockname()[1]}/a.png"
    given = [{"role": "user", "content": [{"type": "image_url", "image_url": url}]}]
    asked = ask(messages=parse_messages(given, glimt.ImageLimits()))
    task = asyncio.create_task(whole(opened, asked))
    await asyncio.wait_for(is_asked.wait(), 10)
    yield task
    is_over.set()
    host.close()
    await host.wait_closed()


@asynccontextmanager
async def decoding_a_picture(opened: Service) -> AsyncGenerator[Any, None]:
    with held(decoding, "_decode") as gate:
        task = asyncio.create_task(whole(opened, ask(1, sampling=LONG)))
        await until(gate.is_reached.is_set)
        yield task


@asynccontextmanager
async def encoding(opened: Service) -> AsyncGenerator[Any, None]:
    with held(opened.host.engine.engine, "prepare_chat") as gate:
        task = asyncio.create_task(whole(opened, ask(1, sampling=LONG)))
        await until(gate.is_reached.is_set)
        yield task


@asynccontextmanager
async def prepared(opened: Service) -> AsyncGenerator[Any, None]:
    is_prepared, goes_on = asyncio.Event(), asyncio.Event()

    async def late() -> RequestOutput:
        async with opened.answer(ask(sampling=LONG)) as answer:
            is_prepared.set()
            await goes_on.wait()
            return await answer.whole()

    task = asyncio.create_task(late())
    await asyncio.wait_for(is_prepared.wait(), 10)
    asyncio.get_running_loop().call_later(0.02, goes_on.set)
    yield task


@asynccontextmanager
async def waiting_in_the_engine(opened: Service) -> AsyncGenerator[Any, None]:
    engine = opened.host.engine
    others = [
        asyncio.create_task(whole(opened, ask(request_id=name, sampling={"max_tokens": 120})))
        for name in ("a", "b")  # as many as run together
    ]
    await until(lambda: engine.stats().num_running == 2)
    task = asyncio.create_task(whole(opened, ask(sampling=LONG)))
    await until(lambda: engine.stats().num_waiting == 1)
    yield task
    await asyncio.gather(*others, return_exceptions=True)


@asynccontextmanager
async def in_its_first_step(opened: Service) -> AsyncGenerator[Any, None]:
    engine = opened.host.engine.engine
    with held(engine.runner, "run") as gate:
        task = asyncio.create_task(whole(opened, ask(sampling=LONG)))
        await until(gate.is_reached.is_set)
        yield task


@asynccontextmanager
async def being_answered(opened: Service) -> AsyncGenerator[Any, None]:
    engine = opened.host.engine
    before = engine.stats().decode_tokens
    task = asyncio.create_task(whole(opened, ask(1, sampling=LONG)))
    await until(lambda: engine.stats().decode_tokens > before + 2)
    yield task


BEFORE_THE_ENGINE = (waiting_to_be_prepared, fetching, decoding_a_picture, encoding, prepared)
STAGES = (*BEFORE_THE_ENGINE, waiting_in_the_engine, in_its_first_step, being_answered)
SETTINGS = {"allowed_media_domains": ("*",), "allowed_media_networks": ("127.0.0.0/8",)}


@pytest.fixture
def model(folders: dict[str, Path]) -> Path:
    return folders["glm4v_9b"]


@pytest.mark.parametrize("stage", STAGES)
def test_a_request_is_stopped_at_every_stage(folder, stage):
    """Catches a stop that finds only what runs, and one whose caller waits on or is told twice."""

    async def scene(opened: Service) -> None:
        expected = (await whole(opened, ask(request_id="alone"))).token_ids
        async with stage(opened) as task:
            assert not task.done()
            assert opened.stop("r")
            if stage is not in_its_first_step:  # that of the engine is not interrupted
                await asyncio.wait([task], timeout=10)
                assert task.done()
        found = await asyncio.wait_for(task, 10)
        assert [each.finish_reason for each in found.completions] == ["abort"]
        assert len(found.token_ids) < LONG["max_tokens"]
        if stage in (*BEFORE_THE_ENGINE, waiting_in_the_engine):
            assert (found.token_ids, found.text) == ((), "")
        assert not opened.stop("r"), "it has ended"
        assert opened.num_open == 0
        await settled(opened)
        assert (await whole(opened, ask(request_id="after"))).token_ids == expected

    run(folder, scene, **SETTINGS)


@pytest.mark.parametrize("stage", STAGES)
def test_a_server_that_ends_tells_every_caller(model, stage):
    """Catches a server whose end reads as an answer's own, or that waits for a slow picture."""

    async def scene(opened: Service) -> None:
        async with stage(opened) as task:
            opened.host.drain()
            opened.give_up()
        with pytest.raises(EngineUnavailable, match="shutting down"):
            await asyncio.wait_for(task, 10)
        await asyncio.wait_for(opened.wait_idle(), 10)
        assert opened.host.last_engine.stats().num_free_blocks == NUM_BLOCKS

    run(model, scene, **SETTINGS)


def test_a_request_stopped_early_ends_each_of_its_choices(model):
    """Catches a second choice that nobody ends, for which the caller waits."""

    async def scene(opened: Service) -> None:
        many = ask(sampling={"n": 3, "temperature": 1.0, "seed": 2**64 - 1})
        async with opened.answer(many) as answer:
            assert opened.stop("r")
            found = await answer.whole()
        assert [each.finish_reason for each in found.completions] == ["abort"] * 3
        assert found.usage.prompt_tokens == len(answer.request.prompt.token_ids) > 0
        assert found.usage.completion_tokens == 0
        known = unprepared(opened.host.engine, many, "r")
        assert known.seeds == (2**64 - 1, 0, 1)
        assert known.sampling.top_p is not None

    run(model, scene)


def test_stopping_twice_is_stopping_once(model):
    """Catches a second wish that breaks the first, or makes an error of a stopped answer."""

    async def scene(opened: Service) -> None:
        async with encoding(opened) as task:
            assert opened.stop("r")
            assert opened.stop("r")
            opened.give_up()  # too late to change what the caller is told
            found = await asyncio.wait_for(task, 10)
        assert found.completions[0].finish_reason == "abort"

    run(model, scene)


def test_a_stop_ends_nobody_else(model):
    """Catches a stop of an id that is a prefix of another's, or is given out anew."""

    async def scene(opened: Service) -> None:
        async with opened.answer(ask()) as first, opened.answer(ask()) as second:
            assert second.request.request_id != "r"
            assert not opened.stop("r-")
            assert opened.stop("r")
            stopped, goes_on = await asyncio.gather(first.whole(), second.whole())
        assert stopped.completions[0].finish_reason == "abort"
        assert goes_on.completions[0].finish_reason == "length"

    run(model, scene)


def test_a_draining_server_still_stops_by_id(model):
    """Catches a stop that needs a server which takes new requests."""

    async def scene(opened: Service) -> None:
        async with being_answered(opened) as task:
            opened.host.drain()
            assert opened.stop("r")
            found = await asyncio.wait_for(task, 10)
        assert found.completions[0].finish_reason == "abort"

    run(model, scene)


def test_the_error_of_a_host_says_what_it_does():
    """Catches a caller of an ending server that is told to wait for its model."""
    host = EngineHost(lambda: None, 3, 60)  # type: ignore[arg-type, return-value]
    assert "still loading" in str(host.unavailable())
    host.drain()
    assert "shutting down" in str(host.unavailable())
