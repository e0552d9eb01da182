"""When a replica is about to be killed: nobody looks at it any more.

Serve asks a replica for its health every few seconds while it is to live, and never again once it
is to end. It does not say so: it waits until no request is left, and kills the replica with those
that are when its patience is over. A replica that notices the silence can give its requests up
before, each with its error. Knows no Ray.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

TICK_S = 0.5
_MISSED = 3
"""Looks that must be missed: a controller that is busy misses one."""


class Silence:
    """Counts the seconds since the last look, and acts once in each silence that is long enough.

    after_s: how long, as `silence_s` has it
    act:     what is then done
    """

    def __init__(self, after_s: float, act: Callable[[], None]) -> None:
        self._most_ticks = after_s / TICK_S
        self._act = act
        self._num_ticks = 0
        self._watching: asyncio.Task[None] | None = None

    def looked(self) -> None:
        """Somebody has looked. The first time begins it: a model may take minutes to load."""
        self._num_ticks = 0
        if self._watching is None:
            self._watching = asyncio.create_task(self._watch(), name="silence")

    async def _watch(self) -> None:
        # Ticks and no clock: in a loop that stood still, a look may be waiting to be noticed.
        while True:
            await asyncio.sleep(TICK_S)
            before, self._num_ticks = self._num_ticks, self._num_ticks + 1
            if before < self._most_ticks <= self._num_ticks:
                self._act()

    def close(self) -> None:
        """Watch no more."""
        if self._watching is not None:
            self._watching.cancel()


def silence_s(drain_timeout_s: float, period_s: float) -> float:
    """How long a replica is not looked at whose answers have had their time to end.

    period_s: between two looks; the last one may have been so long before the end began
    """
    return max(drain_timeout_s, (_MISSED - 1) * period_s) + period_s
