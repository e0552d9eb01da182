"""The predictions file: one flat JSON object, path of the picture -> answer, as MindIE writes it.

What the answers belong to (prompt, sampling, model settings) stands in a file of its own beside
it, so that the predictions stay what other programs read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from glimt.errors import ConfigError

Settings = Mapping[str, Any]
Answers = dict[str, Any]  # by the picture's path; a text, or whatever another program left there


def settings_path(predictions: Path) -> Path:
    """Where the settings of a predictions file stand: beside it, with `.settings` in the name."""
    return predictions.with_name(f"{predictions.stem}.settings{predictions.suffix or '.json'}")


def read_answers(path: Path, field: str) -> Answers:
    """All of a predictions file. Raises ConfigError saying what is wrong with it."""
    raw = read_if_there(path, field)
    if raw is None:
        raise ConfigError(field, [f"{path} does not exist; glimt predict writes such a file"])
    return raw


def read_origins(predictions: Path, field: str) -> dict[str, Settings]:
    """What each answer of a predictions file belongs to, by picture; empty if nothing says so.

    Raises ConfigError for a settings file of another form.
    """
    path = settings_path(predictions)
    raw = read_if_there(path, field)
    if raw is None:
        return {}
    try:
        return {name: dict(run["settings"]) for run in raw["runs"] for name in run["pictures"]}
    except (TypeError, KeyError, ValueError) as error:
        said = (
            f"{path} is not what glimt predict writes; delete it, and restart or move the answers"
        )
        raise ConfigError(field, [said]) from error


def origins_to_bytes(origins: Mapping[str, Settings]) -> bytes:
    """The settings file: the pictures under what they were asked with."""
    runs: list[dict[str, Any]] = []
    for picture, settings in sorted(origins.items()):
        run = next((run for run in runs if run["settings"] == settings), None)
        if run is None:
            runs.append(run := {"settings": settings, "pictures": []})
        run["pictures"].append(picture)
    return _encoded({"runs": runs})


def read_if_there(path: Path, field: str) -> dict[str, Any] | None:
    """An object of answers or of settings, None if there is no such file. Raises ConfigError."""
    try:
        raw = json.loads(path.read_bytes().decode("utf-8-sig"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(field, [f"{path} cannot be read: {error.strerror or error}"]) from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(field, [f"{path} is not JSON in UTF-8: {error}"]) from error
    if not isinstance(raw, dict):
        said = f"{path} holds a {type(raw).__name__}, not an object of paths and answers"
        raise ConfigError(field, [said])
    return raw


def to_bytes(answers: Mapping[str, Any]) -> bytes:
    """The file: keys sorted, one answer a line, Chinese as it is."""
    return _encoded(dict(sorted(answers.items())))


def _encoded(value: Mapping[str, Any]) -> bytes:
    """JSON as a person would read it; escaped where a file's name has no UTF-8 form."""
    try:
        return (json.dumps(value, ensure_ascii=False, indent=4) + "\n").encode()
    except UnicodeEncodeError:
        return (json.dumps(value, indent=4) + "\n").encode()
