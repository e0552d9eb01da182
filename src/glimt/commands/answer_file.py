"""The predictions file while a run adds to it: what it holds already, and when it is written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from glimt.commands.lock import only_run
from glimt.commands.reporting import write_output
from glimt.errors import ConfigError
from glimt.evaluate.predictions import (
    Answers,
    Settings,
    origins_to_bytes,
    read_if_there,
    read_origins,
    settings_path,
    to_bytes,
)


@dataclass(slots=True)
class AnswerFile:
    """Answers by picture, those of earlier runs and of other folders included.

    Written whole after every `every` new answers: what stops a run costs that many at most.
    """

    path: Path
    settings: Settings
    every: int
    answers: Answers
    origins: dict[str, Settings]
    _num_new: int = field(default=0, init=False)

    def add(self, picture: str, answer: str) -> None:
        """Take an answer. Raises ConfigError if it is time to write and that fails."""
        self.answers[picture] = answer
        self.origins[picture] = self.settings
        self._num_new += 1
        if self._num_new >= self.every:
            self.save()

    def save(self) -> None:
        """Write what is new. Raises ConfigError.

        The settings come second: after a crash between the two, an answer without settings is
        refused by the next run, where settings without their answer would be believed.
        """
        if self._num_new:
            write_output(self.path, to_bytes(self.answers), "out")
            write_output(settings_path(self.path), origins_to_bytes(self.origins), "out")
            self._num_new = 0


@contextmanager
def open_answers(
    path: Path, pictures: Sequence[str], settings: Settings, every: int, restarts: bool
) -> Iterator[AnswerFile]:
    """The file that a run over `pictures` adds to; nobody else adds to it while inside.

    restarts: answers to these pictures are left out, so that all are asked anew
    Raises ConfigError if it holds answers to some of them that other settings gave, or if another
    run adds to it.
    """
    with only_run(path, "out"):
        yield _read(path, pictures, settings, every, restarts)


def _read(
    path: Path, pictures: Sequence[str], settings: Settings, every: int, restarts: bool
) -> AnswerFile:
    answers, origins = read_if_there(path, "out") or {}, read_origins(path, "out")
    if restarts:
        for picture in pictures:
            answers.pop(picture, None)
            origins.pop(picture, None)
    for picture in pictures:
        if picture in answers and origins.get(picture) != settings:
            raise ConfigError("out", [_refusal(path, picture, origins.get(picture), settings)])
    return AnswerFile(path, settings, every, answers, origins)


def _refusal(path: Path, picture: str, found: Settings | None, wanted: Settings) -> str:
    remedy = "add --restart to ask anew, or name another --out"
    if found is None:
        beside = settings_path(path).name
        return f"{path} answers {picture} already, and no {beside} says how; {remedy}"
    names = dict.fromkeys((*wanted, *found))
    said = [
        f"{name} was {found.get(name)!r} and is {wanted.get(name)!r} now"
        for name in names
        if wanted.get(name) != found.get(name)
    ]
    return f"{path} answers {picture} with other settings: {'; '.join(said)}; {remedy}"
