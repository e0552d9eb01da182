"""`glimt cluster` with the demo model on a real Ray, over loopback: one replica, then two, then one
of two ranks.

Ray takes seconds to start, and so does each replica; therefore all tests share one cluster, and
what changes it is a fixture: `started`, `running`, `divided`.
"""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tests.cluster.running import (
    Cluster,
    cluster,
    descendants,
    events,
    listening,
    rank_pids,
    replica_pids,
    restart,
    variable,
    words,
)

import glimt

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="needs ray: pip install 'glimt[cluster]'"
)

CHAT = "/v1/chat/completions"
LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}
NUM_REQUESTS, IN_FLIGHT, KILL_AFTER = 200, 8, 60
GREEDY = {"temperature": 0, "max_tokens": 24}
TEXTS = ("你好", "hello", "Who are you?", "图片里是什么？", "What can you do?")


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """With one replica, and room for a second when it has more than one request."""
    by_load = ("--replicas", "1..2", "--target-ongoing", "1", "--scale-up-after", "0.5")
    with cluster(tmp_path_factory.mktemp("home"), *by_load) as found:
        yield found


@pytest.fixture(scope="module")
def idle(started: Cluster) -> dict[str, float]:
    """The replicas that are ready before there is any load."""
    return started.figures("glimt:engine_ready")


@pytest.fixture(scope="module")
def running(started: Cluster, idle: dict[str, float]) -> Cluster:
    """With two replicas, since four asked at a time; none is taken away for 10 minutes."""
    assert idle
    long, has_second = body("hello", max_tokens=50, ignore_eos=True), threading.Event()

    def ask() -> None:
        while not has_second.is_set():
            assert started.post(CHAT, long).status_code == 200

    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(ask) for _ in range(4)]
        try:
            assert_soon(lambda: len(replica_pids(started)) == 2)
        finally:
            has_second.set()
    for each in asked:
        each.result()
    assert_two_ready(started)
    return started


def encoded(seed: int, comment: str = "") -> str:
    """A picture of its own as base64. comment: makes other bytes of the same pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    stream, said = io.BytesIO(), PngInfo()
    said.add_text("Comment", comment)
    Image.fromarray(pixels).save(stream, "PNG", pnginfo=said)
    return base64.b64encode(stream.getvalue()).decode()


def messages(text: str, shown: str | None = None) -> list[dict[str, Any]]:
    if shown is None:
        return [{"role": "user", "content": text}]
    url = {"url": f"data:image/png;base64,{shown}"}
    parts = [{"type": "image_url", "image_url": url}, {"type": "text", "text": text}]
    return [{"role": "user", "content": parts}]


def body(text: str, shown: str | None = None, **fields: Any) -> dict[str, Any]:
    return {"model": "demo", "messages": messages(text, shown), **GREEDY, **fields}


# --- more load -------------------------------------------------------------------------------


def test_a_burst_starts_a_second_replica_with_the_same_answers(idle, running, expected):
    """Would catch a load that Serve's autoscaler does not hear of, and a second replica that nobody
    is sent to or that answers otherwise.
    """
    assert idle == {"0": 1.0}
    text, shown, _ = kind(1)
    assert shown == encoded(1)
    answers: dict[str, set[str]] = {"0": set(), "1": set()}
    for number in range(12):  # other bytes of the same picture: other keys, so other replicas
        reply = running.post(CHAT, body(text, encoded(1, str(number))))
        answers[reply.headers["X-Glimt-Replica"]].add(said_in(reply))
    assert answers == {"0": {expected[1]}, "1": {expected[1]}}


def said_in(reply: requests.Response) -> str:
    """A whole answer's text."""
    assert reply.status_code == 200
    return str(reply.json()["choices"][0]["message"]["content"])


# --- the door --------------------------------------------------------------------------------


