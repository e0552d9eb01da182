"""The processes of a divided model, as tests look at them."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from pathlib import Path

import glimt
from glimt.ranks import Ranks


def rank_pids(engine: glimt.AsyncEngine) -> list[int]:
    """Of the ranks that the engine has started."""
    ranks = engine.engine.opened.ranks
    assert isinstance(ranks, Ranks)
    return [process.pid for process in ranks._processes.values()]


def is_running(pid: int) -> bool:
    """Neither gone nor ended and not waited for yet."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def wait_until_gone(pid: int) -> None:
    """Until it has ended; one that does not is killed where the test's time is over."""
    try:
        while is_running(pid):
            pass
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
