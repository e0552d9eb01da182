"""Single values of what callers write, checked and named by their path. Knows no message."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from glimt.errors import RequestError

_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def check_text(raw: Any, path: str) -> str:
    """A text that has a UTF-8 form. JSON can write half a character, which no tokenizer takes.

    Raises RequestError for anything else.
    """
    if not isinstance(raw, str):
        raise RequestError(path, f"is {kind_of(raw)}; a text is needed")
    if (found := _LONE_SURROGATE.search(raw)) is not None:
        where = f"U+{ord(found[0]):04X} at character {found.start()}"
        raise RequestError(path, f"holds half a surrogate pair ({where}), which is no character")
    return raw


def check_object(raw: Any, path: str, needed: str) -> Mapping[str, Any]:
    """An object; needed: what is to be in it. Raises RequestError for anything else."""
    if not isinstance(raw, Mapping):
        raise RequestError(path, f"is {kind_of(raw)}; an object with {needed} is needed")
    return raw


def required(raw: Mapping[str, Any], key: str, path: str) -> Any:
    """The value of a key. Raises RequestError if there is none."""
    if key not in raw:
        raise RequestError(f"{path}.{key}", "is missing")
    return raw[key]


def kind_of(raw: Any) -> str:
    """What a wrong value is, in the words of JSON where it has any."""
    if raw is None:
        return "null"
    names = {bool: "true or false", dict: "an object", list: "a list", str: "a text"}
    if (name := names.get(type(raw))) is not None:
        return name
    return "a number" if isinstance(raw, (int, float)) else f"a {type(raw).__name__}"
