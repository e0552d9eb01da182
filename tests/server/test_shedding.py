"""A full service refuses by the head alone, in every form; over loopback and on bare requests."""

from __future__ import annotations

import asyncio
import http.client
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import pytest
from tests.server.test_middleware import served_routes

from glimt.errors import CapacityError
from glimt.server.app import create_app
from glimt.server.config import ServerConfig
from glimt.server.middleware import BodyLimit
from glimt.server.shedding import Shedding
from serving import Served, serving

KEY = {"Authorization": "Bearer one"}
FORMS = [
    ("/v1/chat/completions", 429, {"type": "RateLimitError", "param": None, "code": 429}),
    ("/v1/completions", 429, {"type": "RateLimitError", "param": None, "code": 429}),
    ("/generate", 429, "overloaded"),
    ("/generate_stream", 429, "overloaded"),
    ("/", 429, "overloaded"),
    ("/infer", 503, "Service Unavailable"),
    ("/infer_token", 503, "Service Unavailable"),
    ("/v2/models/demo/generate", 503, None),
    ("/v2/models/demo/infer", 503, None),
    ("/v2/models/demo/versions/1/generate_stream", 503, None),
]


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    config = ServerConfig(num_decoders=0, max_waiting=0, api_keys=("one",))
    with serving("demo", config, max_num_seqs=1) as served:
        yield served


@contextmanager
def opened(url: str) -> Iterator[http.client.HTTPConnection]:
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=30)
    try:
        yield connection
    finally:
        connection.close()


def chat(**more: Any) -> bytes:
    """A question whose answer fills the context unless max_tokens says less."""
    asked = [{"role": "user", "content": "1"}]
    return json.dumps({"messages": asked, "ignore_eos": True, "temperature": 0, **more}).encode()


@contextmanager
def full(server: Served) -> Iterator[None]:
    """The one place is taken by an answer that has begun and is long."""
    with opened(server.url) as busy:
        busy.request("POST", "/v1/chat/completions", chat(stream=True), KEY)
        assert busy.getresponse().readline().startswith(b"data: ")
        yield
        assert server.context.service.num_open == 1, "the answer was too short for the test"
    until_idle(server)


def until_idle(server: Served) -> None:
    for _ in range(1000):
        if not server.context.service.num_open:
            return
        time.sleep(0.01)
    raise AssertionError("the answer that its client left goes on")


def head_only(url: str, path: str, headers: dict[str, str]) -> tuple[int, Any, Any]:
    """Status, headers and body that a request gets of which no byte of the body was ever sent."""
    with opened(url) as connection:
        connection.putrequest("POST", path)
        for name, value in {"Content-Length": "1000000", **headers}.items():
            connection.putheader(name, value)
        connection.endheaders()
        reply = connection.getresponse()
        return reply.status, reply.headers, reply.read()


@pytest.mark.parametrize(("path", "status", "kind"), FORMS)
def test_a_full_service_refuses_before_there_is_a_body(server, path, status, kind):
    """Catches a refusal that waits for the body, and one in another family's form."""
    with full(server):
        found, headers, body = head_only(server.url, path, KEY)
    assert (found, headers["Retry-After"], headers["Connection"]) == (status, "1", "close")
    told = json.loads(body)
    if isinstance(kind, dict):
        message = told["error"].pop("message")
        assert told == {"error": kind}
    else:
        message = told.pop("error")
        assert told == ({"error_type": kind} if kind else {})
    assert message == "1 answers are running or waiting, at most 1 may; try again in a second"


def test_a_wrong_key_learns_nothing_of_the_load(server):
    """Catches a refusal that goes before the key."""
    with full(server):
        given = {"Authorization": "Bearer two"}
        assert head_only(server.url, "/v1/chat/completions", given)[0] == 401


def test_what_makes_no_answer_is_served_while_all_is_full(server):
    """Catches probes, counts and stopInfer that a full queue refuses."""
    stop = json.dumps({"id": "unknown"}).encode()
    asked = [
        ("GET", "/health", None, 200),
        ("GET", "/metrics", None, 200),
        ("POST", "/v1/tokenizer", json.dumps({"inputs": "1"}).encode(), 200),
        ("POST", "/v2/models/demo/stopInfer", stop, 404),
    ]
    with full(server), opened(server.url) as connection:
        for method, path, body, status in asked:
            connection.request(method, path, body, KEY)
            reply = connection.getresponse()
            assert (path, reply.status) == (path, status), reply.read()
            reply.read()


def test_a_place_that_is_free_again_is_given(server):
    """Catches a service that goes on refusing, and an answer that a refused client changes."""

    def ask() -> tuple[int, bytes]:
        with opened(server.url) as connection:
            connection.request("POST", "/v1/chat/completions", chat(max_tokens=4), KEY)
            reply = connection.getresponse()
            return reply.status, reply.read()

    def text(body: bytes) -> str:
        return str(json.loads(body)["choices"][0]["message"]["content"])

    alone = ask()
    with full(server):
        assert ask()[0] == 429
    status, body = ask()
    assert (status, text(body)) == (200, text(alone[1]))


