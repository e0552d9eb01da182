"""Bodies that come piece by piece, and clients that leave or do not keep up."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

T = TypeVar("T")

KEEP_ALIVE_S = 15.0
FLUSH_S = 2.0  # for what waits when the source has failed
_HEADERS = {
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",  # a proxy that collects would make a stream of one piece
}


class ClientLeft(Exception):
    """The client closed the connection: nobody waits for the answer."""


async def unless_left(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The work's result; cancels it, and raises ClientLeft, when the client goes away.

    The request's body must have been read.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_left(request.receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientLeft
        return await working
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Pieces of bytes as they are made, a comment where none comes for long.

    pieces:    closed when the client leaves, which ends the request behind it
    max_bytes: that may wait for a slow reader; beyond, the stream is cut
    keep_alive: sent after KEEP_ALIVE_S without a piece; b"" for none
    """

    def __init__(
        self,
        pieces: AsyncIterator[bytes],
        max_bytes: int,
        media_type: str | None = "text/event-stream; charset=utf-8",
        keep_alive: bytes = b": keep-alive\n\n",
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(media_type=media_type, headers={**_HEADERS, **(headers or {})})
        del self.headers["content-length"]
        self._pieces = pieces
        self._keep_alive = keep_alive
        self._waiting = _Waiting(max_bytes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send until the pieces end, the client leaves, or it is too far behind."""
        tasks = [
            asyncio.ensure_future(_left(receive)),
            asyncio.ensure_future(self._fill()),
            asyncio.ensure_future(self._send(send)),
        ]
        left, filling, sending = tasks
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if filling.done() and not isinstance(filling.exception(), ClientLeft):
                # All is made; what waits may still go out, if somebody reads it.
                patience_s = FLUSH_S if filling.exception() else None
                both = {left, sending}
                await asyncio.wait(both, timeout=patience_s, return_when=asyncio.FIRST_COMPLETED)
                filling.result()
            if sending.done():
                sending.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            if aclose := getattr(self._pieces, "aclose", None):
                await aclose()

    async def _fill(self) -> None:
        try:
            async for piece in self._pieces:
                self._waiting.put(piece)
        except BaseException:
            self._waiting.cut()
            raise
        self._waiting.end()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        while True:
            piece = await self._waiting.take(KEEP_ALIVE_S)
            if piece is None:
                break
            if body := piece or self._keep_alive:
                await send(body_message(body, more=True))
        if not self._waiting.is_cut:
            await send(body_message(b"", more=False))


def body_message(content: bytes, more: bool) -> Message:
    """A piece of a reply's body. more: others follow."""
    return {"type": "http.response.body", "body": content, "more_body": more}


class _Waiting:
    """Bytes between the engine and a reader, up to a limit; what waits goes out in one piece."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._bytes = bytearray()
        self._has_ended = False
        self._changed = asyncio.Event()
        self.is_cut = False

    def put(self, piece: bytes) -> None:
        """Raises ClientLeft if the reader is too far behind. An empty piece is none."""
        if not piece:
            return
        if len(self._bytes) + len(piece) > self._max_bytes:
            raise ClientLeft
        self._bytes += piece
        self._changed.set()

    def end(self) -> None:
        """No more comes."""
        self._has_ended = True
        self._changed.set()

    def cut(self) -> None:
        """No more comes, and what came is not all: the reply must not look whole."""
        self.is_cut = True
        self.end()

    async def take(self, patience_s: float) -> bytes | None:
        """All that waits; b"" if nothing came for so long, None at the end."""
        if not self._bytes and not self._has_ended:
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), patience_s)
        taken, self._bytes = bytes(self._bytes), bytearray()
        return None if not taken and self._has_ended else taken


async def begun(pieces: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    """The same generator, past its first piece, which is empty.

    A generator that was never started runs no `finally` when it is closed. One that holds a
    request open is started before anything can go wrong.
    """
    await anext(pieces)
    return pieces
