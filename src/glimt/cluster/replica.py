"""Replica: one engine in a process of Ray Serve, with the server's application around it.

A request comes as plain values, and its reply goes out as they come: first who answers, then the
status with its headers, then pieces of the body.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import time
from collections.abc import AsyncGenerator
from typing import Any

from ray import serve

from glimt.async_engine import AsyncEngine
from glimt.cluster.plan import HEALTH_S, replica_parts
from glimt.cluster.router import RANK
from glimt.cluster.silence import Silence, silence_s
from glimt.server.app import SWITCH_S, close, create_inner_app
from glimt.server.host import EngineUnavailable
from glimt.server.logs import start_logging

log = logging.getLogger("glimt.cluster")

_TOLD_S = 5.0  # for callers of requests that are given up to read so
Head = tuple[str, str, str, list[tuple[bytes, bytes]]]
"""Method, path, query and headers of a request."""
Piece = Any
"""A reply's (replica, rank), then its (status, headers), then bytes."""


class Replica:
    """What Serve starts, asks, watches and ends."""

    async def __init__(self, settings: str, log_level: str, log_format: str) -> None:  # type: ignore[misc]
        """Load the model and answer a first request; raises what loading raises.

        settings: as `ClusterPlan.replica_text` writes them
        """
        start_logging(log_level, log_format)
        sys.setswitchinterval(SWITCH_S)
        engine, server, model_name = replica_parts(settings)
        self._app, self._context = create_inner_app(
            lambda: AsyncEngine.load(engine), server, model_name, int(time.time())
        )
        self._host = self._context.service.host
        place = serve.get_replica_context()
        self._name, self._rank = place.replica_id.unique_id, place.rank.rank
        after_s = silence_s(server.drain_timeout_s, HEALTH_S)
        self._silence = Silence(after_s, self._forsaken)
        await self._host.start()

    def record_replica_metadata(self) -> dict[str, Any]:
        """What routers are told of this replica."""
        return {RANK: self._rank}

    async def check_health(self) -> None:
        """Raise when the engine is beyond help; Serve then puts another replica in this place."""
        self._silence.looked()
        if not self._host.is_live:
            raise RuntimeError(f"the engine is {self._host.state}: {self._host.failure}")

    async def answer(
        self, key: str, avoided: str, head: Head, body: bytes
    ) -> AsyncGenerator[Piece, None]:
        """The reply to one request, piece by piece; leaving the iteration ends the request.

        key, avoided: for the router alone
        """
        yield self._name, self._rank
        sent: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        running = asyncio.create_task(self._run(head, body, sent))
        try:
            while message := await sent.get():
                for piece in _pieces(message):
                    yield piece
            await running
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    async def _run(
        self, head: Head, body: bytes, sent: asyncio.Queue[dict[str, Any] | None]
    ) -> None:
        """Let the application answer, as any ASGI server would; a client that leaves cancels it."""
        waiting = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> dict[str, Any]:
            if not waiting:
                await asyncio.Event().wait()
            return waiting.pop()

        try:
            await self._app(_scope(head), receive, sent.put)
        finally:
            await sent.put(None)

    async def whole(self, head: Head, body: bytes) -> tuple[int, int, list[Any], bytes]:
        """Rank, status, headers and body of a reply that every replica is asked for."""
        pieces = [piece async for piece in self.answer("", "", head, body)]
        (_, rank), (status, headers), *contents = pieces
        return rank, status, headers, b"".join(contents)

    async def drain(self) -> int:
        """Take no more requests; how many answers still run."""
        self._host.drain()
        return self._context.service.num_open

    async def give_up(self) -> None:
        """End what still runs, and return when its callers have been told, or soon after."""
        service = self._context.service
        service.give_up()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(service.wait_idle(), _TOLD_S)

    def _forsaken(self) -> None:
        """Serve is about to kill this replica. If it is not, the engine is well and goes on."""
        if self._context.service.num_open:
            log.warning("nobody asks for this replica's health: what still runs is given up")
        self._context.service.give_up(EngineUnavailable("the replica is ending; ask again"))

    async def __del__(self) -> None:
        """Serve calls this when no request is left; one that is, it cuts when its patience ends."""
        self._silence.close()
        self._host.drain()
        self._context.service.give_up()
        await close(self._context)


def _pieces(message: dict[str, Any]) -> list[Piece]:
    if message["type"] == "http.response.start":
        return [(message["status"], [(bytes(k), bytes(v)) for k, v in message["headers"]])]
    return [message["body"]] if message.get("body") else []


def _scope(head: Head) -> dict[str, Any]:
    method, path, query, headers = head
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode("utf-8", "surrogatepass"),
        "query_string": query.encode("latin-1"),
        "root_path": "",
        "headers": headers,
        "client": None,
        "server": None,
        "state": {},
    }
