"""AsyncEngine: many asyncio callers, one engine thread, one queue between them."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from glimt.config import EngineConfig
from glimt.engine import Engine, EngineStats
from glimt.errors import EngineError, RequestError
from glimt.inputs.request import RequestOptions
from glimt.outputs.assembler import OutputAssembler
from glimt.types import Messages, Request, RequestOutput, SamplingParams, StepOutput

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class _Subscriber:
    """Where a request's outputs go: a queue of the event loop that asked."""

    request: Request
    loop: asyncio.AbstractEventLoop
    outputs: asyncio.Queue[StepOutput | Exception]

    def send(self, item: StepOutput | Exception) -> None:
        """Hand an output to the event loop; one that has closed no longer cares."""
        try:
            self.loop.call_soon_threadsafe(self.outputs.put_nowait, item)
        except RuntimeError:
            log.debug("event loop of request %s is closed", self.request.request_id)


class AsyncEngine:
    """Streams answers to asyncio callers.

    The engine runs in a thread of its own, which alone touches it; prompts and pictures are
    prepared in worker threads, so that a large picture does not hold up the others' tokens.
    """

    def __init__(self, engine: Engine) -> None:
        """Start the thread of a built engine; `close` stops it."""
        self._engine = engine
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._subscribers: dict[str, _Subscriber] = {}  # only the engine thread touches it
        self._is_closed = False
        self._gate = threading.Lock()  # no command may slip in after the last drain
        # Its kind and its text. The error itself would keep every frame it came through, with the
        # model in them, in memory for as long as somebody asks why.
        self._failure: tuple[str, str] | None = None
        self._last_step_s = time.monotonic()  # written by the engine thread alone
        self._thread = threading.Thread(target=self._run, name="glimt-engine", daemon=True)
        self._thread.start()

    @classmethod
    def load(
        cls, config: EngineConfig, on_tensor: Callable[[int], None] | None = None
    ) -> AsyncEngine:
        """Load a model folder and start. Raises what Engine.load raises."""
        return cls(Engine.load(config, on_tensor))

    # --- callers ---

    async def stream_chat(
        self,
        messages: Messages,
        sampling: SamplingParams | None = None,
        options: RequestOptions | None = None,
    ) -> AsyncGenerator[StepOutput, None]:
        """Answer a conversation piece by piece; leaving the iteration aborts the request.

        Raises RequestError for an invalid request, EngineError when the engine has stopped.
        """
        request = await self.prepare_chat(messages, sampling, options)
        # Closed at once with this generator, and not when the garbage collector finds it.
        async with aclosing(self.stream(request)) as outputs:
            async for output in outputs:
                yield output

    async def chat(
        self,
        messages: Messages,
        sampling: SamplingParams | None = None,
        options: RequestOptions | None = None,
    ) -> RequestOutput:
        """Answer a conversation. Raises as stream_chat does."""
        return await self.run(await self.prepare_chat(messages, sampling, options))

    async def generate(
        self,
        prompt: str,
        sampling: SamplingParams | None = None,
        options: RequestOptions | None = None,
    ) -> RequestOutput:
        """Continue a bare text without a chat template. Raises as stream_chat does."""
        return await self.run(await self.prepare_text(prompt, sampling, options))

    async def prepare_chat(
        self,
        messages: Messages,
        sampling: SamplingParams | None = None,
        options: RequestOptions | None = None,
    ) -> Request:
        """Encode a conversation in a worker thread. Raises RequestError."""
        return await asyncio.to_thread(self._engine.prepare_chat, messages, sampling, options)

    async def prepare_text(
        self,
        prompt: str,
        sampling: SamplingParams | None = None,
        options: RequestOptions | None = None,
    ) -> Request:
        """Encode a bare text in a worker thread. Raises RequestError."""
        return await asyncio.to_thread(self._engine.prepare_text, prompt, sampling, options)

    async def prepare_tokens(
        self,
        token_ids: Sequence[int],
        sampling: SamplingParams | None = None,
        options: RequestOptions | None = None,
    ) -> Request:
        """Check a prompt of ids in a worker thread. Raises RequestError."""
        return await asyncio.to_thread(self._engine.prepare_tokens, token_ids, sampling, options)

    async def run(self, request: Request) -> RequestOutput:
        """Run a prepared request to its end. Raises as stream_chat does."""
        assembler = OutputAssembler(request)
        async with aclosing(self.stream(request)) as outputs:
            async for output in outputs:
                whole = assembler.add(output)
                if whole is not None:
                    return whole
        raise EngineError(f"request {request.request_id} ended without its last output")

    async def stream(self, request: Request) -> AsyncGenerator[StepOutput, None]:
        """Run a prepared request; leaving the iteration before its end aborts it.

        Raises RequestError when its id is in use, EngineError when the engine has stopped.
        """
        subscriber = _Subscriber(request, asyncio.get_running_loop(), asyncio.Queue())
        self._command(lambda: self._add(subscriber))
        num_open = request.sampling.n
        try:
            while num_open:
                item = await subscriber.outputs.get()
                if isinstance(item, Exception):
                    num_open = 0
                    raise item
                num_open -= item.finish_reason is not None
                yield item
        finally:
            if num_open:
                self._commands.put(lambda: self._leave(subscriber))

    def abort(self, request_id: str) -> None:
        """End a request soon; its stream finishes with reason "abort". Unknown ids do nothing."""
        self._commands.put(lambda: self._abort(request_id))

    def stats(self) -> EngineStats:
        """Counters; read without stopping the engine, so single figures may be a step apart."""
        return self._engine.stats()

    @property
    def engine(self) -> Engine:
        """The engine, for what does not change: its model, processor and limits."""
        return self._engine

    @property
    def max_num_seqs(self) -> int:
        """Sequences that run at the same time."""
        return self._engine.config.max_num_seqs

    @property
    def is_alive(self) -> bool:
        """The engine thread runs and has not failed, nor has another rank."""
        return self._thread.is_alive() and self._failure is None and not self._engine.failure

    @property
    def failure(self) -> str:
        """Why the engine stopped; "" if it did not fail."""
        if self._failure is None:
            return self._engine.failure
        return ": ".join(self._failure)

    @property
    def stalled_s(self) -> float:
        """Seconds since the last step while there is work for one; 0 when idle."""
        return time.monotonic() - self._last_step_s if self._engine.has_work else 0.0

    def close(self) -> None:
        """Abort everything and stop the thread. Further requests raise EngineError."""
        with self._gate:
            self._is_closed = True
        self._commands.put(None)
        self._thread.join()
        self._engine.close()

    def _command(self, command: Callable[[], None]) -> None:
        with self._gate:
            if self._is_closed:
                raise EngineError(f"the engine has stopped{self._because()}")
            self._commands.put(command)

    def _because(self) -> str:
        return f": {self._failure[1]}" if self._failure else ""

    # --- the engine thread ---

    def _run(self) -> None:
        try:
            while self._take_commands():
                self._publish(self._engine.step())
                self._last_step_s = time.monotonic()
        except Exception as error:
            log.exception("the engine stopped")
            self._failure = type(error).__name__, str(error)
        finally:
            with self._gate:
                self._is_closed = True
            self._drain()

    def _take_commands(self) -> bool:
        """Run what callers asked for; wait for it when idle. False when told to stop."""
        while not self._engine.has_work or not self._commands.empty():
            command = self._commands.get()
            if command is None:
                return False
            command()
            self._last_step_s = time.monotonic()
        return True

    def _add(self, subscriber: _Subscriber) -> None:
        request = subscriber.request
        try:
            self._engine.add_request(request)
        except RequestError as error:
            subscriber.send(error)
            return
        except Exception as error:  # whatever it is, its caller must hear of it, and nobody else
            log.exception("request %s could not be queued", request.request_id)
            subscriber.send(EngineError(f"the engine failed: {type(error).__name__}: {error}"))
            return
        self._subscribers[request.request_id] = subscriber

    def _leave(self, subscriber: _Subscriber) -> None:
        """Abort the request of one who has gone, but never another one of the same id."""
        request_id = subscriber.request.request_id
        if self._subscribers.get(request_id) is subscriber:
            self._abort(request_id)

    def _abort(self, request_id: str) -> None:
        self._publish(self._engine.abort(request_id))

    def _publish(self, outputs: list[StepOutput]) -> None:
        for output in outputs:
            self._subscribers[output.request_id].send(output)
        for request_id in {o.request_id for o in outputs if o.finish_reason}:
            if not self._engine.is_open(request_id):
                del self._subscribers[request_id]

    def _run_last(self, command: Callable[[], None]) -> None:
        try:
            command()
        except Exception:  # a broken engine may not even abort; the others wait to be told
            log.exception("a command to the stopped engine failed")

    def _drain(self) -> None:
        """Nobody may wait for ever: tell running and queued requests that the engine is gone."""
        while not self._commands.empty():
            command = self._commands.get()
            if command is not None:
                self._run_last(command)
        error = EngineError(f"the engine has stopped{self._because()}")
        for subscriber in self._subscribers.values():
            subscriber.send(error)
        self._subscribers.clear()
