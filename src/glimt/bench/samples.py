"""Times with the machine's limit at that moment, and what they come to.

A limit is taken before and after each time. Where the two are far apart the machine changed in
between, and the time says nothing: it is counted, and left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

UNSTEADY = 0.15  # of the larger limit


@dataclass(frozen=True, slots=True)
class Sample:
    """Seconds of one piece of work; before, after: the limit around it, per second."""

    seconds: float
    before: float
    after: float

    @property
    def limit(self) -> float:
        """The mean of the neighbours."""
        return (self.before + self.after) / 2

    @property
    def is_steady(self) -> bool:
        """Whether the machine was the same before and after."""
        return abs(self.before - self.after) <= UNSTEADY * max(self.before, self.after)


@dataclass(frozen=True, slots=True)
class Summary:
    """What the steady samples of one thing come to; None where there is none.

    median_s, least_s, most_s: seconds
    share:     median of the share of its own limit that each sample reached
    num_steady, num_left_out: samples that count, and those around which the machine changed
    all_s:     every sample with its limits, as taken, for whoever wants to judge anew
    """

    median_s: float | None
    least_s: float | None
    most_s: float | None
    share: float | None
    num_steady: int
    num_left_out: int
    all_s: tuple[Sample, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)


def summarise(samples: Sequence[Sample], work: float) -> Summary:
    """What samples of one thing come to.

    work: what each of them did, in the unit of its limit: bytes or operations
    """
    steady = [sample for sample in samples if sample.is_steady]
    times = [sample.seconds for sample in steady]
    shares = [work / sample.seconds / sample.limit for sample in steady if sample.seconds > 0]
    return Summary(
        median_s=median(times) if times else None,
        least_s=min(times, default=None),
        most_s=max(times, default=None),
        share=median(shares) if shares else None,
        num_steady=len(steady),
        num_left_out=len(samples) - len(steady),
        all_s=tuple(samples),
    )
