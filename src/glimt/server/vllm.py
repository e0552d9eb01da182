"""vLLM's old `/generate`, and MindIE's variant of it; what vLLM tells of its tokenizer.

The routes of `/generate` and `/tokenize`, which TGI has too, are in `shared_paths`.

Source: vllm-project/vllm, vllm/entrypoints/api_server.py before its removal; Ascend/MindIE-LLM,
single_req_vllm_infer_interface.cpp; vLLM 0.33.0, entrypoints/serve/tokenize/protocol.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from glimt.errors import RequestError
from glimt.server.app import Context, Protocol
from glimt.server.bodies import Body, Bool, Int, StrictRoute, Text, parsed
from glimt.server.config import ServerConfig
from glimt.server.conversation import read_messages
from glimt.server.failures import Failure
from glimt.server.openai_texts import TokenTexts
from glimt.server.parameters import VllmParameters, fixed_sampling
from glimt.server.parts import MINDIE, Part, prompt_parts, text_of, user_message
from glimt.server.replies import Finished, streamed, whole
from glimt.server.replying import json_reply, one_line
from glimt.server.schemas import Messages, Parts, Tools
from glimt.server.service import Ask
from glimt.server.streaming import EventStream
from glimt.server.tools import read_offer
from glimt.types import Completion, Request, StepOutput, TextPart

_UPSTREAM_MAX_TOKENS, _MINDIE_MAX_TOKENS = 16, 512
_MODEL_OF_MINDIE = "None"  # its default for a LoRA's name
_DELIMITERS = {"newline": b"\n", "nul": b"\0"}


class VllmBody(VllmParameters):
    """A whole request."""

    prompt: Text | Parts
    model: Text | None = None
    stream: Bool = False


@dataclass(frozen=True, slots=True)
class VllmRequest:
    """A request, read.

    prefix: what stands before every text of the reply
    num_shown: choices that are shown, the likeliest of those computed
    """

    ask: Ask
    prefix: str
    is_stream: bool
    num_shown: int


def parse(value: Any, config: ServerConfig, request_id: str) -> VllmRequest:
    """A body that came as JSON. Raises RequestError or HttpFailure, naming the field."""
    body = parsed(VllmBody, value)
    is_mindie = config.profile == "mindie"
    if body.unknown() and not is_mindie:  # upstream fails on them, with 500
        raise RequestError(body.unknown()[0][:80], "is no field of this request")
    parts = prompt_parts(body.prompt, "prompt", MINDIE)
    most = config.max_output_tokens or _MINDIE_MAX_TOKENS if is_mindie else _UPSTREAM_MAX_TOKENS
    sampling = body.sampling(most)
    if body.stream and sampling.n != body.n:
        raise RequestError("best_of", "must be equal to n for a stream")
    is_list = isinstance(body.prompt, list)
    ask = Ask(
        protocol="vllm",
        request_id=request_id,
        sampling=sampling,
        messages=(user_message(parts, "prompt"),) if is_list else None,
        prompt=None if is_list else text_of(parts),
        takes_room=is_mindie,
    )
    _check_prompt(ask)
    return VllmRequest(
        ask=ask,
        prefix=_prefix(parts, is_list, is_mindie),
        is_stream=body.stream,
        num_shown=body.n,
    )


def _check_prompt(ask: Ask) -> None:
    if ask.messages is None and not ask.prompt:
        raise RequestError("prompt", "is empty")


def _prefix(parts: Sequence[Part], is_list: bool, is_mindie: bool) -> str:
    """The prompt as replies repeat it; MindIE puts a space behind, and of parts shows the first."""
    if not is_mindie:
        return text_of(parts)
    first = next((part.text for part in parts if isinstance(part, TextPart)), "")
    return (first if is_list else text_of(parts)) + " "


def render(finished: Finished, asked: VllmRequest) -> dict[str, Any]:
    """The object of a whole answer."""
    shown = finished.output.completions
    if len(shown) > asked.num_shown:
        ranked = sorted(shown, key=_cumulative_logprob, reverse=True)
        shown = tuple(ranked[: asked.num_shown])
    return {"text": [asked.prefix + each.text for each in shown]}


def _cumulative_logprob(completion: Completion) -> float:
    return sum(each.logprob or 0.0 for each in completion.logprobs or ())


def delimiter_of(config: ServerConfig) -> bytes:
    """What ends every object of a stream."""
    is_mindie = config.profile == "mindie"
    return _DELIMITERS["nul" if is_mindie else config.vllm_stream_delimiter]


class VllmWriter:
    """Upstream: all text so far of every choice, prompt included; MindIE: what is new, alone."""

    def __init__(self, request: Request, asked: VllmRequest, config: ServerConfig) -> None:
        self._is_mindie = config.profile == "mindie"
        self._is_cumulative = not self._is_mindie or config.full_text_streams
        self._delimiter = delimiter_of(config)
        prefix = "" if self._is_mindie else asked.prefix
        self._texts = [prefix] * request.sampling.n

    def add(self, output: StepOutput) -> bytes:
        """One object, if there is new text or an end."""
        text = output.text
        self._texts[output.index] += text
        if not text and not output.finish_reason:
            return b""
        if self._is_cumulative:
            return self._object({"text": self._texts})
        deltas = [""] * len(self._texts)
        deltas[output.index] = text
        return self._object({"text": deltas}) if text else b""

    def failed(self, failure: Failure) -> bytes:
        """The last object: what there is, and the error."""
        texts = self._texts if self._is_cumulative else [""] * len(self._texts)
        return self._object({"text": texts, "error": failure.message})

    def _object(self, value: Body | dict[str, Any]) -> bytes:
        return one_line(value) + self._delimiter


class Vllm:
    """Answers requests in vLLM's form."""

    def __init__(self, context: Context) -> None:
        self._context = context

    async def generate(self, request: HttpRequest, value: Any) -> Response:
        """`POST /generate` with a prompt."""
        request.state.family = "vllm"  # whose errors these are, since the path is TGI's too
        config, service = self._context.config, self._context.service
        asked = parse(value, config, request.state.request_id)
        model = value.get("model")
        self._context.check_model(None if model == _MODEL_OF_MINDIE else model)
        if not asked.is_stream:
            finished = await whole(request, service, asked.ask)
            return json_reply(render(finished, asked))
        pieces = await streamed(
            service, asked.ask, lambda answer: VllmWriter(answer.request, asked, config)
        )
        media_type = "text/event-stream" if config.profile == "mindie" else None
        return EventStream(pieces, config.max_stream_bytes, media_type, keep_alive=b"")

    async def tokenize(self, request: HttpRequest, value: Any) -> Response:
        """`POST /tokenize` with a prompt or messages: the ids, and how many fit."""
        request.state.family = "vllm"
        if not isinstance(value, dict):
            raise RequestError("body", "must be a JSON object")
        body = parsed(TokenizeBody, value)
        self._context.check_model(body.model)
        service = self._context.service
        limit = service.host.engine.engine.inputs.limits.max_model_len
        tokens = await self._ids(body, request.state.request_id)
        return json_reply({"count": len(tokens), "max_model_len": limit, "tokens": tokens})

    async def _ids(self, body: TokenizeBody, request_id: str) -> list[int]:
        service = self._context.service
        offer = read_offer(body.tools, None)
        if body.messages is None and body.prompt and not body.add_special_tokens and not offer:
            tokenizer = service.host.engine.engine.opened.processor.tokenizer
            return await asyncio.to_thread(tokenizer.encode, body.prompt)
        ask = Ask(
            protocol="vllm",
            request_id=request_id,
            sampling=fixed_sampling(False),
            messages=None if body.messages is None else read_messages(body.messages),
            prompt=body.prompt or "",
            offer=offer,
        )
        return list((await service.encode(ask)).prompt.token_ids)


