"""Closed and open loops over a server that is a function: who is sent when, and none is lost."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from glimt.bench.load.outcome import Outcome
from glimt.bench.load.run import Plan, Run


class FakeServer:
    """Answers when told to; counts who is there."""

    def __init__(self, kind: Any = "completed") -> None:
        self.kind = kind
        self.now = 0.0
        self.in_flight = 0
        self.peak = 0
        self.due: list[float] = []
        self.on_arrival: Callable[[], None] = lambda: None
        self.hangs = False

    def clock(self) -> float:
        return self.now

    async def send(self, number: int, due_s: float) -> Outcome:
        self.due.append(due_s)
        self.in_flight += 1
        self.peak = max(self.peak, self.in_flight)
        self.now += 1.0
        self.on_arrival()
        try:
            for _ in range(20):  # others get their turns
                await asyncio.sleep(3600 if self.hangs else 0)
            kind = self.kind
        except asyncio.CancelledError:
            kind = "cut"
        self.in_flight -= 1
        return Outcome(number, kind, due_s, due_s, self.now)


def plan(**given: Any) -> Plan:
    plain = {
        "rate": None,
        "burstiness": 1.0,
        "concurrency": None,
        "num_requests": None,
        "duration_s": None,
        "seed": 0,
    }
    return Plan(**plain | given)


def finish(server: FakeServer, stop_after: float | None = None, **given: Any) -> Run:
    async def go() -> Run:
        run = Run(plan(**given), server.send, server.clock)

        def maybe_stop() -> None:
            if stop_after is not None and server.now >= stop_after:
                run.stop("enough")

        server.on_arrival = maybe_stop
        await run.finish()
        return run

    return asyncio.run(go())


def numbers(run: Run) -> list[int]:
    return sorted(outcome.number for outcome in run.outcomes)


@pytest.mark.parametrize("concurrency", [1, 3, 50])
def test_a_closed_loop_keeps_so_many_in_flight(concurrency):
    """Catches one request too many at the start, and a number sent twice."""
    server = FakeServer()
    run = finish(server, concurrency=concurrency, num_requests=20)
    assert numbers(run) == list(range(20))
    assert server.peak == min(concurrency, 20)
    assert run.cut_because == ""


def test_a_closed_loop_ends_when_time_is_up():
    """Catches a run that goes on, and one that drops what is in flight."""
    run = finish(FakeServer(), concurrency=1, duration_s=5.0)
    assert numbers(run) == [0, 1, 2, 3, 4]
    assert {outcome.kind for outcome in run.outcomes} == {"completed"}


def test_whichever_limit_comes_first_ends_the_run():
    """Catches a number that is forgotten when there is a duration, and the other way round."""
    assert len(finish(FakeServer(), concurrency=1, duration_s=5.0, num_requests=3).outcomes) == 3
    assert len(finish(FakeServer(), concurrency=1, duration_s=2.0, num_requests=9).outcomes) == 2


def test_an_open_loop_does_not_wait_for_answers():
    """Catches a queue in the client that hides what a slow server does to the others."""
    server = FakeServer()
    server.hangs = True
    run = finish(server, rate=1000.0, num_requests=10, stop_after=10.0)
    assert server.peak == 10
    assert [outcome.kind for outcome in run.outcomes] == ["cut"] * 10
    assert server.due == sorted(server.due)


def test_an_open_loop_may_have_a_limit():
    """Catches a limit that is ignored, and a request that forgets when it was due."""
    server = FakeServer()
    run = finish(server, rate=1e6, num_requests=12, concurrency=2)
    assert server.peak == 2
    assert numbers(run) == list(range(12))
    assert all(outcome.due_s < 0.01 for outcome in run.outcomes)


def test_an_open_loop_sends_only_what_is_due_in_time():
    """Catches arrivals after the duration."""
    run = finish(FakeServer(), rate=1e5, duration_s=1e-3)
    assert 50 < len(run.outcomes) < 200


@pytest.mark.parametrize(
    "given", [{"concurrency": 4}, {"rate": 1e6}, {"rate": 1e6, "concurrency": 2}]
)
def test_a_stopped_run_loses_no_request(given):
    """Catches a request that was sent, or about to be, and appears nowhere."""
    server = FakeServer()
    server.hangs = True
    server.kind = "cut"
    run = finish(server, stop_after=2.0, num_requests=9, **given)
    assert numbers(run) == list(range(run.num_sent))
    assert run.num_sent >= 2
    assert {outcome.kind for outcome in run.outcomes} == {"cut"}
    assert run.cut_because == "enough"


def test_a_server_that_has_gone_ends_the_run():
    """Catches a closed loop that asks a dead port a million times."""
    run = finish(FakeServer("connection"), concurrency=3, duration_s=1e9)
    assert "could not be reached 20 times" in run.cut_because
    assert 20 <= len(run.outcomes) < 30


def test_an_error_of_our_own_is_not_swallowed():
    """Catches a bug that ends as a run without requests."""

    async def send(number: int, due_s: float) -> Outcome:
        raise ValueError("a bug")

    async def go() -> None:
        await Run(plan(concurrency=2, num_requests=4), send, lambda: 0.0).finish()

    with pytest.raises(ValueError, match="a bug"):
        asyncio.run(go())


def test_a_plan_says_what_it_is():
    """Catches a Poisson process called one that it is not."""
    assert plan(concurrency=3).said == "closed loop, at most 3 in flight"
    assert plan(rate=2.5).said == "open loop, 2.5 requests/s (Poisson)"
    said = plan(rate=2.5, burstiness=0.5, concurrency=4).said
    assert said == "open loop, 2.5 requests/s (gamma, burstiness 0.5), at most 4 in flight"
    assert plan(concurrency=3).as_dict()["request_rate"] == "inf"
