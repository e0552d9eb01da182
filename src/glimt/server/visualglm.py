"""VisualGLM's own HTTP form: `POST /` with text, image and history. Off unless asked for.

Its route is in `shared_paths`. Source: THUDM/VisualGLM-6B, api.py and api_hf.py.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from glimt.errors import RequestError
from glimt.server.app import Context
from glimt.server.bodies import Body, Float, Int, Text, parsed
from glimt.server.parameters import AboveZero, fixed_sampling
from glimt.server.parts import TRITON, image_source
from glimt.server.replies import Finished, whole
from glimt.server.replying import json_reply
from glimt.server.service import Ask
from glimt.types import ImagePart, Message, Role, TextPart

NAMES = {"prompt": "text"}
_MOST_TURNS = 1000


class VisualGlmBody(Body):
    """A whole request. max_length and min_length count the prompt's tokens too."""

    text: Text
    image: Text | None = None
    history: Annotated[list[list[Text]], Field(max_length=_MOST_TURNS)] = Field(
        default_factory=list
    )
    max_length: Annotated[Int, Field(ge=1, le=2**31 - 1)] = 2048
    min_length: Annotated[Int, Field(ge=0, le=2**31 - 1)] = 50
    temperature: Annotated[Float, Field(ge=0)] = 0.8
    top_p: Annotated[Float, Field(gt=0, le=1)] = 0.4
    top_k: Annotated[Int, Field(ge=0, le=2**31 - 1)] = 100
    repetition_penalty: AboveZero = 1.2


def parse(value: Any, request_id: str) -> tuple[Ask, VisualGlmBody]:
    """A body that came as JSON. Raises RequestError or HttpFailure, naming the field."""
    body = parsed(VisualGlmBody, value)
    sampling = fixed_sampling(
        body.temperature > 0,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        repetition_penalty=body.repetition_penalty,
    )
    ask = Ask(
        protocol="visualglm",
        request_id=request_id,
        sampling=sampling,
        messages=_messages(body),
        total_tokens=(min(body.min_length, body.max_length), body.max_length),
    )
    return ask, body


def _messages(body: VisualGlmBody) -> Sequence[Message]:
    """The turns; the picture is in the first, whichever it was shown with."""
    turns: list[tuple[Role, str]] = []
    for i, pair in enumerate(body.history):
        if len(pair) != 2:
            raise RequestError(f"history[{i}]", "must be a question and its answer")
        turns += [("user", pair[0]), ("assistant", pair[1])]
    turns.append(("user", body.text))
    messages = [Message(role, (TextPart(text),)) for role, text in turns]
    if body.image is not None:
        picture = ImagePart(image_source(body.image, "image", TRITON))
        messages[0] = Message("user", (picture, *messages[0].parts))
    elif not body.text:
        raise RequestError("text", "is empty")
    return messages


def render(finished: Finished, body: VisualGlmBody, now_s: float) -> dict[str, Any]:
    """The reply; the history has grown by one turn."""
    text = finished.output.text
    shown = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(now_s))
    history = [*body.history, [body.text, text]]
    return {"result": text, "history": history, "status": 200, "time": shown}


class VisualGlm:
    """Answers requests in VisualGLM's own form."""

    def __init__(self, context: Context) -> None:
        self._context = context

    async def answer(self, request: Request, value: Any) -> Response:
        """`POST /` with a text."""
        ask, body = parse(value, request.state.request_id)
        finished = await whole(request, self._context.service, ask, NAMES)
        return json_reply(render(finished, body, time.time()))
