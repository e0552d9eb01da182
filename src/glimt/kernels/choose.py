"""Which native kernels run on this machine: the best instruction set that passes a self-test.

A processor may report an instruction that the system then refuses, so every set is tried once in
a child process and the outcome is remembered, by processor and by build. Nothing here can fail: at
worst the plain torch path is taken.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from glimt.errors import ConfigError
from glimt.kernels.native import ISAS, Native, available, library_path, open_library

log = logging.getLogger("glimt")

_TIMEOUT_S = 120
_NOT_BUILT = "the native kernels were not built (no C++ compiler at installation)"


@cache
def open_native(wanted: str | None, threads: int) -> Native | None:
    """The kernels to use; None for the plain torch path, which is said once.

    wanted: what GLIMT_ISA holds: one of ISAS, "none" for the plain path, or None for the best
    Raises ConfigError if that set is unknown, not there, or fails its self-test.
    """
    path = library_path()
    if wanted:
        return None if wanted == "none" else _open_wanted(wanted, path, threads)
    if path is None:
        log.warning("%s: running on plain torch, which is slower", _NOT_BUILT)
        return None
    try:
        isa = next((isa for isa in available(path) if why_not(path, isa) is None), None)
        return Native(path, isa, threads) if isa else None
    except OSError as error:
        log.warning("the native kernels cannot be used (%s): running on plain torch", error)
        return None


def _open_wanted(wanted: str, path: str | None, threads: int) -> Native:
    if wanted not in ISAS:
        known = ", ".join((*ISAS, "none"))
        raise ConfigError("GLIMT_ISA", [f"{wanted!r} is unknown; choose one of {known}"])
    try:
        if path is None:
            raise OSError(_NOT_BUILT)
        if wanted in available(path) and (reason := why_not(path, wanted)):
            raise OSError(f"{wanted} fails its self-test here ({reason})")
        return Native(path, wanted, threads)
    except OSError as error:
        advice = "unset GLIMT_ISA to take what works"
        raise ConfigError("GLIMT_ISA", [f"{wanted!r} cannot be used: {error}; {advice}"]) from error


# --- the self-test ---------------------------------------------------------------------------


def why_not(path: str, isa: str) -> str | None:
    """Why an instruction set's kernels must not be used here; None if they are right."""
    remembered = _remembered(path)
    if isa not in remembered:
        remembered[isa] = _try_in_child(isa)
        _remember(path, remembered)
        if remembered[isa]:
            log.warning("kernels for %s are not used: %s", isa, remembered[isa])
    return remembered[isa] or None


def _try_in_child(isa: str) -> str:
    """Run the self-test; what went wrong, "" if nothing did."""
    command = [sys.executable, "-m", "glimt.kernels.selftest", isa]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"the self-test did not end: {error}"
    if done.returncode < 0:
        return f"the self-test was killed by signal {-done.returncode}"
    said = (done.stderr.strip() or done.stdout.strip()).splitlines()
    return "" if done.returncode == 0 else said[-1] if said else f"exit status {done.returncode}"


def memory_file(path: str) -> Path:
    """Where outcomes are remembered for this processor and this build of the library."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "glimt"
    status = os.stat(path)
    seen = f"{path} {status.st_mtime_ns} {status.st_size} {_processor()}"
    return folder / f"kernels-{hashlib.sha256(seen.encode()).hexdigest()[:16]}.json"


def _processor() -> str:
    """Model, features and kernel: what may change what an instruction does."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    said = [line for line in lines if line.startswith(("model name", "flags", "Features"))]
    return f"{sorted(set(said))} {os.uname().release}"


def _remembered(path: str) -> dict[str, str]:
    try:
        found = json.loads(memory_file(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {isa: str(found[isa]) for isa in ISAS if isa in found}


def _remember(path: str, outcomes: dict[str, str]) -> None:
    """Whole or not at all; a folder that cannot be written costs a second at the next start."""
    file = memory_file(path)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f".{os.getpid()}.part")
        part.write_text(json.dumps(outcomes), encoding="utf-8")
        part.replace(file)
    except OSError:
        return


def usable_isas() -> Sequence[str]:
    """Instruction sets whose kernels are right here, best first."""
    path = library_path()
    if path is None:
        return []
    open_library(path)
    return [isa for isa in available(path) if why_not(path, isa) is None]
