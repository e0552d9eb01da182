"""OpenAI-style message dictionaries become `Message` objects; every mistake is named by its path.

Knows the shapes that messages are written in, and neither templates nor tokens nor pixels: a
picture's source is passed on as it was given and is first read by `inputs.image`.
"""

from __future__ import annotations

import json
import logging
import re
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from glimt.config import ImageLimits
from glimt.errors import RequestError
from glimt.inputs.image import SOURCE_TYPES
from glimt.types import ImagePart, Message, Messages, Role, TextPart

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

    A picture's `detail` is checked and ignored: these models see every picture at one size. So is
    any other key, with a debug log, but `tool_calls`, which would change the prompt, is refused.
    Raises RequestError; its field is the exact path, as `messages[2].content[1].image_url.url`.
    """
    given: Any = raw  # it came as JSON, whatever the signature says
    if not isinstance(given, Sequence) or isinstance(given, (str, bytes)):
        raise RequestError("messages", f"is {_kind(given)}; a list of messages is needed")
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
        raise RequestError(str(path), f"holds {_kind(raw)}; a JSON array of messages is needed")
    return raw


# --- messages --------------------------------------------------------------------------------


def _parse_message(raw: Any, path: str) -> Message:
    if isinstance(raw, Message):
        return _check_message(raw, path)
    if not isinstance(raw, Mapping):
        raise RequestError(path, f"is {_kind(raw)}; an object with role and content is needed")
    _refuse_tool_calls(raw, path)
    _log_ignored(raw, {"role", "content", "tool_calls", "function_call"}, path)
    role = _parse_role(_required(raw, "role", path), f"{path}.role")
    content = _required(raw, "content", path)
    return Message(role, _parse_content(content, role, f"{path}.content"))


def _check_message(message: Message, path: str) -> Message:
    """A Message as it is: its fields can hold anything, whatever their types say."""
    role: Any = message.role
    parts: Any = message.parts
    if role not in list(_ROLES.values()):
        known = ", ".join(dict.fromkeys(_ROLES.values()))
        said = f"is {reprlib.repr(role)}; it must be one of {known}"
        raise RequestError(f"{path}.role", said)
    if not isinstance(parts, (list, tuple)):
        raise RequestError(f"{path}.parts", f"is {_kind(parts)}; a tuple of parts is needed")
    for j, part in enumerate(parts):
        if isinstance(part, TextPart):
            _check_text(part.text, f"{path}.parts[{j}].text")
        elif not isinstance(part, ImagePart):
            needed = "a TextPart or an ImagePart is needed"
            raise RequestError(f"{path}.parts[{j}]", f"is {_kind(part)}; {needed}")
    return message


def _parse_role(raw: Any, path: str) -> Role:
    role = _ROLES.get(raw) if isinstance(raw, str) else None
    if role is None:
        known = ", ".join(_ROLES)
        raise RequestError(path, f"is {reprlib.repr(raw)}; it must be one of {known}")
    return role


def _refuse_tool_calls(raw: Mapping[str, Any], path: str) -> None:
    """Null and an empty list say that there are none: clients send answers back like that."""
    for key in ("tool_calls", "function_call"):
        if raw.get(key):
            said = "is given, but these models call no tools; put what was said into content"
            raise RequestError(f"{path}.{key}", said)


def _parse_content(raw: Any, role: Role, path: str) -> tuple[TextPart | ImagePart, ...]:
    if isinstance(raw, str):
        return (TextPart(_check_text(raw, path)),)
    if raw is None and role == "assistant":
        return ()
    if not isinstance(raw, (list, tuple)):
        raise RequestError(path, f"is {_kind(raw)}; a text or a list of parts is needed")
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
    if not isinstance(raw, Mapping):
        raise RequestError(path, f"is {_kind(raw)}; an object with a type is needed")
    part_type = "image_url" if _is_bare_url(raw) else _required(raw, "type", path)
    if part_type in ("text", "input_text"):
        _log_ignored(raw, {"type", "text"}, path)
        return TextPart(_check_text(_required(raw, "text", path), f"{path}.text"))
    if part_type == "refusal" and role == "assistant":
        return TextPart(_check_text(_required(raw, "refusal", path), f"{path}.refusal"))
    if part_type in ("image_url", "input_image"):
        _log_ignored(raw, {"type", "image_url", "detail"}, path)
        _check_detail(raw, path)
        url = _required(raw, "image_url", path)
        return ImagePart(_parse_image_url(url, f"{path}.image_url"))
    if part_type == "image":
        _log_ignored(raw, {"type", "image"}, path)
        return ImagePart(_check_source(_required(raw, "image", path), f"{path}.image"))
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
        raw, path = _required(raw, "url", path), f"{path}.url"
    if not isinstance(raw, str):
        raise RequestError(path, f"is {_kind(raw)}; a text is needed")
    if not raw:
        raise RequestError(path, "is empty; a data URL is needed")
    return raw


def _check_source(raw: Any, path: str) -> Any:
    if not isinstance(raw, SOURCE_TYPES):
        needed = "a path, bytes, base64 text, a data URL or a PIL image is needed"
        raise RequestError(path, f"is {_kind(raw)}; {needed}")
    return raw


_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def _check_text(raw: Any, path: str) -> str:
    """A text that has a UTF-8 form. JSON can write half a character, which no tokenizer takes."""
    if not isinstance(raw, str):
        raise RequestError(path, f"is {_kind(raw)}; a text is needed")
    if (found := _LONE_SURROGATE.search(raw)) is not None:
        where = f"U+{ord(found[0]):04X} at character {found.start()}"
        raise RequestError(path, f"holds half a surrogate pair ({where}), which is no character")
    return raw


# --- shared ----------------------------------------------------------------------------------


def _required(raw: Mapping[str, Any], key: str, path: str) -> Any:
    if key not in raw:
        raise RequestError(f"{path}.{key}", "is missing")
    return raw[key]


def _log_ignored(raw: Mapping[str, Any], known: set[str], path: str) -> None:
    if ignored := [reprlib.repr(key) for key in raw if key not in known]:
        _log.debug("%s: ignored keys: %s", path, reprlib.repr(ignored))


def _kind(raw: Any) -> str:
    """What a wrong value is, in the words of JSON where it has any."""
    if raw is None:
        return "null"
    names = {bool: "true or false", dict: "an object", list: "a list", str: "a text"}
    if (name := names.get(type(raw))) is not None:
        return name
    return "a number" if isinstance(raw, (int, float)) else f"a {type(raw).__name__}"
