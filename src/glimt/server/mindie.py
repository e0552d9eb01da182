"""MindIE's own request form: `/infer`, `/infer_token` and `/v1/tokenizer`.

Its TGI, Triton, vLLM and OpenAI forms are variants inside those files. Source: Ascend/MindIE-LLM,
src/server/endpoint/single_req_infer_interface and docs/zh/user_guide.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from glimt.errors import RequestError
from glimt.server.app import Context, Protocol
from glimt.server.bodies import (
    Body,
    Bool,
    Float,
    Int,
    StrictRoute,
    Text,
    described,
    parsed,
    read_json,
)
from glimt.server.config import ServerConfig
from glimt.server.failures import Failure, body_of
from glimt.server.parameters import (
    AboveZero,
    TextParameters,
    fixed_sampling,
    is_sampled_in_mindie,
    refuse_typical_p,
)
from glimt.server.parts import prompt_parts
from glimt.server.prompts import with_prompt
from glimt.server.replies import Finished, streamed, whole
from glimt.server.replying import data_event, json_reply
from glimt.server.schemas import Parts
from glimt.server.service import Answer, Ask
from glimt.server.streaming import EventStream
from glimt.server.tokens import StepTimes, TokenTexts, finish_word, seed_of
from glimt.types import Request, SamplingParams, StepOutput

NAMES = {"prompt": "inputs", "max_tokens": "parameters.max_new_tokens"}
_NAMES_OF_TOKENS = {**NAMES, "prompt": "input_id"}
_MAX_TOKENS = 20


class InferParameters(TextParameters):
    """`parameters` of the native form."""

    temperature: AboveZero | None = None
    top_k: Annotated[Int, Field(gt=0, le=2**31 - 1)] | None = None
    top_p: Annotated[Float, Field(gt=0, lt=1)] | None = None
    typical_p: Annotated[Float, Field(gt=0, le=1)] | None = None


class InferBody(Body):
    """A whole request: one of inputs and input_id."""

    inputs: Text | Parts | None = None
    input_id: list[Int] | None = None
    stream: Bool = False
    parameters: InferParameters = Field(default_factory=InferParameters)


class TokenizerBody(Body):
    """What is to be counted."""

    inputs: Text
    do_decode: Bool = True


@dataclass(frozen=True, slots=True)
class InferRequest:
    """A request, read."""

    ask: Ask
    is_stream: bool
    wants_details: bool
    is_of_tokens: bool

    @property
    def names(self) -> dict[str, str]:
        """What our fields are called here."""
        return _NAMES_OF_TOKENS if self.is_of_tokens else NAMES


# --- a request -------------------------------------------------------------------------------


def parse(value: Any, config: ServerConfig, request_id: str, is_of_tokens: bool) -> InferRequest:
    """A body that came as JSON. Raises RequestError or HttpFailure, naming the field."""
    body = parsed(InferBody, value)
    if body.inputs is not None and body.input_id is not None:
        raise RequestError("inputs", "and input_id cannot be given together")
    given = body.parameters
    refuse_typical_p(given.typical_p, off=(1.0,))
    ask = Ask(
        protocol="mindie",
        request_id=request_id,
        sampling=_sampling(given),
        timeout_s=given.timeout,
        takes_room=True,
    )
    asked = _with_ids(ask, body) if is_of_tokens else _with_text(ask, body, config)
    return InferRequest(asked, body.stream, given.details, is_of_tokens)


def _with_ids(ask: Ask, body: InferBody) -> Ask:
    if not body.input_id:
        raise RequestError("input_id", "must be a list of token ids that is not empty")
    return replace(ask, token_ids=tuple(body.input_id))


def _with_text(ask: Ask, body: InferBody, config: ServerConfig) -> Ask:
    if body.inputs is None:
        raise RequestError("inputs", "is missing")
    return with_prompt(ask, prompt_parts(body.inputs, "inputs"), "inputs", config)


def _sampling(given: InferParameters) -> SamplingParams:
    chosen = given.temperature, given.top_k, given.top_p
    return fixed_sampling(
        is_sampled_in_mindie(given.do_sample, *chosen),
        temperature=given.temperature,
        top_k=given.top_k,
        top_p=given.top_p,
        repetition_penalty=given.repetition_penalty,
        seed=given.seed,
        max_tokens=given.max_new_tokens or _MAX_TOKENS,
    )


# --- an answer -------------------------------------------------------------------------------


def render(finished: Finished, asked: InferRequest) -> dict[str, Any]:
    """The object of a whole answer."""
    done = finished.output.completions[0]
    if not asked.wants_details:
        return {"generated_text": done.text}
    details = {
        "finish_reason": finish_word(finished.request, done.finish_reason, done.stop_reason),
        "generated_tokens": len(done.token_ids),
        "generated_token_ids": list(done.token_ids),
        "seed": seed_of(finished.request),
    }
    return {"generated_text": done.text, "details": details}


class InferWriter:
    """One event per step, with its time in ms; the last has the whole text.

    MindIE's last event has no `token.text`, so that whoever adds the pieces up misses the tail;
    here it has the last piece.
    """

    def __init__(self, answer: Answer, asked: InferRequest, clock: Callable[[], float]) -> None:
        self._request: Request = answer.request
        self._wants_details = asked.wants_details
        self._times = StepTimes(answer.arrival_s, clock)
        self._text, self._num_tokens = "", 0

    def add(self, output: StepOutput) -> bytes:
        """The event of one step."""
        self._text += output.text
        self._num_tokens += len(output.token_ids)
        event: dict[str, Any] = self._times.next()
        is_last = output.finish_reason is not None
        if is_last:
            event["generated_text"] = self._text
            if self._wants_details:
                event["details"] = self._details(output)
        text = output.text or (None if is_last else "")
        event["token"] = {"id": list(output.token_ids), "text": text}
        return data_event(event)

    def _details(self, output: StepOutput) -> dict[str, Any]:
        return {
            "finish_reason": finish_word(self._request, output.finish_reason, output.stop_reason),
            "generated_tokens": self._num_tokens,
            "seed": seed_of(self._request),
        }

    def failed(self, failure: Failure) -> bytes:
        """The last event."""
        return data_event(body_of(failure, "mindie"))


# --- routes ----------------------------------------------------------------------------------


def routes(context: Context) -> APIRouter:
    """The three."""
    router = APIRouter(route_class=StrictRoute)
    service, config = context.service, context.config

    async def answer(request: HttpRequest, is_of_tokens: bool) -> Response:
        value = await read_json(request)
        asked = parse(value, config, request.state.request_id, is_of_tokens)
        if asked.is_stream:
            pieces = await streamed(
                service, asked.ask, lambda a: InferWriter(a, asked, time.monotonic), asked.names
            )
            return EventStream(pieces, config.max_stream_bytes)
        finished = await whole(request, service, asked.ask, asked.names)
        return json_reply(render(finished, asked))

    body = described(InferBody)

    @router.post("/infer", summary="MindIE: an answer, whole or streamed", openapi_extra=body)
    async def infer(request: HttpRequest) -> Response:
        return await answer(request, is_of_tokens=False)

    @router.post("/infer_token", summary="MindIE: the same of token ids", openapi_extra=body)
    async def infer_token(request: HttpRequest) -> Response:
        return await answer(request, is_of_tokens=True)

    @router.post(
        "/v1/tokenizer",
        summary="MindIE: a text's tokens",
        openapi_extra=described(TokenizerBody),
    )
    async def tokenizer(request: HttpRequest) -> Response:
        asked = parsed(TokenizerBody, await read_json(request))
        processor = service.host.engine.engine.opened.processor
        ids = await asyncio.to_thread(processor.tokenizer.encode, asked.inputs)
        reply: dict[str, Any] = {"token_number": len(ids)}
        if asked.do_decode:
            texts = TokenTexts(processor)
            reply["tokens"] = [texts.shown(token_id).text for token_id in ids]
        return json_reply(reply)

    return router


PROTOCOL = Protocol("mindie", routes, answers=("/infer", "/infer_token"))
