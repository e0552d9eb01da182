"""Child processes that end with their parent, as real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from glimt.children import start_child, start_children
from processes import wait_until_gone

COUNTS = """\
import itertools, pathlib, time
for count in itertools.count(1):
    pathlib.Path({file!r}).write_text(str(count))
    time.sleep(0.01)
"""


@pytest.fixture
def counting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file into which the module `counting` writes higher and higher numbers."""
    file = tmp_path / "count"
    (tmp_path / "counting.py").write_text(COUNTS.format(file=str(file)))
    paths = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    return file


def count(file: Path) -> int:
    return int((file.read_text() if file.exists() else "") or 0)


def wait_for_counts(file: Path, process: subprocess.Popen[bytes], more: int = 3) -> None:
    """Until it has counted so much further."""
    first = count(file)
    while count(file) < first + more:
        assert process.poll() is None, "it has ended"


@pytest.fixture
def started() -> Iterator[dict[int, subprocess.Popen[bytes]]]:
    processes: dict[int, subprocess.Popen[bytes]] = {}
    yield processes
    for process in processes.values():
        process.kill()
        process.wait()


def test_a_child_outlives_the_thread_that_started_it(counting, started):
    """Catches ranks that the kernel kills because a server loaded its engine in a thread."""

    def start() -> subprocess.Popen[bytes]:
        process = start_child("counting", {})
        wait_for_counts(counting, process, 1)  # it has asked the kernel by then
        return process

    thread = threading.Thread(target=start_children, args=({1: start}, started))
    thread.start()
    thread.join()
    wait_for_counts(counting, started[1], 20)
    started[1].kill()
    while "glimt-children" in {each.name for each in threading.enumerate()}:
        pass  # it has nobody to live for


def test_those_that_were_started_before_a_failure_are_known(counting, started):
    """Catches an orphan of a start that failed half way."""

    def fail() -> subprocess.Popen[bytes]:
        raise OSError("no more processes")

    with pytest.raises(OSError, match="no more processes"):
        start_children({1: partial(start_child, "counting", {}), 2: fail}, started)
    assert list(started) == [1]


def test_a_child_sees_its_environment_and_its_own_name(tmp_path, counting, started):
    """Catches a module that is run as another, or without what it was told."""
    said = tmp_path / "said"
    lines = ["import os, sys", "text = ' '.join([__name__, *sys.argv[1:], os.environ['RANK']])"]
    (tmp_path / "saying.py").write_text(
        "\n".join([*lines, f"open({str(said)!r}, 'w').write(text)"])
    )
    start_children({1: partial(start_child, "saying", {"RANK": "7"})}, started)
    assert started[1].wait(60) == 0
    assert said.read_text() == "__main__ 7"


def test_a_child_whose_parent_is_gone_already_ends_at_once(counting):
    """Catches an orphan whose parent died while it was being started."""
    other = str(os.getppid())
    child = [sys.executable, "-m", "glimt.children", "counting"]
    done = subprocess.run(child, env=os.environ | {"GLIMT_PARENT": other}, timeout=60, check=False)
    assert done.returncode == 1
    assert not counting.exists()


PARENT = """\
import os, subprocess, sys, time
child = subprocess.Popen(sys.argv[1:], env=os.environ | {"GLIMT_PARENT": str(os.getpid())})
print(child.pid, flush=True)
time.sleep(600)
"""
WITHOUT_KERNEL = """\
from glimt import children
children._kernel_watches = lambda: False
children.main()
"""


@pytest.mark.parametrize(
    ("way", "is_stopped"),
    [
        (["-m", "glimt.children"], True),
        (["-m", "glimt.children"], False),
        (["-c", WITHOUT_KERNEL], False),
    ],
    ids=["stopped", "by the kernel", "by itself"],
)
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, and the kernel's way is Linux's")
def test_a_child_ends_when_its_parent_is_killed(counting, way, is_stopped):
    """Catches orphans, above all stopped ones, which cannot look for their parent."""
    command = [sys.executable, "-c", PARENT, sys.executable, *way, "counting"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        wait_for_counts(counting, parent)
        if is_stopped:
            os.kill(child, signal.SIGSTOP)
        parent.kill()
    wait_until_gone(child)
