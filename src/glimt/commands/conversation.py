"""A conversation at the keyboard: its turns, the pictures that wait, and how it is saved."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from glimt.commands.pictures import Picture
from glimt.commands.writing import write_file
from glimt.errors import RequestError

# What the original's command line asks of a picture when nothing is typed.
DEFAULT_QUESTIONS: Mapping[str, str] = MappingProxyType(
    {"zh": "描述这张图片。", "en": "Describe the image."}
)


def default_question(language: str, environment: Mapping[str, str]) -> str:
    """The question of an empty line. "auto": of an English locale, else Chinese as originally."""
    if language == "auto":
        names = ("LC_ALL", "LC_MESSAGES", "LANG")
        locale = next((environment[name] for name in names if environment.get(name)), "")
        language = "en" if locale.lower().startswith("en") else "zh"
    return DEFAULT_QUESTIONS[language]


@dataclass(frozen=True, slots=True)
class Turn:
    """A question with its answer.

    answer:     as the model's family shows it, which is what history holds in the original too
    is_partial: the user stopped it
    """

    question: str
    pictures: tuple[Picture, ...]
    answer: str = ""
    is_partial: bool = False


_Source = Callable[[Picture], Any]


@dataclass(slots=True)
class Conversation:
    """Turns that were answered, and pictures that go with the next question."""

    system: str | None = None
    turns: list[Turn] = field(default_factory=list)
    waiting: list[Picture] = field(default_factory=list)

    def clear(self) -> None:
        """Forget the turns and the waiting pictures; the system prompt stays."""
        self.turns.clear()
        self.waiting.clear()

    def ask(self, question: str) -> Turn:
        """The next turn, not answered and not yet part of the conversation."""
        return Turn(question, tuple(self.waiting))

    def add(self, turn: Turn) -> None:
        """Take an answered turn; its pictures no longer wait."""
        self.turns.append(turn)
        self.waiting.clear()

    def messages(self, last: Turn) -> list[dict[str, Any]]:
        """What the engine is given: every turn, then the question of `last`."""
        turns = [*self._past(_as_part), _question(last, _as_part)]
        return [*self._system(), *turns]

    def saved(self) -> list[dict[str, Any]]:
        """OpenAI-style messages with pictures by their paths; a stopped answer is marked."""
        return [*self._system(), *self._past(_as_url)]

    def save(self, path: Path, overwrite: bool) -> None:
        """Write the messages as JSON. Raises RequestError and leaves an existing file alone."""
        text = json.dumps(self.saved(), ensure_ascii=False, indent=2) + "\n"
        if path.exists() and not overwrite:
            raise RequestError("save", f"{path} exists; /save! {path} overwrites it")
        try:
            write_file(path, text.encode("utf-8", "surrogatepass"))
        except OSError as error:
            said = f"{path} cannot be written: {error.strerror or error}"
            raise RequestError("save", f"{said}; choose another path") from error

    @property
    def is_beyond_training(self) -> bool:
        """The waiting pictures make more than one, or come after the first question."""
        num_images = len(self.waiting) + sum(len(turn.pictures) for turn in self.turns)
        return bool(self.waiting) and (num_images > 1 or bool(self.turns))

    @property
    def has_pictures(self) -> bool:
        """Some picture waits or was asked about."""
        return bool(self.waiting) or any(turn.pictures for turn in self.turns)

    def _system(self) -> list[dict[str, Any]]:
        return [{"role": "system", "content": self.system}] if self.system else []

    def _past(self, source: _Source) -> list[dict[str, Any]]:
        return [
            message for turn in self.turns for message in (_question(turn, source), _answer(turn))
        ]


def _question(turn: Turn, source: _Source) -> dict[str, Any]:
    if not turn.pictures:
        return {"role": "user", "content": turn.question}
    parts = [source(picture) for picture in turn.pictures]
    return {"role": "user", "content": [*parts, {"type": "text", "text": turn.question}]}


def _answer(turn: Turn) -> dict[str, Any]:
    mark = {"partial": True} if turn.is_partial else {}
    return {"role": "assistant", "content": turn.answer, **mark}


def _as_part(picture: Picture) -> dict[str, Any]:
    return {"type": "image", "image": picture.content}


def _as_url(picture: Picture) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": picture.given}}


def expanded(path: str) -> str:
    """A path with its ~ spelled out, as the shell would have done."""
    return os.path.expanduser(path)
