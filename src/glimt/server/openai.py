"""OpenAI: chat completions, completions and models, as the `openai` client speaks them."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, aclosing
from functools import partial
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from glimt.errors import GlimtError, RequestError
from glimt.outputs.assembler import OutputAssembler
from glimt.server.app import Context, Protocol
from glimt.server.bodies import StrictRoute
from glimt.server.failures import Failure, HttpFailure, body_of, failure_of
from glimt.server.openai_asks import (
    chat_ask,
    chat_report,
    completion_asks,
    completion_reports,
)
from glimt.server.openai_bodies import ChatBody, CompletionBody, SamplingBody
from glimt.server.openai_prompt import PromptReport
from glimt.server.openai_render import (
    ChatChunks,
    Chunks,
    ChunksMaker,
    CompletionChunks,
    Head,
    chat_reply,
    completion_reply,
)
from glimt.server.openai_texts import TokenTexts
from glimt.server.replies import in_words_of
from glimt.server.replying import data_event, json_reply
from glimt.server.service import Answer, Ask, check_output
from glimt.server.streaming import EventStream, begun, unless_left
from glimt.types import RequestOutput, StepOutput

log = logging.getLogger("glimt.server")


def routes(context: Context) -> APIRouter:
    """The routes below /v1."""
    router = APIRouter(prefix="/v1", route_class=StrictRoute, tags=["OpenAI"])

    @router.post("/chat/completions", summary="Answer a conversation")
    async def chat(request: Request, body: ChatBody) -> Response:
        context.check_model(body.model)
        ask = chat_ask(body, request.state.request_id)
        head = Head(f"chatcmpl-{ask.request_id}", int(time.time()), context.model_name)
        if body.stream:
            kind = partial(ChatChunks, offer=ask.offer)
            return await _streamed(context, request, body, [ask], head, kind)
        return await unless_left(request, _chat_whole(context, ask, head, chat_report(body)))

    @router.post("/completions", summary="Continue texts, without a chat template")
    async def complete(request: Request, body: CompletionBody) -> Response:
        context.check_model(body.model)
        asks = completion_asks(body, request.state.request_id)
        reports = completion_reports(body)
        head = Head(f"cmpl-{request.state.request_id}", int(time.time()), context.model_name)
        if body.stream:
            kind = partial(CompletionChunks, reports=reports)
            return await _streamed(context, request, body, asks, head, kind, reports)
        return await unless_left(request, _completions_whole(context, asks, head, reports))

    @router.get("/models", summary="What is served")
    async def models() -> Response:
        data = [_model(context, name) for name in context.model_names]
        return json_reply({"object": "list", "data": data})

    @router.get("/models/{model_id:path}", summary="One of them")
    async def model(model_id: str) -> Response:
        if model_id not in context.model_names:
            said = f"the model {model_id[:200]!r} is not served here"
            raise HttpFailure(Failure("unknown_model", said, "model"))
        return json_reply(_model(context, model_id))

    return router


_ANSWERS = ("/v1/chat/completions", "/v1/completions")
PROTOCOL = Protocol("openai", routes, answers=_ANSWERS)


def _model(context: Context, name: str) -> dict[str, Any]:
    engine = context.service.host.last_engine
    most = None if engine is None else engine.engine.inputs.limits.max_model_len
    return {
        "id": name,
        "object": "model",
        "created": context.created,
        "owned_by": "glimt",
        "root": name,
        "parent": None,
        "max_model_len": most,
        "permission": [],
    }


def _texts(context: Context) -> TokenTexts:
    return TokenTexts(context.service.host.engine.engine.inputs.processor.tokenizer)


# --- whole answers ---------------------------------------------------------------------------


async def _chat_whole(context: Context, ask: Ask, head: Head, report: PromptReport) -> Response:
    texts = _texts(context)
    async with context.service.answer(ask) as answer:
        whole = await answer.whole()
        write = partial(chat_reply, head, whole, answer.request, texts, ask.offer, report)
        return await _written(write, [report])


async def _written(write: Callable[[], Any], reports: Sequence[PromptReport]) -> Response:
    """The reply; one of a prompt's tokens is written beside the loop, which others wait for."""
    if all(report.wanted is None for report in reports):
        return json_reply(write())
    return await asyncio.to_thread(lambda: json_reply(write()))


async def _completions_whole(
    context: Context, asks: Sequence[Ask], head: Head, reports: Sequence[PromptReport]
) -> Response:
    texts = _texts(context)
    async with AsyncExitStack() as stack:
        answers = await _entered(context, stack, asks, reports)
        requests = [answer.request for answer in answers]
        outputs = await _all_whole(answers)
        write = partial(completion_reply, head, outputs, requests, texts, reports)
        return await _written(write, reports)


