"""A replica that nobody looks at any more: when it notices, and what its callers are told."""

from __future__ import annotations

import asyncio
import json
from contextlib import aclosing
from types import SimpleNamespace
from typing import Any

import pytest

from glimt.cluster import silence
from glimt.cluster.silence import Silence, silence_s
from glimt.server.config import ServerConfig

TICK_S = 1e-6


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(silence, "TICK_S", TICK_S)


async def rounds(count: int, watch: Silence | None = None) -> None:
    """Let the loop go round; watch: looked at in every one."""
    for _ in range(count):
        if watch is not None:
            watch.looked()
        await asyncio.sleep(0)


def test_each_silence_is_noticed_once_and_none_before_the_first_look():
    """Would catch a replica that gives up while it loads, while it is well, or again and again."""

    async def scene() -> list[int]:
        told: list[int] = []
        watch, seen = Silence(20 * TICK_S, lambda: told.append(1)), []
        await rounds(1000)
        seen.append(len(told))
        await rounds(1000, watch)
        seen.append(len(told))
        for _ in range(2):
            while len(told) == seen[-1]:
                await asyncio.sleep(0)
            await asyncio.sleep(1000 * TICK_S)
            await rounds(1000)
            seen.append(len(told))
            watch.looked()
        watch.close()
        return seen

    assert asyncio.run(asyncio.wait_for(scene(), 60)) == [0, 0, 1, 2]


@pytest.mark.parametrize(("drain_s", "period_s", "found"), [(90, 5, 95), (1, 5, 15)])
def test_answers_have_their_time_and_a_busy_controller_its_own(drain_s, period_s, found):
    """Would catch a short --drain-timeout that takes one late look for the end."""
    assert silence_s(drain_s, period_s) == found


def test_a_replica_that_is_forsaken_tells_its_callers(folders, monkeypatch):
    """Would catch a stream that Serve cuts without a word, or that ends as if it were whole."""
    pytest.importorskip("ray.serve", reason="needs ray: pip install 'glimt[cluster]'")
    from glimt.cluster import replica as replicas
    from glimt.cluster.plan import ClusterPlan
    from glimt.config import EngineConfig

    place = SimpleNamespace(replica_id=SimpleNamespace(unique_id="r"), rank=SimpleNamespace(rank=0))
    monkeypatch.setattr(replicas.serve, "get_replica_context", lambda: place)
    monkeypatch.setattr(replicas, "start_logging", lambda level, form: None)
    monkeypatch.setattr(replicas.sys, "setswitchinterval", lambda seconds: None)
    monkeypatch.setattr(replicas, "silence_s", lambda drain_s, period_s: 20 * TICK_S)
    plan = ClusterPlan(
        engine=EngineConfig(model=str(folders["glm4v_9b"])),
        server=ServerConfig(num_decoders=0),
        model_name="demo",
    )

    class Ended(replicas.Replica):
        def __del__(self) -> None:  # type: ignore[override]
            """Serve awaits the original's, Python does not."""

    async def scene() -> str:
        found: Any = object.__new__(Ended)
        await replicas.Replica.__init__(found, plan.replica_text(), "info", "text")
        body = {
            "messages": [{"role": "user", "content": "你好"}],
            "stream": True,
            "max_tokens": 400,
            "ignore_eos": True,
        }
        head = ("POST", "/v1/chat/completions", "", [(b"x-request-id", b"r")])
        said = b""
        async with aclosing(found.answer("", "", head, json.dumps(body).encode())) as pieces:
            async for piece in pieces:
                if isinstance(piece, bytes) and not said:
                    await found.check_health()
                    while not found._context.service._endings["r"].is_asked:
                        await asyncio.sleep(0)
                said += piece if isinstance(piece, bytes) else b""
        assert await found.drain() == 0
        await replicas.Replica.__del__(found)
        return said.decode()

    *begun, last, end = asyncio.run(asyncio.wait_for(scene(), 120)).strip().split("\n\n")
    assert end == "data: [DONE]"
    assert "the replica is ending; ask again" in json.loads(last[6:])["error"]["message"]
    choices = [each for line in begun for each in json.loads(line[6:])["choices"]]
    assert {each["finish_reason"] for each in choices} == {None}
