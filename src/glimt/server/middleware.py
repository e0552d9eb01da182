"""What happens to every HTTP request before a protocol sees it. Pure ASGI, so streams stay streams.

RequestIds   takes the caller's id or makes one, and says it in the reply
Keys         asks for an API key where one is set
BodyLimit    stops reading a body at its cap, whatever its Content-Length says, or when it is slow
LastResort   an error that nobody caught becomes the family's 500, or a cut stream
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import time
import zlib
from collections.abc import Iterable, Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from glimt.errors import RequestError
from glimt.server.failures import Failure, failure_of
from glimt.server.refusals import send_failure, turn_away
from glimt.server.service import checked_id

log = logging.getLogger("glimt.server")

OPEN_PATHS = frozenset({"/health", "/ping", "/v2/health/live"})
"""Answered without a key, and so is the chat page with its files; nothing else is."""
SLOWEST = 16 * 2**10
"""Bytes a second of a body: a megabyte in a minute, which any line of today has."""


class RequestIds:
    """Puts `request_id` into the scope's state, and X-Request-Id into the reply."""

    def __init__(self, app: ASGIApp, profile: str) -> None:
        self._app, self._profile = app, profile

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on with its id; a bad one is refused."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id")
        try:
            request_id = checked_id(given, "X-Request-Id")
        except RequestError as error:
            await send_failure(failure_of(error), scope["path"], self._profile, send)
            return
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = request_id
                if self._profile == "mindie":
                    headers["RequestUUID"] = request_id
            await send(message)

        await self._app(scope, receive, send_with_id)


class RequestLog:
    """One line for each request when its reply ends: no body, no header, no key in it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on and log how it ended."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        seen = {"status": 0, "bytes": 0}

        async def counted(message: Message) -> None:
            seen["status"] = message.get("status", seen["status"])
            seen["bytes"] += len(message.get("body", b""))
            await send(message)

        began_s = time.monotonic()
        try:
            await self._app(scope, receive, counted)
        finally:
            facts = {
                "method": scope["method"],
                "path": scope["path"][:200],
                **seen,
                "seconds": round(time.monotonic() - began_s, 4),
                "request_id": scope.get("state", {}).get("request_id"),
            }
            log.info("request", extra={"facts": facts})


class Keys:
    """Asks for an API key: `Authorization: Bearer KEY`, `api-key` or `x-api-key`."""

    def __init__(self, app: ASGIApp, keys: Sequence[str], profile: str) -> None:
        self._app, self._profile = app, profile
        self._digests = [_digest(key) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on if it needs no key or has one."""
        if scope["type"] != "http" or not self._digests or self._may_pass(scope):
            await self._app(scope, receive, send)
            return
        said = "an API key is needed: Authorization: Bearer KEY"
        await send_failure(Failure("key", said), scope["path"], self._profile, send)

    def _may_pass(self, scope: Scope) -> bool:
        given = _given_keys(Headers(scope=scope))
        return self._is_open(scope) or any(self._is_known(key) for key in given)

    def _is_open(self, scope: Scope) -> bool:
        if scope["method"] == "OPTIONS":
            return True
        path: str = scope["path"]
        if path == "/" or path.startswith("/page/"):
            return scope["method"] in ("GET", "HEAD")
        return path in OPEN_PATHS

    def _is_known(self, key: str) -> bool:
        """In constant time, over all keys, so that time tells nothing of any."""
        digest = _digest(key)
        return sum(hmac.compare_digest(digest, known) for known in self._digests) > 0


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


def _given_keys(headers: Headers) -> Iterable[str]:
    scheme, _, key = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and key:
        yield key.strip()
    for name in ("api-key", "x-api-key"):
        if name in headers:
            yield headers[name]


class _Slow(Exception):
    """A body that does not come in time."""


