"""What the demo asks about which picture, and the right answer where it is known.

A folder may hold `questions.json`, a list of

    {"picture": "boot.png", "zh": {"question": "…", "answer": "…"}, "en": {…}}

Knows nothing of models.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from glimt.errors import ConfigError

FILE = "questions.json"
LANGUAGES = ("zh", "en")


@dataclass(frozen=True, slots=True)
class Asked:
    """One question; answer is None where nobody wrote down the right one."""

    question: str
    answer: str | None = None


@dataclass(frozen=True, slots=True)
class Example:
    """A picture, as a path or drawn here, and what is asked about it in each language."""

    name: str
    picture: Path | Image.Image
    asked: tuple[Asked, ...]


def examples_of(paths: Sequence[Path]) -> list[Example]:
    """What to ask about pictures, or about all that a folder's questions.json names.

    Without any path: about a picture drawn here, so that no file is needed.
    Raises ConfigError for a questions.json that cannot be read.
    """
    if not paths:
        return [_drawn_here()]
    return [example for path in paths for example in _examples_at(path)]


_ANYTHING = (Asked("图片里是什么？"), Asked("What is in the picture?"))


def _examples_at(path: Path) -> list[Example]:
    if path.is_dir():
        return _written_in(path)
    if not (path.parent / FILE).exists():
        return [Example(str(path), path, _ANYTHING)]
    known = [example for example in _written_in(path.parent) if example.picture == path]
    return known or [Example(str(path), path, _ANYTHING)]


def _written_in(folder: Path) -> list[Example]:
    file = folder / FILE
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        said = f"{file} cannot be read: {error.strerror or error}"
        raise ConfigError(
            "questions", [f"{said}; name pictures, or a folder that has it"]
        ) from error
    except ValueError as error:
        raise ConfigError("questions", [f"{file} is not JSON in UTF-8: {error}"]) from error
    try:
        return [_example(row, folder) for row in rows]
    except (TypeError, KeyError) as error:
        said = f"{file}: picture, zh and en with question and answer are needed in every entry"
        raise ConfigError("questions", [said]) from error


def _example(row: Any, folder: Path) -> Example:
    path = folder / row["picture"]
    asked = tuple(Asked(row[each]["question"], row[each]["answer"]) for each in LANGUAGES)
    return Example(str(path), path, asked)


def _drawn_here() -> Example:
    """A red circle on white, as the demo models are taught such scenes."""
    image = Image.new("RGB", (320, 240), "white")
    ImageDraw.Draw(image).ellipse((120, 80, 200, 160), fill=(225, 20, 25))
    asked = (
        Asked("图片里有什么？", "有一个红色的圆形。"),
        Asked("What is in the picture?", "There is a red circle."),
    )
    return Example("a red circle, drawn here", image, asked)
