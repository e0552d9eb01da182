"""What OpenAPI is told of the fields that are read by hand: messages, parts, functions, tensors.

`parts`, `conversation`, `tools` and `tensors` read them; what is said here only describes that.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import WithJsonSchema

from glimt.server.tensors import DATATYPES

_TEXT = {"type": "string"}
_URL = {"type": "string", "format": "uri", "description": "data:image/png;base64,… or https://…"}
_DETAIL = {"enum": ["auto", "low", "high", "original"]}


def _object(required: dict[str, Any], **optional: Any) -> dict[str, Any]:
    """An object with these properties; others are ignored."""
    return {
        "type": "object",
        "required": list(required),
        "properties": {**required, **optional},
    }


def _list_of(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "minItems": 1, "items": items}


_IMAGE_URL = {"anyOf": [_URL, _object({"url": _URL}, detail=_DETAIL)]}
_TEXT_PART = _object({"type": {"enum": ["text", "input_text"]}, "text": _TEXT})
_IMAGE_PART = _object({"type": {"enum": ["image_url", "input_image"]}, "image_url": _IMAGE_URL})
_PARTS = _list_of({"anyOf": [_TEXT_PART, _IMAGE_PART]})
_CONTENT = {"anyOf": [_TEXT, _PARTS]}
_SAID = _object({"role": {"enum": ["system", "assistant"]}, "content": _TEXT})
_ASKED = _object({"role": {"enum": ["user"]}, "content": _CONTENT})
_NAME = {"type": "string", "minLength": 1, "maxLength": 64}
_CALL = _object({"function": _object({"name": _NAME, "arguments": _TEXT})}, id=_TEXT)
_CALLED = _object({"role": {"enum": ["assistant"]}, "tool_calls": _list_of(_CALL)})
_TOLD = _object({"role": {"enum": ["tool"]}, "content": _TEXT}, tool_call_id=_TEXT)

Parts = Annotated[list[dict[str, Any]], WithJsonSchema(_PARTS)]
"""Texts and pictures, read by `parts`."""

TextsOrParts = Annotated[list[Any], WithJsonSchema({"anyOf": [_list_of(_TEXT), _PARTS]})]
"""Triton's: texts that are one, or parts."""

_MESSAGE = {"anyOf": [_ASKED, _SAID, _CALLED, _TOLD]}
Messages = Annotated[list[Any], WithJsonSchema(_list_of(_MESSAGE))]
"""A conversation, read by `conversation`."""

_PARAMETERS = {"type": "object"}
_FUNCTION = _object({"name": _NAME}, description=_TEXT, parameters=_PARAMETERS)
_TOOL = _object({"type": {"enum": ["function"]}, "function": _FUNCTION})
_TOOLS = {"type": "array", "maxItems": 128, "items": _TOOL}

Tools = Annotated[list[Any], WithJsonSchema(_TOOLS)]
"""Functions that may be called, read by `tools`."""

_TENSOR = _object(
    {
        "name": {"type": "string", "minLength": 1, "maxLength": 256},
        "datatype": {"enum": [*DATATYPES]},
        "shape": {"type": "array", "maxItems": 8, "items": {"type": "integer", "minimum": 0}},
        "data": {"type": "array"},
    },
    parameters=_PARAMETERS,
)
_INFER = _object(
    {"inputs": {**_list_of(_TENSOR), "maxItems": 64}},
    id=_TEXT,
    parameters=_PARAMETERS,
    outputs=_list_of(_object({"name": _TEXT}, parameters=_PARAMETERS)),
)
INFER: dict[str, Any] = {
    "requestBody": {"content": {"application/json": {"schema": _INFER}}, "required": True}
}
"""For `openapi_extra` of /infer; the data may also stand in bytes behind the JSON."""
