"""Streams: pieces in order, comments in silence, and an end for readers that leave or lag."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from starlette.requests import Request

from glimt.server import streaming
from glimt.server.streaming import ClientLeft, EventStream, unless_left


async def pieces(*given: bytes, closed: list[str] | None = None) -> AsyncGenerator[bytes, None]:
    try:
        for piece in given:
            await asyncio.sleep(0)
            yield piece
    finally:
        if closed is not None:
            closed.append("closed")


async def run(stream: EventStream, send: Any = None, leaves: asyncio.Event | None = None) -> Any:
    """What a client gets; it stays until `leaves` is set."""
    sent: list[Any] = []

    async def receive() -> Any:
        await (leaves or asyncio.Event()).wait()
        return {"type": "http.disconnect"}

    async def keep(message: Any) -> None:
        sent.append(message)

    await asyncio.wait_for(stream({"type": "http"}, receive, send or keep), 20)
    return sent


def test_all_pieces_arrive_and_the_reply_ends():
    """Catches a last piece that is lost, and a stream that never ends."""
    sent = asyncio.run(run(EventStream(pieces(b"a", b"b", b"c"), 100)))
    assert b"".join(m.get("body", b"") for m in sent) == b"abc"
    assert [m.get("more_body") for m in sent][-1] is False
    headers = dict(sent[0]["headers"])
    assert headers[b"content-type"] == b"text/event-stream; charset=utf-8"
    assert headers[b"x-accel-buffering"] == b"no"
    assert b"content-length" not in headers


def test_a_client_that_leaves_closes_the_source():
    """Catches an answer that goes on for nobody."""
    closed: list[str] = []

    async def scene() -> None:
        leaves = asyncio.Event()

        async def endless() -> AsyncGenerator[bytes, None]:
            try:
                while True:
                    yield b"x"
                    await asyncio.sleep(0.001)
            finally:
                closed.append("closed")

        asyncio.get_running_loop().call_later(0.05, leaves.set)
        await run(EventStream(endless(), 10**6), leaves=leaves)

    asyncio.run(scene())
    assert closed == ["closed"]


def test_a_reader_that_lags_is_cut_and_its_source_closed():
    """Catches memory that grows as long as somebody does not read."""
    closed: list[str] = []
    sent: list[Any] = []

    async def slow(message: Any) -> None:
        sent.append(message)
        if message["type"] == "http.response.body" and len(sent) == 2:
            await asyncio.sleep(0.2)

    async def scene() -> None:
        many = (b"x" * 10 for _ in range(1000))
        await run(EventStream(pieces(*many, closed=closed), 100), send=slow)

    asyncio.run(scene())
    assert closed == ["closed"]
    assert sum(len(m.get("body", b"")) for m in sent) < 1000
    assert all(m.get("more_body", True) for m in sent), "a cut stream must not look whole"


def test_a_reader_that_never_reads_is_cut_too():
    """Catches a request that is held by a send which nobody will ever complete."""
    closed: list[str] = []

    async def never(message: Any) -> None:
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()

    async def scene() -> None:
        many = (b"x" * 10 for _ in range(1000))
        await run(EventStream(pieces(*many, closed=closed), 100), send=never)

    asyncio.run(scene())
    assert closed == ["closed"]


def test_a_source_that_fails_leaves_a_reply_without_an_end():
    """Catches an error in the middle that looks like a finished answer."""

    async def failing() -> AsyncGenerator[bytes, None]:
        yield b"a"
        raise ValueError("engine")

    sent: list[Any] = []

    async def keep(message: Any) -> None:
        sent.append(message)

    with pytest.raises(ValueError, match="engine"):
        asyncio.run(run(EventStream(failing(), 100), send=keep))
    assert all(m.get("more_body", True) for m in sent)


def test_an_empty_piece_is_no_silence():
    """Catches a comment for every token whose text is held back."""
    source = pieces(b"a", *[b""] * 5, b"b")
    assert b"".join(m.get("body", b"") for m in asyncio.run(run(EventStream(source, 100)))) == b"ab"


def test_silence_is_filled_with_comments(monkeypatch):
    """Catches a proxy that gives up on a request which waits for a large picture."""
    monkeypatch.setattr(streaming, "KEEP_ALIVE_S", 0.02)

    async def late() -> AsyncGenerator[bytes, None]:
        await asyncio.sleep(0.1)
        yield b"data: x\n\n"

    body = b"".join(m.get("body", b"") for m in asyncio.run(run(EventStream(late(), 100))))
    assert body.endswith(b"data: x\n\n")
    assert set(body.removesuffix(b"data: x\n\n").split(b"\n\n")) == {b": keep-alive", b""}


def request(*messages: dict[str, Any], later: asyncio.Event | None = None) -> Request:
    left = list(messages)

    async def receive() -> dict[str, Any]:
        if left:
            return left.pop(0)
        await (later or asyncio.Event()).wait()
        return {"type": "http.disconnect"}

    return Request({"type": "http", "headers": []}, receive)


def test_work_is_cancelled_when_its_client_leaves():
    """Catches a whole answer that is computed for nobody."""
    seen: list[str] = []

    async def work() -> int:
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            seen.append("cancelled")
            raise
        return 1

    async def scene() -> None:
        leaves = asyncio.Event()
        asyncio.get_running_loop().call_later(0.02, leaves.set)
        with pytest.raises(ClientLeft):
            await unless_left(request(later=leaves), work())

    asyncio.run(scene())
    assert seen == ["cancelled"]


def test_work_that_ends_or_fails_is_passed_on():
    """Catches an error of the work that becomes a client's leaving."""

    async def two() -> int:
        return 2

    async def bad() -> int:
        raise KeyError("x")

    assert asyncio.run(unless_left(request(), two())) == 2
    with pytest.raises(KeyError):
        asyncio.run(unless_left(request(), bad()))
