"""Triton's and KServe v2's routes, and MindIE's of the same names.

Sources: triton-inference-server/server, docs/protocol and src/http_server.cc;
kserve/open-inference-protocol, specification/protocol/inference_rest.md. gRPC is not offered.
"""

from __future__ import annotations

import gzip
import re
import time
import zlib
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from glimt.errors import RequestError
from glimt.server.app import Context, Protocol
from glimt.server.bodies import Body, StrictRoute, Text, described, parsed, read_json
from glimt.server.failures import Failure, HttpFailure
from glimt.server.health import live_status, ready_status
from glimt.server.replies import streamed, whole
from glimt.server.replying import json_reply
from glimt.server.schemas import INFER
from glimt.server.service import checked_id
from glimt.server.streaming import EventStream
from glimt.server.tensors import HEADER, read_infer, write_infer
from glimt.server.triton_body import (
    NAMES,
    GenerateBody,
    TritonRequest,
    is_of_tokens,
    parse_generate,
    parse_text,
    parse_tokens,
)
from glimt.server.triton_model import (
    model_config,
    model_metadata,
    server_metadata,
    statistics,
)
from glimt.server.triton_reply import (
    TritonWriter,
    head,
    render_generate,
    text_tensors,
    token_tensor,
)

_MODEL = re.compile(r"[\w\-.]+")
_VERSION = "1"
_PREFIXES = ("/v2/models/{model}", "/v2/models/{model}/versions/{version}")


class StopBody(Body):
    """Which request is to end."""

    id: Text


class Triton:
    """Answers requests in Triton's form."""

    def __init__(self, context: Context) -> None:
        self._context = context

    def check(self, model: str, version: str = _VERSION) -> None:
        """Raise HttpFailure for another model than the one that is served, or another version."""
        if not _MODEL.fullmatch(model):
            raise HttpFailure(Failure("unknown_model", "no model has such a name", "model"))
        self._context.check_model(model)
        if version != _VERSION:
            said = f"version {version[:20]!r} is not served; only {_VERSION} is"
            raise HttpFailure(Failure("unknown_model", said, "version"))

    async def infer(self, request: Request, model: str) -> Response:
        """`POST …/infer`: tensors of a text, or of token ids as MindIE has them."""
        asked = read_infer(await request.body(), request.headers.get(HEADER))
        request_id = self._id(asked.request_id, request)
        parse = parse_tokens if is_of_tokens(asked) else parse_text
        read = parse(asked, self._context.config, request_id)
        finished = await whole(request, self._context.service, read.ask, NAMES)
        if is_of_tokens(asked):
            outputs = [token_tensor(finished, next(iter(asked.wanted), "output0"))]
        else:
            outputs = text_tensors(finished, read)
            if asked.wanted:
                outputs = _wanted(outputs, list(asked.wanted))
        content, size = write_infer(head(read, model, self._context.config), outputs, asked)
        return _packed(content, size, request.headers.get("accept-encoding", ""))

    async def generate(self, request: Request, model: str) -> Response:
        """`POST …/generate`: one object."""
        read = await self._read(request)
        finished = await whole(request, self._context.service, read.ask, NAMES)
        return json_reply(render_generate(finished, read, model, self._context.config))

    async def stream(self, request: Request, model: str) -> Response:
        """`POST …/generate_stream`: the status is that of the first token."""
        read, config = await self._read(request), self._context.config
        if read.parameters.n > 1:
            raise RequestError("n", "must be 1 for a stream")
        pieces = await streamed(
            self._context.service,
            read.ask,
            lambda answer: TritonWriter(answer, read, model, config, time.monotonic),
            NAMES,
            waits_for_first=True,
        )
        return EventStream(pieces, config.max_stream_bytes)

    async def stop(self, request: Request) -> Response:
        """`POST …/stopInfer`: end a request by its id; its own reply ends with what it has."""
        try:
            body = parsed(StopBody, await read_json(request))
            checked_id(body.id or "?", "id")
        except (RequestError, HttpFailure) as error:
            return json_reply({"error": str(error)}, 422)
        if not self._context.service.stop(body.id):
            return json_reply({"error": f"no running request has the id {body.id!r}"}, 404)
        return json_reply({"id": body.id})

    async def _read(self, request: Request) -> TritonRequest:
        value = await read_json(request)
        given = value.get("id") if isinstance(value, dict) else None
        request_id = self._id(given if isinstance(given, str) else None, request)
        return parse_generate(value, self._context.config, request_id)

    def _id(self, given: str | None, request: Request) -> str:
        return checked_id(given, "id") if given else request.state.request_id


