"""Stop strings against a plain reading of their definitions."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glimt.outputs.stop import find_stop, partial_stop

TEXT = st.text("ab\n", max_size=12)
STOPS = st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=4)


@pytest.mark.parametrize(
    ("text", "stops", "start", "found"),
    [
        ("", ("a",), 0, None),
        ("hello", (), 0, None),
        ("hello STOP now STOP", ("STOP",), 0, (6, "STOP")),
        ("hello STOP now STOP", ("STOP",), 7, (15, "STOP")),
        ("hello", ("hello",), 0, (0, "hello")),
        ("xyz", ("z", "y"), 0, (1, "y")),
        ("abc", ("ab", "abc"), 0, (0, "ab")),
        ("\n\nQ:", ("Q:", "\n\nQ:"), 0, (0, "\n\nQ:")),
        ("abcd", ("abcd", "bc"), 0, (1, "bc")),
    ],
)
def test_the_first_stop_string_to_end_is_found(text, stops, start, found):
    """Another order of preference would depend on how the text came in."""
    assert find_stop(text, stops, start) == found


@given(text=TEXT, more=TEXT, stops=STOPS)
@settings(max_examples=200, deadline=None)
def test_what_was_found_stays_found_whatever_follows(text: str, more: str, stops: list[str]):
    """If later text changed the answer, a stream could not act on it at once."""
    found = find_stop(text, stops, 0)
    if found is not None:
        assert find_stop(text + more, stops, 0) == found


@given(text=TEXT, stops=STOPS)
@settings(max_examples=200, deadline=None)
def test_find_stop_agrees_with_reading_character_by_character(text: str, stops: list[str]):
    """The quick search must pick what a reader of one character at a time would pick."""
    expected = None
    for end in range(len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending and expected is None:
            longest = max(ending, key=len)
            expected = (end - len(longest), longest)
    assert find_stop(text, stops, 0) == expected


@pytest.mark.parametrize(
    ("text", "stops", "length"),
    [
        ("", ("ab",), 0),
        ("x", (), 0),
        ("xa", ("ab",), 1),
        ("xab", ("ab",), 0),
        ("aab", ("aabb", "bc"), 3),
        ("aaa", ("aab",), 2),
        ("a", ("a",), 0),
        ("xy", ("abc", "yz"), 1),
    ],
)
def test_only_a_tail_that_begins_a_stop_string_is_held(text, stops, length):
    """Holding more delays the text, holding less shows a part of a stop string."""
    assert partial_stop(text, stops) == length


@given(text=TEXT, stops=STOPS)
@settings(max_examples=200, deadline=None)
def test_partial_stop_is_the_longest_proper_prefix_at_the_end(text: str, stops: list[str]):
    """The definition, tried out over every length of every stop string."""
    lengths = [n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])]
    assert partial_stop(text, stops) == max(lengths, default=0)


def test_the_most_stop_strings_allowed_are_searched_in_milliseconds():
    """Catches a search that grows with the square of a stop string, which one request may send."""
    stops = tuple("a" * 1023 + chr(0x4E00 + i) for i in range(32))
    began = time.perf_counter()
    for _ in range(10):
        assert partial_stop("b" * 20000 + "a" * 10, stops) == 10
    assert time.perf_counter() - began < 1.0
