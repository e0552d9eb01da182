"""Replies that refuse: to an application's request, to a client that still sends, to bare bytes.

Knows how a refusal is sent, and not why there is one.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from http import HTTPStatus

from starlette.datastructures import MutableHeaders
from starlette.types import Message, Receive, Scope, Send

from glimt.server.failures import Failure, content_of, family_of, headers_of, status_of

LINGER_S = 5.0
"""How long a refused client may go on sending before its connection is closed."""


async def send_failure(failure: Failure, path: str, profile: str, send: Send) -> None:
    """A whole error reply in the form of the path's family."""
    status, headers, body = _reply(failure, path, profile)
    raw = [(name.lower().encode(), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": body})


async def turn_away(
    failure: Failure, profile: str, most_bytes: int, scope: Scope, receive: Receive, send: Send
) -> None:
    """Answer at once and close the connection, when the client has stopped sending.

    One that is closed with bytes unread is reset, and the client may never see its answer.
    most_bytes: that are read to no purpose
    """

    async def unended(message: Message) -> None:
        await send({**as_last(message), "more_body": True})

    await send_failure(failure, scope["path"], profile, unended)
    with suppress(TimeoutError):
        async with asyncio.timeout(LINGER_S):
            await _drop(receive, most_bytes)
    await send({"type": "http.response.body", "body": b""})


def as_last(message: Message) -> Message:
    """The same; a head says that the connection ends with its reply."""
    if message["type"] == "http.response.start":
        MutableHeaders(scope=message)["Connection"] = "close"
    return message


async def _drop(receive: Receive, most_bytes: int) -> None:
    """Read a body and keep nothing of it, until it ends, the client leaves, or it is too long."""
    num_bytes = 0
    while num_bytes <= most_bytes:
        message = await receive()
        num_bytes += len(message.get("body", b""))
        if not message.get("more_body"):
            return


# --- before there is an application ----------------------------------------------------------


def asked(head: bytes) -> tuple[str, str]:
    """Method and path that a request begins with; empty if they are not here yet."""
    line = head.split(b" ", 2)
    if len(line) < 3:
        return "", ""
    return line[0].decode("latin-1"), line[1].partition(b"?")[0].decode("latin-1")


def ready_made(failure: Failure, head: bytes, profile: str) -> bytes:
    """A whole reply in the form of the path that a request begins with, and the last one."""
    code, headers, body = _reply(failure, asked(head)[1], profile)
    status = HTTPStatus(code)
    lines = [f"HTTP/1.1 {status.value} {status.phrase}"]
    lines += [f"{name}: {value}" for name, value in {**headers, "connection": "close"}.items()]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def _reply(failure: Failure, path: str, profile: str) -> tuple[int, dict[str, str], bytes]:
    family = family_of(path)
    body = content_of(failure, family, profile)
    headers = {
        "content-type": "application/json",
        "content-length": str(len(body)),
        **headers_of(failure),
    }
    return status_of(failure, family, profile), headers, body
