"""Which native kernels run on this machine: the best instruction set that passes a self-test.

A processor may report an instruction that the system then refuses, so every set is tried once in
a child process and the outcome is remembered, by processor and by build. Unless a set is asked for
by name, nothing here can fail: at worst the plain torch path is taken.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from glimt.errors import ConfigError
from glimt.kernels.library import ISAS, available, library_path
from glimt.kernels.native import Native

log = logging.getLogger("glimt")

WRONG_VALUES = 3  # exit status of the self-test; any other failure may be the machine's
_TIMEOUT_S = 120
_OF_THE_KERNELS = (signal.SIGILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGABRT)
_NOT_BUILT = "the native kernels were not built (no C++ compiler at installation)"


def open_native(wanted: str | None, threads: int, places: Sequence[int] = ()) -> Native | None:
    """The kernels to use, now in force for the whole process; None for the plain torch path.

    wanted: as chosen_isa takes it; threads, places: of the kernels' own, as Native takes them
    Raises ConfigError if a set that was asked for is unknown, not there, or fails its self-test.
    """
    path = library_path()
    isa = chosen_isa(wanted, path)
    return Native(path, isa, threads, places) if path and isa else None


def chosen_isa(wanted: str | None, path: str | None) -> str | None:
    """The instruction set to use; None for the plain torch path, whose reason is said once.

    wanted: what GLIMT_ISA holds: one of ISAS, "none" for the plain path, or nothing for the best
    path:   of the compiled kernels; None where they were not built
    Raises ConfigError as open_native does.
    """
    if wanted:
        return None if wanted == "none" else _checked(wanted, path)
    if path is None:
        _say_plain(_NOT_BUILT)
        return None
    try:
        isa = next((isa for isa in available(path) if why_not(path, isa) is None), None)
    except OSError as error:
        _say_plain(f"the native kernels cannot be used ({error})")
        return None
    if isa is None:
        _say_plain("no native kernels are right here")
    return isa


@cache
def _say_plain(reason: str) -> None:
    log.warning("%s: running on plain torch, which is slower", reason)


def _checked(wanted: str, path: str | None) -> str:
    if wanted not in ISAS:
        known = ", ".join((*ISAS, "none"))
        raise ConfigError("GLIMT_ISA", [f"{wanted!r} is unknown; choose one of {known}"])
    if reason := _why_not_even_if_absent(path, wanted):
        advice = "unset GLIMT_ISA to take what works"
        raise ConfigError("GLIMT_ISA", [f"{wanted!r} cannot be used: {reason}; {advice}"])
    return wanted


def reasons(path: str | None) -> dict[str, str | None]:
    """Per instruction set, best first, why it cannot be used here; None if it can."""
    return {isa: _why_not_even_if_absent(path, isa) for isa in ISAS}


def _why_not_even_if_absent(path: str | None, isa: str) -> str | None:
    if path is None:
        return _NOT_BUILT
    try:
        if isa not in available(path):
            return "it is not compiled in, or this processor does not have it"
    except OSError as error:
        return str(error)
    return why_not(path, isa)


def usable_isas() -> Sequence[str]:
    """Instruction sets whose kernels are right here, best first."""
    return [isa for isa, reason in reasons(library_path()).items() if reason is None]


# --- the self-test ---------------------------------------------------------------------------


@cache
def why_not(path: str, isa: str) -> str | None:
    """Why an available instruction set's kernels must not be used here; None if they are right.

    Only what the kernels did is remembered: a test that the machine cut short (no memory, no time)
    says nothing about them, and the next process tries again.
    """
    remembered = _remembered(path)
    if isa in remembered:
        log.info("kernels for %s, tried before: %s", isa, remembered[isa] or "right")
        return remembered[isa] or None
    reason, is_certain = _try_in_child(isa)
    if reason:
        log.warning("kernels for %s are not used: %s", isa, reason)
    if is_certain:
        _remember(path, remembered | {isa: reason})
    return reason or None


def _try_in_child(isa: str) -> tuple[str, bool]:
    """Run the self-test: what went wrong ("" if nothing did), and whether it would again."""
    command = [sys.executable, "-m", "glimt.kernels.selftest", isa]
    # The child must find the packages that this process found, whatever told it where they are.
    places = os.environ | {"PYTHONPATH": os.pathsep.join(place for place in sys.path if place)}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_TIMEOUT_S, env=places
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"the self-test did not end: {error}", False
    if done.returncode < 0:
        reason = f"the self-test was killed by signal {-done.returncode}"
        return reason, -done.returncode in _OF_THE_KERNELS
    if done.returncode == 0:
        return "", True
    said = (done.stderr.strip() or done.stdout.strip()).splitlines()
    reason = said[-1] if said else f"the self-test ended with status {done.returncode}"
    return reason, done.returncode == WRONG_VALUES


def memory_file(path: str) -> Path:
    """Where outcomes are remembered for this processor and this build of the library."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "glimt"
    status = os.stat(path)
    seen = f"{path} {status.st_mtime_ns} {status.st_size} {_processor()}"
    return folder / f"kernels-{hashlib.sha256(seen.encode()).hexdigest()[:16]}.json"


@cache
def _processor() -> str:
    """Model, features and kernel: what may change what an instruction does."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    said = [line for line in lines if line.startswith(("model name", "flags", "Features"))]
    return f"{sorted(set(said))} {os.uname().release}"


def _remembered(path: str) -> dict[str, str]:
    """Outcomes by instruction set, "" if its kernels are right; nothing if the file is not ours."""
    try:
        found = json.loads(memory_file(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RuntimeError):  # RuntimeError: there is no home folder
        return {}
    known = found if isinstance(found, dict) else {}
    return {isa: str(known[isa]) for isa in ISAS if isa in known}


def _remember(path: str, outcomes: dict[str, str]) -> None:
    """Whole or not at all; a folder that cannot be written costs a second at the next start."""
    try:
        file = memory_file(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f".{os.getpid()}.part")
        part.write_text(json.dumps(outcomes), encoding="utf-8")
        part.replace(file)
    except (OSError, RuntimeError):
        return
