"""Reads questions, of one line or of several, from a terminal or a pipe."""

from __future__ import annotations

import glob
import io
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

_QUOTES = '"""'
_PROMPT, _MORE = "> ", ". "


@dataclass(frozen=True, slots=True)
class Entry:
    """What was typed. is_quoted: it stood between lines of three quotes, so it is no command."""

    text: str
    is_quoted: bool = False


class Reader:
    """Asks for one entry after the other.

    is_interactive: both ends are a terminal: there is a prompt, and lines can be edited
    """

    def __init__(self, commands: Sequence[str] = ()) -> None:
        """commands: words that the tabulator completes at the start of a line."""
        self.is_interactive = sys.stdin.isatty() and sys.stdout.isatty()
        if self.is_interactive:
            _use_line_editing(commands)
            if isinstance(sys.stdin, io.TextIOWrapper):
                # A byte that is no UTF-8 must not end the program; the engine will refuse it.
                sys.stdin.reconfigure(errors="surrogateescape")

    def read(self) -> Entry | None:
        """The next entry; None at the end of input, or at Ctrl-C where an entry would begin."""
        try:
            line = self._line(_PROMPT)
        except KeyboardInterrupt:
            self._break_line()
            return None
        if line is None:
            return None
        try:
            return self._whole(line)
        except KeyboardInterrupt:
            self._break_line()
            return self.read()

    def _whole(self, line: str) -> Entry:
        """Add the lines that belong to the first one."""
        if line.strip() == _QUOTES:
            return Entry("\n".join(self._quoted()), is_quoted=True)
        lines = [line]
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1][:-1]
            more = self._line(_MORE)
            if more is None:
                break
            lines.append(more)
        return Entry("\n".join(lines))

    def _quoted(self) -> list[str]:
        lines: list[str] = []
        while (line := self._line(_MORE)) is not None and line.strip() != _QUOTES:
            lines.append(line)
        return lines

    def _line(self, prompt: str) -> str | None:
        """One line without its end; None at the end of input."""
        if not self.is_interactive:
            raw = sys.stdin.buffer.readline()
            return raw.decode("utf-8", "surrogateescape").rstrip("\r\n") if raw else None
        try:
            return input(prompt)
        except EOFError:
            self._break_line()
            return None

    def _break_line(self) -> None:
        """Ctrl-C and Ctrl-D leave the cursor behind the prompt."""
        if self.is_interactive:
            print(flush=True)


# --- line editing ----------------------------------------------------------------------------


def _use_line_editing(commands: Sequence[str]) -> None:
    """Arrow keys, history and completion, where Python has readline."""
    try:
        import readline
    except ImportError:
        return

    def complete(text: str, state: int) -> str | None:
        begun = readline.get_line_buffer()
        found = completions(begun, text, commands)
        return found[state] if state < len(found) else None

    readline.set_completer_delims(" \t\n")
    readline.set_completer(complete)
    readline.parse_and_bind("tab: complete")


def completions(line: str, word: str, commands: Sequence[str]) -> list[str]:
    """Commands at the start of a line, file names after one; a question completes to nothing."""
    if line == word and word.startswith("/"):
        return [f"{command} " for command in commands if command.startswith(word)]
    if not line.startswith("/"):
        return []
    home = os.path.expanduser(word)
    found = sorted(glob.glob(glob.escape(home) + "*"))
    return [f"{path}/" if os.path.isdir(path) else path for path in found]