class TokenizeBody(Body):
    """What vLLM's clients send to /tokenize: one of prompt and messages."""

    prompt: Text | None = None
    messages: Messages | None = None
    tools: Tools | None = None
    add_special_tokens: Bool = True
    model: Text | None = None


class DetokenizeBody(Body):
    """What vLLM's clients send to /detokenize."""

    tokens: list[Int]
    model: Text | None = None


def routes(context: Context) -> APIRouter:
    """Those that no other family has."""
    router = APIRouter(route_class=StrictRoute, tags=["vLLM"])

    @router.post("/detokenize", summary="vLLM: the text of tokens")
    async def detokenize(body: DetokenizeBody) -> Response:
        context.check_model(body.model)
        inputs = context.service.host.engine.engine.inputs
        inputs.check_ids("tokens", body.tokens)
        texts = TokenTexts(inputs.processor.tokenizer)
        return json_reply({"prompt": await asyncio.to_thread(texts.whole, body.tokens)})

    @router.get("/tokenizer_info", summary="vLLM: what /tokenize is done with")
    async def tokenizer_info() -> Response:
        engine = context.service.host.engine.engine
        # A name that is sent to /tokenize is text there like any other, so none is told.
        names = dict.fromkeys(("bos_token", "eos_token", "pad_token", "chat_template"))
        return json_reply(
            {
                "tokenizer_class": type(engine.inputs.processor.tokenizer).__name__,
                "model_max_length": engine.inputs.limits.max_model_len,
                **names,
            }
        )

    return router


PROTOCOL = Protocol("vllm", routes)
