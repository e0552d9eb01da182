"""A request's end before its time, at whatever stage it is: being prepared, waiting or running.

Somebody may ask for it (stopInfer): the answer then ends with what it has. Or the server gives the
request up, and its caller is told why. Knows no request form and no HTTP.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager

from glimt.errors import GlimtError
from glimt.types import Request, StepOutput, Timings, Usage


def _nothing() -> None:
    """What ends a request that is between two stages, of which the next looks at `is_asked`."""


class Ending:
    """Whether one request is to end early, and how that which it is at now is ended.

    error:   what its caller is told; None: the answer ends with what it has
    is_over: it has ended already, however; there is nothing to ask for
    """

    def __init__(self) -> None:
        self.is_asked = False
        self.is_over = False
        self.error: GlimtError | None = None
        self._end: Callable[[], None] = _nothing

    def ask(self, error: GlimtError | None = None) -> None:
        """End the stage that runs; between two, the next looks at it. The first wish counts."""
        if self.is_asked or self.is_over:
            return
        self.is_asked, self.error = True, error
        self._end()

    @contextmanager
    def by(self, end: Callable[[], None]) -> Iterator[None]:
        """A stage that has not been asked to end. end: ends it from outside."""
        self._end = end
        try:
            yield
        finally:
            self._end = _nothing


def usage_before(request: Request) -> Usage:
    """A request's counts before its first token: all its prompt, nothing from the cache."""
    prompt = request.prompt
    return Usage(len(prompt.token_ids), 0, 0, sum(span.length for span in prompt.spans))


async def ended_outputs(request: Request) -> AsyncGenerator[StepOutput, None]:
    """The outputs of a request that ends before the engine has it: the last one of each choice."""
    waited_s = time.monotonic() - request.arrival_s
    for index in range(request.sampling.n):
        yield StepOutput(
            request.request_id,
            index,
            text="",
            token_ids=(),
            finish_reason="abort",
            usage=usage_before(request),
            timings=Timings(0.0, 0.0, 0.0, waited_s),
        )
