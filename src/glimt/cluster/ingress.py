"""Ingress: the door of a cluster. Keys and limits as the server has them, then a replica's reply.

    client -> Serve's proxy -> Ingress -> the replica that the request's key prefers -> and back

A request whose replica dies, or takes no more, before the first byte of its reply is asked once
more of another. After it, the reply ends with an error in the family's words.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass
from typing import Any

from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from glimt.cluster.affinity import affinity_key
from glimt.cluster.merged import merged_metrics
from glimt.cluster.plan import read_server
from glimt.cluster.replica import Head, Piece
from glimt.errors import CapacityError, EngineError
from glimt.server.app import behind_door
from glimt.server.config import ServerConfig
from glimt.server.failures import Failure, body_of, failure_of, family_of
from glimt.server.host import EngineUnavailable
from glimt.server.logs import start_logging
from glimt.server.middleware import OPEN_PATHS
from glimt.server.openai import error_end
from glimt.server.refusals import send_failure
from glimt.server.replying import data_event, one_line
from glimt.server.streaming import body_message
from glimt.server.vllm import delimiter_of

log = logging.getLogger("glimt.cluster")

RANK_HEADER = b"x-glimt-replica"
_REFUSALS = (429, 503)  # of a replica: full, loading or ending; another may have room
_TO_ALL = re.compile(r"/v2/models/[^/]+(?:/versions/[^/]+)?/stopInfer")  # one of them has it
_LOOK_S = 5.0  # for a replica to tell its health
_AT_THE_DOOR = ("origin", "authorization", "api-key", "x-api-key")  # checked; go no further


class ReplicaLost(EngineUnavailable):
    """The replica that had a request is gone, and nothing of its reply was sent: HTTP 503."""


class CutReply(EngineError):
    """A reply of a known length that ends too early: its connection is closed."""


class Ingress:
    """What Serve gives every HTTP request to."""

    def __init__(
        self, replicas: DeploymentHandle, settings: str, log_level: str, log_format: str
    ) -> None:
        """settings: as `ClusterPlan.server_text` writes them."""
        start_logging(log_level, log_format)
        config = read_server(settings)
        self._reply = _Application(behind_door(Forwarder(replicas, config), config))

    async def __call__(self, request: Request) -> Response:
        """The application, which Serve then runs as any other reply."""
        return self._reply


class _Application(Response):
    """An ASGI application that passes for a response."""

    def __init__(self, app: Any) -> None:
        super().__init__()
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""

        async def without_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                del MutableHeaders(scope=message)["x-request-id"]  # Serve's proxy says it
            await send(message)

        await self._app(scope, receive, without_id)


@dataclass(slots=True)
class _Call:
    """One request on its way. lost: the replica that is not to be asked again."""

    key: str
    head: Head
    body: bytes
    wait_s: float
    lost: str = ""


class Forwarder:
    """An ASGI application whose replies are the replicas'."""

    def __init__(self, replicas: DeploymentHandle, config: ServerConfig) -> None:
        self._replicas = replicas
        self._streaming = replicas.options(stream=True)
        self._config = config

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; what fails is said in the words of the path's family."""
        if scope["type"] != "http":
            return
        try:
            await self._answer(scope, await _body(receive), send)
        except CapacityError as error:
            await send_failure(failure_of(error), scope["path"], self._config.profile, send)

    async def _answer(self, scope: Scope, body: bytes, send: Send) -> None:
        """Raises CapacityError, of its kinds EngineUnavailable, before the first byte alone."""
        if scope["path"] == "/metrics":
            await self._send_metrics(send)
            return
        call = await asyncio.to_thread(self._call, scope, body)
        if _TO_ALL.fullmatch(scope["path"]):
            await self._send_from_all(call, send)
            return
        async with contextlib.aclosing(self._reply(call)) as pieces:
            await self._pass_on(pieces, scope["path"], send)

    def _call(self, scope: Scope, body: bytes) -> _Call:
        """Read what the way depends on; of a large body that takes a while."""
        header_bytes = Headers(scope=scope).get("inference-header-content-length", "0")
        is_read = scope["method"] in ("GET", "HEAD")
        is_look = is_read or scope["path"] in OPEN_PATHS
        return _Call(
            key=affinity_key(body, int(header_bytes) if header_bytes.isdecimal() else 0),
            head=_head(scope),
            body=body,
            wait_s=_LOOK_S if is_look else self._config.request_timeout_s,
        )

    # --- from one replica ---

    async def _reply(self, call: _Call) -> AsyncGenerator[Piece, None]:
        """Status and headers, then bytes, of the first replica that does not fail or refuse."""
        for is_last in (False, True):
            response = self._streaming.answer.remote(call.key, call.lost, call.head, call.body)
            try:
                async for piece in self._begun(response, call, is_last):
                    yield piece
                return
            except _Again as again:
                log.warning("%s: asked again, since %s", call.head[1][:200], again)
            finally:
                response.cancel()

    async def _begun(self, response: Any, call: _Call, is_last: bool) -> AsyncIterator[Piece]:
        """One replica's reply. Raises _Again while nothing of it has been sent."""
        pieces = aiter(response)
        try:
            async with asyncio.timeout(call.wait_s):
                call.lost, rank = await anext(pieces)
            status, headers = await anext(pieces)
            first = await anext(pieces, b"")  # a head alone is no byte of an answer
        except TimeoutError:
            raise EngineUnavailable("no replica is there to answer; try again soon") from None
        except BackPressureError as error:
            raise CapacityError("too many requests wait for a replica; try again soon") from error
        except DeploymentUnavailableError as error:
            raise EngineUnavailable("no replica can be started; the log says why") from error
        except RayActorError as error:
            raise _Again.or_lost(is_last) from error
        if status in _REFUSALS and not is_last:
            raise _Again(f"replica {rank} refused it with {status}")
        yield status, [*headers, (RANK_HEADER, str(rank).encode())]
        yield first
        async for piece in pieces:
            yield piece

    async def _pass_on(self, pieces: AsyncIterator[Piece], path: str, send: Send) -> None:
        status, headers = await anext(pieces)
        await send({"type": "http.response.start", "status": status, "headers": headers})
        try:
            async for piece in pieces:
                await send(body_message(piece, more=True))
            last = b""
        except RayError:
            log.warning("%s: the replica is gone in the middle of its reply", path[:200])
            last = self._last_words(path, Headers(raw=headers))
        await send(body_message(last, more=False))

    def _last_words(self, path: str, headers: Headers) -> bytes:
        """The error at the end of a stream. Raises CutReply for a reply that is no stream."""
        failure = Failure("incomplete", "the replica that answered is gone; ask again")
        if "content-length" in headers:
            raise CutReply(failure.message)
        family, profile = family_of(path), self._config.profile
        if path == "/generate":  # TGI has its streams elsewhere
            said = one_line({"text": [""], "error": failure.message})
            return said + delimiter_of(self._config)
        if family == "openai":
            return error_end(failure, profile)
        return data_event(body_of(failure, family, profile))

    # --- from all ---

    async def _send_metrics(self, send: Send) -> None:
        """Every replica's figures, told apart by the label `replica`."""
        head: Head = ("GET", "/metrics", "", [])
        replies = await self._from_all(head, b"")
        texts = {str(rank): text.decode() for rank, status, _, text in replies if status == 200}
        headers = [(b"content-type", b"text/plain; version=0.0.4")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send(body_message(merged_metrics(texts), more=False))

    async def _send_from_all(self, call: _Call, send: Send) -> None:
        """The reply of a replica that succeeded, else of any."""
        replies = await self._from_all(call.head, call.body)
        if not replies:
            raise EngineUnavailable("no replica is there to answer; try again soon")
        _, status, headers, body = min(replies, key=lambda reply: reply[1])
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send(body_message(body, more=False))

    async def _from_all(self, head: Head, body: bytes) -> list[Any]:
        response = self._replicas.broadcast("whole", head, body)
        replies = await response.results_async(timeout_s=_LOOK_S, return_exceptions=True)
        return [reply for reply in replies if not isinstance(reply, BaseException)]


class _Again(Exception):
    """Nothing was sent yet: another replica may be asked."""

    @classmethod
    def or_lost(cls, is_last: bool) -> Exception:
        """What to raise when a replica dies before its first byte."""
        said = "the replica that had the request is gone"
        return ReplicaLost(f"{said}, as was one before; ask again") if is_last else cls(said)


async def _body(receive: Receive) -> bytes:
    """The whole body, which the door has already held to its limit."""
    parts = bytearray()
    while True:
        message = await receive()
        parts += message.get("body", b"")
        if not message.get("more_body"):
            return bytes(parts)


def _head(scope: Scope) -> Head:
    """What the application of a replica needs of a request; its id goes with it."""
    kept = [
        (bytes(name), bytes(value))
        for name, value in scope["headers"]
        if name.decode("latin-1") not in (*_AT_THE_DOOR, "x-request-id")
    ]
    request_id = scope["state"]["request_id"].encode("latin-1")
    query = bytes(scope.get("query_string", b"")).decode("latin-1")
    return scope["method"], scope["path"], query, [*kept, (b"x-request-id", request_id)]
