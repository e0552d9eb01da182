"""The bound of a port's connections: those beyond it are told so, and the others live."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import pytest

import glimt
from glimt.server.app import create_app
from glimt.server.config import ServerConfig
from glimt.server.connections import Bound, Entrance
from glimt.server.middleware import OPEN_PATHS
from serving import running, wait_ready

MOST = 3


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """Answers with the path that it was asked for."""
    if scope["type"] != "http":
        return
    body = scope["path"].encode()
    headers = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class Port:
    """A served port; counts what it refuses."""

    def __init__(self, silent_s: float = 30.0) -> None:
        self.num_refused = 0
        self.bound = Bound(MOST, silent_s, "upstream", self._count)

    def _count(self) -> None:
        self.num_refused += 1

    @contextmanager
    def served(self) -> Iterator[str]:
        with running(echo, http=partial(Entrance, self.bound), lifespan="off") as url:
            yield url


def dial(url: str) -> socket.socket:
    place = urlsplit(url)
    assert place.hostname
    return socket.create_connection((place.hostname, place.port or 0), timeout=30)


def asked(connection: socket.socket, path: str = "/v1/x", body: bytes = b"") -> tuple[int, bytes]:
    """Status and body of one request over a connection that stays open."""
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    connection.sendall(head.encode() + body)
    said = connection.makefile("rb")
    status = int(said.readline().split()[1])
    headers = dict(line.rstrip().lower().split(b": ") for line in iter(said.readline, b"\r\n"))
    return status, said.read(int(headers[b"content-length"]))


@contextmanager
def held(url: str, count: int) -> Iterator[list[socket.socket]]:
    """Connections that have been answered once and stay."""
    with ExitStack() as stack:
        found = [stack.enter_context(dial(url)) for _ in range(count)]
        assert [asked(each)[0] for each in found] == [200] * count
        yield found


@pytest.mark.parametrize(
    ("path", "status", "kind"),
    [
        ("/v1/chat/completions?a=b", 429, {"type": "RateLimitError", "param": None, "code": 429}),
        ("/generate", 429, "overloaded"),
        ("/infer", 503, "Service Unavailable"),
        ("/v2/models/demo/infer", 503, None),
    ],
)
def test_a_connection_beyond_the_bound_is_told_in_its_form(path, status, kind):
    """Catches a bound that closes without a word, or answers in another family's form."""
    port = Port()
    with port.served() as url, held(url, MOST) as connections:
        with dial(url) as more:
            found, body = asked(more, path)
            assert more.recv(1) == b"", "it is closed"
        assert found == status
        told = json.loads(body)
        message = told["error"].pop("message") if isinstance(kind, dict) else told.pop("error")
        rest = {"error": kind} if isinstance(kind, dict) else {"error_type": kind} if kind else {}
        assert told == rest
        assert message.startswith(f"{MOST} connections are open")
        assert port.num_refused == 1
        assert {asked(each)[0] for each in connections} == {200}, "the others live"


def test_a_refusal_says_when_to_come_again():
    """Catches a client that is told nothing to wait for and asks again at once."""
    port = Port()
    said = port.bound.reply(b"POST /generate HTTP/1.1\r\n")
    head = said.partition(b"\r\n\r\n")[0].split(b"\r\n")
    assert head[0] == b"HTTP/1.1 429 Too Many Requests"
    assert {b"Retry-After: 1", b"connection: close"} < set(head)


def test_a_refused_client_that_sends_on_reads_its_refusal():
    """Catches a reset in place of the reply."""
    port = Port()
    with port.served() as url, held(url, MOST), dial(url) as more:
        assert asked(more, body=b" " * 8_000_000)[0] == 429


