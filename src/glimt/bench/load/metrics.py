"""What outcomes come to: latencies, throughput, goodput. Pure functions, no clock.

The definitions are those of docs/benchmarks.md. Only completed requests count, but for the number
in flight.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from glimt.bench.load.outcome import Outcome

METRICS = ("ttft", "tpot", "itl", "e2el")


@dataclass(frozen=True, slots=True)
class Spread:
    """How values lie, in milliseconds; None where there is none.

    std: of all of them (divided by their number); percentiles: between neighbours in proportion
    """

    num: int
    mean: float | None
    median: float | None
    std: float | None
    percentiles: Mapping[float, float | None]


@dataclass(frozen=True, slots=True)
class Goodput:
    """Requests that met every one of some limits, in milliseconds by metric."""

    name: str
    limits: Mapping[str, float]
    num_good: int
    per_s: float

    @property
    def limits_text(self) -> str:
        """The limits in words."""
        return ", ".join(f"{name.upper()} {limit:g} ms" for name, limit in self.limits.items())


SERVER = ("server", {"ttft": 2000.0, "tpot": 100.0})
INTERACTIVE = ("interactive", {"ttft": 500.0, "tpot": 30.0})
"""Proposed for GLM-4v-9B; the second on datacentre cards. Borrowed from MLPerf's limits for 8B."""

Limits = Sequence[tuple[str, Mapping[str, float]]]


@dataclass(frozen=True, slots=True)
class Timeline:
    """The run second by second.

    seconds:       the middle of each
    output_tokens: that came in it; a request's tokens are spread evenly over its events
    in_flight:     most requests at once in it
    """

    seconds: tuple[float, ...]
    output_tokens: tuple[float, ...]
    in_flight: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Metrics:
    """Everything that a run comes to.

    duration_s: from the start of the run to the last request's end
    spreads:    by metric: ttft, tpot, itl (of all requests together), e2el, queue
    num_short:  answers with fewer tokens than were asked for
    num_uncounted: completed requests of which the server did not tell the tokens
    """

    num_sent: int
    num_completed: int
    kinds: Mapping[str, int]
    duration_s: float
    input_tokens: int
    output_tokens: int
    image_tokens: int
    cached_tokens: int
    num_images: int
    num_short: int
    num_uncounted: int
    text_tokens: int | None
    peak_in_flight: int
    spreads: Mapping[str, Spread]
    goodputs: tuple[Goodput, ...]
    timeline: Timeline

    def per_s(self, amount: float) -> float:
        """An amount over the run's time."""
        return amount / self.duration_s if self.duration_s > 0 else 0.0


def measure(
    outcomes: Sequence[Outcome], percentiles: Sequence[float], limits: Limits, output_len: int
) -> Metrics:
    """What a run's outcomes come to; percentiles: 0 to 100; output_len: tokens asked for."""
    completed = [outcome for outcome in outcomes if outcome.is_completed]
    duration_s = max((outcome.end_s for outcome in outcomes), default=0.0)
    counted = [outcome.text_tokens for outcome in completed if outcome.text_tokens is not None]
    return Metrics(
        num_sent=len(outcomes),
        num_completed=len(completed),
        kinds=dict(sorted(Counter(each.said for each in outcomes).items())),
        duration_s=duration_s,
        input_tokens=sum(each.prompt_tokens for each in completed),
        output_tokens=sum(each.output_tokens for each in completed),
        image_tokens=sum(each.counts.image_tokens or 0 for each in completed),
        cached_tokens=sum(each.counts.cached_tokens or 0 for each in completed),
        num_images=sum(each.num_images for each in completed),
        num_short=sum(each.output_tokens < output_len for each in completed),
        num_uncounted=sum(each.counts.output_tokens is None for each in completed),
        text_tokens=sum(counted) if counted else None,
        peak_in_flight=peak_in_flight(outcomes),
        spreads=_spreads(completed, percentiles),
        goodputs=tuple(_goodput(completed, duration_s, *each) for each in limits),
        timeline=_timeline(outcomes, duration_s),
    )


# --- latencies -------------------------------------------------------------------------------


def _spreads(completed: Sequence[Outcome], percentiles: Sequence[float]) -> dict[str, Spread]:
    values: dict[str, Iterable[float | None]] = {
        "ttft": (each.ttft_s for each in completed),
        "tpot": (each.tpot_s for each in completed),
        "itl": (gap for each in completed for gap in each.itl_s),
        "e2el": (each.e2el_s for each in completed),
        "queue": (each.queue_s for each in completed),
    }
    return {
        name: spread([1000 * value for value in seconds if value is not None], percentiles)
        for name, seconds in values.items()
    }


def spread(values: Sequence[float], percentiles: Sequence[float]) -> Spread:
    """How some values lie."""
    if not values:
        return Spread(0, None, None, None, dict.fromkeys(percentiles))
    found = np.percentile(values, percentiles)
    return Spread(
        len(values),
        float(np.mean(values)),
        float(np.median(values)),
        float(np.std(values)),
        dict(zip(percentiles, map(float, found), strict=True)),
    )


# --- goodput ---------------------------------------------------------------------------------


def _goodput(
    completed: Sequence[Outcome], duration_s: float, name: str, limits: Mapping[str, float]
) -> Goodput:
    num_good = sum(is_good(outcome, limits) for outcome in completed)
    return Goodput(name, limits, num_good, num_good / duration_s if duration_s > 0 else 0.0)


def is_good(outcome: Outcome, limits: Mapping[str, float]) -> bool:
    """Whether a request met all limits; what is undefined, as one token's TPOT, breaks none."""
    took_s = {"ttft": outcome.ttft_s, "tpot": outcome.tpot_s, "e2el": outcome.e2el_s}
    return all(1000 * (took_s[name] or 0.0) <= limit for name, limit in limits.items())


# --- the run as time passes ------------------------------------------------------------------


def peak_in_flight(outcomes: Iterable[Outcome]) -> int:
    """Most requests between sending and end at once; one that ends as another begins is gone."""
    return max(_levels(outcomes)[1], default=0)


def _levels(outcomes: Iterable[Outcome]) -> tuple[list[float], list[int]]:
    """When the number in flight changed, and to what."""
    ends = [
        (time, step) for each in outcomes for time, step in ((each.sent_s, 1), (each.end_s, -1))
    ]
    times, levels, level = [], [], 0
    for time, step in sorted(ends):
        level += step
        times.append(time)
        levels.append(level)
    return times, levels


def _timeline(outcomes: Sequence[Outcome], duration_s: float) -> Timeline:
    num = int(duration_s) + 1 if outcomes else 0
    tokens, peaks = [0.0] * num, [0] * num
    for outcome in filter(lambda each: each.is_completed, outcomes):
        share = outcome.output_tokens / len(outcome.event_s)
        for time in outcome.event_s:
            tokens[min(int(time), num - 1)] += share
    times, levels = _levels(outcomes)
    for time, level, until in zip(times, levels, times[1:], strict=False):  # the last level is 0
        for second in range(min(int(time), num - 1), min(int(until), num - 1) + 1):
            peaks[second] = max(peaks[second], level)
    return Timeline(tuple(i + 0.5 for i in range(num)), tuple(tokens), tuple(peaks))
