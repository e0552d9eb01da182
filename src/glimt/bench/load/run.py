"""Sends a workload in a closed or an open loop, until it is done, time is up or it is stopped."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from glimt.bench.load.arrivals import arrival_times
from glimt.bench.load.client import Clock
from glimt.bench.load.outcome import Outcome

Send: TypeAlias = Callable[[int, float], Awaitable[Outcome]]
"""Send request `number`, which was due at a time, and give its outcome."""

_GIVE_UP = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """When requests are sent.

    rate:         requests per second that arrive (open loop); None: the next one when one is done
    concurrency:  requests in flight at most; None: no limit, open loop only
    num_requests, duration_s: nothing more is sent after so many, or after so long; what is in
                  flight then is waited for
    """

    rate: float | None
    burstiness: float
    concurrency: int | None
    num_requests: int | None
    duration_s: float | None
    seed: int

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON, by vLLM's names where it has one."""
        return {
            "request_rate": "inf" if self.rate is None else self.rate,
            "burstiness": self.burstiness,
            "max_concurrency": self.concurrency,
            "num_prompts": self.num_requests,
            "duration_limit": self.duration_s,
        }

    @property
    def said(self) -> str:
        """In words."""
        limit = f"at most {self.concurrency} in flight"
        if self.rate is None:
            return f"closed loop, {limit}"
        kind = "Poisson" if self.burstiness == 1 else f"gamma, burstiness {self.burstiness:g}"
        loop = f"open loop, {self.rate:g} requests/s ({kind})"
        return f"{loop}, {limit}" if self.concurrency else loop


@dataclass(slots=True, eq=False)
class Run:
    """One run of a plan.

    clock:       seconds since the run began, monotonic
    outcomes:    one for each request that was sent; they grow as requests end, in that order
    cut_because: why it was stopped; empty for a run that was not
    """

    plan: Plan
    send: Send
    clock: Clock
    on_done: Callable[[int], None] | None = None
    outcomes: list[Outcome] = field(default_factory=list)
    num_sent: int = 0
    cut_because: str = ""
    _ended: set[int] = field(default_factory=set)  # numbers of those that have an outcome
    _num_unreachable: int = 0  # in a row
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)
    _is_stopped: asyncio.Event = field(default_factory=asyncio.Event)

    def stop(self, because: str) -> None:
        """Send nothing more, and leave what is in flight: each such request ends as "cut"."""
        self.cut_because = self.cut_because or because
        self._is_stopped.set()
        for task in self._tasks:
            task.cancel()

    async def finish(self) -> None:
        """Send everything and wait for it, or until stop()."""
        if self.plan.rate is None:
            for _ in range(self.plan.concurrency or 1):
                self._start(self._one_after_another())
        else:
            await self._as_they_arrive(self.plan.rate)
        for ended in await asyncio.gather(*self._tasks, return_exceptions=True):
            if isinstance(ended, Exception):
                raise ended
        self._note_unsent()

    def _note_unsent(self) -> None:
        """No request is lost: those that were stopped before they began have an outcome too."""
        now = self.clock()
        for number in set(range(self.num_sent)) - self._ended:
            self.outcomes.append(Outcome(number, "cut", now, now, now, error=self.cut_because))

    # --- closed loop ---

    async def _one_after_another(self) -> None:
        while not self._is_stopped.is_set() and self._may_send(self.clock()):
            await self._send(self._next_number(), self.clock())

    # --- open loop ---

    async def _as_they_arrive(self, rate: float) -> None:
        gate = asyncio.Semaphore(self.plan.concurrency) if self.plan.concurrency else None
        for due_s in self._due_times(rate):
            await self._wait_until(due_s)
            if self._is_stopped.is_set():
                return
            self._start(self._send(self._next_number(), due_s, gate))

    def _due_times(self, rate: float) -> Iterator[float]:
        for due_s in arrival_times(rate, self.plan.burstiness, self.plan.seed):
            if not self._may_send(due_s):
                return
            yield due_s

    async def _wait_until(self, due_s: float) -> None:
        """Sleep until then, or until the run is stopped."""
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._is_stopped.wait(), max(0.0, due_s - self.clock()))

    # --- both ---

    def _may_send(self, now: float) -> bool:
        plan = self.plan
        is_early = plan.duration_s is None or now < plan.duration_s
        return is_early and (plan.num_requests is None or self.num_sent < plan.num_requests)

    def _next_number(self) -> int:
        self.num_sent += 1
        return self.num_sent - 1

    def _start(self, work: Any) -> None:
        self._tasks.add(asyncio.create_task(work))

    async def _send(self, number: int, due_s: float, gate: asyncio.Semaphore | None = None) -> None:
        async with gate or nullcontext():
            outcome = await self.send(number, due_s)
        self.outcomes.append(outcome)
        self._ended.add(number)
        self._notice_absence(outcome)
        if self.on_done:
            self.on_done(1)

    def _notice_absence(self, outcome: Outcome) -> None:
        """A closed loop would ask a server that has gone as fast as it can."""
        is_gone = outcome.kind == "connection"
        self._num_unreachable = self._num_unreachable + 1 if is_gone else 0
        if self._num_unreachable == _GIVE_UP:
            self.stop(f"the server could not be reached {_GIVE_UP} times in a row")