def test_health_needs_no_key_and_everything_else_does(running):
    """Would catch a cluster that is open where the server is not, or answers in another form."""
    assert running.get("/health", Authorization="").status_code == 200
    for path in ("/v1/models", "/metrics"):
        refused = running.get(path, Authorization="Bearer sk-other")
        assert refused.status_code == 401
        assert refused.json()["error"]["type"] == "AuthenticationError"
    assert running.get("/v1/models").json()["data"][0]["id"] == "demo"
    missing = running.get("/nope")
    assert (missing.status_code, missing.json()["error"]["type"]) == (404, "NotFoundError")


def test_headers_and_errors_of_a_replica_reach_the_caller(running):
    """Would catch a reply that loses its status, its request id or its field on the way."""
    given = {"X-Request-Id": "mine-1"}
    reply = running.post(CHAT, body("hello"), headers=given)
    assert (reply.status_code, reply.headers["X-Request-Id"]) == (200, "mine-1")
    assert reply.json()["id"] == "chatcmpl-mine-1"
    assert reply.headers["X-Glimt-Replica"] in ("0", "1")
    refused = running.post(CHAT, body("hello", temperature=-1))
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "temperature")
    tgi = running.post("/generate", {"inputs": "hello", "parameters": {"max_new_tokens": 0}})
    assert (tgi.status_code, tgi.json()["error_type"]) == (422, "validation")


def test_ports_are_on_loopback_or_ask_for_the_token(running):
    """Would catch Ray's ports, behind which anything may be run, open to the network.

    One of each of Serve's three processes listens everywhere, whatever Ray is told.
    """
    found = listening(descendants(running.process.pid))
    open_ports = [port for address, port in found if address not in LOOPBACK]
    assert len(open_ports) == 3
    assert len(found) > 10
    for port in open_ports:
        assert refusal_of(port) == "UNAUTHENTICATED"


def test_ray_is_told_to_report_no_start(running):
    """Would catch Ray's dashboard, which runs without a page too, telling its maker of it."""
    (dashboard,) = (
        pid for pid in descendants(running.process.pid) if "dashboard.py" in " ".join(words(pid))
    )
    assert variable(dashboard, "RAY_USAGE_STATS_ENABLED") == "0"


def refusal_of(port: int) -> str:
    """What a stranger's call is answered with."""
    import grpc

    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = channel.unary_unary("/ray.serve.ASGIService/HandleRequest")
        with pytest.raises(grpc.RpcError) as caught:
            call(b"", timeout=10)
    return str(caught.value.code().name)


# --- affinity --------------------------------------------------------------------------------


def test_repeated_pictures_are_found_where_they_were_encoded(running):
    """Would catch requests dealt out in turn: half of the repeats would be encoded again."""
    before = sum(running.figures("glimt:tower_images_total").values())
    shown = [encoded(seed) for seed in range(100, 108)]

    def ask(number: int) -> str:
        reply = running.post(CHAT, body(f"Question {number}", shown[number % 8], max_tokens=2))
        return reply.headers["X-Glimt-Replica"]

    with ThreadPoolExecutor(4) as pool:
        ranks = list(pool.map(ask, range(48)))
    encodings = sum(running.figures("glimt:tower_images_total").values()) - before
    assert encodings >= 8
    assert 1 - (encodings - 8) / 40 >= 0.9
    assert set(ranks) == {"0", "1"}
    assert all(len({ranks[i] for i in range(first, 48, 8)}) == 1 for first in range(8))


def test_a_client_that_leaves_ends_its_request(running):
    """Would catch an answer that is computed to its end for nobody."""
    long = body("hello", stream=True, max_tokens=2000, ignore_eos=True)
    reply = running.post(CHAT, long, stream=True)
    assert reply.status_code == 200
    pieces = reply.iter_content(1)
    next(pieces)
    assert_soon(lambda: num_running(running) == 1)
    reply.close()
    assert_soon(lambda: num_running(running) == 0)
    aborts = running.get("/metrics").text.count(
        'vllm:request_success_total{finished_reason="abort"'
    )
    assert aborts == 1


def num_running(running: Cluster) -> float:
    return sum(running.figures("vllm:num_requests_running").values())


def assert_soon(is_so: Callable[[], bool], timeout_s: float = 60) -> None:
    """Look again and again until it is so."""
    tick = threading.Event()
    for _ in range(int(10 * timeout_s)):
        if is_so():
            return
        tick.wait(0.1)
    raise AssertionError("it never was so")


