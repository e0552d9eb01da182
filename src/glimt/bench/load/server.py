"""What is asked of the server before the load: whether it is there, and its models."""

from __future__ import annotations

import asyncio
import os
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from glimt.bench.load.recording import message_of_body
from glimt.errors import ConfigError

_PATHS = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}
ENDPOINTS = tuple(_PATHS)
_WAIT_S = 10.0


def checked_url(base_url: str) -> str:
    """The server's address without a path, from one with or without /v1. Raises ConfigError."""
    try:
        parts = urlsplit(base_url)
        is_good = parts.scheme in ("http", "https") and bool(parts.hostname)
        is_good = is_good and parts.port != 0
    except ValueError:
        is_good = False
    if not is_good:
        said = f"is {base_url!r}; an address such as http://127.0.0.1:8000 is needed"
        raise ConfigError("base_url", [said])
    if parts.username or parts.password:
        said = "holds a user name or a password; give a key with --api-key instead"
        raise ConfigError("base_url", [said])
    return base_url.rstrip("/").removesuffix("/v1")


def endpoint_url(base_url: str, endpoint: str) -> str:
    """Where requests of one of ENDPOINTS go."""
    return base_url + _PATHS[endpoint]


async def find_model(
    session: aiohttp.ClientSession, base_url: str, api_key: str | None, wanted: str | None
) -> str:
    """The name to send: the wanted one, else the first that the server lists.

    Raises ConfigError for a server that does not answer, refuses the key or lists none.
    """
    status, body = await _get(session, f"{base_url}/v1/models", api_key)
    if status in (401, 403):
        said = f"{base_url} refuses it (HTTP {status}: {message_of_body(str(body))})"
        raise ConfigError("api_key", [f"{said}; give another with --api-key or OPENAI_API_KEY"])
    if wanted is not None:
        return wanted
    listed = body.get("data") if isinstance(body, dict) else None
    names = [each.get("id") for each in listed or () if isinstance(each, dict)]
    if status != 200 or not names or not isinstance(names[0], str):
        said = f"{base_url}/v1/models lists none (HTTP {status})"
        raise ConfigError("model", [f"{said}; name one with --model"])
    return names[0]


async def _get(
    session: aiohttp.ClientSession, url: str, api_key: str | None
) -> tuple[int, dict[str, Any] | str]:
    """Status and body of a GET, parsed if it is JSON. Raises ConfigError if there is none."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    wait = aiohttp.ClientTimeout(total=_WAIT_S)
    try:
        async with session.get(url, headers=headers, timeout=wait) as reply:
            try:
                return reply.status, await reply.json(content_type=None)
            except ValueError:
                return reply.status, await reply.text(errors="replace")
    except (asyncio.TimeoutError, TimeoutError) as error:
        said = f"{url} does not answer within {_WAIT_S:g} s; is that the server's port?"
        raise ConfigError("base_url", [said]) from error
    except (aiohttp.ClientError, OSError) as error:
        number = getattr(error, "errno", None)
        name = getattr(error, "strerror", None) or str(error)
        why = os.strerror(number) if number and number > 0 else name
        said = f"{url} cannot be reached ({why}); start the server, or name another address"
        raise ConfigError("base_url", [said]) from error
