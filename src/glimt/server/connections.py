"""How many connections one port holds open. Beyond, each gets a ready-made 429 and is closed.

`Entrance` stands before uvicorn's own protocol: a connection that is let in becomes uvicorn's with
its first bytes, and one that never sends any is closed. One beyond the limit that asks whether the
server lives gets that one answer, from the route itself: an orchestrator would otherwise end a
server that is merely full. Knows no request but its first line.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from glimt.server.failures import Failure
from glimt.server.middleware import OPEN_PATHS
from glimt.server.refusals import LINGER_S, as_last, asked, ready_made
from glimt.server.timed_protocol import TimedProtocol


@dataclass(slots=True, eq=False)
class Bound:
    """What one port allows.

    max_connections: that are served; as many more may be told at one time that they are not
    silent_s:   how long one may send nothing at first, and then how long a head may take
    profile:    of the error form
    on_refused: called for each connection that gets no place and asks for more than health
    """

    max_connections: int
    silent_s: float
    profile: str
    on_refused: Callable[[], None]
    refused: set[Entrance] = field(default_factory=set)

    def reply(self, head: bytes) -> bytes:
        """A refusal in the form of the path that a request begins with."""
        said = f"{self.max_connections} connections are open, which is all that there may be"
        failure = Failure("overloaded", f"{said}; try again in a second")
        return ready_made(failure, head, self.profile)

    def late(self, head: bytes) -> bytes:
        """What a request is told whose head did not come in time."""
        said = f"the request's head did not come within {self.silent_s:g} s"
        return ready_made(Failure("slow", f"{said}; send it at once"), head, self.profile)


class Entrance(asyncio.Protocol):
    """A connection that has not sent anything yet, and one that is turned away.

    Made in place of uvicorn's protocol, with its arguments, behind the port's `Bound`.
    """

    def __init__(self, bound: Bound, **uvicorn: Any) -> None:
        self._bound, self._uvicorn = bound, uvicorn
        # uvicorn's own set: what is in it counts, and is closed with the server.
        self._connections: set[Any] = uvicorn["server_state"].connections

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Let it in or not; it hears of it when it asks, as HTTP has it."""
        assert isinstance(transport, asyncio.Transport)
        self._transport, bound = transport, self._bound
        self._is_answered = False
        self._probe: H11Protocol | None = None
        if len(self._connections) - len(bound.refused) >= bound.max_connections:
            bound.refused.add(self)
        self._connections.add(self)
        limit_s = LINGER_S if self in bound.refused else bound.silent_s
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(limit_s, transport.abort)
        if len(bound.refused) > bound.max_connections:
            transport.abort()

    def data_received(self, data: bytes) -> None:
        """The first bytes: uvicorn gets them, or the client is told; later ones are dropped."""
        if self._probe is not None:
            self._probe.data_received(data)
        elif self not in self._bound.refused:
            self._hand_over(data)
        elif not self._is_answered:
            self._answer(data)

    def _answer(self, data: bytes) -> None:
        """Of a connection that has no place: is the server alive? Anything else is refused."""
        self._is_answered = True
        method, path = asked(data)
        if method == "GET" and path in OPEN_PATHS:
            self._probe = self._once()
            self._probe.connection_made(self._transport)
            self._probe.data_received(data)
        else:
            self._bound.on_refused()
            self._transport.write(self._bound.reply(data))
            # The client may still be sending: closed now, it would see a reset and no reply.
            if self._transport.can_write_eof():
                self._transport.write_eof()

    def _hand_over(self, data: bytes) -> None:
        self._forget()
        # Not what happens to be installed: another would not keep the limit on headers.
        protocol = TimedProtocol(self._bound.silent_s, self._bound.late, **self._uvicorn)
        self._transport.set_protocol(protocol)
        protocol.connection_made(self._transport)
        protocol.data_received(data)

    def _once(self) -> H11Protocol:
        """Uvicorn's protocol for one request, still within the time and number of refusals.

        It counts among connections of its own, since it has no place among the port's.
        """
        apart = ServerState()
        apart.default_headers = self._uvicorn["server_state"].default_headers
        protocol = H11Protocol(**{**self._uvicorn, "server_state": apart})
        protocol.app = _closing(protocol.app)
        return protocol

    def connection_lost(self, exc: Exception | None) -> None:
        """Its place is free again."""
        if self._probe is not None:
            self._probe.connection_lost(exc)
        elif self in self._bound.refused and not self._is_answered:
            self._bound.on_refused()
        self._forget()

    def pause_writing(self) -> None:
        """The client reads slowly."""
        if self._probe is not None:
            self._probe.pause_writing()

    def resume_writing(self) -> None:
        """It has caught up."""
        if self._probe is not None:
            self._probe.resume_writing()

    def _forget(self) -> None:
        self._timer.cancel()
        self._connections.discard(self)
        self._bound.refused.discard(self)

    def shutdown(self) -> None:
        """Called by uvicorn when the server ends: nothing has been asked here."""
        self._transport.close()


def _closing(app: ASGIApp) -> ASGIApp:
    """The same application, whose replies end their connection."""

    async def closing(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_closing(message: Message) -> None:
            await send(as_last(message))

        await app(scope, receive, send_closing)

    return closing