def test_a_client_that_sends_on_reads_its_refusal(server):
    """Catches a connection that is closed over unread bytes: a reset in place of the reply."""
    with full(server), opened(server.url) as connection:
        connection.request("POST", "/v1/chat/completions", b" " * 8_000_000, KEY)
        reply = connection.getresponse()
        assert reply.status == 429
        assert b"try again" in reply.read()
        assert connection.sock is None, "the connection is closed"


def test_every_route_that_takes_a_body_says_whether_it_makes_answers():
    """Catches a route, of now or of later, whose bodies a full server goes on reading."""
    app, _ = create_app(lambda: None, ServerConfig(num_decoders=0), "demo", 0)  # type: ignore
    layer = app
    while not isinstance(layer, Shedding):
        layer = layer._app
    others = {
        path
        for method, path in served_routes(app)
        if method == "POST" and not any(p.match(path) for p in layer._patterns)
    }
    prefixes = ("/v2/models/{model}", "/v2/models/{model}/versions/{version}")
    assert others == {
        "/tokenize",
        "/detokenize",
        "/v1/tokenizer",
        "/v2/repository/index",
        "/v2/repository/models/{model}/{action}",
        *(f"{prefix}/stopInfer" for prefix in prefixes),
    }


# --- bare requests ---------------------------------------------------------------------------


class Room:
    """A service that has room for a number of requests that are read at the same time."""

    def __init__(self, most: int) -> None:
        self.config = ServerConfig(num_decoders=0)
        self._most = most

    def check_room(self, num_reading: int) -> None:
        if num_reading >= self._most:
            raise CapacityError("full")


async def read_all(scope: Any, receive: Any, send: Any) -> None:
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"done"})


def shedding(room: Room) -> Shedding:
    return Shedding(read_all, room, ["/v1/x"])  # type: ignore[arg-type]


async def told(app: Shedding, pieces: list[Any], into: list[Any] | None = None) -> list[Any]:
    """What happens to one request, in order: "read" for each piece, and what is sent."""
    log: list[Any] = [] if into is None else into
    left = list(pieces)

    async def receive() -> Any:
        log.append("read")
        if not left:
            await asyncio.Event().wait()
        return {"type": "http.request", "body": left.pop(0), "more_body": bool(left)}

    async def send(message: Any) -> None:
        log.append(message.get("status", message.get("body")))

    await app({"type": "http", "method": "POST", "path": "/v1/x", "headers": []}, receive, send)
    return log


def test_the_reply_goes_out_before_a_byte_is_read():
    """Catches a refusal that first reads what it does not need."""
    log = asyncio.run(told(shedding(Room(0)), [b"a", b"b"]))
    assert log[0] == 429
    assert b"full" in log[1]
    assert log[2:] == ["read", "read", b""]


def test_a_refused_body_is_dropped_only_up_to_a_limit():
    """Catches a client that is read for ever because it was refused."""
    room = Room(0)
    piece = bytes(room.config.max_body_bytes // 2)
    log = asyncio.run(told(shedding(room), [piece] * 9))
    assert log.count("read") == 3


def test_bodies_that_are_being_read_take_places():
    """Catches slow clients whose bodies are all read at once, and a place that stays taken."""
    app = shedding(Room(1))

    async def scene() -> list[Any]:
        slow = asyncio.create_task(told(app, []))
        await asyncio.sleep(0)
        during = await told(app, [b"a"])
        slow.cancel()
        await asyncio.gather(slow, return_exceptions=True)
        return [during[0], (await told(app, [b"a"]))[1]]

    assert asyncio.run(scene()) == [429, 200]


def test_a_body_that_stops_coming_gives_its_place_back(monkeypatch):
    """Catches a client that keeps a place by sending nothing more, refused or not."""
    monkeypatch.setattr("glimt.server.refusals.LINGER_S", 60)
    limited = BodyLimit(read_all, 1000, "upstream", idle_s=0.01)
    app = Shedding(limited, Room(1), ["/v1/x"])  # type: ignore[arg-type]

    async def scene() -> list[Any]:
        log: list[Any] = []
        slow = asyncio.create_task(told(app, [], log))
        while len(log) < 3:
            await asyncio.sleep(0.01)
        during = await told(app, [b"a"])
        slow.cancel()
        await asyncio.gather(slow, return_exceptions=True)
        return [*log[:3], during[1]]

    first, status, body, after = asyncio.run(scene())
    assert (first, status, after) == ("read", 408, 200)
    assert b"no more of the body came for 0.01 s" in body
