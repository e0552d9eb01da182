"""How bodies are read: field types that take no word for a number; what OpenAPI is told of them."""

from __future__ import annotations

import logging
import re
import reprlib
from collections.abc import Callable, Coroutine
from itertools import takewhile
from typing import Any, TypeVar

from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import (
    BaseModel,
    ConfigDict,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    ValidationError,
    model_validator,
)
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Scope

from glimt.server.failures import Failure, HttpFailure
from glimt.server.strict_json import parse_json

log = logging.getLogger("glimt.server")


class Body(BaseModel):
    """A request's body. Fields that are not known are ignored, null means not given."""

    model_config = ConfigDict(
        extra="allow", hide_input_in_errors=True, str_max_length=None, allow_inf_nan=False
    )

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {key: each for key, each in value.items() if each is not None}

    def unknown(self) -> list[str]:
        """Names of what came and is not known."""
        return sorted(self.model_extra or {})


Int = StrictInt
Float = StrictFloat  # a whole number is one too; true and "1" are not
Bool = StrictBool
Text = StrictStr


class StrictRequest(Request):
    """A request whose JSON is read as `strict_json` does."""

    async def json(self) -> Any:
        """The body. Raises HttpFailure if it is no such JSON."""
        if not hasattr(self, "_strict_json"):
            self._strict_json = parse_json(await self.body())
        return self._strict_json


B = TypeVar("B", bound=Body)


def parsed(kind: type[B], value: Any) -> B:
    """A value that came as JSON, as a body of a kind. Raises HttpFailure naming the field."""
    if not isinstance(value, dict):
        raise HttpFailure(Failure("invalid", "the body must be a JSON object"))
    try:
        body = kind.model_validate(value)
    except ValidationError as error:
        raise HttpFailure(validation_failure(error)) from error
    if unknown := body.unknown():
        log.debug("%s: ignored fields: %s", kind.__name__, reprlib.repr(unknown))
    return body


async def read_json(request: Request) -> Any:
    """A request's JSON, whatever its Content-Type says: curl -d sends that of a form."""
    return parse_json(await request.body())


def described(kind: type[Body]) -> dict[str, Any]:
    """What OpenAPI is told of a body that the route reads itself: for `openapi_extra`."""
    schema = kind.model_json_schema()
    inlined = _inlined(schema, schema.pop("$defs", {}))
    return {"requestBody": {"content": {"application/json": {"schema": inlined}}, "required": True}}


def _inlined(schema: Any, known: dict[str, Any]) -> Any:
    """The same with every reference replaced by what it names: OpenAPI keeps them elsewhere."""
    if isinstance(schema, list):
        return [_inlined(each, known) for each in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return _inlined(known[schema["$ref"].rpartition("/")[2]], known)
    return {key: _inlined(each, known) for key, each in schema.items()}


class StrictRoute(APIRoute):
    """A route whose handler gets a StrictRequest, and its body as JSON whatever it is called."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's own handler behind a stricter reading of the body."""
        handler = super().get_route_handler()

        async def strict(request: Request) -> Response:
            if not self.body_field:
                return await handler(StrictRequest(request.scope, request.receive))
            with_json = StrictRequest(_as_json(request.scope), request.receive)
            await with_json.json()  # here: FastAPI would say no more than that it went wrong
            return await handler(with_json)

        return strict


def _as_json(scope: Scope) -> Scope:
    """The same, said to carry JSON: `curl -d` calls everything a form."""
    headers = [(name, value) for name, value in scope["headers"] if name != b"content-type"]
    return {**scope, "headers": [*headers, (b"content-type", b"application/json")]}


# Where a field takes several types, pydantic names the one it tried.
_TYPE = re.compile(r"(str|int|float|bool|list\[.*|dict\[.*|constrained-.*|function-.*)$")


def validation_failure(error: RequestValidationError | ValidationError) -> Failure:
    """The first mistake of a body, by its field, without the value that was sent."""
    first = error.errors()[0]
    place = [str(each) for each in first["loc"] if each not in ("body", "path", "query")]
    field = ".".join(takewhile(lambda part: not _TYPE.match(part), place)) or None
    more = f" (and {len(error.errors()) - 1} more)" if len(error.errors()) > 1 else ""
    return Failure("invalid", f"{field or 'the body'}: {first['msg']}{more}", field)
