"""Ids, keys, body caps and last words, on bare ASGI applications."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

import pytest

from glimt.server.app import create_app, create_management_app
from glimt.server.config import ServerConfig
from glimt.server.middleware import BodyLimit, Keys, LastResort, RequestIds


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """Answers with the body it was given."""
    message = await receive()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": message.get("body", b"")})


async def broken(scope: Any, receive: Any, send: Any) -> None:
    raise ValueError("secret: /home/someone")


async def broken_late(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    raise ValueError("late")


def ask(
    app: Any, path: str = "/v1/x", method: str = "POST", *pieces: bytes, **headers: str
) -> list[dict[str, Any]]:
    """All that an application sends for one request."""
    parts = list(pieces or (b"",))
    sent: list[dict[str, Any]] = []
    raw = [(n.replace("_", "-").encode(), v.encode("utf-8")) for n, v in headers.items()]
    scope = {"type": "http", "path": path, "method": method, "headers": raw, "query_string": b""}

    async def receive() -> dict[str, Any]:
        if not parts:
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts)}

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(app(scope, receive, send))
    return sent


def status(sent: list[dict[str, Any]]) -> int:
    return int(sent[0]["status"])


def header(sent: list[dict[str, Any]], name: str) -> str | None:
    found = {n.decode().lower(): v.decode() for n, v in sent[0]["headers"]}
    return found.get(name)


# --- keys ------------------------------------------------------------------------------------

KEYED = Keys(echo, ("one", "zwei ü"), "upstream")


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": "Bearer one"},
        {"authorization": "bearer one"},
        {"authorization": "BEARER  one"},
        {"api_key": "one"},
        {"x_api_key": "one"},
    ],
)
def test_a_key_is_taken_in_every_usual_header(headers):
    """Catches a client that has the key and is sent away."""
    assert status(ask(KEYED, **headers)) == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer two"},
        {"authorization": "Bearer ONE"},
        {"authorization": "Basic one"},
        {"authorization": "one"},
        {"authorization": "Bearer "},
        {"api_key": "on"},
        {"x_api_key": "one two"},
    ],
)
def test_no_other_key_is_taken(headers):
    """Catches a key that is compared by its beginning, its length or not at all."""
    sent = ask(KEYED, **headers)
    assert status(sent) == 401
    assert header(sent, "www-authenticate") == "Bearer"
    assert "an API key is needed" in sent[1]["body"].decode()


@pytest.mark.parametrize(
    ("path", "method", "is_open"),
    [
        ("/health", "GET", True),
        ("/ping", "GET", True),
        ("/v2/health/live", "GET", True),
        ("/", "GET", True),
        ("/page/page.js", "GET", True),
        ("/", "POST", False),
        ("/metrics", "GET", False),
        ("/v1/models", "GET", False),
        ("/info", "GET", False),
        ("/live", "GET", False),
        ("/ready", "GET", False),
        ("/page/page.js", "POST", False),
        ("/v2/health/ready", "GET", False),
        ("/health/../v1/models", "GET", False),
        ("/v1/chat/completions", "OPTIONS", True),
    ],
)
def test_few_paths_are_open(path, method, is_open):
    """Catches a route that answers strangers, and a probe that needs a key."""
    assert status(ask(KEYED, path, method)) == (200 if is_open else 401)


OPEN_ROUTES = {
    ("GET", "/health"),
    ("GET", "/ping"),
    ("GET", "/v2/health/live"),
    ("GET", "/"),
    ("GET", "/page/limits.json"),
    ("GET", "/page/{name}"),
}


def routes_of(routes: Iterable[Any]) -> Iterator[tuple[str, str]]:
    """Method and path of each, those of included routers too."""
    for route in routes:
        if (inner := getattr(route, "original_router", None)) is not None:
            yield from routes_of(inner.routes)
        else:
            yield from ((method, route.path) for method in route.methods - {"HEAD"})


def served_routes(app: Any) -> set[tuple[str, str]]:
    """Of every route below the middleware, FastAPI's own ones too."""
    while not hasattr(app, "routes"):
        app = app._app
    found = set(routes_of(app.routes))
    assert {("POST", "/infer"), ("GET", "/openapi.json"), ("GET", "/metrics")} < found
    assert len(found) > 40
    return found


def test_of_all_routes_few_answer_without_a_key():
    """Catches a route, of now or of later, that strangers may use."""
    config = ServerConfig(num_decoders=0, api_keys=("one",))
    app, _ = create_app(lambda: None, config, "demo", 0)  # type: ignore[arg-type, return-value]
    is_open = {
        (method, path)
        for method, path in served_routes(app)
        if status(ask(app, re.sub(r"\{.*?\}", "x", path), method)) != 401
    }
    assert is_open == OPEN_ROUTES


def test_without_keys_all_is_open():
    """Catches a server that asks for a key nobody set."""
    assert status(ask(Keys(echo, (), "upstream"))) == 200


# --- bodies ----------------------------------------------------------------------------------


def test_a_body_in_pieces_is_one():
    """Catches a body of which only the first piece arrives."""
    sent = ask(BodyLimit(echo, 100, "upstream"), "/v1/x", "POST", b"ab", b"cd", b"ef")
    assert sent[1]["body"] == b"abcdef"


