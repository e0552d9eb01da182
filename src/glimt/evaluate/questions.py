"""A folder of questions with their only right answers.

    questions.jsonl   one object a line: id, task, language, messages, answer
    pictures/         what the messages show, by paths relative to the folder

`python -m training.held_out DIR` writes the demo models' one; any other has the same form.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glimt.config import ImageLimits
from glimt.errors import ConfigError, RequestError
from glimt.inputs.chat import parse_messages
from glimt.types import ImagePart, Message

FILE = "questions.jsonl"
_WORDS = ("id", "task", "language", "answer")


@dataclass(frozen=True, slots=True)
class Question:
    """A conversation that ends with the question, and its right answer."""

    id: str
    task: str
    language: str
    messages: tuple[Message, ...]
    answer: str

    @property
    def pictures(self) -> tuple[str, ...]:
        """What its messages show, as the parts name it."""
        parts = (part for message in self.messages for part in message.parts)
        return tuple(str(part.source) for part in parts if isinstance(part, ImagePart))


def read_questions(folder: Path) -> list[Question]:
    """All questions of a folder, in its order.

    Raises ConfigError listing every line that is not a question and every picture that is not
    there. Whether a picture can be read shows when it is asked about.
    """
    lines = _read_lines(folder / FILE)
    questions, problems = [], [] if lines else [f"{folder / FILE} holds no question"]
    for number, line in enumerate(lines, 1):
        try:
            questions.append(_question(_object(line), folder))
        except (_Wrong, RequestError) as error:
            problems.append(f"line {number} of {FILE}: {error}")
    if problems:
        raise ConfigError("questions", problems)
    return questions


class _Wrong(Exception):
    """A line is not a question; the message says why."""


def _read_lines(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        said = f"{path} cannot be read ({error.strerror or error})"
        raise ConfigError("questions", [f"{said}; name a folder that holds {FILE}"]) from error
    except UnicodeDecodeError as error:
        raise ConfigError("questions", [f"{path} is not UTF-8: {error}"]) from error
    # Not splitlines: a JSON text may hold U+2028 as it is.
    return text.removesuffix("\n").split("\n") if text.strip() else []


def _object(line: str) -> Mapping[str, Any]:
    try:
        raw = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise _Wrong(f"is not JSON: {error}") from error
    if not isinstance(raw, dict):
        raise _Wrong(f"is a {type(raw).__name__}, not an object")
    missing = [name for name in (*_WORDS, "messages") if name not in raw]
    if missing:
        raise _Wrong(f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing")
    return raw


def _question(raw: Mapping[str, Any], folder: Path) -> Question:
    words = {name: raw[name] for name in _WORDS}
    for name, value in words.items():
        if not isinstance(value, str):
            raise _Wrong(f"{name} is {value!r}, not a text")
    messages = raw["messages"]
    if isinstance(messages, list):
        messages = [_with_paths(message, folder) for message in messages]
    return Question(messages=parse_messages(messages, ImageLimits()), **words)


def _with_paths(message: Any, folder: Path) -> Any:
    """The message with its pictures' paths as seen from here; what is no message stays as it is."""
    content = message.get("content") if isinstance(message, dict) else None
    if not isinstance(content, list):
        return message
    return {**message, "content": [_with_path(part, folder) for part in content]}


def _with_path(part: Any, folder: Path) -> Any:
    if not isinstance(part, dict) or not isinstance(part.get("image"), str):
        return part
    path = folder / part["image"]
    if not path.is_file():
        raise _Wrong(f"the picture {path} is missing")
    return part | {"image": str(path)}
