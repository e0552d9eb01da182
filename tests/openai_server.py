"""A small OpenAI-compatible server over loopback: over an engine, or one that follows a script.

It stands in for any server that `glimt bench serve` and evaluation programs may talk to, and knows
no more of the protocol than they need.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

import glimt
from glimt.errors import RequestError
from glimt.inputs.request import RequestOptions
from glimt.types import SamplingParams, StepOutput, Usage

MODEL = "small"
_SAMPLING = ("temperature", "top_p", "top_k", "n", "stop", "seed", "ignore_eos", "max_tokens")


@contextmanager
def serving(app: FastAPI) -> Iterator[str]:
    """Run an app in a thread; gives its address."""
    quiet = {"log_level": "critical", "lifespan": "off", "ws": "none"}
    quiet |= {"loop": "asyncio", "http": "h11"}  # as glimt serve, whatever else is installed
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, **quiet))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server ended before it began"
        time.sleep(0.005)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = server.force_exit = True
        thread.join()


def event(data: Any) -> bytes:
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)
    return f"data: {text}\n\n".encode()


def chunk(is_chat: bool = True, text: str | None = None, finish: str | None = None) -> bytes:
    """One event of a stream with one choice."""
    said = {} if text is None else {"content": text}
    of_kind = {"delta": said} if is_chat else {"text": text or ""}
    kind = "chat.completion.chunk" if is_chat else "text_completion"
    choice = {"index": 0, **of_kind, "finish_reason": finish}
    return event({"id": "1", "object": kind, "created": 0, "model": MODEL, "choices": [choice]})


def usage_chunk(prompt_tokens: int, completion_tokens: int, **details: int) -> bytes:
    usage = {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": details or None,
    }
    return event({"id": "1", "object": "chat.completion.chunk", "choices": [], "usage": usage})


DONE = event("[DONE]")


def models(*names: str) -> dict[str, Any]:
    data = [{"id": n, "object": "model", "created": 0, "owned_by": "tests"} for n in names]
    return {"object": "list", "data": data}


def refusal(status: int, message: str, **headers: str) -> JSONResponse:
    error = {"message": message, "type": "Error", "param": None, "code": status}
    return JSONResponse({"error": error}, status, headers)


# --- over an engine --------------------------------------------------------------------------


def engine_app(engine: glimt.AsyncEngine, seen: list[dict[str, Any]] | None = None) -> FastAPI:
    """Serves chat and completions. seen: gets each body that was sent."""
    app = FastAPI()

    @app.get("/v1/models")
    def list_models() -> dict[str, Any]:
        return models(MODEL)

    @app.get("/health")
    def health() -> dict[str, Any]:
        return {}

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await answer(request, is_chat=True)

    @app.post("/v1/completions")
    async def complete(request: Request) -> Response:
        return await answer(request, is_chat=False)

    async def answer(request: Request, is_chat: bool) -> Response:
        body = await request.json()
        if seen is not None:
            seen.append(body)
        try:
            prepared = await prepare(engine, body, is_chat)
        except RequestError as error:
            return refusal(400, str(error))
        outputs = engine.stream(prepared)
        if body.get("stream"):
            events = _events(outputs, is_chat, body.get("stream_options") or {})
            return StreamingResponse(events, media_type="text/event-stream")
        return JSONResponse(await _whole(outputs, is_chat))

    return app


async def prepare(engine: glimt.AsyncEngine, body: Mapping[str, Any], is_chat: bool) -> Any:
    """The request that a body asks for."""
    given = {name: body[name] for name in _SAMPLING if body.get(name) is not None}
    given["max_tokens"] = body.get("max_completion_tokens") or given.get("max_tokens")
    sampling = SamplingParams(**given)
    options = RequestOptions(allow_files=False)
    if is_chat:
        return await engine.prepare_chat(body["messages"], sampling, options)
    return await engine.prepare_text(body["prompt"], sampling, options)


async def _events(
    outputs: AsyncIterator[StepOutput], is_chat: bool, options: Mapping[str, Any]
) -> AsyncIterator[bytes]:
    usage: Usage | None = None
    async with aclosing(outputs) as stream:  # type: ignore[type-var]
        async for output in stream:
            usage = output.usage or usage
            if output.text or output.finish_reason:
                yield chunk(is_chat, output.text or None, output.finish_reason)
    if options.get("include_usage") and usage:
        details = {"cached_tokens": usage.cached_tokens, "image_tokens": usage.image_tokens}
        yield usage_chunk(usage.prompt_tokens, usage.completion_tokens, **details)
    yield DONE


async def _whole(outputs: AsyncIterator[StepOutput], is_chat: bool) -> dict[str, Any]:
    seen = [output async for output in outputs]
    text = "".join(output.text for output in seen)
    usage = seen[-1].usage
    assert usage
    said = {"message": {"role": "assistant", "content": text}} if is_chat else {"text": text}
    return {
        "id": "1",
        "object": "chat.completion" if is_chat else "text_completion",
        "created": 0,
        "model": MODEL,
        "choices": [{"index": 0, **said, "finish_reason": seen[-1].finish_reason}],
        "usage": {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "total_tokens": usage.total_tokens,
        },
    }


# --- by a script -----------------------------------------------------------------------------

HANG = b"hang"  # in a script: nothing comes any more
BREAK = b"break"  # in a script: the connection is torn down

Step = Sequence[bytes] | Response


def answer_of(*texts: str, prompt_tokens: int = 7, is_chat: bool = True) -> list[bytes]:
    """A good answer: one token a text, a finish reason, usage, the end."""
    said = [chunk(is_chat, text) for text in texts]
    usage = usage_chunk(prompt_tokens, len(texts))
    return [*said, chunk(is_chat, finish="length"), usage, DONE]


@dataclass
class Script:
    """What each request gets, by its number among all; the models that are listed.

    answer: request number -> pieces of the stream, each sent by itself, or a whole reply
    bodies, keys: what was sent
    """

    answer: Callable[[int], Step]
    names: Sequence[str] = (MODEL,)
    listing: Response | None = None
    bodies: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)

    def app(self) -> FastAPI:
        app = FastAPI()

        @app.get("/v1/models", response_model=None)
        def list_models() -> Any:
            return self.listing or models(*self.names)

        @app.post("/v1/chat/completions")
        @app.post("/v1/completions")
        async def answer(request: Request) -> Response:
            number = len(self.bodies)
            self.bodies.append(await request.json())
            self.keys.append(request.headers.get("authorization"))
            step = self.answer(number)
            if isinstance(step, Response):
                return step
            return StreamingResponse(_pieces(step), media_type="text/event-stream")

        return app


async def _pieces(pieces: Sequence[bytes]) -> AsyncIterator[bytes]:
    for piece in pieces:
        if piece == BREAK:
            raise ConnectionAbortedError
        if piece == HANG:
            await asyncio.sleep(3600)
        yield piece
        await asyncio.sleep(0)
