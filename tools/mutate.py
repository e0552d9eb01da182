"""Breaks the code on purpose, one place at a time, and tells which test notices.

    python -m tools.mutate                every mutation of tools/mutations.toml
    python -m tools.mutate --only NAME    these alone; the other rows of the table stay
    python -m tools.mutate --list

Each mutation is a small mistake that somebody could make. It is put into a copy of the checkout,
the tests named with it run, nearest first, and all the others if these pass. What caught it is
written to docs/mutations.md; a mutation that nothing caught is a test that is missing, and makes
the exit status 1. Knows files and pytest, nothing of what the code does.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import track

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # which pytest brings along

ROOT = Path(__file__).parents[1]
DATA = ROOT / "tools" / "mutations.toml"
PAGE = ROOT / "docs" / "mutations.md"

_LIBRARY = Path("src/glimt/kernels/_native.so")
_NOT_COPIED = (".git", ".venv", "__pycache__", ".*_cache", ".hypothesis", "build", "dist")
# Of this program's own tests every mutation would fail one: its text is no longer there.
_PYTEST = ("-x", "-q", "-p", "no:cacheprovider", "-o", "timeout=120", "--ignore=tests/tools")
_REPEATABLE = "--hypothesis-seed=0"
_FAILED = re.compile(r"^(?:FAILED|ERROR) ([^\s\[]+)", re.MULTILINE)


class MutationError(Exception):
    """A mutation that cannot be judged: it no longer applies, or its tests fail without it."""


@dataclass(frozen=True, slots=True)
class Mutation:
    """One mistake.

    what:  what is then wrong, for the table
    file:  where, from the root of the checkout
    old:   text that is in the file exactly once; new: what stands there instead
    tests: files and folders of tests, nearest first
    """

    name: str
    what: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    @property
    def is_native(self) -> bool:
        """The compiled kernels must be built anew."""
        return "/csrc/" in self.file

    def applied(self, text: str) -> str:
        """The file's text with the mistake in it. Raises MutationError if it does not apply."""
        if (count := text.count(self.old)) != 1:
            raise MutationError(f"{self.name}: its text occurs {count} times in {self.file}")
        return text.replace(self.old, self.new)


def read_mutations(path: Path = DATA) -> list[Mutation]:
    """Every mutation of the file, in order."""
    raw = tomllib.loads(path.read_text(encoding="utf-8"))
    return [
        Mutation(name=name, **{**fields, "tests": tuple(fields["tests"])})
        for name, fields in raw.items()
    ]


# --- one mutation ----------------------------------------------------------------------------


class Checkout:
    """A copy of the checkout, where the code may be broken."""

    def __init__(self, folder: Path) -> None:
        self.tree = folder / "tree"
        self._build = folder / "build"
        self._environment = os.environ | {
            "PYTHONPATH": str(self.tree / "src"),
            # A changed file of equal size and second would be taken for what it was.
            "PYTHONDONTWRITEBYTECODE": "1",
            "XDG_CACHE_HOME": str(folder / "cache"),  # no verdict on broken kernels is kept
        }
        shutil.copytree(ROOT, self.tree, ignore=shutil.ignore_patterns(*_NOT_COPIED))

    def catcher(self, mutation: Mutation) -> str | None:
        """The test that notices a mutation; None if all pass."""
        with self._broken(mutation):
            return self.first_failure(mutation.tests) or self.first_failure(["tests"])

    def first_failure(self, tests: Sequence[str]) -> str | None:
        """The first test that fails, without its parameters; None if all pass."""
        command = [sys.executable, "-m", "pytest", *_PYTEST, _REPEATABLE, *tests]
        done = subprocess.run(
            command, cwd=self.tree, env=self._environment, capture_output=True, text=True
        )
        if done.returncode == 0:
            return None
        if found := _FAILED.search(done.stdout):
            return found[1]
        raise MutationError(f"pytest ended with {done.returncode}: {done.stdout}{done.stderr}")

    @contextmanager
    def _broken(self, mutation: Mutation) -> Iterator[None]:
        file = self.tree / mutation.file
        whole, library = file.read_text(encoding="utf-8"), self.tree / _LIBRARY
        file.write_text(mutation.applied(whole), encoding="utf-8")
        sound = library.read_bytes() if mutation.is_native else b""
        try:
            if mutation.is_native:
                self._build_library()
            yield
        finally:
            file.write_text(whole, encoding="utf-8")
            if mutation.is_native:
                library.write_bytes(sound)

    def _build_library(self) -> None:
        for command in (
            ["cmake", "-S", str(self.tree), "-B", str(self._build)],
            ["cmake", "--build", str(self._build), "--parallel"],
        ):
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise MutationError(f"the kernels cannot be built: {done.stdout}{done.stderr}")
        shutil.copyfile(self._build / _LIBRARY.name, self.tree / _LIBRARY)


