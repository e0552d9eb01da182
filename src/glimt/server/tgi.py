"""TGI's routes, and MindIE's of the same names. Sources: those of `tgi_body`."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from glimt import __version__
from glimt.errors import RequestError
from glimt.server.app import Context, Protocol
from glimt.server.bodies import Body, StrictRoute, Text, described, parsed, read_json
from glimt.server.failures import HttpFailure, failure_of
from glimt.server.replies import in_words_of, streamed, whole
from glimt.server.replying import json_reply
from glimt.server.streaming import EventStream
from glimt.server.tgi_body import (
    MOST_BEST_OF,
    NAMES,
    TgiBody,
    TgiRequest,
    parse,
)
from glimt.server.tgi_reply import TgiWriter, error_event, headers, render
from glimt.server.tokens import TokenTexts

if TYPE_CHECKING:
    from glimt.models.base import Processor


class TokenizeBody(Body):
    """What is to be cut into tokens."""

    inputs: Text


class Tgi:
    """Answers requests in TGI's form."""

    def __init__(self, context: Context) -> None:
        self._context = context

    async def generate(self, request: Request, value: Any) -> Response:
        """`POST /generate`: one object, whatever `stream` says."""
        content, times = await self._whole(request, value)
        return json_reply(content, headers=times)

    async def compat(self, request: Request, value: Any) -> Response:
        """`POST /`: a list of one object, or a stream."""
        if isinstance(value, dict) and value.get("stream") is True:
            return await self.stream(request, value)
        content, times = await self._whole(request, value)
        return json_reply([content], headers=times)

    async def stream(self, request: Request, value: Any) -> Response:
        """`POST /generate_stream`. Upstream tells a bad request in an event of a 200."""
        config = self._context.config
        try:
            asked = self._parse(request, value, is_stream=True)
            texts = self._texts()
            pieces = await streamed(
                self._context.service,
                asked.ask,
                lambda answer: TgiWriter(answer.request, asked, texts),
                NAMES,
            )
        except (RequestError, HttpFailure) as error:
            failure = failure_of(error)
            if config.profile != "upstream" or failure.kind not in ("invalid", "too_long"):
                raise
            self._context.metrics.refused(failure.kind)
            return _one_event(error_event(failure, "upstream"))
        return EventStream(pieces, config.max_stream_bytes)

    async def tokenize(self, value: Any) -> Response:
        """`POST /tokenize` with `inputs`: the text's tokens and their places in it."""
        body = parsed(TokenizeBody, value)
        processor = self._context.service.host.engine.engine.opened.processor
        return json_reply(await asyncio.to_thread(places, body.inputs, processor))

    async def _whole(self, request: Request, value: Any) -> tuple[dict[str, Any], dict[str, str]]:
        """The object of an answer, and its headers. Raises HalfAnswer for one that was stopped."""
        asked = self._parse(request, value, is_stream=False)
        # Before the answer: a server that drains meanwhile gives out no engine any more.
        texts, device = self._texts(), self._context.service.host.engine.engine.config.device
        finished = await whole(request, self._context.service, asked.ask, NAMES)
        content = render(finished, asked, texts)
        return content, dict(headers(finished, asked, device))

    def _parse(self, request: Request, value: Any, is_stream: bool) -> TgiRequest:
        context = self._context
        models = (*context.model_names, "None")
        return parse(value, context.config, request.state.request_id, models, is_stream)

    def _texts(self) -> TokenTexts:
        return TokenTexts(self._context.service.host.engine.engine.opened.processor)

    def info(self) -> dict[str, Any]:
        """The union of what TGI and MindIE tell."""
        host, config = self._context.service.host, self._context.config
        engine = host.engine.engine
        limit = engine.inputs.limits.max_model_len
        most_prompt = min(limit - 1, config.max_prompt_tokens or limit)
        model = {
            "model_id": self._context.model_name,
            "model_sha": None,
            "model_pipeline_tag": "image-text-to-text",
            "model_dtype": str(engine.opened.dtype).removeprefix("torch."),
            "model_device_type": engine.config.device,
        }
        most = engine.config.max_num_seqs
        return {
            **model,
            "max_concurrent_requests": most + config.max_waiting,
            "max_best_of": MOST_BEST_OF,
            "max_stop_sequences": 1024,
            "max_input_tokens": most_prompt,
            "max_input_length": most_prompt,
            "max_total_tokens": limit,
            "max_batch_total_tokens": engine.config.max_num_batched_tokens,
            "max_waiting_tokens": None,
            "waiting_served_ratio": None,
            "validation_workers": max(1, config.num_decoders),
            "max_client_batch_size": 1,
            "router": "glimt",
            "version": __version__,
            "sha": None,
            "docker_label": None,
            "models": [{**model, "max_total_tokens": limit}],
        }


def places(text: str, processor: Processor) -> list[dict[str, Any]]:
    """A text's tokens, and which of its characters each ends. Raises RequestError."""
    try:
        ids = processor.tokenizer.encode(text)
    except RequestError as error:
        raise in_words_of(error, {"text": "inputs"}) from error
    decoder, texts = processor.tokenizer.decoder(), TokenTexts(processor)
    tokens: list[dict[str, Any]] = []
    at = 0
    for token_id in ids:
        stop = min(len(text), at + len(decoder.feed(token_id)))
        shown = texts.shown(token_id).text
        tokens.append({"id": token_id, "text": shown, "start": at, "stop": stop})
        at = stop
    return tokens


def _one_event(event: bytes) -> Response:
    cached = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return Response(event, 200, cached, "text/event-stream; charset=utf-8")


def routes(context: Context) -> APIRouter:
    """What is TGI's alone; the paths that it shares are in `shared_paths`."""
    router = APIRouter(route_class=StrictRoute)
    tgi = Tgi(context)

    @router.post(
        "/generate_stream",
        summary="TGI: an answer, token by token",
        openapi_extra=described(TgiBody),
    )
    async def generate_stream(request: Request) -> Response:
        return await tgi.stream(request, await read_json(request))

    @router.get("/info", summary="TGI, MindIE: what is served")
    async def info() -> Response:
        return json_reply(tgi.info())

    return router


PROTOCOL = Protocol("tgi", routes, answers=("/generate_stream",))
