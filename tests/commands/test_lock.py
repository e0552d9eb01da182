"""One run at a time: who holds a file is told, and whoever is killed holds nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from glimt.commands.lock import only_run
from glimt.errors import ConfigError

HOLD = """
import sys
from pathlib import Path
from glimt.commands.lock import only_run
with only_run(Path(sys.argv[1]), "out"):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_the_second_is_refused_and_told_who_the_first_is(tmp_path):
    """Catches two runs at once, and a lock that outlives its run."""
    path = tmp_path / "rows.json"
    for _ in range(2):
        with only_run(path, "out"):
            with pytest.raises(ConfigError) as refused, only_run(path, "out"):
                pass
            assert f"another run (process {os.getpid()})" in str(refused.value)
            with only_run(tmp_path / "other.json", "out"):
                pass
        assert list(tmp_path.iterdir()) == []


def test_a_killed_run_holds_nothing(tmp_path):
    """Catches a lock file that has to be deleted by hand after a crash."""
    path = tmp_path / "rows.json"
    command = [sys.executable, "-c", HOLD, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(ConfigError, match=f"process {holder.pid}"), only_run(path, "out"):
            pass
        holder.kill()
        holder.wait()
    with only_run(path, "out"):
        assert (tmp_path / ".rows.json.lock").read_text() == f"{os.getpid()}\n"
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_was_removed_is_not_taken_for_ones_own(tmp_path, monkeypatch):
    """Catches two runs at once where the first ends between the second's open and its lock."""
    path, opened = tmp_path / "rows.json", os.open
    removed = []

    def open_late(*given: object, **named: object) -> int:
        found = opened(*given, **named)
        if not removed:
            removed.append(1)
            (tmp_path / ".rows.json.lock").unlink()
        return found

    monkeypatch.setattr(os, "open", open_late)
    with only_run(path, "out"):
        assert (tmp_path / ".rows.json.lock").is_file()
        with pytest.raises(ConfigError), only_run(path, "out"):
            pass


def test_a_place_that_takes_no_lock_is_named(tmp_path):
    """Catches a traceback where the folder cannot be written."""
    with pytest.raises(ConfigError, match="cannot be locked"), only_run(Path("/proc/x"), "out"):
        pass
