"""From an `Ask` to a reply: whole or streamed, with the client's leaving and failures on the way.

A family brings the pure part, a `Writer` that turns outputs into bytes; nothing here knows a form.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Protocol

from starlette.requests import Request as HttpRequest

from glimt.errors import CapacityError, GlimtError, RequestError
from glimt.server.failures import Failure, failure_of
from glimt.server.metrics import Metrics
from glimt.server.service import Answer, Ask, DeadlinePassed, Service, TimedStep, check_output
from glimt.server.streaming import unless_left
from glimt.types import Request, RequestOutput, StepOutput


@dataclass(frozen=True, slots=True, eq=False)
class Finished:
    """A whole answer: as one, and as the steps in which it came."""

    request: Request
    output: RequestOutput
    steps: tuple[TimedStep, ...]


class Writer(Protocol):
    """One answer's outputs in a family's form."""

    def add(self, output: StepOutput) -> bytes:
        """What one step adds; b"" for nothing."""

    def failed(self, failure: Failure) -> bytes:
        """What an error says once the status has gone out."""


async def whole(
    request: HttpRequest, service: Service, ask: Ask, names: Mapping[str, str] | None = None
) -> Finished:
    """The finished answer; a client that leaves ends the request.

    names: what the family calls a field that an error may name
    Raises as Service.answer and Answer.whole.
    """

    async def work() -> Finished:
        async with service.answer(ask) as answer:
            output, steps = await answer.whole_steps()
            return Finished(answer.request, output, tuple(steps))

    try:
        return await unless_left(request, work())
    except RequestError as error:
        raise in_words_of(error, names or {}) from error


async def streamed(
    service: Service,
    ask: Ask,
    writer: Callable[[Answer], Writer],
    names: Mapping[str, str] | None = None,
    waits_for_first: bool = False,
) -> StreamedAnswer:
    """An answer that is admitted and prepared, as pieces of bytes to be sent.

    waits_for_first: return only with the first output, so that an error can still be a status
    Raises as Service.answer.
    """
    stack = AsyncExitStack()
    try:
        answer = await stack.enter_async_context(service.answer(ask))
        stream = StreamedAnswer(stack, answer, writer(answer), service.metrics)
        if waits_for_first:
            await stream.begin()
    except BaseException as error:
        await stack.aclose()
        if isinstance(error, RequestError):
            raise in_words_of(error, names or {}) from error
        raise
    return stream


class StreamedAnswer:
    """The pieces of one answer. Closing it ends the request, whether it was read or not."""

    def __init__(
        self, stack: AsyncExitStack, answer: Answer, writer: Writer, metrics: Metrics
    ) -> None:
        self._stack = stack
        self._outputs = answer.stream()
        self._writer = writer
        self._metrics = metrics
        self._first: StepOutput | None = None
        self._has_ended = False

    async def begin(self) -> None:
        """Wait for the first output. Raises what the engine raises."""
        self._first = await self._next()

    async def _next(self) -> StepOutput:
        first, self._first = self._first, None
        output = await anext(self._outputs) if first is None else first
        check_output(output)
        return output

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        """The next piece; an error becomes the last one."""
        if self._has_ended:
            raise StopAsyncIteration
        try:
            return self._writer.add(await self._next())
        except GlimtError as error:
            self._has_ended = True
            return self._failure(error)

    def _failure(self, error: GlimtError) -> bytes:
        if not isinstance(error, DeadlinePassed):  # the service has counted that one
            self._metrics.failed("unavailable" if isinstance(error, CapacityError) else "engine")
        return self._writer.failed(failure_of(error))

    async def aclose(self) -> None:
        """End the request."""
        self._has_ended = True
        await self._stack.aclose()


# --- errors in the family's words ------------------------------------------------------------

_PART = re.compile(r"messages\[0\]\.(?:content|parts)")


def in_words_of(error: RequestError, names: Mapping[str, str]) -> RequestError:
    """The same error with its field as the caller calls it.

    names: by our own name; "prompt" also stands for the message that a prompt was made into
    """
    field = error.field
    if "prompt" in names:
        field = _PART.sub(names["prompt"], field)
        field = names["prompt"] if field == "messages" else field
    kind = type(error)
    return kind(names.get(field, field), error.message)
