"""OpenAI-style message dictionaries become `Message` objects; every mistake is named by its path.

Knows the shapes that messages are written in, and neither templates nor tokens nor pixels: a
picture's source is passed on as it was given and is first read by `inputs.image`.
"""

from __future__ import annotations

import json
import logging
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from glimt.config import ImageLimits
from glimt.errors import RequestError
from glimt.inputs.image import SOURCE_TYPES
from glimt.inputs.tools import check_calls, parse_calls
from glimt.inputs.values import check_object, check_text, kind_of, required
from glimt.types import ImagePart, Message, Messages, Role, TextPart, ToolCall

_log = logging.getLogger(__name__)

_ROLES: Mapping[str, Role] = MappingProxyType(
    {
        "system": "system",
        "developer": "system",
        "user": "user",
        "assistant": "assistant",
        "observation": "observation",
        "tool": "observation",
    }
)

_DETAILS = ("auto", "low", "high", "original")
_OTHER_MEDIA = ("video_url", "audio_url", "input_audio", "input_video", "video", "audio")


def parse_messages(raw: Messages, limits: ImageLimits) -> tuple[Message, ...]:
    """Check a conversation and make it plain data.

    A message is a Message, or a dictionary with

        role     system (or developer), user, assistant, observation (or tool)
        content  a text, null (assistant only: nothing said), or a list of parts:
                 {"type": "text" or "input_text", "text": "…"}
                 {"type": "image_url" or "input_image", "image_url": "…" or {"url": "…"}},
                 with or without the type
                 {"type": "refusal", "refusal": "…"} (assistant only), which is text
                 {"type": "image", "image": whatever open_image takes}

    An assistant's may have `tool_calls`, of functions that it called; the messages of `tool` behind
    it are their results, in the order of the calls. A picture's `detail` is checked and ignored:
    these models see every picture at one size. So is any other key, with a debug log, but
    `function_call`, the older form of `tool_calls`, is refused.
    Raises RequestError; its field is the exact path, as `messages[2].content[1].image_url.url`.
    """
    given: Any = raw  # it came as JSON, whatever the signature says
    if not isinstance(given, Sequence) or isinstance(given, (str, bytes)):
        raise RequestError("messages", f"is {kind_of(given)}; a list of messages is needed")
    if not given:
        raise RequestError("messages", "is empty; at least one message is needed")
    messages = tuple(_parse_message(each, f"messages[{i}]") for i, each in enumerate(raw))
    _check_num_images(raw, messages, limits)
    return messages


