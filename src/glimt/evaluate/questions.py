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

from glimt.errors import ConfigError

FILE = "questions.jsonl"


@dataclass(frozen=True, slots=True)
class Question:
    """A conversation that ends with the question, and its right answer.

    messages: OpenAI-style, pictures as paths
    """

    id: str
    task: str
    language: str
    messages: tuple[Mapping[str, Any], ...]
    answer: str


def read_questions(folder: Path) -> list[Question]:
    """All questions of a folder, in its order. Raises ConfigError listing every bad line."""
    path = folder / FILE
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(
            "questions", [f"{path} cannot be read ({reason}); name a folder that holds {FILE}"]
        ) from error
    questions, problems = [], []
    for number, line in enumerate(lines, 1):
        try:
            questions.append(_question(json.loads(line), folder))
        except (ValueError, TypeError, KeyError) as error:
            problems.append(f"line {number} of {path.name}: {_said(error)}")
    if not lines:
        problems.append(f"{path} holds no question")
    if problems:
        raise ConfigError("questions", problems)
    return questions


def _said(error: Exception) -> str:
    return f"{error} is missing" if isinstance(error, KeyError) else str(error)


def _question(raw: Any, folder: Path) -> Question:
    if not isinstance(raw, dict):
        raise TypeError(f"is {type(raw).__name__}, not an object")
    words = {name: raw[name] for name in ("id", "task", "language", "answer")}
    for name, value in words.items():
        if not isinstance(value, str):
            raise TypeError(f"{name} is {value!r}, not a text")
    messages = tuple(_with_paths(message, folder) for message in raw["messages"])
    return Question(messages=messages, **words)


def _with_paths(message: Mapping[str, Any], folder: Path) -> Mapping[str, Any]:
    """The message with its pictures' paths as seen from here."""
    content = message["content"]
    if isinstance(content, str):
        return message
    parts = [
        part | {"image": str(folder / part["image"])} if part["type"] == "image" else part
        for part in content
    ]
    return {**message, "content": parts}
