"""Values as they go out: JSON in one line, as a whole reply or as an event of a stream."""

from __future__ import annotations

import json
from typing import Any

from starlette.responses import Response


def one_line(value: Any) -> bytes:
    """JSON as clients want it: one line, UTF-8, no NaN; half characters become U+FFFD."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", "replace")


def json_reply(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A whole reply."""
    return Response(one_line(value), status, headers, "application/json")


def data_event(value: Any) -> bytes:
    """A server-sent event."""
    return b"data: " + one_line(value) + b"\n\n"
