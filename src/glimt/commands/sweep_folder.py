"""A folder that a sweep fills row by row: what is measured is kept, and the next run goes on.

The record is one JSON file that is written anew after each row, whole or not at all; CSV files are
made from it. A stop between any two writes costs the row that was being measured, and no other.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from glimt.commands.lock import only_run
from glimt.commands.reporting import check_folder, write_output
from glimt.errors import ConfigError

_FORMAT = 1


class SweepFolder:
    """The record of one sweep.

    settings: what all rows share; a folder of other settings is refused
    rows:     as plain data, in the order in which they were measured
    extra:    whatever else was measured once, such as the machine's limits
    num_runs: how many runs of the command gave rows
    """

    def __init__(self, folder: Path, name: str, settings: Mapping[str, Any]) -> None:
        self.folder = folder
        self.name = name
        self.settings = dict(settings)
        self.rows: list[dict[str, Any]] = []
        self.extra: dict[str, Any] = {}
        self.num_runs = 0
        self._is_counted = False

    @classmethod
    @contextmanager
    def open(
        cls,
        folder: Path,
        name: str,
        settings: Mapping[str, Any],
        files: Sequence[str],
        restart: bool,
    ) -> Iterator[SweepFolder]:
        """Go on where an earlier run stopped, or begin; no other run may while inside.

        files:   patterns of what the sweep writes beside its record
        restart: throw away what is there
        Raises ConfigError for a record of other settings or one that cannot be read, for such
        files that belong to no record, and while another run fills the folder.
        """
        check_folder(folder, "out")
        found = cls(folder, name, settings)
        with only_run(found.path, "out"):
            found._begin(files, restart)
            yield found

    def _begin(self, files: Sequence[str], restart: bool) -> None:
        others = [path for pattern in files for path in sorted(self.folder.glob(pattern))]
        if restart:
            _remove([self.path, *others])
        elif self.path.exists():
            self._go_on()
        elif others:
            said = f"{others[0]} is there, and no {self.name} that it belongs to"
            raise ConfigError("out", [f"{said}; {_ADVICE.replace('anew', 'anew over it')}"])

    @property
    def path(self) -> Path:
        """The record."""
        return self.folder / self.name

    def add(self, row: Mapping[str, Any], keys: Sequence[str]) -> None:
        """Keep a row in the place of an earlier one with the same values under `keys`."""
        if not self._is_counted:
            self.num_runs, self._is_counted = self.num_runs + 1, True
        same = [old for old in self.rows if all(old[key] == row[key] for key in keys)]
        self.rows = [old for old in self.rows if old not in same] + [dict(row)]
        self.save()

    def save(self) -> None:
        """Write the record. Raises ConfigError if it cannot be written."""
        record = {
            "format": _FORMAT,
            "settings": self.settings,
            "runs": self.num_runs,
            "extra": self.extra,
            "rows": self.rows,
        }
        text = json.dumps(record, ensure_ascii=False, indent=1, allow_nan=False) + "\n"
        self.write(self.name, text)

    def write(self, name: str, text: str) -> None:
        """Write a file of the folder, whole or not at all. Raises ConfigError."""
        write_output(self.folder / name, text.encode(), "out")

    def _go_on(self) -> None:
        try:
            record = json.loads(self.path.read_text(encoding="utf-8"))
            is_ours = record["format"] == _FORMAT
            before, rows = record["settings"], list(record["rows"])
            extra, num_runs = dict(record["extra"]), int(record["runs"])
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise self._unreadable() from error
        if not is_ours:
            raise self._unreadable()
        if changed := _changes(before, self.settings):
            said = f"{self.path} was begun with other settings: {'; '.join(changed)}"
            raise ConfigError("out", [f"{said}; {_ADVICE}"])
        self.rows, self.extra, self.num_runs = rows, extra, num_runs

    def _unreadable(self) -> ConfigError:
        return ConfigError("out", [f"{self.path} cannot be read as a record; {_ADVICE}"])

    def rows_as(self, kind: Any) -> list[Any]:
        """The rows as objects, made by kind.from_dict. Raises ConfigError for a damaged record."""
        try:
            return [kind.from_dict(row) for row in self.rows]
        except (TypeError, KeyError, AttributeError) as error:
            raise self._unreadable() from error


_ADVICE = "name another --out, or begin anew with --restart"


def _changes(before: Any, now: Mapping[str, Any]) -> list[str]:
    if not isinstance(before, dict):
        return ["they are not there"]
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    return [f"{name} was {before.get(name)} and is now {now.get(name)}" for name in names]


def _remove(paths: Sequence[Path]) -> None:
    for path in paths:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            said = f"{path} cannot be removed: {error.strerror or error}"
            raise ConfigError("out", [f"{said}; name another --out"]) from error