@pytest.mark.parametrize("headers", [{}, {"content_length": "3"}, {"content_length": "101"}])
def test_a_body_beyond_the_cap_is_refused_whatever_it_claims(headers):
    """Catches a cap that trusts Content-Length, and one that reads all before it looks."""
    sent = ask(BodyLimit(echo, 100, "upstream"), "/v1/x", "POST", b"a" * 60, b"b" * 60, **headers)
    assert status(sent) == 413
    assert "at most 100 bytes" in sent[1]["body"].decode()


def test_a_body_of_exactly_the_cap_is_taken():
    """Catches a limit that is off by one."""
    assert status(ask(BodyLimit(echo, 100, "upstream"), "/v1/x", "POST", b"a" * 100)) == 200


def test_the_management_port_has_the_cap_too():
    """Catches bodies of any size and any slowness on the port whose limits nobody looks at."""
    _, context = create_app(lambda: None, ServerConfig(max_body_bytes=1024), "m", 0)  # type: ignore
    app = create_management_app(context)
    assert status(ask(app, "/stopService", "POST", bytes(2000), host="127.0.0.1")) == 413


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (
            "/v1/x",
            {"error": {"message": "m", "type": "BadRequestError", "param": None, "code": 413}},
        ),
        ("/generate", {"error": "m", "error_type": "validation"}),
        ("/v2/models/m/infer", {"error": "m"}),
        ("/infer", {"message": "m"}),
    ],
)
def test_each_family_gets_its_own_form(path, body):
    """Catches OpenAI's error in a Triton client, which would read no error at all."""
    sent = ask(BodyLimit(echo, 1, "upstream"), path, "POST", b"too much")
    told = json.loads(sent[1]["body"])
    said = told["error"]["message"] if "error" in body and isinstance(body["error"], dict) else None
    said = said or told.get("error") or told["message"]
    assert "at most 1 bytes" in said
    assert json.loads(json.dumps(told).replace(said, "m")) == body


class Clock(asyncio.SelectorEventLoop):
    """A loop whose time is what a test says."""

    now_s = 0.0

    def time(self) -> float:
        return self.now_s


def dripped(piece: bytes, every_s: float, num_pieces: int) -> list[dict[str, Any]]:
    """All that is sent for a body of equal pieces that come one after the other."""
    loop, left, sent = Clock(), [piece] * num_pieces, []

    async def receive() -> Any:
        loop.now_s += every_s
        await asyncio.sleep(0)  # a limit that has passed ends this
        await asyncio.sleep(0)
        left.pop()
        return {"type": "http.request", "body": piece, "more_body": bool(left)}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/generate", "headers": []}
    with contextlib.closing(loop):
        app = BodyLimit(echo, 10**9, "upstream", idle_s=30)
        loop.run_until_complete(app(scope, receive, send))
    return sent


def test_a_body_that_comes_byte_by_byte_is_refused():
    """Catches a body of which a byte comes before each limit of silence, for hours."""
    sent = dripped(b"x", 20, 10_000)
    assert status(sent) == 408
    assert header(sent, "connection") == "close"
    told = json.loads(sent[1]["body"])
    assert told["error_type"] == "validation"
    assert told["error"].startswith("the body came more slowly than 16,384 bytes a second")


def test_a_body_that_comes_fast_enough_may_take_longer_than_a_silence():
    """Catches a limit of time that refuses a large picture over a slow line."""
    sent = dripped(bytes(20 * 16 * 2**10), 20, 100)
    assert status(sent) == 200
    assert len(sent[1]["body"]) == 100 * 20 * 16 * 2**10


def test_a_body_that_came_fast_may_not_then_stop():
    """Catches a large body's time that is used up in silence."""
    assert status(dripped(bytes(2**20), 31, 2)) == 408


# --- ids and errors --------------------------------------------------------------------------


def test_every_reply_has_an_id():
    """Catches a reply that cannot be found in any log."""
    app = RequestIds(echo, "upstream")
    assert header(ask(app, x_request_id="my-id_1"), "x-request-id") == "my-id_1"
    made = {header(ask(app), "x-request-id") for _ in range(3)}
    assert len(made) == 3


@pytest.mark.parametrize("given", ["a b", "x" * 257, "ä", "a\x00b", "../x"])
def test_an_id_that_is_none_is_refused(given):
    """Catches an id that writes into a log, a header or a path."""
    sent = ask(RequestIds(echo, "upstream"), x_request_id=given)
    assert status(sent) == 400
    assert "X-Request-Id" in sent[1]["body"].decode()


def test_an_error_nobody_caught_says_nothing_of_our_inside(caplog):
    """Catches a traceback, a path or a prompt in a reply."""
    sent = ask(LastResort(broken, "upstream"))
    assert status(sent) == 500
    assert "secret" not in sent[1]["body"].decode()
    assert header(sent, "x-should-retry") == "false"
    assert "secret" in caplog.text  # the log has it


def test_an_error_after_the_beginning_sends_no_second_one(caplog):
    """Catches a second start of a reply, which servers do not survive."""
    sent = ask(LastResort(broken_late, "upstream"))
    assert [message["type"] for message in sent] == ["http.response.start"]
