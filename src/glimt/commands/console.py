"""Where the commands write: answers and JSON to stdout, everything else to stderr.

Nothing a model, a file or an error says is ever read as rich markup.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.text import Text

from glimt.errors import GlimtError, RequestError, SetupError
from glimt.server.logs import printable as printable  # commands know it from here


def out_console() -> Console:
    """A console on stdout, for tables."""
    return Console(markup=False, highlight=False, emoji=False)


def error_console() -> Console:
    """A console on stderr, whose lines the terminal wraps and not rich."""
    return Console(stderr=True, markup=False, highlight=False, emoji=False, soft_wrap=True)


# --- words for people ------------------------------------------------------------------------


def note(text: str) -> None:
    """Say something beside the answer, in dim letters on stderr."""
    _say(Text(printable(text), style="dim"))


def warn(text: str) -> None:
    """Say something that needs attention, on stderr."""
    _say(Text(printable(text), style="yellow"))


def say_error(error: GlimtError | OSError, with_traceback: bool = False) -> None:
    """Print an error's message on stderr, after its traceback if that is wanted."""
    if with_traceback:
        traceback.print_exception(error)
    _say(Text.assemble(("error: ", "bold red"), printable(str(error))))


def _say(text: Text) -> None:
    sys.stdout.flush()  # stderr is not buffered: without this it would overtake the answer
    error_console().print(text)


def exit_code(error: GlimtError | OSError) -> int:
    """2 for what the caller can mend, 1 for what went wrong here."""
    return 2 if isinstance(error, (RequestError, SetupError)) else 1


def write_answer(text: str) -> None:
    """Write a piece of an answer to stdout at once; a pipe gets it byte for byte."""
    sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


# --- data for scripts ------------------------------------------------------------------------


def print_json(value: Any) -> None:
    """Write one JSON object and a line feed to stdout; escaped where stdout is not UTF-8."""
    is_utf8 = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    text = json.dumps(value, ensure_ascii=not (is_utf8 and _has_utf8_form(value)), allow_nan=False)
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _has_utf8_form(value: Any) -> bool:
    """False for half characters, which file names of another encoding turn into."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def error_object(error: GlimtError) -> dict[str, Any]:
    """An error as plain data, the same for every command."""
    field, message = None, str(error)
    if isinstance(error, RequestError):
        field, message = error.field, error.message
    return {"error": {"type": type(error).__name__, "field": field, "message": message}}


def usage_object(message: str) -> dict[str, Any]:
    """The same for an option that the command line itself refused."""
    return {"error": {"type": "UsageError", "field": None, "message": message}}


@contextmanager
def told_as_json(as_json: bool) -> Iterator[None]:
    """Whoever reads stdout gets the error too, as data."""
    try:
        yield
    except GlimtError as error:
        if as_json:
            print_json(error_object(error))
        raise


# --- progress --------------------------------------------------------------------------------


def byte_bar(label: str, total: int | None) -> AbstractContextManager[Callable[[int], None] | None]:
    """A progress bar of bytes on stderr; gives the function to call with bytes done.

    total: bytes in all, None if unknown. Where stderr is no terminal there is no bar.
    """
    return _bar(label, total, DownloadColumn(binary_units=True), TransferSpeedColumn())


def count_bar(label: str, total: int) -> AbstractContextManager[Callable[[int], None] | None]:
    """The same of things that are counted."""
    return _bar(label, total, MofNCompleteColumn())


@contextmanager
def _bar(
    label: str, total: int | None, *columns: ProgressColumn
) -> Iterator[Callable[[int], None] | None]:
    console = error_console()
    if not console.is_terminal:
        yield None
        return
    label_and_bar = (TextColumn("{task.description}", markup=False), BarColumn())
    with Progress(
        *label_and_bar,
        *columns,
        TimeRemainingColumn(),
        console=console,
        transient=True,
        redirect_stdout=False,
    ) as progress:
        task = progress.add_task(label, total=total)
        yield lambda count: progress.advance(task, count)
