"""Stop strings: where one is in a text, and how much of a text's tail may begin one.

Pure functions of text; knows nothing of tokens or streams. Stop strings are never empty: a
request with an empty one is refused before it gets here.
"""

from __future__ import annotations

from collections.abc import Sequence


def find_stop(text: str, stops: Sequence[str], start: int) -> tuple[int, str] | None:
    """The first stop string to be complete at or after `start`: its index and itself.

    First means the one that ends first, and among those that end together the longest. So the
    answer is settled as soon as its last character is there, whatever follows: of "ab" and
    "abc", "ab" wins in "abc"; of "c" and "abc", "abc" wins.
    """
    found = [(at + len(stop), at, stop) for stop in stops if (at := text.find(stop, start)) >= 0]
    if not found:
        return None
    _, at, stop = min(found)
    return at, stop


def partial_stop(text: str, stops: Sequence[str]) -> int:
    """Length of the longest tail of `text` that begins a stop string without completing it."""
    return max((_overlap(text, stop) for stop in stops), default=0)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest tail of `text` that begins `stop` without completing it."""
    lengths = range(min(len(stop) - 1, len(text)), 0, -1)
    return next((length for length in lengths if text.endswith(stop[:length])), 0)