async def _entered(
    context: Context, stack: AsyncExitStack, asks: Sequence[Ask], reports: Sequence[PromptReport]
) -> list[Answer]:
    """All answers, begun. Raises what the service raises, in the words of the body."""
    try:
        return [await stack.enter_async_context(context.service.answer(ask)) for ask in asks]
    except RequestError as error:
        asks_by_echo = any(report.num_top is None for report in reports)
        raise in_words_of(error, {"prompt_logprobs": "echo"} if asks_by_echo else {}) from error


async def _all_whole(answers: Sequence[Answer]) -> list[RequestOutput]:
    """Every answer, run side by side. Raises what the first to fail raises."""
    assemblers = [OutputAssembler(answer.request) for answer in answers]
    found: dict[int, RequestOutput] = {}
    async with aclosing(_merged(answers)) as outputs:
        async for number, output in outputs:
            check_output(output)
            if (whole := assemblers[number].add(output)) is not None:
                found[number] = whole
    return [found[number] for number in range(len(answers))]


async def _merged(answers: Sequence[Answer]) -> AsyncGenerator[tuple[int, StepOutput], None]:
    """The outputs of several answers as they come, with the number of the answer."""
    ready: asyncio.Queue[tuple[int, StepOutput] | Exception | None] = asyncio.Queue()

    async def pump(number: int, outputs: AsyncIterator[StepOutput]) -> None:
        try:
            async for output in outputs:
                ready.put_nowait((number, output))
            ready.put_nowait(None)
        except Exception as error:
            ready.put_nowait(error)

    tasks = [asyncio.create_task(pump(i, answer.stream())) for i, answer in enumerate(answers)]
    num_open = len(tasks)
    try:
        while num_open:
            item = await ready.get()
            if isinstance(item, Exception):
                raise item
            num_open -= item is None
            if item is not None:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


# --- streams ---------------------------------------------------------------------------------


async def _streamed(
    context: Context,
    request: Request,
    body: SamplingBody,
    asks: Sequence[Ask],
    head: Head,
    kind: ChunksMaker,
    reports: Sequence[PromptReport] = (),
) -> Response:
    """Everything that can be refused is refused before the first byte."""
    texts = _texts(context)
    stack = AsyncExitStack()

    try:
        answers = await unless_left(request, _entered(context, stack, asks, reports))
    except BaseException:
        await stack.aclose()
        raise
    chunks = kind(head, [answer.request for answer in answers], texts)
    events = _Events(chunks, body, context.config.profile)
    pieces = await begun(_pieces(context, stack, answers, events))
    return EventStream(pieces, context.config.max_stream_bytes)


async def _pieces(
    context: Context, stack: AsyncExitStack, answers: Sequence[Answer], events: _Events
) -> AsyncGenerator[bytes, None]:
    """An empty piece, then the events; owns the requests, whatever becomes of it."""
    async with stack:
        yield b""
        try:
            async with aclosing(_merged(answers)) as outputs:
                async for number, output in outputs:
                    check_output(output)
                    if piece := events.of(number, output):
                        yield piece
            yield events.end()
        except Exception as error:
            if not isinstance(error, GlimtError):
                log.exception("a stream failed")
            yield events.failure(_counted(context, failure_of(error)))


def _counted(context: Context, failure: Failure) -> Failure:
    """The same, told to the metrics; a deadline is counted where it passes."""
    if failure.kind in ("engine", "unavailable"):
        context.metrics.failed(failure.kind)
    return failure


class _Events:
    """Chunks as server-sent events, with counts where they are asked for."""

    def __init__(self, chunks: Chunks, body: SamplingBody, profile: str) -> None:
        self._chunks = chunks
        self._profile = profile
        self._has_last = body.includes_usage and profile == "upstream"
        self._is_running = body.has_running_usage

    def of(self, number: int, output: StepOutput) -> bytes:
        """The events of one output."""
        chunks = self._chunks.feed(number, output)
        return b"".join(data_event(self._with_usage(chunk, output, chunks[-1])) for chunk in chunks)

    def _with_usage(
        self, chunk: dict[str, Any], output: StepOutput, last: dict[str, Any]
    ) -> dict[str, Any]:
        if self._is_running:
            return chunk | {"usage": self._chunks.usage.body()}
        if self._profile == "mindie" and output.usage and chunk is last:
            return chunk | {"usage": self._chunks.usage.body()}
        return chunk | {"usage": None} if self._has_last else chunk

    def end(self) -> bytes:
        """What follows the last text."""
        usage = data_event(self._chunks.last()) if self._has_last else b""
        return usage + b"data: [DONE]\n\n"

    def failure(self, failure: Failure) -> bytes:
        """An error after the first byte: the status cannot say it any more."""
        return error_end(failure, self._profile)


def error_end(failure: Failure, profile: str) -> bytes:
    """The last events of a stream that fails."""
    return data_event(body_of(failure, "openai", profile)) + b"data: [DONE]\n\n"
