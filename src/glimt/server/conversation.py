"""A conversation as it comes by HTTP: the engine's own reading of messages, and less is allowed.

What protocols share that send chat messages. Knows no protocol.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from glimt.config import ImageLimits
from glimt.errors import ImageError, RequestError
from glimt.inputs.chat import parse_messages
from glimt.server.parts import joined
from glimt.types import ImagePart, Message

_MAX_IMAGES = 20  # of any request, whatever --limit-images says
_SCHEMES = ("data:", "http://", "https://")


def read_messages(raw: Any) -> tuple[Message, ...]:
    """Check a conversation whose pictures are data URLs or web addresses, in user messages.

    Text parts of a message without pictures are joined as one text would be.
    Raises RequestError naming the part.
    """
    parsed = parse_messages(raw, ImageLimits(max_images=_MAX_IMAGES))
    messages = tuple(map(_joined, parsed))
    for m, message in enumerate(messages):
        _check(message, f"messages[{m}].content")
    return messages


def _check(message: Message, path: str) -> None:
    for p, part in enumerate(message.parts):
        if isinstance(part, ImagePart):
            _check_image(part, message.role, f"{path}[{p}]")
    if message.role == "user" and not message.num_images and not message.text:
        raise RequestError(path, "is empty; a user's message needs text or a picture")


def _check_image(part: ImagePart, role: str, path: str) -> None:
    if role != "user":
        raise RequestError(path, f"is a picture in a message of {role}; only the user shows them")
    source = part.source
    if not isinstance(source, str) or not source[:8].lower().startswith(_SCHEMES):
        raise ImageError(path, "is no picture that is taken here; send a data URL")


def _joined(message: Message) -> Message:
    """Its texts as one, with nothing between them; pictures keep them apart."""
    return message if message.num_images else replace(message, parts=joined(message.parts))