# --- the table -------------------------------------------------------------------------------

_HEAD = """\
# What happens when the code is wrong

Every row is a mistake that was put into the code on purpose, and the first test that then failed.
`tools/mutate.py` makes this page; the mistakes are in `tools/mutations.toml`. A mistake that no
test notices would be a test that is missing: there is none.

| name | mistake | in | caught by |
|---|---|---|---|
"""


def caught_before(page: Path = PAGE) -> dict[str, str]:
    """What caught each mutation, by name, as the page says."""
    if not page.exists():
        return {}
    rows = re.findall(r"^\| (\S+) \|.*\| `(tests/.*)` \|$", page.read_text("utf-8"), re.MULTILINE)
    return dict(rows)


def page_text(mutations: Sequence[Mutation], caught: Mapping[str, str]) -> str:
    """The page, with a row for each mutation that something has caught."""
    rows = [
        f"| {m.name} | {m.what} | `{m.file}` | `{caught[m.name]}` |"
        for m in mutations
        if m.name in caught
    ]
    return _HEAD + "".join(f"{row}\n" for row in rows)


# --- the command -----------------------------------------------------------------------------


def run(chosen: Sequence[Mutation], console: Console) -> dict[str, str | None]:
    """What catches each mutation, by name.

    Raises MutationError if one cannot be applied, or a test fails without any mutation as well.
    """
    caught: dict[str, str | None] = {}
    with tempfile.TemporaryDirectory() as folder:
        checkout = Checkout(Path(folder))
        for mutation in track(chosen, "breaking", console=console):
            caught[mutation.name] = checkout.catcher(mutation)
            found = caught[mutation.name] or "NOTHING"
            console.print(f"{mutation.name}: {found}", highlight=False, soft_wrap=True)
        tests = sorted({test for test in caught.values() if test})
        if tests and (failed := checkout.first_failure(tests)):
            raise MutationError(f"{failed} fails on the unbroken code too")
    return caught


def _chosen(mutations: Sequence[Mutation], names: Sequence[str]) -> list[Mutation]:
    unknown = set(names) - {mutation.name for mutation in mutations}
    if unknown:
        raise MutationError(f"no mutation is called {' or '.join(sorted(unknown))}")
    return [mutation for mutation in mutations if not names or mutation.name in names]


def main(arguments: Sequence[str] | None = None) -> int:
    """Break, test, and write the page; 1 if a mutation survived."""
    parser = argparse.ArgumentParser(description="Break the code on purpose; see which test fails.")
    parser.add_argument("--only", metavar="NAME", action="append", default=[])
    parser.add_argument("--list", action="store_true", help="print the names and run nothing")
    given = parser.parse_args(arguments)
    mutations, console = read_mutations(), Console(stderr=True)
    if given.list:
        print("\n".join(f"{mutation.name}: {mutation.what}" for mutation in mutations))
        return 0
    found = run(_chosen(mutations, given.only), console)
    caught = {name: test for name, test in (caught_before() | found).items() if test}
    PAGE.write_text(page_text(mutations, caught), encoding="utf-8")
    survivors = [name for name, test in found.items() if test is None]
    if survivors:
        console.print(f"no test notices: {', '.join(survivors)}", style="red")
    return 1 if survivors else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except MutationError as error:
        sys.exit(str(error))
