"""Whether two lists of figures about the same pictures differ: a paired bootstrap.

The pictures are drawn again with replacement, many times; where the mean difference falls in the
middle 95 % of the draws is the interval. Source: Efron and Tibshirani, An Introduction to the
Bootstrap (1993), section 13.3, the percentile interval.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

NUM_RESAMPLES = 10_000
LEVEL = 0.95
MIN_PICTURES = 10  # of fewer, the draws repeat too few figures for an interval to mean anything
_DRAWN_AT_ONCE = 2**21  # places of pictures; bounds the memory to 32 MB


@dataclass(frozen=True, slots=True)
class Comparison:
    """Second minus first.

    low, high: of the interval of the mean difference
    """

    num_pictures: int
    mean_difference: float
    low: float
    high: float

    @property
    def has_winner(self) -> bool:
        """Whether the pictures are enough to tell the two apart."""
        return self.num_pictures >= MIN_PICTURES and not self.low <= 0 <= self.high


def compare_paired(
    first: Floats, second: Floats, seed: int = 0, num_resamples: int = NUM_RESAMPLES
) -> Comparison:
    """Compare two figures of each picture.

    first, second: [num_pictures]; at least one picture
    The same seed gives the same interval.
    """
    assert first.shape == second.shape, "figures of the same pictures"
    differences = second - first
    means = np.concatenate(list(_resampled_means(differences, seed, num_resamples)))
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(means, (tail, 1 - tail))
    return Comparison(len(differences), float(differences.mean()), float(low), float(high))


def _resampled_means(values: Floats, seed: int, num_resamples: int) -> Iterator[Floats]:
    """Means of draws of as many values as there are, in parts that fit in memory."""
    random = np.random.default_rng(seed)
    part = max(1, _DRAWN_AT_ONCE // len(values))
    for start in range(0, num_resamples, part):
        count = min(part, num_resamples - start)
        yield values[random.integers(len(values), size=(count, len(values)))].mean(axis=1)
