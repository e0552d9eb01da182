"""When requests arrive in an open loop: seconds from the start of the run, from a seed."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np


def arrival_times(rate: float, burstiness: float, seed: int) -> Iterator[float]:
    """Times in seconds, rising, for ever; the first is one gap after 0.

    Gaps are drawn from a gamma distribution of mean 1 / rate and shape `burstiness`: 1 is a
    Poisson process, below it requests come in bursts, above it more evenly.
    """
    generator = np.random.default_rng(seed)
    now = 0.0
    while True:
        now += float(generator.gamma(burstiness, 1 / (rate * burstiness)))
        yield now
