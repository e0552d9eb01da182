"""A served model that is divided among ranks, one of which is killed under load."""

from __future__ import annotations

import json
import os
import signal
import threading
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import glimt
from glimt.server.app import create_app
from glimt.server.config import ServerConfig
from processes import rank_pids
from serving import running, wait_ready

NUM_STREAMS = 4


def post(url: str, max_tokens: int, stream: bool) -> urllib.request.Request:
    body = {
        "model": "m",
        "messages": [{"role": "user", "content": "Hello"}],
        "temperature": 0,
        "max_tokens": max_tokens,
        "ignore_eos": True,
        "stream": stream,
    }
    data = json.dumps(body).encode()
    return urllib.request.Request(
        f"{url}/v1/chat/completions", data, {"Content-Type": "application/json"}
    )


def answer(url: str) -> str:
    with urllib.request.urlopen(post(url, 8, False), timeout=120) as reply:
        return str(json.load(reply)["choices"][0]["message"]["content"])


def events(url: str, has_begun: threading.Semaphore) -> list[str]:
    """Every event of a long stream, to its end."""
    found = []
    with urllib.request.urlopen(post(url, 900, True), timeout=120) as reply:
        for line in reply:
            if line.startswith(b"data: "):
                found.append(line[6:].decode().strip())
                has_begun.release()
    return found


def test_a_killed_rank_ends_its_streams_with_an_error_and_serving_resumes(
    folders: dict[str, Path],
) -> None:
    """Catches a client that waits for ever, a stream that ends as if whole, a server that stays
    down, and a second model in memory beside the dead one.
    """
    config = glimt.EngineConfig(
        model=str(folders["glm4v_9b"]), dtype="float32", tp_size=2, kv_bytes=2**26
    )
    engines: list[glimt.AsyncEngine] = []

    def load() -> glimt.AsyncEngine:
        engines.append(glimt.AsyncEngine.load(config))
        return engines[-1]

    app, _ = create_app(load, ServerConfig(num_decoders=0), "m", created=0)
    with running(app) as url, ThreadPoolExecutor(NUM_STREAMS) as pool:
        wait_ready(url)
        before = answer(url)
        has_begun = threading.Semaphore(0)
        streams = [pool.submit(events, url, has_begun) for _ in range(NUM_STREAMS)]
        for _ in range(2 * NUM_STREAMS):
            has_begun.acquire()
        (killed,) = rank_pids(engines[0])
        os.kill(killed, signal.SIGKILL)
        for stream in streams:
            assert_failed(stream.result())
        while len(engines) < 2:
            pass
        wait_ready(url)
        assert answer(url) == before
    assert not any(exists(pid) for pid in [killed, *rank_pids(engines[1])])


def assert_failed(found: list[str]) -> None:
    """Exactly one error, then the end, and no finish reason before it."""
    assert found[-1] == "[DONE]"
    bodies = [json.loads(event) for event in found[:-1]]
    assert [("error" in body) for body in bodies] == [False] * (len(bodies) - 1) + [True]
    reasons = {c["finish_reason"] for body in bodies[:-1] for c in body["choices"]}
    assert reasons <= {None}


def exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
