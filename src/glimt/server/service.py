"""Service: what every protocol calls. Admission, preparation, deadlines and counts of a request.

A protocol file turns a body into an `Ask`, and the outputs of `Answer.stream` into its own form.
Knows no HTTP.
"""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass

from glimt.async_engine import AsyncEngine
from glimt.errors import CapacityError, EngineError, RequestError
from glimt.outputs.assembler import OutputAssembler
from glimt.server.config import ServerConfig
from glimt.server.ending import Ending, ended_outputs
from glimt.server.host import EngineHost, EngineUnavailable
from glimt.server.metrics import Metrics
from glimt.server.pictures import PictureReader
from glimt.server.preparation import Ask as Ask  # protocols know it from here
from glimt.server.preparation import Preparation, unprepared
from glimt.server.tracing import Trace, Traces
from glimt.types import Request, RequestOutput, StepOutput

REQUEST_ID = re.compile(r"[A-Za-z0-9_-]{1,256}")
_PREPARING = 4  # requests whose prompts and pictures are encoded at the same time


class HalfAnswer(EngineError):
    """The engine failed when a part of the answer was already there."""


class DeadlinePassed(CapacityError):
    """The request took longer than it may: it is aborted."""


@dataclass(frozen=True, slots=True)
class TimedStep:
    """One step's output, and the seconds since the one before, or since the request's arrival."""

    output: StepOutput
    seconds: float


@dataclass(slots=True, eq=False)
class Answer:
    """A request that was admitted and prepared; it runs while `stream` is read.

    request:   with every default filled in and the prompt's length known
    arrival_s: by time.monotonic
    """

    request: Request
    arrival_s: float
    _outputs: AsyncIterator[StepOutput]

    def stream(self) -> AsyncIterator[StepOutput]:
        """Outputs as they come. Raises EngineError, or DeadlinePassed when it takes too long."""
        return self._outputs

    async def whole(self) -> RequestOutput:
        """The finished answer. Raises as `stream`, and EngineError for a choice with an error."""
        return (await self.whole_steps())[0]

    async def whole_steps(self) -> tuple[RequestOutput, list[TimedStep]]:
        """The finished answer, and the steps it came in. Raises as `whole`."""
        assembler = OutputAssembler(self.request)
        steps: list[TimedStep] = []
        last_s = self.arrival_s
        try:
            async for output in self._outputs:
                now_s = time.monotonic()
                steps.append(TimedStep(output, now_s - last_s))
                last_s = now_s
                check_output(output)
                whole = assembler.add(output)
                if whole is not None:
                    return whole, steps
        except EngineError as error:
            if any(step.output.token_ids for step in steps):
                raise HalfAnswer(str(error)) from error
            raise
        raise EngineError(f"request {self.request.request_id} ended without its last output")


