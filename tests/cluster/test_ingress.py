"""The way to a replica and back, with replicas that fail as they are told to."""

from __future__ import annotations

import json
from typing import Any

import pytest
import requests
from tests.serving import running

pytest.importorskip("ray.serve", reason="needs ray: pip install 'glimt[cluster]'")

from ray.exceptions import ActorDiedError
from ray.serve.exceptions import BackPressureError

from glimt.cluster.affinity import affinity_key
from glimt.cluster.ingress import Forwarder
from glimt.server.app import behind_door
from glimt.server.config import ServerConfig

JSON = (b"content-type", b"application/json")
EVENTS = (b"content-type", b"text/event-stream; charset=utf-8")
GONE = "the replica that answered is gone; ask again"
CHAT = "/v1/chat/completions"


class Reply:
    """What one replica says: pieces, and errors where it fails."""

    def __init__(self, pieces: list[Any]) -> None:
        self.pieces = list(pieces)
        self.is_cancelled = False

    def __aiter__(self) -> Reply:
        return self

    async def __anext__(self) -> Any:
        if not self.pieces:
            raise StopAsyncIteration
        piece = self.pieces.pop(0)
        if isinstance(piece, Exception):
            raise piece
        return piece

    def cancel(self) -> None:
        self.is_cancelled = True


class Replicas:
    """Replies in order, one for each time that a replica is asked; and with what it was."""

    def __init__(self, *replies: list[Any]) -> None:
        self.replies = [Reply(pieces) for pieces in replies]
        self.asked: list[tuple[Any, ...]] = []
        self.answer = self

    def options(self, stream: bool) -> Replicas:
        assert stream
        return self

    def remote(self, *call: Any) -> Reply:
        self.asked.append(call)
        return self.replies[len(self.asked) - 1]


def whole(rank: int, status: int = 200, content: bytes = b"{}") -> list[Any]:
    length = (b"content-length", str(len(content)).encode())
    return [(f"replica-{rank}", rank), (status, [JSON, length]), content]


def post(
    replicas: Replicas, path: str = CHAT, config: ServerConfig | None = None, **headers: str
) -> requests.Response:
    config = config or ServerConfig()
    with running(behind_door(Forwarder(replicas, config), config)) as url:  # type: ignore[arg-type]
        return requests.post(url + path, json={"prompt": "hi"}, headers=headers, timeout=10)


def dead() -> ActorDiedError:
    return ActorDiedError()


@pytest.mark.parametrize(
    "first",
    [
        [dead()],
        [("replica-0", 0), dead()],
        [("replica-0", 0), (200, [EVENTS]), dead()],
        whole(0, 503, b'{"error": "loading"}'),
        whole(0, 429, b'{"error": "full"}'),
    ],
    ids=["before it took it", "before its status", "before its first byte", "loading", "full"],
)
def test_a_request_without_a_byte_of_a_reply_is_asked_once_more(first):
    """Would catch a caller that hears of a death which another replica could have hidden."""
    replicas = Replicas(first, whole(1, content=b'{"x":1}'))
    reply = post(replicas)
    assert (reply.status_code, reply.json()) == (200, {"x": 1})
    assert reply.headers["X-Glimt-Replica"] == "1"
    assert [asked[0] for asked in replicas.asked] == [affinity_key(b'{"prompt": "hi"}')] * 2
    is_known = not isinstance(first[0], Exception)
    assert [asked[1] for asked in replicas.asked] == ["", "replica-0" if is_known else ""]
    assert all(each.is_cancelled for each in replicas.replies)


def test_a_second_death_is_told():
    """Would catch a request that is asked for ever, or hangs."""
    replicas = Replicas([dead()], [("replica-1", 1), dead()])
    reply = post(replicas)
    assert (reply.status_code, reply.headers["Retry-After"]) == (503, "1")
    assert reply.json()["error"]["message"].startswith("the replica that had the request is gone")


def test_a_second_refusal_is_the_replica_s_own():
    """Would catch a reply to overload that clients of the form do not understand."""
    replicas = Replicas(whole(0, 429, b"{}"), whole(1, 429, b'{"error":"full"}'))
    reply = post(replicas)
    assert (reply.status_code, reply.json()) == (429, {"error": "full"})


