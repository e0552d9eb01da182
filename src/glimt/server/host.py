"""EngineHost: the engine's life. Loads it, tells whether it is well, starts it again if it fails.

    loading -> ready -> (failed -> loading -> ready, at most so often) -> draining

Knows no request and no protocol.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import time
from collections import deque
from collections.abc import Callable
from typing import Literal

from glimt.async_engine import AsyncEngine
from glimt.errors import CapacityError
from glimt.types import SamplingParams

log = logging.getLogger("glimt.server")

State = Literal["loading", "ready", "failed", "draining"]
_WATCH_S = 0.2  # between two looks at the engine
_RESTART_WINDOW_S = 3600.0


class EngineUnavailable(CapacityError):
    """The engine is loading, has failed, or takes no more requests: HTTP 503."""


class EngineHost:
    """One engine at a time.

    load: makes an engine, in a worker thread; called again after a failure
    """

    def __init__(
        self,
        load: Callable[[], AsyncEngine],
        max_restarts: int,
        stall_timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._load = load
        self._max_restarts = max_restarts
        self._stall_timeout_s = stall_timeout_s
        self._clock = clock
        self._engine: AsyncEngine | None = None
        self._restarts: deque[float] = deque()
        self._watcher: asyncio.Task[None] | None = None
        self.state: State = "loading"
        self.failure: str = ""
        self.num_restarts = 0

    # --- for requests ---

    @property
    def engine(self) -> AsyncEngine:
        """The engine to ask. Raises EngineUnavailable while there is none."""
        if self.state == "ready" and self._engine is not None and self._engine.is_alive:
            return self._engine
        raise self.unavailable()

    @property
    def last_engine(self) -> AsyncEngine | None:
        """The engine for its counters, whatever its state; None while one loads."""
        return self._engine

    @property
    def is_ready(self) -> bool:
        """New requests are taken and will be answered."""
        return self.state == "ready" and self._engine is not None and self._engine.is_alive

    @property
    def is_live(self) -> bool:
        """Not beyond help: it loads, or makes steps while work waits."""
        if self.state == "failed":
            return False
        return self._engine is None or self._engine.stalled_s < self._stall_timeout_s

    def unavailable(self) -> EngineUnavailable:
        """The error of a request that finds no engine, or loses it: it says why."""
        said = {
            "loading": "the model is still loading; try again soon",
            "draining": "the server is shutting down; ask another one",
            "failed": f"the engine has failed and is not started again: {self.failure}",
            "ready": "the engine has failed and is being started again; try again soon",
        }
        return EngineUnavailable(said[self.state])

    # --- its life ---

    async def start(self) -> None:
        """Load, answer one request of our own, and watch from then on.

        Raises what loading raises: at the first start there is nobody to serve without it.
        """
        await self._open()
        self._watcher = asyncio.create_task(self._watch(), name="engine-watcher")

    async def _open(self) -> None:
        engine = await asyncio.to_thread(self._load)
        await asyncio.to_thread(engine.engine.inputs.warm_up)
        await engine.chat([{"role": "user", "content": "1"}], SamplingParams(max_tokens=1))
        self._engine = engine
        if self.state != "draining":
            self.state = "ready"

    async def _watch(self) -> None:
        while self.state == "ready":
            await asyncio.sleep(_WATCH_S)
            if self._engine is not None and not self._engine.is_alive and self.state == "ready":
                await self._restart()

    async def _restart(self) -> None:
        self.failure = self._engine.failure if self._engine else ""
        now = self._clock()
        while self._restarts and now - self._restarts[0] > _RESTART_WINDOW_S:
            self._restarts.popleft()
        if len(self._restarts) >= self._max_restarts:
            self.state = "failed"
            log.error("the engine failed %d times: %s", len(self._restarts) + 1, self.failure)
            return
        self._restarts.append(now)
        self.num_restarts += 1
        self.state = "loading"
        log.error("the engine failed (%s) and is started again", self.failure)
        try:
            await asyncio.to_thread(self._let_go)
            await self._open()
        except Exception as error:  # whatever it is, a probe must learn that nothing loads any more
            self.failure, self.state = str(error), "failed"
            log.exception("the engine could not be started again")

    def _let_go(self) -> None:
        """End the failed engine; its memory is needed for the next one."""
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.close()
            del engine
            gc.collect()  # a model's parts refer to each other

    def drain(self) -> None:
        """Take no more requests; those that run go on."""
        self.state = "draining"

    async def stop(self) -> None:
        """Abort what still runs and end the engine."""
        self.state = "draining"
        if self._watcher is not None:
            self._watcher.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watcher
        if self._engine is not None:
            await asyncio.to_thread(self._engine.close)
