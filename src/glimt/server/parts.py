"""A prompt field that is a text or a list of parts, as every family but OpenAI's writes it.

What a picture's text may be is decided here, and what is behind it is read in `pictures`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from glimt.errors import ImageError, RequestError
from glimt.types import ImagePart, Message, TextPart

Part = TextPart | ImagePart

MOST_MEDIA = 20  # of one request, as in MindIE
_MOST_PATH = 4096
_DETAILS = ("auto", "low", "high", "original")
_OTHER_MEDIA = ("video_url", "audio_url", "input_audio", "video", "audio")
_WEB = ("http://", "https://")


@dataclass(frozen=True, slots=True)
class PartRules:
    """What a family lets a picture's text be, besides data and http(s) URLs.

    takes_base64: the bare base64 of a picture
    takes_files:  a file's name, read only from the server's media folder
    """

    takes_base64: bool = False
    takes_files: bool = False


MINDIE = PartRules(takes_base64=True, takes_files=True)
TRITON = PartRules(takes_base64=True)


def prompt_parts(value: Any, field: str, rules: PartRules = MINDIE) -> tuple[Part, ...]:
    """The parts of a prompt field, texts that follow each other joined.

    Raises RequestError naming the part.
    """
    if isinstance(value, str):
        return (TextPart(value),)
    if not isinstance(value, list):
        raise RequestError(field, "must be a text or a list of parts")
    if not value:
        raise RequestError(field, "is an empty list; at least one part is needed")
    parts = [_part(each, f"{field}[{i}]", rules) for i, each in enumerate(value)]
    num_images = sum(isinstance(part, ImagePart) for part in parts)
    if num_images > MOST_MEDIA:
        raise RequestError(field, f"holds {num_images} pictures; at most {MOST_MEDIA} are taken")
    return joined(parts)


def user_message(parts: Iterable[Part], field: str) -> Message:
    """One question. Raises RequestError if there is nothing in it."""
    message = Message("user", tuple(parts))
    if not message.num_images and not message.text:
        raise RequestError(field, "is empty")
    return message


def joined(parts: Iterable[Part]) -> tuple[Part, ...]:
    """The same with neighbouring texts made one, without anything between them."""
    kept: list[Part] = []
    for kind, run in groupby(parts, type):
        same = list(run)
        kept += [TextPart(text_of(same))] if kind is TextPart else same
    return tuple(kept)


def text_of(parts: Iterable[Part]) -> str:
    """All texts, without anything between them."""
    return "".join(part.text for part in parts if isinstance(part, TextPart))


def _part(value: Any, field: str, rules: PartRules) -> Part:
    if not isinstance(value, Mapping):
        raise RequestError(field, "must be an object with a type")
    kind = value.get("type", "image_url" if "image_url" in value else None)
    if kind in ("text", "input_text"):
        text = value.get("text")
        if not isinstance(text, str):
            raise RequestError(f"{field}.text", "must be a text")
        return TextPart(text)
    if kind in ("image_url", "input_image"):
        return ImagePart(_source(value.get("image_url"), value, f"{field}.image_url", rules))
    if kind in _OTHER_MEDIA:
        raise RequestError(f"{field}.type", f"is {kind}; this model takes text and images")
    raise RequestError(f"{field}.type", "must be text or image_url")


def _source(value: Any, part: Mapping[str, Any], field: str, rules: PartRules) -> str | Path:
    """The address, alone or in an object under `url`; its detail is checked and ignored."""
    detail = part.get("detail")
    if isinstance(value, Mapping):
        detail, value, field = value.get("detail", detail), value.get("url"), f"{field}.url"
    if detail is not None and detail not in _DETAILS:
        raise RequestError(f"{field}: detail", f"must be one of {', '.join(_DETAILS)}")
    if not isinstance(value, str) or not value:
        raise RequestError(field, "must be a text that is not empty")
    return image_source(value, field, rules)


def image_source(text: str, field: str, rules: PartRules) -> str | Path:
    """What a picture's text names: an address, encoded bytes as text, or a file."""
    start = text[:8].lower()
    if start.startswith("data:") or start.startswith(_WEB):
        return text
    path = _path_of(text)
    if path is not None:
        if not rules.takes_files:
            raise ImageError(field, "names a file; send the picture itself as a data URL")
        return path
    if re.match(r"[a-z][a-z0-9+.-]*:", text[:32], re.IGNORECASE):
        raise ImageError(field, "has a scheme that is not read; data, http and https are")
    if not rules.takes_base64:
        needed = "a data URL (data:image/png;base64,…) is needed"
        raise ImageError(field, f"is neither a data URL nor an http(s) URL; {needed}")
    return text


def _path_of(text: str) -> Path | None:
    """A file's name; the base64 of every JPEG begins with /9j/ and is none."""
    if text[:7].lower() == "file://":
        return Path(text[7:])
    if text.startswith("/") and not text.startswith("/9j/") and len(text) <= _MOST_PATH:
        return Path(text)
    return None
