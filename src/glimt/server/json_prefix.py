"""Whether a text that comes in pieces can still become one JSON object.

The same texts as json.loads takes, NaN and Infinity aside. Each character is read once, but for a
number, a literal or an escape that is not whole: what there is of it is read with each piece.
"""

from __future__ import annotations

import re

_BLANKS = re.compile(r"[ \t\n\r]*")
_IN_STRING = re.compile(r'(?:[^"\\\x00-\x1f]|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}))*')
_HALF_ESCAPE = re.compile(r"\\(?:u[0-9a-fA-F]{0,3})?")
_WORD = re.compile(r"[-+.0-9A-Za-z]+")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_HALF_NUMBER = re.compile(r"-?(?:(?:0|[1-9][0-9]*)(?:\.[0-9]*)?(?:(?<=[0-9])[eE][+-]?[0-9]*)?)?")
_LITERALS = ("true", "false", "null")
# What may come next: one of these characters; w stands for a number or a literal.
_VALUE = '"w{['
_AFTER_OPENING = {"{": '"}', "[": _VALUE + "]"}
_AFTER_COMMA = {"{": '"', "[": _VALUE}
_CLOSES = {"}": "{", "]": "["}


class JsonObjectPrefix:
    """A reader of one object; `feed` it a text piece by piece."""

    def __init__(self) -> None:
        self._expected = "{"
        self._open: list[str] = []
        self._is_in_string = False
        self._is_key = False
        self._tail = ""  # what is not whole yet: an escape, a number or a literal

    def feed(self, text: str) -> bool:
        """Whether what has been fed so far can become an object; if not, nothing more is fed."""
        text, at = self._tail + text, 0
        self._tail = ""
        while (at := self._skip(text, at)) < len(text):
            end = self._string(text, at) if self._is_in_string else self._token(text, at)
            if end is None:
                return False
            if end == at:  # the rest waits for more
                self._tail = text[at:]
                return True
            at = end
        return True

    def _skip(self, text: str, at: int) -> int:
        if self._is_in_string:
            return at
        found = _BLANKS.match(text, at)
        return found.end() if found else at

    def _string(self, text: str, at: int) -> int | None:
        """The end of what is whole of a string; None: it cannot be one."""
        found = _IN_STRING.match(text, at)
        end = found.end() if found else at
        if end == len(text):
            return end
        if text[end] == '"':
            self._is_in_string = False
            self._expected = ":" if self._is_key else self._after_value()
            return end + 1
        is_half = end == at and _HALF_ESCAPE.fullmatch(text, at) is not None
        return end if end > at or is_half else None

    def _token(self, text: str, at: int) -> int | None:
        """The end of a token, `at` if it is not whole; None: there can be none."""
        char = text[at]
        if (word := _WORD.match(text, at)) is not None:
            return self._word(word[0], at, word.end() == len(text))
        if char not in self._expected or char == "w":
            return None
        self._take(char)
        return at + 1

    def _word(self, word: str, at: int, is_last: bool) -> int | None:
        if "w" not in self._expected:
            return None
        if is_last:
            return at if _is_begun(word) else None
        if not _NUMBER.fullmatch(word) and word not in _LITERALS:
            return None
        self._expected = self._after_value()
        return at + len(word)

    def _take(self, char: str) -> None:
        if char == '"':
            self._is_key = "w" not in self._expected
            self._is_in_string = True
        elif char in _AFTER_OPENING:
            self._open.append(char)
            self._expected = _AFTER_OPENING[char]
        elif char in _CLOSES:
            self._open.pop()
            self._expected = self._after_value()
        else:
            self._expected = _VALUE if char == ":" else _AFTER_COMMA[self._open[-1]]

    def _after_value(self) -> str:
        """A comma or the end of what is open; nothing behind the whole object."""
        if not self._open:
            return ""
        return ",}" if self._open[-1] == "{" else ",]"


def _is_begun(word: str) -> bool:
    """Whether a number or a literal may begin so."""
    is_literal = any(literal.startswith(word) for literal in _LITERALS)
    return is_literal or _HALF_NUMBER.fullmatch(word) is not None