class BodyLimit:
    """Reads a request's body, at most so much of it, before anything is done with it.

    idle_s: how long nothing may come; so long, and a second for every SLOWEST bytes that came, may
            the whole take
    """

    def __init__(self, app: ASGIApp, max_bytes: int, profile: str, idle_s: float = 30.0) -> None:
        self._app, self._max_bytes, self._profile = app, max_bytes, profile
        self._idle_s = idle_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on with its whole body, or refuse it with 413 or 408."""
        try:
            await self._pass_on(scope, receive, send)
        except _Slow as error:
            failure = Failure("slow", str(error))
            await turn_away(failure, self._profile, self._max_bytes, scope, receive, send)

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        length = headers.get("content-length", "0")
        body = None
        if not length.isdecimal() or int(length) <= self._max_bytes:
            body = await self._body(receive)
        coding = headers.get("content-encoding", "identity").strip().lower()
        if body and coding != "identity":
            try:
                body = await asyncio.to_thread(unpacked, body, coding, self._max_bytes)
            except ValueError as error:
                failure = Failure("malformed", str(error))
                await send_failure(failure, scope["path"], self._profile, send)
                return
        if body is None:
            most = f"at most {self._max_bytes:,} bytes are taken"
            failure = Failure("too_large", f"the request's body is larger than that: {most}")
            await send_failure(failure, scope["path"], self._profile, send)
            return
        await self._app(scope, _replayed(body, receive), send)

    async def _body(self, receive: Receive) -> bytes | None:
        """The body; None beyond the limit. Empty if the client left meanwhile. Raises _Slow."""
        body = bytearray()
        began_s = asyncio.get_running_loop().time()
        while True:
            message = await self._piece(receive, began_s, len(body))
            if message["type"] == "http.disconnect":
                return b""
            body += message.get("body", b"")
            if len(body) > self._max_bytes:
                return None
            if not message.get("more_body"):
                return bytes(body)

    async def _piece(self, receive: Receive, began_s: float, num_bytes: int) -> Message:
        """What comes next. Raises _Slow: such a body keeps a place of those that are read."""
        now_s = asyncio.get_running_loop().time()
        idle_at_s = now_s + self._idle_s
        slow_at_s = began_s + self._idle_s + num_bytes / SLOWEST
        try:
            async with asyncio.timeout_at(min(idle_at_s, slow_at_s)):
                return await receive()
        except TimeoutError:
            said = f"no more of the body came for {self._idle_s:g} s"
            if num_bytes and slow_at_s < idle_at_s:
                said = f"the body came more slowly than {SLOWEST:,} bytes a second"
            raise _Slow(f"{said}; send it without a pause") from None


_WINDOW_BITS = {"gzip": 31, "x-gzip": 31, "deflate": 15}


def unpacked(body: bytes, coding: str, max_bytes: int) -> bytes | None:
    """A compressed body's content, of which no more than max_bytes are ever made; None beyond.

    Raises ValueError for what is not compressed as it says.
    """
    if coding not in _WINDOW_BITS:
        raise ValueError(f"Content-Encoding {coding[:40]!r} is not read; gzip and deflate are")
    unpacker = zlib.decompressobj(_WINDOW_BITS[coding])
    try:
        content = unpacker.decompress(body, max_bytes + 1)
    except zlib.error as error:
        raise ValueError(f"the body is no {coding}") from error
    if len(content) > max_bytes:
        return None
    if not unpacker.eof:
        raise ValueError(f"the body's {coding} ends too early")
    if unpacker.unused_data:
        raise ValueError(f"the body goes on behind the end of its {coding}; send one piece")
    return content


def _replayed(body: bytes, receive: Receive) -> Receive:
    """Gives the body once, then what comes after it: the client's leaving."""
    first: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return first.pop() if first else await receive()

    return replay


class LastResort:
    """Turns what nobody caught into an error reply that says nothing of our inside."""

    def __init__(self, app: ASGIApp, profile: str) -> None:
        self._app, self._profile = app, profile

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on; log and answer what it raises."""
        has_begun = False

        async def watched(message: Message) -> None:
            nonlocal has_begun
            has_begun = has_begun or message["type"] == "http.response.start"
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except Exception as error:
            if scope["type"] != "http":
                raise
            log.exception("request %s failed", scope.get("state", {}).get("request_id"))
            if not has_begun:
                await send_failure(failure_of(error), scope["path"], self._profile, send)
