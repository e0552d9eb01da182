"""Reads config.json and other JSON of a model folder. Which keys a family has is the family's."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from glimt.errors import ConfigError

SAT_SAID = (
    "holds VisualGLM's SAT form (model_config.json); make the hub form of it first: glimt convert"
)


def read_model_config(folder: Path) -> dict[str, Any]:
    """A model folder's config.json. Raises ConfigError; names VisualGLM's other weight form."""
    if not (folder / "config.json").exists() and (folder / "model_config.json").exists():
        raise ConfigError(str(folder), [SAT_SAID])
    return read_json(folder / "config.json")


LFS_HEAD = b"version https://git-lfs"
LFS_SAID = "is a Git LFS pointer, not the file itself; run git lfs pull in the model folder"


def read_json(path: Path) -> dict[str, Any]:
    """Parse a JSON object. Raises ConfigError naming the file."""
    try:
        data = path.read_bytes()
        if data.startswith(LFS_HEAD):
            raise ConfigError(str(path), [LFS_SAID])
        raw = json.loads(data.decode("utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(str(path.parent), [f"{path.name} is missing"]) from error
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(str(path), [f"is not readable as JSON: {error}"]) from error
    if not isinstance(raw, dict):
        raise ConfigError(str(path), [f"holds a {type(raw).__name__}, not an object"])
    return raw


class ConfigReader:
    """Reads typed values from a parsed config.json and remembers everything that is wrong.

    Read all values, then call `check()`: it raises one ConfigError naming each problem. A value
    that is wrong is returned as a harmless stand-in until then.
    """

    def __init__(self, raw: Mapping[str, Any], where: str, prefix: str = "") -> None:
        self.raw = raw
        self.where = where
        self.prefix = prefix
        self.problems: list[str] = []
        self._wrong: set[str] = set()  # full names; what is derived from them is not judged

    def section(self, name: str) -> ConfigReader:
        """A reader of a nested object; its problems join this reader's.

        Where there is no such object, that is the problem, and not each of its values.
        """
        inner = self.raw.get(name)
        if not isinstance(inner, Mapping):
            self._problem(name, "is missing" if inner is None else "is not an object")
            return ConfigReader({}, self.where, f"{self.prefix}{name}.")
        reader = ConfigReader(inner, self.where, f"{self.prefix}{name}.")
        reader.problems, reader._wrong = self.problems, self._wrong
        return reader

    def integer(self, name: str, low: int = 1, default: int | None = None) -> int:
        """A whole number of at least `low`."""
        value = self._given(name, default)
        if value is None:
            return int(self._problem(name, "is missing", low))
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            return int(self._problem(name, f"is {value!r}; a whole number >= {low} is needed", low))
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A finite number above 0."""
        value = self._given(name, default)
        if value is None:
            return float(self._problem(name, "is missing", 1.0))
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not 0 < value < float("inf"):
            return float(self._problem(name, f"is {value!r}; a number above 0 is needed", 1.0))
        return float(value)

    def flag(self, name: str, default: bool | None = None) -> bool:
        """True or false."""
        value = self._given(name, default)
        if not isinstance(value, bool):
            said = "is missing" if value is None else f"is {value!r}; true or false is needed"
            return bool(self._problem(name, said, False))
        return value

    def must_be(self, name: str, only: Any) -> None:
        """A setting that has only one value that this family computes."""
        if self.raw.get(name) is None:
            self._problem(name, "is missing")
        else:
            self.may_only_be(name, only)

    def may_only_be(self, name: str, only: Any) -> None:
        """The same, for a setting that many files do not have: absent means `only`."""
        value = self.raw.get(name)
        if value is not None and value != only:
            self._problem(name, f"is {value!r}; only {only!r} is supported")

    def one_of(self, name: str, choices: Sequence[int], default: int) -> int:
        """One of a few whole numbers."""
        value = self._given(name, default)
        if isinstance(value, bool) or value not in choices:
            said = either([str(choice) for choice in choices])
            return int(self._problem(name, f"is {value!r}; {said} is needed", default))
        return int(value)

    def must_agree(self, given: tuple[str, int], wanted: int, *sources: str) -> None:
        """A value that other keys, the sources, determine already."""
        name, value = given
        if self._are_sound(name, *sources) and value != wanted:
            said = " and ".join(f"{self.prefix}{source}" for source in sources)
            self._problem(name, f"is {value}, but {said} give {wanted}")

    def text(self, name: str, default: str | None = None) -> str:
        """A string."""
        value = self.raw.get(name, default)
        if not isinstance(value, str):
            return str(self._problem(name, "is missing" if value is None else f"is {value!r}", ""))
        return value

    def size(self, name: str) -> tuple[int, int]:
        """[height, width]."""
        match self.raw.get(name):
            case [int(height), int(width)] if height > 0 and width > 0:
                return height, width
            case value:
                said = "is missing" if value is None else f"is {value!r}; [height, width] is needed"
                self._problem(name, said)
                return 1, 1

    def flags(self, name: str, count: int, source: str) -> tuple[bool, ...]:
        """A list of `count` true or false; `source` is the key that gave the count."""
        value = self.raw.get(name)
        is_flags = isinstance(value, list) and all(isinstance(flag, bool) for flag in value)
        is_counted = isinstance(value, list) and len(value) == count
        if isinstance(value, list) and is_flags and (is_counted or not self._are_sound(source)):
            return tuple(value)
        said = "is missing" if value is None else f"is {value!r}; {count} flags are needed"
        self._problem(name, said)
        return (False,) * count

    def ids(self, name: str) -> tuple[int, ...]:
        """One token id or a list of them."""
        value = self.raw.get(name)
        if value is None:
            self._problem(name, "is missing")
            return ()
        ids = value if isinstance(value, list) else [value]
        if not ids or any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in ids):
            self._problem(name, f"is {value!r}; a token id or a list of them is needed")
            return ()
        return tuple(ids)

    def dtype(self) -> str:
        """torch_dtype, or dtype, as newer writers call it."""
        name = "dtype" if self.raw.get("torch_dtype") is None else "torch_dtype"
        value = self.raw.get(name)
        if value is None:
            self._problem("torch_dtype", "is missing")
            return "float32"
        if value not in ("float32", "float16", "bfloat16"):
            self._problem(name, f"is {value!r}; float32, float16 or bfloat16 is needed")
            return "float32"
        return str(value)

    def divides(self, whole: str, size: int, part: str, count: int) -> None:
        """Remember a problem when `count` parts do not divide `size`."""
        if self._are_sound(whole, *part.split()) and size % count:
            self._problem(whole, f"is {size}, which {part} ({count}) does not divide")

    def _are_sound(self, *names: str) -> bool:
        """No key of these names was found wrong, nor the object that it is in."""
        paths = [f"{self.prefix}{name}." for name in names]
        return not any(path.startswith(f"{wrong}.") for path in paths for wrong in self._wrong)

    def _given(self, name: str, default: Any) -> Any:
        """A value, or the default where it is absent or null."""
        value = self.raw.get(name)
        return default if value is None else value

    def _problem(self, name: str, said: str, stand_in: Any = None) -> Any:
        self.problems.append(f"{self.prefix}{name} {said}")
        self._wrong.add(f"{self.prefix}{name}")
        return stand_in

    def check(self) -> None:
        """Raise ConfigError if anything was wrong."""
        if self.problems:
            raise ConfigError(self.where, self.problems)


def either(words: Sequence[str]) -> str:
    """A, B or C."""
    return " or ".join(filter(None, (", ".join(words[:-1]), words[-1])))
