"""Which replica a request goes to, so that caches are found: by its picture, else its beginning.

A picture's features and the beginning of a prompt are cached where they were computed. Requests
that share them have the same key, and a key ranks the replicas in an order of its own. Source of
the order: highest random weight, Thaler and Ravishankar, IEEE/ACM Transactions on Networking 6(1);
of the bound: Mirrokni et al., Consistent Hashing with Bounded Loads, arXiv 1608.01350.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

_BEGINNING = 512  # characters of a prompt that is no conversation
_PROMPTS = ("history", "inputs", "prompt", "text_input", "text")  # of TGI, vLLM, Triton, VisualGLM
_ENCODED = ("/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR", "Qk")  # base64 of JPEG, PNG, GIF, WebP, BMP
_LEAST_ENCODED = 64  # characters; what is shorter holds no picture
_MARKED = re.compile(r"!\[[^\]]*\]\(([^)]*)\)")  # a picture in a text, as TGI and MindIE write it
_SLACK = 1.25  # of the mean load, before another replica takes over


def affinity_key(body: bytes, header_bytes: int = 0) -> str:
    """A digest that is the same for requests that find each other's work in a cache.

    body:         of the request, in any form that the server reads
    header_bytes: of a JSON header before binary tensors, as Triton has it; 0: all is JSON
    Returns "" for a body that holds neither picture nor text.
    """
    if header_bytes:
        return _digest(body[header_bytes:]) if len(body) > header_bytes else ""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return ""
    picture = next(_pictures(value), None)
    if picture is not None:
        return _digest(picture)
    beginning = _beginning(value)
    return _digest(beginning.encode("utf-8", "surrogatepass")) if beginning else ""


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


# --- pictures --------------------------------------------------------------------------------


def _pictures(value: Any) -> Iterator[bytes]:
    """Bytes of each picture of a body, in order; of one that must be fetched, its address."""
    for name, text in _texts(value):
        if found := _MARKED.search(text):
            yield _picture(found[1].strip())
        elif _is_picture(name, text):
            yield _picture(text)


def _texts(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Every text of a JSON value with the name under which it stands, in order."""
    if isinstance(value, str):
        yield name, value
    elif isinstance(value, Mapping):
        for key, each in value.items():
            yield from _texts(each, key)
    elif isinstance(value, list):
        for each in value:
            yield from _texts(each, name)


def _is_picture(name: str, text: str) -> bool:
    start = text[:11].lower()
    if start.startswith("data:image/"):
        return True
    if name in ("url", "image", "image_url") and start.startswith(("http://", "https://")):
        return True
    return len(text) >= _LEAST_ENCODED and text.startswith(_ENCODED) and " " not in text


def _picture(address: str) -> bytes:
    """The encoded picture where it is at hand, so that equal ones meet in every form."""
    is_data = address[:5].lower() == "data:"
    encoded = address.partition(",")[2] if is_data else address
    if not is_data and not address.startswith(_ENCODED):
        return address.encode("utf-8", "surrogatepass")
    try:
        return base64.b64decode(encoded)
    except (binascii.Error, ValueError):  # refused by the replica, whichever it is
        return encoded.encode("utf-8", "surrogatepass")


# --- beginnings ------------------------------------------------------------------------------


def _beginning(value: Any) -> str:
    """A conversation up to its first question; of a bare prompt, so many characters."""
    if not isinstance(value, Mapping):
        return ""
    messages = value.get("messages")
    if isinstance(messages, list):
        return "\n".join(text for _, text in _texts(_to_first_question(messages)))
    prompts = (text for name in _PROMPTS for _, text in _texts(value.get(name)))
    return "\n".join(prompts)[:_BEGINNING]


def _to_first_question(messages: Sequence[Any]) -> list[Any]:
    roles = [each.get("role") if isinstance(each, Mapping) else None for each in messages]
    return list(messages[: roles.index("user") + 1 if "user" in roles else len(messages)])


# --- replicas --------------------------------------------------------------------------------


def ranked(key: str, names: Iterable[str]) -> list[str]:
    """Replicas in a key's own order. One that is gone moves its own keys, and no other's."""
    return sorted(names, key=lambda name: (_digest(f"{name}/{key}".encode()), name))


def preferred(key: str, loads: Mapping[str, int], full_at: int) -> list[str]:
    """Replicas in the order in which a request tries them.

    key:     from affinity_key; "" goes by load alone
    loads:   requests that each replica is answering, by its name
    full_at: load from which a replica lets others help, if it has 1.25 times the mean as well
    """
    if not key:
        return sorted(loads, key=lambda name: (loads[name], name))
    mean = (sum(loads.values()) + 1) / max(1, len(loads))
    most = max(full_at, math.ceil(_SLACK * mean))
    order = ranked(key, loads)
    return [name for name in order if loads[name] < most] + sorted(
        (name for name in order if loads[name] >= most), key=loads.__getitem__
    )
