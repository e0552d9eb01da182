"""Load shedding: while every place is taken, a request is refused by its head alone.

The service says no as well, but only once a body has been read and understood, which takes longer
than the next requests take to arrive. Pure ASGI; stands behind the keys, so that whoever has none
learns nothing of the load. Knows no form but that of errors.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from contextlib import suppress

from starlette.datastructures import MutableHeaders
from starlette.routing import compile_path
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from glimt.errors import CapacityError
from glimt.server.failures import Failure, failure_of
from glimt.server.middleware import send_failure
from glimt.server.service import Service

LINGER_S = 5.0
"""How long a refused client may go on sending before its connection is closed."""


class _Stalled(Exception):
    """A body of which no more came."""


class Shedding:
    """Refuses what there is no place for, before its body is read.

    answers: paths whose POST makes answers, as routes are written: "/v2/models/{model}/infer"
    """

    def __init__(self, app: ASGIApp, service: Service, answers: Iterable[str]) -> None:
        self._app, self._service = app, service
        self._patterns = [compile_path(path)[0] for path in answers]
        self._reading: set[object] = set()  # one for each request whose body is not here yet

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on if it may find a place."""
        if not self._makes_answer(scope):
            await self._app(scope, receive, send)
            return
        try:
            self._service.check_room(len(self._reading))
            await self._read(scope, receive, send)
        except CapacityError as error:
            await self._turn_away(failure_of(error), scope, receive, send)
        except _Stalled:
            said = f"no more of the body came for {self._service.config.idle_timeout_s:g} s"
            failure = Failure("malformed", f"{said}; send it without a pause")
            await self._turn_away(failure, scope, receive, send)

    def _makes_answer(self, scope: Scope) -> bool:
        if scope["type"] != "http" or scope["method"] != "POST":
            return False
        return any(pattern.match(scope["path"]) for pattern in self._patterns)

    async def _read(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on; it counts as one that is read until its body is whole."""
        mark = object()
        self._reading.add(mark)

        async def watched() -> Message:
            if mark not in self._reading:
                return await receive()
            message = await self._within_limit(receive)
            if not message.get("more_body"):
                self._reading.discard(mark)
            return message

        try:
            await self._app(scope, watched, send)
        finally:
            self._reading.discard(mark)

    async def _within_limit(self, receive: Receive) -> Message:
        """A body's next piece. Raises _Stalled: it would keep its place without ever asking."""
        try:
            async with asyncio.timeout(self._service.config.idle_timeout_s):
                return await receive()
        except TimeoutError:
            raise _Stalled from None

    async def _turn_away(
        self, failure: Failure, scope: Scope, receive: Receive, send: Send
    ) -> None:
        """Answer at once and close the connection, when the client has stopped sending.

        One that is closed with bytes unread is reset, and the client may never see its answer.
        """

        async def unended(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["Connection"] = "close"
            await send({**message, "more_body": True})

        config = self._service.config
        await send_failure(failure, scope["path"], config.profile, unended)
        with suppress(TimeoutError):
            async with asyncio.timeout(LINGER_S):
                await _drop(receive, config.max_body_bytes)
        await send({"type": "http.response.body", "body": b""})


async def _drop(receive: Receive, most_bytes: int) -> None:
    """Read a body and keep nothing of it, until it ends, the client leaves, or it is too long."""
    num_bytes = 0
    while num_bytes <= most_bytes:
        message = await receive()
        num_bytes += len(message.get("body", b""))
        if not message.get("more_body"):
            return