def load_messages_file(path: Path) -> list[Any]:
    """Read a file that holds a JSON array of messages, which parse_messages then checks.

    Raises RequestError naming the file.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise RequestError(str(path), f"cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise RequestError(str(path), f"is not JSON in UTF-8: {error}") from error
    if not isinstance(raw, list):
        raise RequestError(str(path), f"holds {kind_of(raw)}; a JSON array of messages is needed")
    return raw


# --- messages --------------------------------------------------------------------------------


def _parse_message(raw: Any, path: str) -> Message:
    if isinstance(raw, Message):
        return _check_message(raw, path)
    check_object(raw, path, "role and content")
    _log_ignored(raw, {"role", "content", "tool_calls", "function_call", "tool_call_id"}, path)
    role = _parse_role(required(raw, "role", path), f"{path}.role")
    calls = _parse_calls(raw, role, path)
    content = raw.get("content") if calls else required(raw, "content", path)
    return Message(role, _parse_content(content, role, f"{path}.content"), calls)


def _check_message(message: Message, path: str) -> Message:
    """A Message as it is: its fields can hold anything, whatever their types say."""
    role: Any = message.role
    parts: Any = message.parts
    if role not in list(_ROLES.values()):
        known = ", ".join(dict.fromkeys(_ROLES.values()))
        said = f"is {reprlib.repr(role)}; it must be one of {known}"
        raise RequestError(f"{path}.role", said)
    check_calls(message, f"{path}.calls")
    if not isinstance(parts, (list, tuple)):
        raise RequestError(f"{path}.parts", f"is {kind_of(parts)}; a tuple of parts is needed")
    for j, part in enumerate(parts):
        if isinstance(part, TextPart):
            check_text(part.text, f"{path}.parts[{j}].text")
        elif not isinstance(part, ImagePart):
            needed = "a TextPart or an ImagePart is needed"
            raise RequestError(f"{path}.parts[{j}]", f"is {kind_of(part)}; {needed}")
    return message


def _parse_role(raw: Any, path: str) -> Role:
    role = _ROLES.get(raw) if isinstance(raw, str) else None
    if role is None:
        known = ", ".join(_ROLES)
        raise RequestError(path, f"is {reprlib.repr(raw)}; it must be one of {known}")
    return role


def _parse_calls(raw: Mapping[str, Any], role: Role, path: str) -> tuple[ToolCall, ...]:
    """Null and an empty list say that there are none: clients send answers back like that."""
    if raw.get("function_call"):
        said = "is the older form of a call; send the same as tool_calls"
        raise RequestError(f"{path}.function_call", said)
    given, path = raw.get("tool_calls"), f"{path}.tool_calls"
    if given and role != "assistant":
        raise RequestError(path, f"is given in a message of {role}; only the assistant calls")
    return parse_calls(given, path) if given else ()


def _parse_content(raw: Any, role: Role, path: str) -> tuple[TextPart | ImagePart, ...]:
    if isinstance(raw, str):
        return (TextPart(check_text(raw, path)),)
    if raw is None and role == "assistant":
        return ()
    if not isinstance(raw, (list, tuple)):
        raise RequestError(path, f"is {kind_of(raw)}; a text or a list of parts is needed")
    if not raw:
        raise RequestError(path, "is an empty list; at least one part is needed")
    return tuple(_parse_part(part, role, f"{path}[{j}]") for j, part in enumerate(raw))


def _check_num_images(raw: Sequence[Any], messages: Sequence[Message], limits: ImageLimits) -> None:
    """Refuse the first picture that is one too many, by its own path."""
    num_images = 0
    for i, message in enumerate(messages):
        for j, part in enumerate(message.parts):
            num_images += isinstance(part, ImagePart)
            if num_images > limits.max_images:
                parts = "parts" if isinstance(raw[i], Message) else "content"
                said = f"is picture number {num_images} of the request"
                path = f"messages[{i}].{parts}[{j}]"
                raise RequestError(path, f"{said}; at most {limits.max_images} are accepted")


# --- parts -----------------------------------------------------------------------------------


def _parse_part(raw: Any, role: Role, path: str) -> TextPart | ImagePart:
    check_object(raw, path, "a type")
    part_type = "image_url" if _is_bare_url(raw) else required(raw, "type", path)
    if part_type in ("text", "input_text"):
        _log_ignored(raw, {"type", "text"}, path)
        return TextPart(check_text(required(raw, "text", path), f"{path}.text"))
    if part_type == "refusal" and role == "assistant":
        return TextPart(check_text(required(raw, "refusal", path), f"{path}.refusal"))
    if part_type in ("image_url", "input_image"):
        _log_ignored(raw, {"type", "image_url", "detail"}, path)
        _check_detail(raw, path)
        url = required(raw, "image_url", path)
        return ImagePart(_parse_image_url(url, f"{path}.image_url"))
    if part_type == "image":
        _log_ignored(raw, {"type", "image"}, path)
        return ImagePart(_check_source(required(raw, "image", path), f"{path}.image"))
    known = "text, input_text, image_url, input_image, image"
    said = f"is {reprlib.repr(part_type)}; it must be one of {known}"
    if part_type in _OTHER_MEDIA:
        said = f"is {part_type}, but this model takes text and images"
    raise RequestError(f"{path}.type", said)


def _is_bare_url(raw: Mapping[str, Any]) -> bool:
    """vLLM's shortest form of a picture."""
    return "image_url" in raw and "type" not in raw


def _check_detail(raw: Mapping[str, Any], path: str) -> None:
    detail = raw.get("detail")
    if detail is not None and detail not in _DETAILS:
        said = f"is {reprlib.repr(detail)}; it must be one of {', '.join(_DETAILS)}"
        raise RequestError(f"{path}.detail", said)


def _parse_image_url(raw: Any, path: str) -> str:
    """The address, which stands alone or in an object under `url`."""
    if isinstance(raw, Mapping):
        _log_ignored(raw, {"url", "detail"}, path)
        _check_detail(raw, path)
        raw, path = required(raw, "url", path), f"{path}.url"
    if not isinstance(raw, str):
        raise RequestError(path, f"is {kind_of(raw)}; a text is needed")
    if not raw:
        raise RequestError(path, "is empty; a data URL is needed")
    return raw


def _check_source(raw: Any, path: str) -> Any:
    if not isinstance(raw, SOURCE_TYPES):
        needed = "a path, bytes, base64 text, a data URL or a PIL image is needed"
        raise RequestError(path, f"is {kind_of(raw)}; {needed}")
    return raw


def _log_ignored(raw: Mapping[str, Any], known: set[str], path: str) -> None:
    if ignored := [reprlib.repr(key) for key in raw if key not in known]:
        _log.debug("%s: ignored keys: %s", path, reprlib.repr(ignored))
