"""Counts C++: the lines of functions, found by their braces. Nesting is not counted.

Lines of code are those that are neither blank nor comment alone. A function's begin with its
signature, the template line included; those of a lambda are its function's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from tools.counted import Counted, Function

SUFFIXES = (".cpp", ".h", ".inc")
COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
# Braces here open no block: directives, texts, and initialisers, which stand right behind a name.
NO_BLOCK = re.compile(
    r"""^[ ]*\#(?:\\\n|[^\n])* | "(?:\\.|[^"\\\n])*" | '(?:\\.|[^'\\\n])*' | (?<=\w)\{[^{};]*\}""",
    re.MULTILINE | re.VERBOSE,
)
BEFORE = re.compile(r"^\s*(?:(?:public|private|protected):\s*)*")
NOT_THE_NAME = re.compile(
    r"^template <[^{]*?>\s+(?=\w)|(?:__attribute__\(\(\w+\)\)|alignas\(\w+\))\s*"
)
NAME = re.compile(r"(?!namespace|struct|class|union|enum)[^=(]*?(operator\W+|[~\w]+)(?:<\w+>)?\(")


def count(folder: Path) -> Counted:
    """Count the C++ files in a folder."""
    counted = Counted()
    for path in sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES):
        text = path.read_text(encoding="utf-8")
        counted.files[path.name] = len(text.splitlines())
        counted.functions.extend(functions_of(text, path.name))
    return counted


def functions_of(text: str, file: str) -> Iterator[Function]:
    """Every function with a body, in the order in which they stand."""
    code = blank(COMMENT, text)
    for name, first, end in bodies(blank(NO_BLOCK, code)):
        lines = code[first:end].splitlines()
        yield Function(f"{file}:{name}", sum(map(bool, map(str.strip, lines))), len(lines))


def blank(pattern: re.Pattern[str], text: str) -> str:
    """A text with spaces for all that matches, its lines where they were."""
    return pattern.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), text)


def bodies(code: str) -> Iterator[tuple[str, int, int]]:
    """Name, begin of the signature and end of the body, from code without comments and texts."""
    depth = begin = 0
    open_at: tuple[str, int, int] | None = None  # name, begin and depth of the function we are in
    for mark in re.finditer("[{};]", code):
        header = code[begin : mark.start()]
        if mark[0] == "{":
            if open_at is None and (name := name_of(header)):
                open_at = name, begin + len(BEFORE.findall(header)[0]), depth
            depth += 1
        elif mark[0] == "}":
            depth -= 1
            if open_at and open_at[2] == depth:
                yield *open_at[:2], mark.end()
                open_at = None
        begin = mark.end()


def name_of(header: str) -> str:
    """Of the function whose body follows; "" where a class or anything else does."""
    plain = NOT_THE_NAME.sub("", BEFORE.sub("", header))
    name = NAME.match(plain)
    return name[1] if name else ""
