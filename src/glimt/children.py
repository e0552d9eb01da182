"""Processes that end when this one does, however it ends: the other ranks. Knows no rank.

On Linux the kernel kills them with their parent, stopped ones too, which can do nothing themselves.
What it takes for the parent's death is the end of the thread that started them, so that a thread
here lives as long as they do. Elsewhere a child looks for its parent again and again.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping

_PARENT = "GLIMT_PARENT"  # environment of a child: the process that started it
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_LOOK_S = 0.1  # between two looks at the parent, where the kernel does not watch it


def start_children(
    functions: Mapping[int, Callable[[], subprocess.Popen[bytes]]],
    started: dict[int, subprocess.Popen[bytes]],
) -> None:
    """Start processes, each by its function, and put each into `started` as soon as it is there.

    Raises what a function raises; those before it are then running. Any thread, which may end.
    """
    are_started = threading.Event()
    errors: list[BaseException] = []

    def live_with_them() -> None:
        try:
            for key, start in functions.items():
                started[key] = start()
        except BaseException as error:  # raised where it can be answered
            errors.append(error)
        are_started.set()
        for process in list(started.values()):
            process.wait()

    threading.Thread(target=live_with_them, name="glimt-children", daemon=True).start()
    try:
        are_started.wait()
    except BaseException:  # Ctrl-C: the caller ends what was started, so all of it must be known
        are_started.wait()
        raise
    if errors:
        raise errors[0]


def start_child(module: str, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """A process that runs a module as `python -m` does; to be called by `start_children`.

    environment: its own, besides this process's
    """
    # In a session of its own: Ctrl-C is the parent's to answer, which then ends the others.
    return subprocess.Popen(
        [sys.executable, "-m", "glimt.children", module],
        env=os.environ | environment | {_PARENT: str(os.getpid())},
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )


def main() -> None:
    """`python -m glimt.children MODULE`: be that module until the parent ends.

    Bound to the parent first: imports take seconds, in which the parent may be gone.
    """
    _, module = sys.argv
    _end_with(os.environ[_PARENT])
    sys.argv[:] = [module]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _end_with(parent: str) -> None:
    """End when the parent does, also in the midst of a sum that waits for it."""
    is_watched = _kernel_watches()
    if str(os.getppid()) != parent:  # it was gone before the kernel was asked
        os._exit(1)
    if not is_watched:
        threading.Thread(target=_watch, args=(parent,), name="glimt-parent", daemon=True).start()


def _kernel_watches() -> bool:
    """Ask the kernel to kill this process with its parent; False where it cannot."""
    if sys.platform != "linux":
        return False
    try:
        prctl = ctypes.CDLL(None).prctl
    except (OSError, AttributeError):  # a program without a C library of its own
        return False
    zeros = [ctypes.c_ulong(0)] * 3
    return bool(prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL), *zeros) == 0)


def _watch(parent: str) -> None:
    while str(os.getppid()) == parent:
        time.sleep(_LOOK_S)
    os._exit(1)


if __name__ == "__main__":
    main()
