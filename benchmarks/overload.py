"""A server under ten times the load that it can bear, for a minute, seen from outside.

    python -m benchmarks.overload demo
    python -m benchmarks.overload demo-visualglm --term

`glimt serve` is a process of its own; everything goes over loopback. First each question is asked
alone, and as many clients as answers run together find the capacity (closed loop). Then requests
arrive at ten times that rate, whether others are done or not (open loop): texts and pictures,
whole and streamed, every tenth from a client that leaves. With --term the server is told to end in
the middle. What was promised and not kept is listed under "broken" in the JSON line at the end.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np

from benchmarks.stream_gap import body
from glimt.bench.load.pictures import Size, data_url, draw_picture

SERVE = [sys.executable, "-c", "from glimt.cli import main; main()", "serve", "--port", "0"]
NUM_KINDS = 8  # of questions; every other shows a picture
NUM_TOKENS = 24
MAX_SEQS, MAX_WAITING = 16, 32
CAPACITY_S = 8.0
SETTLE_S = 10.0  # the load's beginning, before memory is judged
RISE_BYTES = 32 * 2**20  # that the server may grow by after it
DRAIN_S = 30.0
CHAT = "/v1/chat/completions"


@dataclass(frozen=True, slots=True)
class Seen:
    """What one client got.

    outcome: the HTTP status; "left" for a client that went, "refused" without a connection, or
             "broken": a reply that began or was waited for and did not end as it must
    sent_s, ended_s: seconds, monotonic
    """

    kind: int
    outcome: int | str
    text: str
    sent_s: float
    ended_s: float
    has_retry: bool = False


@dataclass(slots=True)
class Watched:
    """What was read of the server meanwhile; memory in bytes, one sample a second."""

    own: list[int] = field(default_factory=list)
    children: list[int] = field(default_factory=list)
    health: Counter[int | str] = field(default_factory=Counter)
    metrics: Counter[int | str] = field(default_factory=Counter)
    slowest_s: float = 0.0


# --- requests --------------------------------------------------------------------------------


def question(kind: int, is_stream: bool) -> dict[str, Any]:
    """One of the questions, greedy, with an answer of NUM_TOKENS tokens."""
    parts: list[dict[str, Any]] = [{"type": "text", "text": f"问题 {kind}: 图里有什么?"}]
    if kind % 2:
        url = data_url(draw_picture(Size(320, 240), f"overload {kind}"), "jpeg")
        parts.insert(0, {"type": "image_url", "image_url": {"url": url}})
    return body(parts, NUM_TOKENS, is_stream)


class Client:
    """Asks one server; bodies are written before the clock starts."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self._session, self._url = session, url
        self._bodies = {
            (kind, is_stream): json.dumps(question(kind, is_stream)).encode()
            for kind in range(NUM_KINDS)
            for is_stream in (False, True)
        }

    async def get(self, path: str) -> tuple[int, str]:
        """Status and text of a page."""
        async with self._session.get(self._url + path) as reply:
            return reply.status, await reply.text()

    async def ask(self, number: int, leaves: bool = False) -> Seen:
        """Request `number`; whatever happens becomes an outcome."""
        kind, is_stream = number % NUM_KINDS, bool(number // NUM_KINDS % 2)
        sent_s = time.monotonic()
        patience_s = random.Random(number).uniform(0.0, 3.0) if leaves else 120.0
        has_retry, text, outcome = False, "", "broken"
        try:
            async with asyncio.timeout(patience_s), self._post(kind, is_stream) as reply:
                has_retry = "Retry-After" in reply.headers
                found = _streamed(reply) if is_stream and reply.status == 200 else _whole(reply)
                text = await found
                outcome = reply.status
        except TimeoutError:
            outcome = "left" if leaves else "broken"
        except aiohttp.ClientConnectorError:
            outcome = "refused"
        except (aiohttp.ClientError, OSError, ValueError, KeyError) as error:
            text = repr(error)
        return Seen(kind, outcome, text, sent_s, time.monotonic(), has_retry)

    def _post(self, kind: int, is_stream: bool) -> Any:
        content = self._bodies[kind, is_stream]
        headers = {"Content-Type": "application/json"}
        return self._session.post(self._url + CHAT, data=content, headers=headers)


async def _whole(reply: aiohttp.ClientResponse) -> str:
    told = await reply.json()
    if reply.status != 200:
        return str(told["error"]["message"])
    (choice,) = told["choices"]
    if choice["finish_reason"] != "length":
        raise ValueError(f"ended by {choice['finish_reason']}")
    return str(choice["message"]["content"])


async def _streamed(reply: aiohttp.ClientResponse) -> str:
    """The text of a stream. Raises ValueError unless it ends exactly once, and as it must."""
    lines = [line.strip() async for line in reply.content]
    data = [line.removeprefix(b"data: ") for line in lines if line.startswith(b"data: ")]
    if data.pop() != b"[DONE]":
        raise ValueError("a stream without an end")
    events = [json.loads(line) for line in data]
    choices = [choice for event in events for choice in event["choices"]]
    ends = [choice["finish_reason"] for choice in choices if choice["finish_reason"]]
    if ends != ["length"]:
        raise ValueError(f"a stream with the ends {ends}")
    return "".join(choice["delta"].get("content") or "" for choice in choices)


# --- the server and its memory ---------------------------------------------------------------


@contextmanager
def served(model: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """`glimt serve` as a process, and its address. Raises RuntimeError if it does not start."""
    options = ["-m", model, "--max-num-seqs", str(MAX_SEQS), "--max-waiting", str(MAX_WAITING)]
    options += ["--drain-timeout", f"{DRAIN_S:g}", "--log-level", "error"]
    with subprocess.Popen([*SERVE, *options], stderr=subprocess.PIPE, text=True) as process:
        try:
            yield address_of(process), process
        finally:
            process.terminate()


def address_of(process: subprocess.Popen[str]) -> str:
    """What the server says of its port, before the model is loaded."""
    for line in process.stderr or ():
        if found := re.search(r"http://127\.0\.0\.1:\d+", line):
            return found[0]
    raise RuntimeError("the server did not start")


def resident(pid: int) -> int:
    """Bytes of memory that a process holds; 0 once it has gone."""
    try:
        found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return 0
    return int(found[1]) * 1024 if found else 0


def children_of(pid: int) -> list[int]:
    """Processes that it started, and theirs."""
    try:
        files = list(Path(f"/proc/{pid}/task").glob("*/children"))
        found = [int(child) for file in files for child in file.read_text().split()]
    except OSError:
        return []
    return found + [inner for child in found for inner in children_of(child)]


async def watch(client: Client, pid: int, watched: Watched) -> None:
    """Sample memory and ask /health and /metrics each second, until cancelled."""
    while True:
        began_s = time.monotonic()
        watched.own.append(resident(pid))
        watched.children.append(sum(map(resident, children_of(pid))))
        for path, counts in (("/health", watched.health), ("/metrics", watched.metrics)):
            try:
                counts[(await client.get(path))[0]] += 1
            except (aiohttp.ClientError, OSError) as error:
                counts[type(error).__name__] += 1
        spent_s = time.monotonic() - began_s
        watched.slowest_s = max(watched.slowest_s, spent_s)
        await asyncio.sleep(max(0.0, 1.0 - spent_s))


# --- the load --------------------------------------------------------------------------------


async def until_ready(client: Client) -> None:
    """Return once requests are answered."""
    while (await client.get("/health"))[0] != 200:
        await asyncio.sleep(0.05)


async def capacity(client: Client) -> float:
    """Answers per second with as many clients as answers run together."""
    end_s = time.monotonic() + CAPACITY_S
    seen: list[Seen] = []

    async def one(first: int) -> None:
        number = first
        while time.monotonic() < end_s:
            seen.append(await client.ask(number))
            number += MAX_SEQS + 1

    await asyncio.gather(*map(one, range(MAX_SEQS)))
    assert {each.outcome for each in seen} == {200}, Counter(each.outcome for each in seen)
    return len(seen) / CAPACITY_S


async def flood(client: Client, rate: float, seconds: float) -> list[Seen]:
    """Requests that arrive as a Poisson process; each is waited for to its end."""
    chance = random.Random(0)
    start_s, due_s, tasks = time.monotonic(), 0.0, []
    while due_s < seconds:
        await asyncio.sleep(max(0.0, start_s + due_s - time.monotonic()))
        number = len(tasks)
        tasks.append(asyncio.create_task(client.ask(number, leaves=number % 10 == 9)))
        due_s += chance.expovariate(rate)
    return await asyncio.gather(*tasks)


@asynccontextmanager
async def opened(url: str) -> AsyncIterator[Client]:
    """A client with as many connections as it needs."""
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        yield Client(session, url)


async def is_clean(client: Client) -> bool:
    """No block taken, nothing running, nothing waiting."""
    names = ("kv_cache_usage_perc", "num_requests_running", "num_requests_waiting")
    text = (await client.get("/metrics"))[1]
    return all(re.search(rf"^vllm:{name}{{[^}}]*}} 0\.0$", text, re.MULTILINE) for name in names)


async def clean_after(client: Client) -> float | None:
    """Seconds until nothing is left in the engine; None: not within ten."""
    began_s = time.monotonic()
    while (spent_s := time.monotonic() - began_s) < 10:
        if await is_clean(client):
            return spent_s
        await asyncio.sleep(0.01)
    return None


async def beside(work: Awaitable[list[Seen]], watching: asyncio.Task[None]) -> list[Seen]:
    """The work's result; the watching ends with it."""
    try:
        return await work
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)


# --- what it came to -------------------------------------------------------------------------


def slope(samples: Sequence[int]) -> float:
    """Bytes per second of a straight line through samples of one a second."""
    return float(np.polyfit(range(len(samples)), samples, 1)[0]) if len(samples) > 1 else 0.0


def memory_facts(samples: Sequence[int]) -> dict[str, float]:
    """MiB: after the load's beginning, at most from there on, and the slope in MiB a minute."""
    later = samples[round(SETTLE_S) :] or samples[-1:]
    return {
        "first": round(samples[0] / 2**20, 1),
        "settled": round(later[0] / 2**20, 1),
        "most": round(max(later) / 2**20, 1),
        "last": round(later[-1] / 2**20, 1),
        "slope_per_min": round(60 * slope(later) / 2**20, 2),
    }


def wrong(seen: Sequence[Seen], alone: Sequence[str]) -> int:
    """Answers that are not what the same question gets alone."""
    return sum(each.outcome == 200 and each.text != alone[each.kind] for each in seen)


def broken_promises(seen: Sequence[Seen], alone: Sequence[str], term_s: float) -> Iterator[str]:
    """Of the requests. term_s: when the server was told to end; infinite: never."""
    for each in seen:
        known = {200, 429, "left"} if each.sent_s < term_s else {200, 429, 503, "left", "refused"}
        # A connection that is opened while the port closes is reset: nobody has taken it.
        if each.outcome not in known and not (each.outcome == "broken" and each.sent_s > term_s):
            yield f"{each.outcome} {each.text[:120]}"
        if each.outcome in (429, 503) and not each.has_retry:
            yield f"{each.outcome} without Retry-After"
    if count := wrong(seen, alone):
        yield f"{count} answers are not those of an undisturbed server"


def memory_broken(watched: Watched) -> Iterator[str]:
    """What does not stay flat of the server's own memory."""
    later = watched.own[round(SETTLE_S) :]
    if later and max(later) - later[0] > RISE_BYTES:
        yield f"memory grew by {(max(later) - later[0]) / 2**20:.0f} MiB after {SETTLE_S:g} s"


def facts_of(seen: Sequence[Seen], watched: Watched, rate: float) -> dict[str, Any]:
    """The figures of one flood."""
    span_s = max(each.sent_s for each in seen) - min(each.sent_s for each in seen)
    answered = [each.ended_s - each.sent_s for each in seen if each.outcome == 200]
    refused = [each.ended_s - each.sent_s for each in seen if each.outcome == 429]
    return {
        "capacity_per_s": round(rate, 1),
        "offered_per_s": round(len(seen) / span_s, 1),
        "requests": len(seen),
        "outcomes": {str(name): count for name, count in Counter(e.outcome for e in seen).items()},
        "answered_s_p50_p99": [round(float(np.percentile(answered, p)), 2) for p in (50, 99)],
        "refused_s_p50_p99": [round(float(np.percentile(refused, p)), 3) for p in (50, 99)],
        "own_mib": memory_facts(watched.own),
        "children_mib": memory_facts(watched.children),
        "health": {str(name): count for name, count in watched.health.items()},
        "metrics": {str(name): count for name, count in watched.metrics.items()},
        "slowest_probe_s": round(watched.slowest_s, 2),
    }


async def term(process: subprocess.Popen[str], after_s: float) -> tuple[float, float, int]:
    """Tell the server to end; gives when, after how long it did, and its exit code."""
    await asyncio.sleep(after_s)
    told_s = time.monotonic()
    process.send_signal(signal.SIGTERM)
    code = await asyncio.to_thread(process.wait, DRAIN_S + 20)
    return told_s, time.monotonic() - told_s, code


async def run(url: str, process: subprocess.Popen[str], given: argparse.Namespace) -> Any:
    """Capacity, flood, and what is left of it."""
    async with opened(url) as client:
        await until_ready(client)
        asked = [await client.ask(kind) for kind in range(NUM_KINDS)]
        assert {each.outcome for each in asked} == {200}, asked
        alone = [each.text for each in asked]
        rate = await capacity(client)
        watched = Watched()
        watching = asyncio.create_task(watch(client, process.pid, watched))
        ending = asyncio.create_task(term(process, given.seconds / 2)) if given.term else None
        seen = await beside(flood(client, given.factor * rate, given.seconds), watching)
        facts = {"model": given.model, **facts_of(seen, watched, rate)}
        told_s, broken = float("inf"), []
        if ending is not None:
            told_s, took_s, code = await ending
            facts |= {"exit_code": code, "ended_after_s": round(took_s, 2)}
            broken += [f"exit code {code}"] if code else []
        else:
            facts["clean_after_s"] = clean_s = await clean_after(client)
            broken += [*memory_broken(watched)]
            broken += [] if clean_s is not None and clean_s < 1 else ["blocks stay taken"]
            strange = set(watched.health) | set(watched.metrics)
            broken += [] if strange == {200} else [f"probes: {strange}"]
        return facts | {"broken": sorted({*broken, *broken_promises(seen, alone, told_s)})}


def main() -> None:
    """One flood; figures as one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--factor", type=float, default=10.0)
    parser.add_argument("--term", action="store_true", help="SIGTERM in the middle")
    given = parser.parse_args()
    with served(given.model) as (url, process):
        facts = asyncio.run(run(url, process, given))
    print(json.dumps({**facts, "cores": os.cpu_count()}, ensure_ascii=False))


if __name__ == "__main__":
    main()
