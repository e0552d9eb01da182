"""Predictions files -> the pictures that all of them answer, each with its path and its answers."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

from glimt.errors import ConfigError
from glimt.evaluate.predictions import Answers, read_answers


@dataclass(frozen=True, slots=True)
class Answered:
    """A picture and what each file says of it.

    key:  its name in the first file
    path: where the picture is looked for
    """

    key: str
    path: Path
    answers: tuple[str, ...]

    @property
    def name(self) -> str:
        """The file's name, without folders, by which captions are found."""
        return PurePath(self.key).name


@dataclass(frozen=True, slots=True)
class Paired:
    """What the files have in common.

    only_in: how many pictures each file has that the other has not
    refused: keys and why their answers cannot be judged
    """

    pictures: tuple[Answered, ...]
    only_in: tuple[int, ...]
    refused: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class _Entry:
    key: str
    path: str
    answer: str


def read_pairs(files: Sequence[Path], images: str | None, by_name: bool = False) -> Paired:
    """Read one or two predictions files.

    images:  the folder of the pictures; None: the keys are paths as they stand
    by_name: pictures of the same name are the same, wherever they are: enough where captions judge
    Raises ConfigError for a file that is none, and if no picture is in all of them.
    """
    refused: list[tuple[str, str]] = []
    sides = [
        _by_picture(read_answers(file, "predictions"), images, by_name, refused) for file in files
    ]
    common = [picture for picture in sides[0] if all(picture in side for side in sides)]
    if not common:
        raise ConfigError("predictions", [_nothing(files, sides)])
    pictures = tuple(_answered([side[picture] for side in sides]) for picture in common)
    only_in = tuple(len(side) - len(common) for side in sides)
    return Paired(pictures, only_in, tuple(refused))


def _answered(entries: Sequence[_Entry]) -> Answered:
    first = entries[0]
    return Answered(first.key, Path(first.path), tuple(each.answer for each in entries))


def _nothing(files: Sequence[Path], sides: Sequence[Mapping[str, _Entry]]) -> str:
    if any(not side for side in sides):
        empty = next(file for file, side in zip(files, sides, strict=True) if not side)
        return f"{empty} holds no answer that is a text"
    first, second = (next(iter(side)) for side in sides)
    said = f"{files[0]} and {files[1]} have no picture in common ({first}, {second})"
    return f"{said}; give --images, the folder that holds the pictures of both"


def _by_picture(
    answers: Answers, images: str | None, by_name: bool, refused: list[tuple[str, str]]
) -> dict[str, _Entry]:
    """The entries by what tells their pictures apart."""
    found: dict[str, _Entry] = {}
    for key, answer in sorted(answers.items()):
        path = locate(key, images)
        picture = PurePath(key).name if by_name else path
        if not isinstance(answer, str):
            refused.append((key, f"its answer is a {type(answer).__name__}, not a text"))
        elif picture in found:
            refused.append((key, f"is the same picture as {found[picture].key}"))
        else:
            found[picture] = _Entry(key, path, answer)
    return found


def locate(key: str, images: str | None) -> str:
    """Where a key's picture is, the links in its path followed.

    As the original does, the folder is joined with the key, and an absolute key wins. If nothing
    is there: the key as it stands, if that begins with the folder, or its last part in the folder,
    if that is there. Where nothing is found, the last part in the folder is what will be missed.
    """
    if images is None:
        return os.path.realpath(key) if os.path.exists(key) else PurePath(key).name
    joined, inside = os.path.join(images, key), os.path.join(images, PurePath(key).name)
    begins = os.path.normpath(key).startswith(os.path.normpath(images) + os.sep)
    places = [joined, *([key] if begins else []), inside]
    return os.path.realpath(next((place for place in places if os.path.exists(place)), inside))