def test_too_many_that_wait_for_a_replica_are_told_to_wait():
    """Would catch a queue at the door that answers 500."""
    reply = post(Replicas([BackPressureError(5, 5)]))
    assert (reply.status_code, reply.headers["Retry-After"]) == (429, "1")


LAST_WORDS = {
    CHAT: b'data: {"error":{"message":"%s","type":"InternalServerError","param":null,"code":500}}'
    b"\n\ndata: [DONE]\n\n",
    "/generate_stream": b'data: {"error":"%s","error_type":"incomplete_generation"}\n\n',
    "/v2/models/demo/generate_stream": b'data: {"error":"%s"}\n\n',
    "/infer": b'data: {"error":"%s","error_type":"Incomplete Generation"}\n\n',
    "/generate": b'{"text":[""],"error":"%s"}\n',
}


@pytest.mark.parametrize("path", LAST_WORDS)
def test_a_stream_ends_with_an_error_of_its_form(path):
    """Would catch a stream that just stops, and passes for a short answer; or is asked again
    when a part of it is out.
    """
    first = b'data: {"a":1}\n\n'
    replicas = Replicas([("replica-0", 0), (200, [EVENTS]), first, dead()])
    reply = post(replicas, path)
    assert (reply.status_code, len(replicas.asked)) == (200, 1)
    assert reply.content == first + LAST_WORDS[path].replace(b"%s", GONE.encode())


def test_a_whole_reply_that_breaks_is_cut():
    """Would catch half an object that ends like a whole one."""
    head = (200, [JSON, (b"content-length", b"100")])
    with pytest.raises(requests.exceptions.ChunkedEncodingError, match="95 more expected"):
        post(Replicas([("replica-0", 0), head, b'{"a":', dead()]))


@pytest.fixture
def forwarded() -> dict[bytes, bytes]:
    """Headers as a replica gets them."""
    replicas = Replicas(whole(0))
    config = ServerConfig(api_keys=("sk-1",), allowed_origins=("https://chat.example.org",))
    given = {
        "Authorization": "Bearer sk-1",
        "Origin": "https://chat.example.org",
        "X-Request-Id": "mine",
        "X-Other": "kept",
    }
    reply = post(replicas, config=config, **given)
    assert reply.headers["Access-Control-Allow-Origin"] == "https://chat.example.org"
    ((_, _, (method, path, query, headers), body),) = replicas.asked
    assert (method, path, query, json.loads(body)) == ("POST", CHAT, "", {"prompt": "hi"})
    return dict(headers)


def test_what_the_door_has_checked_goes_no_further(forwarded):
    """Would catch a key in a replica's logs, and an origin that it refuses once more."""
    assert not {b"authorization", b"origin"} & forwarded.keys()
    assert (forwarded[b"x-request-id"], forwarded[b"x-other"]) == (b"mine", b"kept")


def test_without_a_key_no_replica_hears_of_a_request():
    """Would catch bodies of strangers that are sent through the cluster."""
    replicas = Replicas()
    assert post(replicas, config=ServerConfig(api_keys=("sk-1",))).status_code == 401
    assert replicas.asked == []


class Everybody(Replicas):
    """Replicas that are all asked at once."""

    def __init__(self, *replies: Any) -> None:
        super().__init__()
        self.all = replies

    def broadcast(self, method: str, head: Any, body: bytes) -> Everybody:
        self.asked.append((method, head[1], body))
        return self

    async def results_async(self, timeout_s: float, return_exceptions: bool) -> list[Any]:
        assert return_exceptions
        return list(self.all)


STOP = "/v2/models/demo/stopInfer"


def test_a_request_is_stopped_wherever_it_runs():
    """Would catch a stop that only reaches the replica of its own affinity."""
    missing = (0, 404, [JSON], b'{"error":"unknown"}')
    replicas = Everybody(missing, dead(), (1, 200, [JSON], b'{"id":"r"}'))
    reply = post(replicas, STOP)
    assert (reply.status_code, reply.json()) == (200, {"id": "r"})
    assert replicas.asked == [("whole", STOP, b'{"prompt": "hi"}')]
    assert post(Everybody(missing), STOP).status_code == 404
    assert post(Everybody(dead()), STOP).status_code == 503
