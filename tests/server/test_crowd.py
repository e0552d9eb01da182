"""Many clients at once, rude ones among them: nobody is lost, harmed or remembered."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest
from PIL import Image

from glimt.demo.noise import FAMILIES, write_noise_model
from glimt.server.config import ServerConfig
from serving import Served, serving

NUM_CLIENTS = 64
NUM_TOKENS = 24
NUM_KINDS = 8  # of questions, so that an answer can be compared with an undisturbed one
NUM_BLOCKS = 26  # of 4 tokens: about a tenth of what all need together
POLL_S = 0.01
MOST_LOOKS = round(1 / POLL_S)  # within a second


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param)
    write_noise_model(path, request.param)
    return path


@pytest.fixture
def server(folder: Path) -> Iterator[Served]:
    options = {"num_blocks": NUM_BLOCKS, "block_size": 4, "max_num_seqs": 16}
    config = ServerConfig(num_decoders=0, max_waiting=NUM_CLIENTS)
    with serving(str(folder), config, **options) as served:
        yield served


def picture(seed: int) -> str:
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"


def body(kind: int, stream: bool, num_tokens: int = NUM_TOKENS) -> dict[str, Any]:
    """One of NUM_KINDS questions; every other shows a picture."""
    parts: list[dict[str, Any]] = [{"type": "text", "text": f"问题 {kind}"}]
    if kind % 2:
        parts.insert(0, {"type": "image_url", "image_url": {"url": picture(kind)}})
    return {
        "messages": [{"role": "user", "content": parts}],
        "temperature": 0,
        "max_tokens": num_tokens,
        "ignore_eos": True,
        "stream": stream,
    }


async def whole(session: aiohttp.ClientSession, url: str, kind: int) -> tuple[int, str]:
    """Status and answer of a request that is not streamed."""
    async with session.post(f"{url}/v1/chat/completions", json=body(kind, False)) as reply:
        told = await reply.json()
        if reply.status != 200:
            return reply.status, json.dumps(told)
        return 200, told["choices"][0]["message"]["content"]


async def streamed(
    session: aiohttp.ClientSession, url: str, kind: int, leaves_after: int | None
) -> tuple[int | str, str]:
    """The same of a streamed one; "left" for a client that goes after so many events."""
    text, has_ended, num_events = [], False, 0
    async with session.post(f"{url}/v1/chat/completions", json=body(kind, True)) as reply:
        if reply.status != 200:
            return reply.status, await reply.text()
        async for line in reply.content:
            if not line.startswith(b"data: "):
                continue
            num_events += 1
            if leaves_after is not None and num_events > leaves_after:
                return "left", ""
            data = line[6:].strip()
            if data == b"[DONE]":
                has_ended = True
                continue
            event = json.loads(data)
            assert "error" not in event, event
            text += [choice["delta"].get("content") or "" for choice in event["choices"]]
    assert has_ended, "a stream ended without its last event"
    return 200, "".join(text)


async def client(session: aiohttp.ClientSession, url: str, number: int) -> tuple[Any, int, str]:
    """Outcome, kind and answer; every third client is rude."""
    chance = random.Random(number)
    kind = number % NUM_KINDS
    await asyncio.sleep(chance.random() * 0.2)
    if number % 3 == 0:
        if chance.random() < 0.5:
            outcome, text = await streamed(session, url, kind, chance.randint(0, 8))
            return outcome, kind, text
        try:  # leaves in the middle of a request that is not streamed
            async with asyncio.timeout(chance.random() * 0.3):
                return (await whole(session, url, kind))[0], kind, "unread"
        except TimeoutError:
            return "left", kind, ""
    if number % 2:
        status, text = await whole(session, url, kind)
        return status, kind, text
    outcome, text = await streamed(session, url, kind, None)
    return outcome, kind, text


@dataclass(frozen=True)
class Crowd:
    """Undisturbed answers by kind, what everybody got at once, and how long until it was quiet.

    looks: at the engine, POLL_S apart, from the last client's end until nothing was left
    """

    alone: dict[int, str]
    outcomes: list[tuple[Any, int, str]]
    looks: int


def is_clean(server: Served) -> bool:
    stats = server.engine.stats()
    return stats.num_free_blocks == NUM_BLOCKS and not server.context.service.num_open


async def looks_until_clean(server: Served) -> int:
    """Looks and not seconds: a machine that is busy keeps the server, in this process, as long."""
    for look in range(1, 10 * MOST_LOOKS):
        if is_clean(server):
            return look
        await asyncio.sleep(POLL_S)
    raise AssertionError(f"something stays taken: {server.engine.stats()}")


async def crowd(server: Served) -> Crowd:
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    timeout = aiohttp.ClientTimeout(120)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        url = server.url
        alone = {kind: (await whole(session, url, kind))[1] for kind in range(NUM_KINDS)}
        clients = (client(session, url, number) for number in range(NUM_CLIENTS))
        outcomes = await asyncio.gather(*clients)
        return Crowd(alone, outcomes, await looks_until_clean(server))


def test_a_crowd_gets_its_answers_and_leaves_nothing_behind(server):
    """Catches a lost request, an answer that a neighbour changes, and blocks that stay taken."""
    found = asyncio.run(crowd(server))
    outcomes = found.outcomes
    assert len(outcomes) == NUM_CLIENTS
    assert {outcome for outcome, _, _ in outcomes} <= {200, "left"}
    answered = [(kind, text) for outcome, kind, text in outcomes if outcome == 200]
    assert len(answered) >= NUM_CLIENTS // 2
    for kind, text in answered:
        assert text in (found.alone[kind], "unread")
    assert found.looks <= MOST_LOOKS, "all must be free within a second of the last client's end"
    stats = server.engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.failed_steps) == (0, 0, 0)
    assert stats.preemptions > 0, "the pool was not too small"


async def flood(url: str, count: int) -> list[tuple[int, str]]:
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(connector=connector) as session:
        alone = await whole(session, url, 0)
        found = await asyncio.gather(*(whole(session, url, 0) for _ in range(count)))
        return [alone, *found]


def test_beyond_capacity_some_are_refused_and_the_others_unharmed(folder):
    """Catches a queue without an end, a 500 under load, and an answer that a crowd changes."""
    options = {"num_blocks": NUM_BLOCKS, "block_size": 4, "max_num_seqs": 4}
    config = ServerConfig(num_decoders=0, max_waiting=4)
    with serving(str(folder), config, **options) as served:
        alone, *found = asyncio.run(flood(served.url, 80))
        assert {status for status, _ in found} == {200, 429}
        assert {text for status, text in found if status == 200} == {alone[1]}
        refused = next(json.loads(text) for status, text in found if status == 429)
        assert refused["error"]["type"] == "RateLimitError"
        assert served.context.service.num_open == 0