def _wanted(outputs: list[Any], names: list[str]) -> list[Any]:
    """The outputs by the names that the caller listed. Raises RequestError for another one."""
    known = {tensor.name: tensor for tensor in outputs}
    for name in names:
        if name not in known:
            said = f"{name[:80]!r} is no output, or was not asked for with its return_ input"
            raise RequestError("outputs", said)
    return [known[name] for name in names]


def _packed(content: bytes, size: int | None, accepted: str) -> Response:
    """The reply of /infer, compressed if the client asks for it."""
    media_type = "application/json" if size is None else "application/octet-stream"
    headers = {} if size is None else {HEADER: str(size)}
    codings = [each.partition(";")[0].strip().lower() for each in accepted.split(",")]
    # "gzip, deflate" is what every HTTP library says of itself; only Triton's client says one.
    if codings == ["gzip"]:
        content, headers["Content-Encoding"] = gzip.compress(content, 1), "gzip"
    elif codings == ["deflate"]:
        content, headers["Content-Encoding"] = zlib.compress(content, 1), "deflate"
    return Response(content, 200, headers, media_type)


def routes(context: Context) -> APIRouter:
    """Health, what is served, and inference; everything of a model by version as well."""
    router = APIRouter(route_class=StrictRoute)
    triton = Triton(context)

    @router.get("/v2/health/live", summary="Triton: 200 if the server is alive")
    async def live() -> Response:
        return Response(status_code=live_status(context))

    @router.get("/v2/health/ready", summary="Triton: 200 if requests are answered")
    async def ready() -> Response:
        return Response(status_code=ready_status(context))

    @router.get("/v2", summary="Triton: what the server is")
    async def server() -> Response:
        return json_reply(server_metadata(context))

    @router.get("/v2/models/stats", summary="Triton: counts and times of all models")
    async def all_statistics() -> Response:
        return json_reply(statistics(context))

    @router.post("/v2/repository/index", summary="Triton: the models")
    async def index() -> Response:
        state = "READY" if context.service.host.is_ready else "LOADING"
        return json_reply([{"name": context.model_name, "version": _VERSION, "state": state}])

    @router.post("/v2/repository/models/{model}/{action}", include_in_schema=False)
    async def load(model: str, action: str) -> Response:
        raise RequestError("model", "models are not loaded and unloaded here")

    for prefix in _PREFIXES:
        _add_queries(router, prefix, context, triton)
        _add_inference(router, prefix, triton)
    return router


def _add_queries(router: APIRouter, prefix: str, context: Context, triton: Triton) -> None:
    @router.get(prefix, summary="Triton: a model's inputs and outputs")
    async def metadata(model: str, version: str = _VERSION) -> Response:
        triton.check(model, version)
        return json_reply(model_metadata(context, model))

    @router.get(f"{prefix}/ready", summary="Triton: 200 if the model answers")
    async def ready(model: str, version: str = _VERSION) -> Response:
        triton.check(model, version)
        return Response(status_code=ready_status(context))

    @router.get(f"{prefix}/config", summary="Triton: a model's configuration")
    async def config(model: str, version: str = _VERSION) -> Response:
        triton.check(model, version)
        return json_reply(model_config(context, model))

    @router.get(f"{prefix}/stats", summary="Triton: a model's counts and times")
    async def stats(model: str, version: str = _VERSION) -> Response:
        triton.check(model, version)
        return json_reply(statistics(context))


def _add_inference(router: APIRouter, prefix: str, triton: Triton) -> None:
    @router.post(f"{prefix}/infer", summary="Triton: tensors in, tensors out", openapi_extra=INFER)
    async def infer(request: Request, model: str, version: str = _VERSION) -> Response:
        triton.check(model, version)
        return await triton.infer(request, model)

    body = described(GenerateBody)

    @router.post(f"{prefix}/generate", summary="Triton: an answer", openapi_extra=body)
    async def generate(request: Request, model: str, version: str = _VERSION) -> Response:
        triton.check(model, version)
        return await triton.generate(request, model)

    @router.post(
        f"{prefix}/generate_stream", summary="Triton: an answer, streamed", openapi_extra=body
    )
    async def stream(request: Request, model: str, version: str = _VERSION) -> Response:
        triton.check(model, version)
        return await triton.stream(request, model)

    @router.post(
        f"{prefix}/stopInfer",
        summary="MindIE: end a request by its id",
        openapi_extra=described(StopBody),
    )
    async def stop(request: Request, model: str, version: str = _VERSION) -> Response:
        triton.check(model, version)
        return await triton.stop(request)


_ANSWERS = ("infer", "generate", "generate_stream")
PROTOCOL = Protocol(
    "triton",
    routes,
    answers=tuple(f"{prefix}/{each}" for prefix in _PREFIXES for each in _ANSWERS),
)
