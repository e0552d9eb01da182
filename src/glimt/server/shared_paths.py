"""Paths that two families share: which one a body is of is told by its keys, here and only here.

POST /generate   a prompt is vLLM's form, inputs are TGI's
POST /           inputs are TGI's, a text is VisualGLM's own
POST /tokenize   inputs are TGI's, a prompt or messages vLLM's
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from glimt.server.app import Context, Protocol
from glimt.server.bodies import Body, StrictRoute, described, read_json
from glimt.server.failures import Failure, HttpFailure
from glimt.server.tgi import Tgi
from glimt.server.tgi import TokenizeBody as TgiTokens
from glimt.server.tgi_body import TgiBody
from glimt.server.visualglm import VisualGlm, VisualGlmBody
from glimt.server.vllm import TokenizeBody as VllmTokens
from glimt.server.vllm import Vllm, VllmBody


def routes(context: Context) -> APIRouter:
    """The three."""
    router = APIRouter(route_class=StrictRoute)
    tgi, vllm, visualglm = Tgi(context), Vllm(context), VisualGlm(context)

    @router.post(
        "/generate",
        summary="TGI and vLLM: an answer, chosen by the body's keys",
        openapi_extra=_either(TgiBody, VllmBody),
    )
    async def generate(request: Request) -> Response:
        value = await read_json(request)
        if _has(value, "prompt"):  # first, as MindIE does
            return await vllm.generate(request, value)
        if _has(value, "inputs"):
            return await tgi.generate(request, value)
        raise _missing("prompt or inputs")

    @router.post(
        "/",
        summary="TGI: an answer, in a list or streamed; VisualGLM's own form",
        openapi_extra=_either(TgiBody, *([VisualGlmBody] if context.config.visualglm_api else [])),
    )
    async def root(request: Request) -> Response:
        value = await read_json(request)
        if _has(value, "inputs"):
            return await tgi.compat(request, value)
        if context.config.visualglm_api and _has(value, "text"):
            return await visualglm.answer(request, value)
        raise _missing("inputs")

    @router.post(
        "/tokenize",
        summary="TGI and vLLM: the tokens of a text",
        openapi_extra=_either(TgiTokens, VllmTokens),
    )
    async def tokenize(request: Request) -> Response:
        value = await read_json(request)
        if _has(value, "inputs"):
            return await tgi.tokenize(value)
        if _has(value, "prompt") or _has(value, "messages"):
            return await vllm.tokenize(request, value)
        raise _missing("inputs, prompt or messages")

    return router


def _either(*kinds: type[Body]) -> dict[str, Any]:
    """What OpenAPI is told of a body that is of one of several kinds."""
    contents = [described(kind)["requestBody"]["content"]["application/json"] for kind in kinds]
    schema = {"anyOf": [content["schema"] for content in contents]}
    return {"requestBody": {"content": {"application/json": {"schema": schema}}, "required": True}}


def _has(value: Any, key: str) -> bool:
    return isinstance(value, dict) and value.get(key) is not None


def _missing(what: str) -> HttpFailure:
    return HttpFailure(Failure("invalid", f"the body must be a JSON object with {what}"))


PROTOCOL = Protocol("shared", routes, answers=("/", "/generate"))
