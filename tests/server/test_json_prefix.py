"""Beginnings of JSON objects, against json.loads."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glimt.server.json_prefix import JsonObjectPrefix

REALS = st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | REALS | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=12,
)
OBJECTS = st.dictionaries(st.text(max_size=4), VALUES, max_size=4)


def can_be(*pieces: str) -> bool:
    """Whether an object may begin with all of the pieces."""
    prefix = JsonObjectPrefix()
    return all(prefix.feed(piece) for piece in pieces)


def is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text, parse_constant=_none), dict)
    except ValueError:
        return False


def _none(name: str) -> Any:
    raise ValueError(name)


@given(OBJECTS, st.booleans(), st.sampled_from([None, 1]), st.data())
def test_every_beginning_of_an_object_can_become_it(value, is_ascii, indent, data):
    """Catches an escape, a number or a literal that is cut in two and taken for a mistake."""
    text = json.dumps(value, ensure_ascii=is_ascii, indent=indent)
    assert can_be(*text)
    cut = data.draw(st.integers(0, len(text)))
    assert can_be(text[:cut], text[cut:], " \n")
    assert can_be(text)


@given(OBJECTS, st.data())
def test_a_text_that_no_longer_can_is_no_object(value, data):
    """Catches a mistake that is let through: nothing behind it may make the text an object."""
    text = json.dumps(value)
    at = data.draw(st.integers(0, len(text)))
    char = data.draw(st.sampled_from(list('{}[]",:\\ue1.-+ tn\x01é')))
    text = text[:at] + char + text[at:]
    if is_object(text):
        assert can_be(*text)
    if can_be(text):
        assert can_be(*text)
    else:
        assert not is_object(text)
        assert not can_be(*text)


ENDS = [
    "[", "x", "{x", "{'", '{"a"x', '{"a":x', '{"a":tru1', '{"a":truE', '{"a":01', '{"a":1.}',
    '{"a":1.e', '{"a":-}', '{"a":+', '{"a":1,}', '{"a":1]', "{]", '{"a":[}', '{"a":[1,]', "{,",
    '{"a":"\\x', '{"a":"\\u12g', '{"a":"\n', '{"a":N', '{"a":I', '{"a":-I', "{} x", "{}{", "{}}",
    '{"a" "', '{"a":1 2', '{"a":1 "', '{"a"}', '{"a":\xa0',
]  # fmt: skip


@pytest.mark.parametrize("text", ENDS)
def test_the_first_wrong_character_is_told(text):
    """Catches a call that is waited for long after the answer has become text."""
    assert can_be(text[:-1])
    assert not can_be(text)
    assert not can_be(*text)
