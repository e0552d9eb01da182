"""Service: what every protocol calls. Admission, preparation, deadlines and counts of a request.

A protocol file turns a body into an `Ask`, and the outputs of `Answer.stream` into its own form.
Knows no HTTP.
"""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field, replace

from glimt.async_engine import AsyncEngine
from glimt.errors import CapacityError, EngineError, PromptTooLong, RequestError
from glimt.inputs.request import RequestOptions
from glimt.outputs.assembler import OutputAssembler
from glimt.server.config import ServerConfig
from glimt.server.host import EngineHost
from glimt.server.markers import marked_ids
from glimt.server.metrics import Metrics
from glimt.server.pictures import PictureReader
from glimt.server.tracing import Trace, Traces
from glimt.types import Message, Request, RequestOutput, SamplingParams, StepOutput

REQUEST_ID = re.compile(r"[A-Za-z0-9_-]{1,256}")
_PREPARING = 4  # requests whose prompts and pictures are prepared at the same time


class HalfAnswer(EngineError):
    """The engine failed when a part of the answer was already there."""


class DeadlinePassed(CapacityError):
    """The request took longer than it may: it is aborted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One request, whatever protocol it came by.

    messages:  a conversation; or
    prompt:    a bare text to be continued; or
    token_ids: the same as ids
    request_id: checked already; the engine's own may get a suffix
    prompt_end, is_exact: as RequestOptions says
    timeout_s: from arrival; None: the server's limit
    has_markers: the prompt's role markers are special tokens (`markers`)
    takes_room: a max_tokens beyond the context is cut to what fits, as MindIE does, not refused
    keep_last:  tokens of the prompt, the last ones; None: all
    total_tokens: least and most tokens of prompt and answer, in place of the sampling's own
    """

    protocol: str
    request_id: str
    sampling: SamplingParams
    messages: Sequence[Message] | None = None
    prompt: str | None = None
    token_ids: Sequence[int] | None = None
    language: str = "auto"
    cache_salt: str = ""
    prompt_end: str = "answer"
    is_exact: bool = False
    timeout_s: float | None = None
    has_markers: bool = False
    takes_room: bool = False
    keep_last: int | None = None
    total_tokens: tuple[int, int] | None = None


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
    waited_s: float = field(default=0.0)

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
                if output.finish_reason == "error":
                    raise EngineError(output.error or "the answer ended with an error")
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
        self.pictures = PictureReader(config, metrics)
        self.traces = traces or Traces(None)
        self._num_open = 0
        self._preparing = asyncio.Semaphore(_PREPARING)
        self._ids: set[str] = set()
        self._running: set[str] = set()  # of these, the ones that the engine has
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
        trace_of = self.traces.request
        with self._admitted(engine, ask) as request_id, trace_of(ask.protocol, request_id) as trace:
            deadline = asyncio.get_running_loop().time() + self._timeout_s(ask)
            try:
                async with asyncio.timeout_at(deadline), self._preparing:
                    request = await self._prepare(engine, ask, request_id)
            except TimeoutError:
                raise self._late(ask) from None
            self.metrics.began(ask.protocol, request)
            outputs = self._stream(engine, request, ask, deadline, trace)
            async with aclosing(outputs):
                yield Answer(request, arrival_s, outputs)

    def _timeout_s(self, ask: Ask) -> float:
        limit = self.config.request_timeout_s
        return limit if ask.timeout_s is None else min(limit, ask.timeout_s)

    def _late(self, ask: Ask) -> DeadlinePassed:
        self.metrics.failed("timeout")
        return DeadlinePassed(f"the request took longer than {self._timeout_s(ask):g} s")

    # --- admission ---

    def _admitted(self, engine: AsyncEngine, ask: Ask) -> _Place:
        """A place for the request. Raises CapacityError if there is none."""
        most = engine.max_num_seqs + self.config.max_waiting
        if self._num_open and self._num_open + ask.sampling.n > most:
            self.metrics.failed("overloaded")
            said = f"{self._num_open} answers are running or waiting, at most {most} may"
            raise CapacityError(f"{said}; try again in a second")
        return _Place(self, ask)

    async def wait_idle(self) -> None:
        """Return once no request is open."""
        await self._idle.wait()

    def _enter(self, ask: Ask) -> str:
        self._num_open += ask.sampling.n
        self._idle.clear()
        request_id = ask.request_id
        while request_id in self._ids:  # a client that repeats an id of a running request
            request_id = f"{ask.request_id}-{secrets.token_hex(4)}"
        self._ids.add(request_id)
        return request_id

    def _leave(self, ask: Ask, request_id: str) -> None:
        self._ids.discard(request_id)
        self._num_open -= ask.sampling.n
        if not self._num_open:
            self._idle.set()

    def stop(self, request_id: str) -> bool:
        """End a running request; its answer ends with what it has. False: it does not run."""
        if request_id not in self._running:
            return False
        self.host.engine.abort(request_id)
        return True

    # --- preparation ---

    async def encode(self, ask: Ask) -> Request:
        """What a request would be, without running it. Raises RequestError, EngineUnavailable."""
        async with self._preparing:
            return await self._prepare(self.host.engine, ask, ask.request_id)

    async def _prepare(self, engine: AsyncEngine, ask: Ask, request_id: str) -> Request:
        """Everything that can be refused. Raises RequestError."""
        if ask.sampling.n > self.config.max_choices:
            said = f"is {ask.sampling.n}; at most {self.config.max_choices} are made here"
            raise RequestError("n", said)
        wanted, sampling = ask.sampling.max_tokens, ask.sampling
        if ask.takes_room or ask.total_tokens:
            sampling = replace(sampling, max_tokens=None)
        request = await self._encoded(engine, replace(ask, sampling=sampling), request_id)
        if ask.keep_last is not None and len(request.prompt.token_ids) > ask.keep_last:
            request = await self._last_tokens(engine, request, ask, request_id)
        if ask.takes_room and wanted is not None:
            request = _bounded(request, 0, wanted)
        if ask.total_tokens is not None:
            least, most = ask.total_tokens
            num_prompt = len(request.prompt.original_token_ids)
            request = _bounded(request, least - num_prompt, most - num_prompt)
        return self._within(request)

    def _within(self, request: Request) -> Request:
        """Hold a request to the server's own limits. Raises PromptTooLong."""
        most, num_prompt = self.config.max_prompt_tokens, len(request.prompt.token_ids)
        if most is not None and num_prompt > most:
            raise PromptTooLong("prompt", f"is {num_prompt} tokens; at most {most} are taken here")
        if self.config.max_output_tokens is None:
            return request
        return _bounded(request, 0, self.config.max_output_tokens)

    async def _last_tokens(
        self, engine: AsyncEngine, request: Request, ask: Ask, request_id: str
    ) -> Request:
        """The same with the prompt's last tokens only. Raises RequestError for a cut picture."""
        assert ask.keep_last is not None
        if request.images:
            raise RequestError("truncate", "would cut a prompt with pictures; leave it out")
        kept = request.prompt.original_token_ids[-ask.keep_last :]
        short = replace(ask, messages=None, prompt=None, token_ids=kept)
        return await self._encoded(engine, short, request_id)

    async def _encoded(self, engine: AsyncEngine, ask: Ask, request_id: str) -> Request:
        options = RequestOptions(
            request_id=request_id,
            language=ask.language,
            cache_salt=ask.cache_salt,
            allow_files=False,
            prompt_end=ask.prompt_end,
            is_exact=ask.is_exact,
        )
        if ask.messages is not None:
            num_images = sum(message.num_images for message in ask.messages)
            if num_images > self.config.limit_images:
                most = f"at most {self.config.limit_images} are taken (--limit-images)"
                raise RequestError("messages", f"holds {num_images} pictures; {most}")
            messages = await self.pictures.read(ask.messages)
            return await engine.prepare_chat(messages, ask.sampling, options)
        if ask.token_ids is not None:
            return await engine.prepare_tokens(ask.token_ids, ask.sampling, options)
        if not ask.prompt:
            raise RequestError("prompt", "is empty")
        if ask.has_markers:
            processor = engine.engine.opened.processor
            ids = await asyncio.to_thread(marked_ids, ask.prompt, processor)
            if ids is not None:
                return await engine.prepare_tokens(ids, ask.sampling, options)
        return await engine.prepare_text(ask.prompt, ask.sampling, options)

    # --- running ---

    async def _stream(
        self, engine: AsyncEngine, request: Request, ask: Ask, deadline: float, trace: Trace
    ) -> AsyncGenerator[StepOutput, None]:
        """The engine's outputs up to the deadline; counted, whatever becomes of them."""
        watch = self.metrics.watch(request)
        self._running.add(request.request_id)
        try:
            async with aclosing(engine.stream(request)) as outputs:
                iterator = aiter(outputs)
                while True:
                    try:
                        async with asyncio.timeout_at(self._next_deadline(deadline)):
                            output = await anext(iterator)
                    except StopAsyncIteration:
                        return
                    except TimeoutError:
                        raise self._late(ask) from None
                    watch.saw(output)
                    trace.saw(output)
                    yield output
        finally:
            self._running.discard(request.request_id)
            watch.ended()

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
        self._request_id = ""

    def __enter__(self) -> str:
        self._request_id = self._service._enter(self._ask)
        return self._request_id

    def __exit__(self, *error: object) -> None:
        self._service._leave(self._ask, self._request_id)


def checked_id(given: str | None, field_name: str = "request_id") -> str:
    """A request's id: the caller's, or a new one. Raises RequestError if it is no id."""
    if given is None or given == "":
        return secrets.token_hex(16)
    if not REQUEST_ID.fullmatch(given):
        raise RequestError(field_name, "must be 1 to 256 letters, digits, - or _")
    return given


def _bounded(request: Request, least: int, most: int) -> Request:
    """The same with its answer's length between the two, as far as its context lets it."""
    max_tokens = max(1, min(request.max_tokens, most))
    min_tokens = min(max(least, request.sampling.min_tokens or 0), max_tokens)
    sampling = replace(request.sampling, max_tokens=max_tokens, min_tokens=min_tokens)
    return replace(request, max_tokens=max_tokens, sampling=sampling)
