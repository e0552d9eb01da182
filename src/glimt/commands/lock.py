"""One run at a time on what a run adds to: a lock that ends with the process that holds it."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from glimt.errors import ConfigError


@contextmanager
def only_run(path: Path, field: str) -> Iterator[None]:
    """Hold `path` while inside; beside it lies a hidden file with this process's number.

    The operating system lets go of it even where the process is killed: no stale lock is left.
    Raises ConfigError if another run holds it, and where no lock file can be written.
    """
    beside = path.with_name(f".{path.name}.lock")
    try:
        held = _held(beside)
    except BlockingIOError as error:
        said = f"{path} is being written by another run (process {_holder(beside)})"
        raise ConfigError(field, [f"{said}; wait for its end, or name another --out"]) from error
    except OSError as error:
        said = f"{beside} cannot be locked: {error.strerror or error}"
        raise ConfigError(field, [f"{said}; name another --out"]) from error
    try:
        yield
    finally:
        with suppress(OSError):
            beside.unlink()  # while it is held, so that nobody's lock is removed but this one
        os.close(held)


def _held(beside: Path) -> int:
    """The descriptor of the locked file. Raises BlockingIOError if somebody has it, OSError."""
    while True:
        opened = os.open(beside, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_still(beside, opened):
                os.ftruncate(opened, 0)
                os.write(opened, f"{os.getpid()}\n".encode())
                return opened
        except OSError:
            os.close(opened)
            raise
        os.close(opened)  # its last holder removed it between the two calls


def _is_still(beside: Path, opened: int) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(beside.stat(), os.fstat(opened))
    return False


def _holder(beside: Path) -> str:
    with suppress(OSError):
        return beside.read_text(encoding="ascii", errors="replace").strip() or "unknown"
    return "unknown"
