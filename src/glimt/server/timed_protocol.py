"""Uvicorn's protocol with limits of time on what a client sends before and after it is answered.

    first byte ... head complete        in time, or 408
    head ... body complete              `middleware.BodyLimit` has the time, since it has the path
    reply complete ... body complete    in time, or the connection is closed

Without them a byte now and then holds a connection for ever: uvicorn's own limit is of silence
between two requests. Knows no route.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from glimt.server.refusals import LINGER_S, asked

log = logging.getLogger("glimt.server")


class TimedProtocol(H11Protocol):
    """One connection.

    limit_s: for a head, and for the rest of a body whose reply is out
    late:    a whole reply to a head that did not come in time, made of what did
    """

    def __init__(self, limit_s: float, late: Callable[[bytes], bytes], **uvicorn: Any) -> None:
        super().__init__(**uvicorn)
        self._limit_s, self._late = limit_s, late
        self._awaited = ""  # what has a limit of time now: "head", "rest" or nothing
        self._timer: asyncio.TimerHandle | None = None
        self._is_over = False

    def data_received(self, data: bytes) -> None:
        """More of a request; of one that came too late, nothing is taken any more."""
        if not self._is_over:
            super().data_received(data)

    def handle_events(self) -> None:
        """Take what is whole, and look at what is not."""
        super().handle_events()
        self._watch()

    def on_response_complete(self) -> None:
        """The same when a reply is out: of its request something may still be to come."""
        super().on_response_complete()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is waited for."""
        self._stop()
        super().connection_lost(exc)

    def _watch(self) -> None:
        """Start a limit when something begins to be awaited; a part of it changes nothing."""
        awaited = self._what_is_awaited()
        if awaited == self._awaited:
            return
        self._stop()
        self._awaited = awaited
        if awaited:
            self._timer = self.loop.call_later(self._limit_s, self._end)

    def _what_is_awaited(self) -> str:
        if self._is_over or self.transport.is_closing():
            return ""
        theirs = self.conn.their_state
        if theirs is h11.IDLE:
            # Looked at once for each head: h11 copies what it gives away.
            is_begun = self._awaited == "head" or bool(self.conn.trailing_data[0])
            return "head" if is_begun else ""
        return "rest" if theirs is h11.SEND_BODY and self.conn.our_state is h11.DONE else ""

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _end(self) -> None:
        """Too late."""
        self._is_over = True
        head = self.conn.trailing_data[0] if self._awaited == "head" else b""
        method, path = asked(head)
        if not method:
            self.transport.close()
            return
        log.info("%s %s: its head did not come in time", method[:20], path[:200])
        self.transport.write(self._late(head))
        # The client may still be sending: closed now, it would see a reset and no reply.
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._timer = self.loop.call_later(LINGER_S, self.transport.abort)