class Service:
    """One server's requests."""

    def __init__(
        self,
        host: EngineHost,
        config: ServerConfig,
        metrics: Metrics,
        traces: Traces | None = None,
    ) -> None:
        self.host = host
        self.config = config
        self.metrics = metrics
        self.pictures = PictureReader(config, metrics, _PREPARING)
        self.traces = traces or Traces(None)
        self._preparation = Preparation(config, self.pictures)
        self._num_open = 0
        self._preparing = asyncio.Semaphore(_PREPARING)
        self._endings: dict[str, Ending] = {}  # of every open request, by its id
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def num_open(self) -> int:
        """Choices of requests that are admitted and not finished."""
        return self._num_open

    @asynccontextmanager
    async def answer(self, ask: Ask) -> AsyncGenerator[Answer, None]:
        """Admit and prepare a request; leaving the context ends it, finished or not.

        Raises RequestError, CapacityError (of its kinds EngineUnavailable and DeadlinePassed), or
        EngineError.
        """
        arrival_s = time.monotonic()
        engine = self.host.engine
        traced = self.traces.request
        with self._admitted(engine, ask) as place, traced(ask.protocol, place.request_id) as trace:
            deadline = asyncio.get_running_loop().time() + self._timeout_s(ask)
            request = await self._prepared(engine, ask, place, deadline)
            self.metrics.began(ask.protocol, request)
            outputs = self._stream(engine, request, ask, place.ending, deadline, trace)
            async with aclosing(outputs):
                yield Answer(request, arrival_s, outputs)

    async def _prepared(
        self, engine: AsyncEngine, ask: Ask, place: _Place, deadline: float
    ) -> Request:
        """The request; of one that is stopped meanwhile, what is known without its prompt."""
        ending, request_id = place.ending, place.request_id
        try:
            async with asyncio.timeout_at(deadline) as limit:
                with ending.by(lambda: _expire(limit)):
                    return await self._in_turn(engine, ask, request_id)
        except TimeoutError:
            if not ending.is_asked:
                raise self._late(ask) from None
        if ending.error is not None:
            raise ending.error
        return unprepared(engine, ask, request_id)

    def _timeout_s(self, ask: Ask) -> float:
        limit = self.config.request_timeout_s
        return limit if ask.timeout_s is None else min(limit, ask.timeout_s)

    def _late(self, ask: Ask) -> DeadlinePassed:
        self.metrics.failed("timeout")
        return DeadlinePassed(f"the request took longer than {self._timeout_s(ask):g} s")

    # --- admission ---

    def _admitted(self, engine: AsyncEngine, ask: Ask) -> _Place:
        """A place for the request. Raises CapacityError if there is none."""
        most = self._num_places(engine)
        if self._num_open and self._num_open + ask.sampling.n > most:
            raise self._full(most)
        return _Place(self, ask)

    def check_room(self, num_reading: int) -> None:
        """Raise CapacityError if a request that is not read yet can find no place.

        num_reading: others that are not either; each will want a place
        """
        if not self.host.is_ready:
            return  # the route says why
        most = self._num_places(self.host.engine)
        if self._num_open >= most or self._num_open + num_reading >= most + _PREPARING:
            raise self._full(most)

    def _num_places(self, engine: AsyncEngine) -> int:
        return engine.max_num_seqs + self.config.max_waiting

    def _full(self, most: int) -> CapacityError:
        self.metrics.failed("overloaded")
        said = f"{self._num_open} answers are running or waiting, at most {most} may"
        return CapacityError(f"{said}; try again in a second")

    async def wait_idle(self) -> None:
        """Return once no request is open."""
        await self._idle.wait()

    def _enter(self, ask: Ask, ending: Ending) -> str:
        self._num_open += ask.sampling.n
        self._idle.clear()
        request_id = ask.request_id
        while request_id in self._endings:  # a client that repeats an id of a running request
            request_id = f"{ask.request_id}-{secrets.token_hex(4)}"
        self._endings[request_id] = ending
        return request_id

    def _leave(self, ask: Ask, request_id: str) -> None:
        del self._endings[request_id]
        self._num_open -= ask.sampling.n
        if not self._num_open:
            self._idle.set()

    def stop(self, request_id: str) -> bool:
        """End an open request, at whatever stage; its answer ends with what it has.

        False: none of that id is open.
        """
        ending = self._endings.get(request_id)
        if ending is None or ending.is_over:
            return False
        ending.ask()
        return True

    def give_up(self, error: EngineUnavailable | None = None) -> None:
        """End every open request, since the server ends; their callers get the error, or why."""
        for ending in self._endings.values():
            ending.ask(error or self.host.unavailable())

    async def encode(self, ask: Ask) -> Request:
        """What a request would be, without running it. Raises RequestError, EngineUnavailable."""
        return await self._in_turn(self.host.engine, ask, ask.request_id)

    async def _in_turn(self, engine: AsyncEngine, ask: Ask, request_id: str) -> Request:
        """Prepare a request when its pictures are here and few others are being prepared."""
        async with self._preparation.gathered(engine, ask) as gathered, self._preparing:
            return await self._preparation.prepare(engine, gathered, request_id)

    # --- running ---

    async def _stream(
        self,
        engine: AsyncEngine,
        request: Request,
        ask: Ask,
        ending: Ending,
        deadline: float,
        trace: Trace,
    ) -> AsyncGenerator[StepOutput, None]:
        """The engine's outputs up to the deadline; counted, whatever becomes of them."""
        watch = self.metrics.watch(request)
        try:
            async with aclosing(self._outputs(engine, request, ask, ending, deadline)) as outputs:
                async for output in outputs:
                    watch.saw(output)
                    trace.saw(output)
                    yield output
        finally:
            ending.is_over = True
            watch.ended()

    async def _outputs(
        self, engine: AsyncEngine, request: Request, ask: Ask, ending: Ending, deadline: float
    ) -> AsyncGenerator[StepOutput, None]:
        """The same, not counted. Raises what a request that was given up is to be told."""
        # Nothing is awaited between this look and the engine's having the request.
        source = ended_outputs(request) if ending.is_asked else engine.stream(request)
        with ending.by(lambda: engine.abort(request.request_id)):
            async with aclosing(source) as outputs:
                while output := await self._next(outputs, ask, deadline):
                    if output.finish_reason == "abort" and ending.error is not None:
                        raise ending.error
                    yield output

    async def _next(
        self, outputs: AsyncGenerator[StepOutput, None], ask: Ask, deadline: float
    ) -> StepOutput | None:
        """The next output, None after the last. Raises DeadlinePassed."""
        try:
            async with asyncio.timeout_at(self._next_deadline(deadline)):
                return await anext(outputs, None)
        except TimeoutError:
            raise self._late(ask) from None

    def _next_deadline(self, deadline: float) -> float:
        """When the next token must be there: MindIE limits the time between two as well."""
        between_s = self.config.token_timeout_s
        if between_s is None:
            return deadline
        return min(deadline, asyncio.get_running_loop().time() + between_s)


class _Place:
    """A request's place among the open ones."""

    def __init__(self, service: Service, ask: Ask) -> None:
        self._service, self._ask = service, ask
        self.request_id = ""
        self.ending = Ending()

    def __enter__(self) -> _Place:
        self.request_id = self._service._enter(self._ask, self.ending)
        return self

    def __exit__(self, *error: object) -> None:
        self._service._leave(self._ask, self.request_id)


def _expire(limit: asyncio.Timeout) -> None:
    """Let a limit pass now, unless it has."""
    if not limit.expired():
        limit.reschedule(0.0)


def check_output(output: StepOutput) -> None:
    """Raise EngineError if it ends its choice with an error."""
    if output.finish_reason == "error":
        raise EngineError(output.error or "the answer ended with an error")


def checked_id(given: str | None, field_name: str = "request_id") -> str:
    """A request's id: the caller's, or a new one. Raises RequestError if it is no id."""
    if given is None or given == "":
        return secrets.token_hex(16)
    if not REQUEST_ID.fullmatch(given):
        raise RequestError(field_name, "must be 1 to 256 letters, digits, - or _")
    return given