# --- a replica dies --------------------------------------------------------------------------


@dataclass
class Load:
    """What became of every request, by its number. failures: explicit ones, told and retried."""

    running: Cluster
    answers: dict[int, str] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def ask(self, number: int) -> None:
        """Ask until there is an answer, as a client does that is told to try again."""
        for attempt in range(5):
            text = self._once(number, attempt)
            if text is not None:
                assert number not in self.answers
                self.answers[number] = text
                return
        raise AssertionError(f"request {number} failed again and again")

    def _once(self, number: int, attempt: int) -> str | None:
        text, shown, is_streamed = kind(number)
        request_id = f"r{number}-{attempt}"
        reply = self.running.post(
            CHAT,
            body(text, shown, stream=is_streamed),
            headers={"X-Request-Id": request_id},
        )
        assert reply.headers["X-Request-Id"] == request_id
        if reply.status_code != 200:
            assert reply.status_code == 503
            assert "gone" in reply.json()["error"]["message"]
            self.failures.append(request_id)
            return None
        return self._streamed(reply, request_id) if is_streamed else content(reply, request_id)

    def _streamed(self, reply: requests.Response, request_id: str) -> str | None:
        said = events(reply)
        assert reply.content.endswith(b"data: [DONE]\n\n")
        if "error" in said[-1]:
            assert said[-1]["error"]["message"] == "the replica that answered is gone; ask again"
            self.failures.append(request_id)
            return None
        assert {each["id"] for each in said} == {f"chatcmpl-{request_id}"}
        assert [each["choices"][0]["finish_reason"] for each in said].count("stop") <= 1
        return "".join(each["choices"][0]["delta"].get("content") or "" for each in said)


def content(reply: requests.Response, request_id: str) -> str:
    said = reply.json()
    assert said["id"] == f"chatcmpl-{request_id}"
    return str(said["choices"][0]["message"]["content"])


def kind(number: int) -> tuple[str, str | None, bool]:
    """Text, picture and whether it is streamed: 20 kinds, all mixed."""
    text = TEXTS[number % 5]
    shown = encoded(number % 4) if number % 2 else None
    return text, shown, number // 2 % 2 == 1


@pytest.fixture(scope="module")
def expected() -> dict[int, str]:
    """Of each kind, what one engine answers."""
    llm = glimt.LLM("demo")
    sampling = glimt.SamplingParams(**GREEDY)
    kinds = [messages(*kind(number)[:2]) for number in range(20)]
    return {n: llm.chat(asked, sampling).text for n, asked in enumerate(kinds)}


def test_no_request_is_lost_when_a_replica_is_killed(running, expected):
    """Would catch a request that hangs, is answered twice or wrongly, or ends as if it were whole
    when its replica dies under load; and a cluster that does not heal.
    """
    homes = {n: home_of(running, n) for n in range(8)}
    load, done = Load(running), threading.Semaphore(0)

    def ask(number: int) -> None:
        load.ask(number)
        done.release()

    with ThreadPoolExecutor(IN_FLIGHT) as pool:
        waiting = [pool.submit(ask, number) for number in range(NUM_REQUESTS)]
        for _ in range(KILL_AFTER):
            assert done.acquire(timeout=60)
        os.kill(replica_pids(running)[0], signal.SIGKILL)
        for each in waiting:
            each.result(120)
    assert load.answers == {n: expected[n % 20] for n in range(NUM_REQUESTS)}
    assert len(load.failures) <= IN_FLIGHT
    assert_two_ready(running)
    assert {n: home_of(running, n) for n in range(8)} == homes


def home_of(running: Cluster, seed: int) -> str:
    """The replica that a picture's requests go to."""
    reply = running.post(CHAT, body("hello", encoded(1000 + seed), max_tokens=1))
    assert reply.status_code == 200
    return reply.headers["X-Glimt-Replica"]


def assert_two_ready(running: Cluster) -> None:
    """Wait until two replicas tell their figures."""
    both = {"0": 1.0, "1": 1.0}
    assert_soon(lambda: running.figures("glimt:engine_ready") == both)


