"""Clients that send a byte now and then: how long each part of a request may take."""

from __future__ import annotations

import asyncio
import json
import select
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import pytest

from glimt.server.connections import Bound, Entrance
from serving import running

HEAD = b"GET %s HTTP/1.1\r\nHost: x\r\n"


class App:
    """Answers with its path, without reading the body; to /wait once it is told to."""

    def __init__(self) -> None:
        self.goes_on = threading.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        if scope["path"] == "/wait":
            await asyncio.to_thread(self.goes_on.wait, 60)
        body = scope["path"].encode()
        headers = [(b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})


@contextmanager
def served(limit_s: float = 0.3) -> Iterator[tuple[str, App]]:
    app = App()
    bound = Bound(10, limit_s, "upstream", lambda: None)
    with running(app, http=partial(Entrance, bound), lifespan="off") as url:
        yield url, app
        app.goes_on.set()


def dial(url: str) -> socket.socket:
    place = urlsplit(url)
    assert place.hostname
    return socket.create_connection((place.hostname, place.port or 0), timeout=30)


def drip(connection: socket.socket) -> bytes:
    """What the server says, and then closes, while a byte is sent now and then."""
    said = b""
    for _ in range(2000):
        try:
            connection.sendall(b"a")
            while select.select([connection], [], [], 0.01)[0]:
                piece = connection.recv(65536)
                if not piece:
                    return said
                said += piece
        except ConnectionError:
            return said
    raise AssertionError("the connection is held")


def status_of(reply: bytes) -> int:
    return int(reply.split()[1])


def answered(connection: socket.socket, request: bytes) -> bytes:
    """The body of a reply to a whole request, over a connection that stays."""
    connection.sendall(request)
    said = connection.makefile("rb")
    assert status_of(said.readline()) == 200
    headers = dict(line.rstrip().lower().split(b": ") for line in iter(said.readline, b"\r\n"))
    return said.read(int(headers[b"content-length"]))


@pytest.mark.parametrize(
    ("path", "error"),
    [
        (b"/v1/models", {"type": "BadRequestError", "param": None, "code": 408}),
        (b"/generate?a=b", "validation"),
        (b"/infer", "Bad Request"),
        (b"/v2/models/demo/infer", None),
    ],
)
def test_a_head_that_comes_byte_by_byte_is_told_in_its_form(path, error):
    """Catches a connection that a byte now and then holds for ever, or cut without a word."""
    with served() as (url, _), dial(url) as connection:
        connection.sendall(HEAD % path)
        reply = drip(connection)
    head, _, body = reply.partition(b"\r\n\r\n")
    assert status_of(head) == 408
    assert b"connection: close" in head
    told = json.loads(body)
    said = told["error"]["message"] if isinstance(error, dict) else told["error"]
    assert said == "the request's head did not come within 0.3 s; send it at once"
    if isinstance(error, dict):
        assert {name: told["error"][name] for name in error} == error
    else:
        assert told.get("error_type") == error


def test_a_head_without_a_path_is_closed():
    """Catches a limit that begins with the first line's end."""
    with served() as (url, _), dial(url) as connection:
        assert drip(connection) == b""


def test_a_later_head_has_a_limit_too():
    """Catches a limit of a connection's first request alone."""
    with served() as (url, _), dial(url) as connection:
        whole = HEAD % b"/first" + b"\r\n"
        assert answered(connection, whole) == b"/first"
        connection.sendall(HEAD % b"/second")
        assert status_of(drip(connection)) == 408


def test_a_head_behind_a_running_request_has_a_limit_too():
    """Catches bytes that came too early to be looked at, and are never looked at again."""
    with served() as (url, app), dial(url) as connection:
        connection.sendall(HEAD % b"/wait" + b"\r\n" + HEAD % b"/second")
        app.goes_on.set()
        assert drip(connection).count(b"HTTP/1.1") == 2


def test_a_request_that_is_whole_may_take_its_time():
    """Catches a limit on heads that ends answers."""
    with served() as (url, app), dial(url) as connection, dial(url) as clock:
        connection.sendall(HEAD % b"/wait" + b"\r\n")
        assert drip(clock) == b""  # later than the limit of the first
        app.goes_on.set()
        assert answered(connection, b"") == b"/wait"
        assert answered(connection, HEAD % b"/next" + b"\r\n") == b"/next"


def test_the_rest_of_a_body_that_nobody_reads_has_a_limit():
    """Catches a connection that is held by a body whose reply is long out."""
    with served() as (url, _), dial(url) as connection:
        head = b"POST /x HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n"
        assert answered(connection, head) == b"/x"
        assert drip(connection) == b""


def test_a_body_that_ends_in_time_leaves_its_connection_open():
    """Catches a limit that goes on when its body is whole."""
    with served() as (url, _), dial(url) as connection:
        head = b"POST /x HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\n"
        assert answered(connection, head) == b"/x"
        connection.sendall(b"body")
        with dial(url) as clock:
            assert drip(clock) == b""
        assert answered(connection, HEAD % b"/next" + b"\r\n") == b"/next"