def probed(url: str, path: str, method: str = "GET") -> tuple[int, bytes]:
    """Status and body of a request over a connection of its own, which the server must close."""
    with dial(url) as connection:
        connection.sendall(f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
        head, _, body = connection.makefile("rb").read().partition(b"\r\n\r\n")
    assert b"connection: close" in head.lower()
    return int(head.split()[1]), body


def test_a_full_server_tells_how_it_is():
    """Catches a server that is full and is ended for it, and one that says it is well whatever."""
    port, goes_on = Port(), threading.Event()

    def load() -> glimt.AsyncEngine:
        assert goes_on.wait(60)
        return glimt.AsyncEngine.load(glimt.EngineConfig(model="demo"))

    config = ServerConfig(num_decoders=0, api_keys=("secret",))
    app, context = create_app(load, config, "demo", 0)
    with ExitStack() as stack:
        url = stack.enter_context(running(app, http=partial(Entrance, port.bound)))
        stack.callback(goes_on.set)
        connections = [stack.enter_context(dial(url)) for _ in range(MOST)]
        assert {asked(each)[0] for each in connections} == {401}
        status, body = probed(url, "/health")
        assert (status, json.loads(body)["status"]) == (503, "loading")
        assert probed(url, "/v2/health/live")[0] == 200
        goes_on.set()
        wait_ready(url)
        assert {path: probed(url, path)[0] for path in OPEN_PATHS} == dict.fromkeys(OPEN_PATHS, 200)
        context.service.host.drain()
        status, body = probed(url, "/ping?from=here")
        assert (status, json.loads(body)["status"]) == (503, "draining")
        assert port.num_refused == 0
        assert {asked(each)[0] for each in connections} == {401}, "the others live"


@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "/health"), ("GET", "/metrics"), ("GET", "/live"), ("GET", "/healthy")],
)
def test_of_a_full_server_nothing_else_is_answered(method, path):
    """Catches a way past the bound for whatever looks like a probe."""
    port = Port()
    with port.served() as url, held(url, MOST):
        assert probed(url, path, method)[0] == 429
        assert port.num_refused == 1


def test_a_probe_beyond_the_bound_is_one_request_and_has_little_time(monkeypatch):
    """Catches a probe's connection that is a place like any other, or is held without an end."""
    monkeypatch.setattr("glimt.server.connections.LINGER_S", 0.05)
    port = Port()
    with port.served() as url, held(url, MOST):
        with dial(url) as silent:
            silent.sendall(b"GET /health HTTP/1.1\r\n")
            assert silent.recv(1) == b""
        with dial(url) as greedy:
            greedy.sendall(
                b"GET /health HTTP/1.1\r\nHost: x\r\n\r\nGET /x HTTP/1.1\r\nHost: x\r\n\r\n"
            )
            assert greedy.makefile("rb").read().count(b"HTTP/1.1 200") == 1
        until_empty(port)


def until_empty(port: Port) -> None:
    """Return once no refused connection is left."""
    for _ in range(1000):
        if not port.bound.refused:
            return
        threading.Event().wait(0.01)
    raise AssertionError("refused connections are kept")


def test_a_place_that_is_free_again_is_given():
    """Catches a connection that counts after its end, refused ones too."""
    port = Port()
    with port.served() as url:
        for _ in range(2):
            with held(url, MOST), dial(url) as more:
                assert asked(more)[0] == 429
            until_free(url)
        assert not port.bound.refused


def until_free(url: str) -> None:
    """Return once a connection is let in: the server hears of an end a moment later."""
    for _ in range(1000):
        with dial(url) as connection:
            if asked(connection)[0] == 200:
                return
    raise AssertionError("the connections that were closed still count")


def test_a_connection_that_sends_nothing_is_closed():
    """Catches places that anybody can hold without a word."""
    with Port(silent_s=0.05).served() as url, dial(url) as silent:
        assert silent.recv(1) == b""


def test_a_connection_that_spoke_is_not_closed_for_its_silence():
    """Catches a timer that goes on when uvicorn has the connection."""
    with Port(silent_s=0.05).served() as url, held(url, 1) as (connection,), dial(url) as silent:
        assert silent.recv(1) == b""  # later than its own limit would have been
        assert asked(connection)[0] == 200


def test_a_server_ends_although_connections_are_silent():
    """Catches a server that waits for clients that never asked anything."""
    with ExitStack() as clients:
        with Port().served() as url:
            silent = clients.enter_context(dial(url))
            with dial(url) as other:
                assert asked(other)[0] == 200  # the silent one was taken before
        assert silent.recv(1) == b""


@pytest.mark.parametrize(
    ("settings", "max_num_seqs", "most"),
    [
        ({}, 64, 1024),
        ({"max_waiting": 3000}, 200, 6400),
        ({"max_connections": 7, "max_waiting": 3000}, 200, 7),
    ],
)
def test_there_are_connections_for_all_that_may_wait(settings, max_num_seqs, most):
    """Catches a queue that the bound of connections makes useless."""
    assert ServerConfig(num_decoders=0, **settings).connections_for(max_num_seqs) == most
