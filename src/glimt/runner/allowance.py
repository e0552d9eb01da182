"""Allowance: time for work that comes in parts, none of which can be cut short."""

from __future__ import annotations

import time
from collections.abc import Callable


class Allowance:
    """So many seconds from now; clock: gives seconds."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._last_s = clock()
        self._end_s = self._last_s + seconds
        self._longest_s = 0.0

    def is_spent(self) -> bool:
        """Asked after each part: whether one more, as long as the longest so far, is too much."""
        now_s = self._clock()
        self._longest_s = max(self._longest_s, now_s - self._last_s)
        self._last_s = now_s
        return now_s + self._longest_s > self._end_s
