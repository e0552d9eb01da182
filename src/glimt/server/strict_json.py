"""JSON as a body may hold it: one reading of it, or an error that says what is wrong.

Knows no request. RFC 8259 leaves much to the reader (a key twice, numbers beyond a float, half a
surrogate pair, UTF-16); where two readers may disagree, this one refuses.
"""

from __future__ import annotations

import codecs
import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from glimt.errors import RequestError
from glimt.server.failures import Failure, HttpFailure

MAX_DEPTH = 32  # a schema in response_format takes about 20
_MAX_VALUES = 500_000  # a list of nothing takes 56 bytes for its 3: 48 MB of them would take 3 GB
_MAX_DIGITS = 40
_MAX_SHOWN = 80  # characters of a key in a message
_MARKS = (codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_SURROGATE = re.compile("[\ud800-\udfff]")
_ESCAPED_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_DEEP = Failure("invalid", f"the body is nested deeper than {MAX_DEPTH} levels")


def parse_json(content: bytes) -> Any:
    """The value of UTF-8 JSON. Raises HttpFailure saying what is wrong.

    A number that a float cannot hold, a key twice in one object, half a surrogate pair, more than
    half a million values and what is nested deeper than MAX_DEPTH are refused.
    """
    if any(_comes_too_often(each, content) for each in (b",", b"[", b"{")):
        raise HttpFailure(Failure("invalid", f"the body holds more than {_MAX_VALUES:,} values"))
    try:
        value = json.loads(
            _text(content),
            object_pairs_hook=_object,
            parse_constant=_refuse_constant,
            parse_int=_parse_int,
            parse_float=_parse_float,
        )
    except RecursionError as error:
        raise HttpFailure(_DEEP) from error
    except ValueError as error:
        raise HttpFailure(Failure("malformed", f"the body is not JSON: {error}")) from error
    if _depth(value) > MAX_DEPTH:
        raise HttpFailure(_DEEP)
    if _may_hold_half_pairs(content):
        _refuse_half_pairs(value)
    return value


def _text(content: bytes) -> str:
    """Decoded. Raises ValueError; json.loads by itself would take UTF-16 and UTF-32 too."""
    if content.startswith(_MARKS):
        raise ValueError("it begins with a byte order mark; send UTF-8 without one")
    if not content:
        raise ValueError("it is empty")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ValueError("it is not UTF-8") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise HttpFailure(_repeated(pairs))
    return found


def _repeated(pairs: list[tuple[str, Any]]) -> Failure:
    """Names the first key that comes again: readers take the first value, the last, or both."""
    counts = Counter(key for key, _ in pairs)
    key = next(key for key, count in counts.items() if count > 1)[:_MAX_SHOWN]
    said = f"the body is not JSON: the key {key!r} stands twice in one object; give it once"
    return Failure("malformed", said, key if key.isprintable() else None)


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _parse_int(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise ValueError(f"a number has more than {_MAX_DIGITS} digits")
    return int(text)


def _parse_float(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError("a number is beyond what a 64-bit float can hold (1.8e308)")
    return number


def _depth(value: Any) -> int:
    """Levels of lists and objects, at most one more than MAX_DEPTH; read without recursion."""
    depth, level = 0, [value]
    while level := [
        inner
        for each in level
        if isinstance(each, (list, dict))
        for inner in (each.values() if isinstance(each, dict) else each)
    ]:
        depth += 1
        if depth > MAX_DEPTH:
            break
    return depth


def parse_field(content: bytes | str, field: str) -> Any:
    """JSON that stands as text in a field. Raises RequestError naming the field."""
    raw = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    try:
        return parse_json(raw)
    except HttpFailure as error:
        raise RequestError(field, _of_field(error.failure)) from error


def _of_field(failure: Failure) -> str:
    """What is wrong with a body, said of a field."""
    if failure.kind == "malformed":
        return failure.message.removeprefix("the body ")
    return failure.message.removeprefix("the body").lstrip(" :")


def _comes_too_often(byte: bytes, content: bytes) -> bool:
    """Whether a byte is there more than _MAX_VALUES times.

    Where it is rare, as in base64, this is six times as fast as bytes.count.
    """
    at = -1 if len(content) > _MAX_VALUES else len(content)
    for _ in range(_MAX_VALUES + 1):
        at = content.find(byte, at + 1)
        if at < 0:
            return False
    return True


def _may_hold_half_pairs(content: bytes) -> bool:
    """Surrogates that are not escaped are no UTF-8. The first look is the fast one."""
    return b"\\" in content and _ESCAPED_SURROGATE.search(content) is not None


def _refuse_half_pairs(value: Any) -> None:
    """Raise HttpFailure for half a surrogate pair, which is no character, naming its field."""
    for place, text in _texts(value, ""):
        if not text.isascii() and _SURROGATE.search(text):
            field = place if place.isprintable() else None
            said = "holds half a surrogate pair, which is no character"
            raise HttpFailure(Failure("invalid", f"{field or 'a key'}: {said}", field))


def _texts(value: Any, place: str) -> Iterator[tuple[str, str]]:
    """Every text and where it stands, keys too; as deep as MAX_DEPTH at most.

    A place is cut to _MAX_SHOWN: one of a long key would be written again for each value under it.
    """
    if isinstance(value, str):
        yield place or "the body", value
    inner = enumerate(value) if isinstance(value, list) else ()
    for key, each in value.items() if isinstance(value, dict) else inner:
        where = (f"{place}.{key}" if place else str(key))[:_MAX_SHOWN]
        if isinstance(key, str):
            yield where, key
        yield from _texts(each, where)