# --- a divided model -------------------------------------------------------------------------

DIVIDED = ("--replicas", "1", "--tp", "2", "--dtype", "float32")


@pytest.fixture(scope="module")
def divided(running: Cluster) -> Cluster:
    """The same cluster with one replica of two ranks in the place of two replicas."""
    done = restart(running, *DIVIDED)
    assert done.returncode == 0, done.stderr
    assert "every replica is new" in done.stderr
    assert_soon(lambda: len(replica_pids(running)) == 1)
    return running


def test_a_replica_of_two_ranks_answers_like_one_process(divided):
    """Would catch a rolling restart that keeps an old replica, ranks that do not meet within Ray,
    and a part of a model that one rank reads wrongly there.
    """
    (replica,) = replica_pids(divided)
    assert len(rank_pids(replica)) == 1  # the replica itself is the other
    llm = glimt.LLM("demo", dtype="float32")
    sampling = glimt.SamplingParams(**GREEDY)
    for number in range(5):
        text, shown, _ = kind(number)
        reply = divided.post(CHAT, body(text, shown))
        assert reply.headers["X-Glimt-Replica"] == "0"
        assert said_in(reply) == llm.chat(messages(text, shown), sampling).text


def test_a_killed_rank_ends_its_request_with_an_error_and_its_replica_serves_again(divided):
    """Would catch a caller that waits for ever, a stream that ends as if it were whole, a replica
    that stays down, and one that leaves half of a model behind.
    """
    (replica,) = replica_pids(divided)
    (killed,) = rank_pids(replica)
    before = said_in(divided.post(CHAT, body("hello")))
    long = body("hello", stream=True, max_tokens=900, ignore_eos=True)
    pieces = divided.post(CHAT, long, stream=True).iter_content(None)
    first = next(pieces)
    os.kill(killed, signal.SIGKILL)
    assert_failed((first + b"".join(pieces)).decode(), "rank 1 is gone")
    answers: list[str] = []
    assert_soon(lambda: is_answered(divided, answers))
    assert answers == [before]
    assert replica_pids(divided) == [replica]
    assert killed not in rank_pids(replica)
    assert len(rank_pids(replica)) == 1


def assert_failed(stream: str, why: str) -> None:
    """It ends with one error that says why, and with no reason to finish before it."""
    *begun, last, end = [line[6:] for line in stream.split("\n\n") if line.startswith("data: ")]
    assert end == "[DONE]"
    assert why in json.loads(last)["error"]["message"]
    choices = [each for line in begun for each in json.loads(line)["choices"]]
    assert {each["finish_reason"] for each in choices} == {None}


def is_answered(divided: Cluster, answers: list[str]) -> bool:
    """Ask once; until the ranks are back, the caller is told to come again."""
    reply = divided.post(CHAT, body("hello"))
    if reply.status_code == 200:
        answers.append(said_in(reply))
        return True
    assert reply.status_code == 503
    assert reply.headers["Retry-After"]
    return False


# --- its end ---------------------------------------------------------------------------------


def test_it_ends_when_told_with_its_answers_finished(running):
    """Would catch a cluster that cuts a running answer, or leaves processes behind."""
    begun, ends = threading.Event(), {"text": b""}

    def listen() -> None:
        long = body("hello", stream=True, max_tokens=100, ignore_eos=True)
        reply = running.post(CHAT, long, stream=True)
        for piece in reply.iter_content(None):
            begun.set()
            ends["text"] += piece

    hearing = threading.Thread(target=listen)
    hearing.start()
    assert begun.wait(30)
    left = descendants(running.process.pid)
    running.process.send_signal(signal.SIGTERM)
    hearing.join(60)
    assert ends["text"].endswith(b"data: [DONE]\n\n")
    assert b'"error"' not in ends["text"]
    assert running.process.wait(60) == 0
    assert not [pid for pid in left if Path(f"/proc/{pid}/stat").exists() and is_alive(pid)]


def is_alive(pid: int) -> bool:
    state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return state != "Z"
