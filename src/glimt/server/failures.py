"""What went wrong, as each protocol says it: HTTP status and body. Chosen by the path alone.

Knows every kind of error, and no request.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from glimt.errors import (
    CapacityError,
    EngineError,
    GlimtError,
    MissingDependency,
    PromptTooLong,
    RequestError,
)
from glimt.server.host import EngineUnavailable
from glimt.server.replying import one_line
from glimt.server.service import DeadlinePassed, HalfAnswer

Family = Literal["openai", "tgi", "triton", "vllm", "mindie"]
Kind = Literal[
    "invalid", "too_long", "unknown_model", "unknown_route", "method", "key", "origin", "too_large",
    "overloaded", "unavailable", "timeout", "engine", "malformed", "incomplete", "slow",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Failure:
    """One error for a client.

    field: of the request, where one is at fault
    """

    kind: Kind
    message: str
    field: str | None = None


class HttpFailure(GlimtError):
    """An error that only HTTP knows, such as a model's name that is not served."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


def failure_of(error: Exception) -> Failure:
    """What an exception means for its client; an unknown one says nothing of its inside."""
    if isinstance(error, HttpFailure):
        return error.failure
    if isinstance(error, RequestError):
        kind: Kind = "too_long" if isinstance(error, PromptTooLong) else "invalid"
        return Failure(kind, str(error), error.field)
    if isinstance(error, MissingDependency):  # of an option that this installation lacks
        return Failure("invalid", str(error))
    if isinstance(error, EngineUnavailable):
        return Failure("unavailable", str(error))
    if isinstance(error, DeadlinePassed):
        return Failure("timeout", str(error))
    if isinstance(error, CapacityError):
        return Failure("overloaded", str(error))
    if isinstance(error, HalfAnswer):
        return Failure("incomplete", str(error))
    if isinstance(error, EngineError):
        return Failure("engine", str(error))
    return Failure("engine", "the server failed; its log says why")


# --- status ----------------------------------------------------------------------------------

_OPENAI: Mapping[Kind, tuple[int, str]] = {
    "invalid": (400, "BadRequestError"),
    "too_long": (400, "BadRequestError"),
    "unknown_model": (404, "NotFoundError"),
    "unknown_route": (404, "NotFoundError"),
    "method": (405, "BadRequestError"),
    "key": (401, "AuthenticationError"),
    "origin": (403, "PermissionDeniedError"),
    "too_large": (413, "BadRequestError"),
    "overloaded": (429, "RateLimitError"),
    "unavailable": (503, "ServiceUnavailableError"),
    "timeout": (504, "TimeoutError"),
    "engine": (500, "InternalServerError"),
    "malformed": (400, "BadRequestError"),
    "incomplete": (500, "InternalServerError"),
    "slow": (408, "BadRequestError"),
}
_TGI: Mapping[Kind, tuple[int, str]] = {
    "invalid": (422, "validation"),
    "too_long": (422, "validation"),
    "unknown_model": (422, "validation"),
    "unknown_route": (404, "not_found"),
    "method": (405, "validation"),
    "key": (401, "authentication"),
    "origin": (403, "forbidden"),
    "too_large": (413, "validation"),
    "overloaded": (429, "overloaded"),
    "unavailable": (503, "healthcheck"),
    "timeout": (424, "generation"),
    "engine": (424, "generation"),
    "malformed": (422, "validation"),
    "incomplete": (500, "incomplete_generation"),
    "slow": (408, "validation"),
}
_TRITON: Mapping[Kind, int] = {
    "invalid": 400, "too_long": 400, "unknown_model": 404, "unknown_route": 404, "method": 405,
    "key": 401, "origin": 403, "too_large": 413, "overloaded": 503, "unavailable": 503,
    "timeout": 504, "engine": 500, "malformed": 400, "incomplete": 500,
    "slow": 408,
}  # fmt: skip
_MINDIE: Mapping[Kind, tuple[int, str]] = {
    "invalid": (422, "Input Validation Error"),
    "too_long": (422, "Input Validation Error"),
    "unknown_model": (422, "Input Validation Error"),
    "unknown_route": (404, "NotFoundError"),
    "method": (405, "Bad Request"),
    "key": (401, "Bad Request"),
    "origin": (403, "Bad Request"),
    "too_large": (413, "Bad Request"),
    "overloaded": (503, "Service Unavailable"),
    "unavailable": (503, "Service Unavailable"),
    "timeout": (424, "Generation Error"),
    "engine": (424, "Generation Error"),
    "malformed": (400, "Bad Request"),
    "incomplete": (500, "Incomplete Generation"),
    "slow": (408, "Bad Request"),
}


def status_of(failure: Failure, family: Family, profile: str = "upstream") -> int:
    """The HTTP status."""
    if family == "mindie" or (family == "vllm" and profile == "mindie"):
        return _MINDIE[failure.kind][0]
    if family in ("openai", "vllm"):
        return _OPENAI[failure.kind][0]
    return _TRITON[failure.kind] if family == "triton" else _TGI[failure.kind][0]


def body_of(failure: Failure, family: Family, profile: str = "upstream") -> dict[str, Any]:
    """The JSON body."""
    if family == "triton":
        return {"error": failure.message}
    if family in ("openai", "vllm") and profile == "upstream":
        status, kind = _OPENAI[failure.kind]
        code: int | str = "context_length_exceeded" if failure.kind == "too_long" else status
        inner = {"message": failure.message, "type": kind, "param": failure.field, "code": code}
        return {"error": inner}
    if family == "mindie" and failure.kind == "too_large":
        return {"message": failure.message}
    table = _MINDIE if family == "mindie" or profile == "mindie" else _TGI
    if table is _TGI and failure.kind in ("invalid", "too_long"):
        said = f"Input validation error: {failure.message}"
        return {"error": said, "error_type": "validation"}
    return {"error": failure.message, "error_type": table[failure.kind][1]}


def content_of(failure: Failure, family: Family, profile: str = "upstream") -> bytes:
    """The body as it is sent; TGI says nothing to whoever has no key."""
    if family == "tgi" and failure.kind == "key" and profile == "upstream":
        return b""
    return one_line(body_of(failure, family, profile))


def headers_of(failure: Failure) -> dict[str, str]:
    """What clients go by when they decide whether to try again."""
    if failure.kind in ("overloaded", "unavailable"):
        return {"Retry-After": "1"}
    if failure.kind == "key":
        return {"WWW-Authenticate": "Bearer"}
    return (
        {"x-should-retry": "false"} if failure.kind in ("engine", "incomplete", "timeout") else {}
    )


# --- whose form ------------------------------------------------------------------------------

_BY_PREFIX: tuple[tuple[str, Family], ...] = (
    ("/v1/config", "mindie"),
    ("/v1/status", "mindie"),
    ("/v1/tokenizer", "mindie"),
    ("/v1/engine-server", "mindie"),
    ("/v2/status", "mindie"),
    ("/health/timed", "mindie"),
    ("/metrics-json", "mindie"),
    ("/stopService", "mindie"),
    ("/v2", "triton"),
    ("/v1", "openai"),
    ("/infer", "mindie"),
    ("/generate", "tgi"),
    ("/info", "tgi"),
    ("/tokenize", "tgi"),
)


def family_of(path: str) -> Family:
    """Whose errors a path speaks."""
    if path == "/":
        return "tgi"
    return next((family for prefix, family in _BY_PREFIX if path.startswith(prefix)), "openai")
