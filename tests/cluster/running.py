"""A real cluster for tests: `glimt cluster` as a process, on loopback, small."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests

COMMAND = [sys.executable, "-c", "from glimt.cli import main; main()", "cluster"]
KEY = "sk-cluster"
HEADERS = {"Authorization": f"Bearer {KEY}"}
# Serve looks at the load every 6 s, a fifth of 30, and tells of it every 10, unless it is told to
# do so more often.
QUICK = {
    "RAY_SERVE_AUTOSCALING_METRIC_RECORD_INTERVAL_FACTOR": "0.01",
    "RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "0.2",
}


@dataclass(frozen=True)
class Cluster:
    """url: http://127.0.0.1:PORT. lines: what it has written to stderr so far.

    options: that it was started with, beside those of each test
    """

    url: str
    options: list[str]
    process: subprocess.Popen[str]
    environment: dict[str, str]
    lines: list[str] = field(default_factory=list)

    def get(self, path: str, **headers: str) -> requests.Response:
        return requests.get(self.url + path, headers=headers or HEADERS, timeout=30)

    def post(self, path: str, body: Any, **options: Any) -> requests.Response:
        headers = {**HEADERS, **options.pop("headers", {})}
        return requests.post(self.url + path, json=body, headers=headers, timeout=60, **options)

    def figures(self, name: str) -> dict[str, float]:
        """One metric of each replica, by its rank."""
        found = {}
        for line in self.get("/metrics").text.splitlines():
            if line.startswith(name + "{"):
                labels, value = line.rsplit(" ", 1)
                found[labels.partition('replica="')[2].partition('"')[0]] = float(value)
        return found


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextmanager
def cluster(folder: Path, *options: str) -> Iterator[Cluster]:
    """A cluster of the demo model until the end of the block, ready.

    folder: for the home of its processes, so that nothing of Ray's stays behind
    """
    # Its sockets are in there, and their addresses may have 107 bytes: pytest's folders are deep.
    with tempfile.TemporaryDirectory(
        prefix="glimt-", dir="/tmp", ignore_cleanup_errors=True
    ) as sessions:
        environment = {**os.environ, **QUICK, "RAY_AUTH_TOKEN": "0" * 64}
        environment |= {"HOME": str(folder), "RAY_TMPDIR": sessions}
        with _started(environment, *options) as running:
            yield running


@contextmanager
def _started(environment: dict[str, str], *options: str) -> Iterator[Cluster]:
    port = free_port()
    given = ["--port", str(port), "--decoders", "0", "--api-key", KEY, "--drain-timeout", "5"]
    process = subprocess.Popen(
        [*COMMAND, *given, "--ray-cpus", "2", "--ray-store", "80M", *options],
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    running = Cluster(f"http://127.0.0.1:{port}", given, process, environment)
    assert process.stderr is not None
    reading = threading.Thread(target=_read, args=(running,), daemon=True)
    reading.start()
    try:
        wait_said(running, "serving demo at")
        yield running
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        process.wait(60)
        reading.join(10)
        process.stderr.close()


def restart(running: Cluster, *options: str) -> subprocess.CompletedProcess[str]:
    """`glimt cluster --rolling-restart` with other options, to its end."""
    return subprocess.run(
        [*COMMAND, *running.options, *options, "--rolling-restart"],
        stderr=subprocess.PIPE,
        text=True,
        env=running.environment,
        timeout=120,
    )


def _read(running: Cluster) -> None:
    assert running.process.stderr is not None
    running.lines.extend(iter(running.process.stderr.readline, ""))


def wait_said(running: Cluster, text: str) -> None:
    tick = threading.Event()
    while not any(text in line for line in running.lines):
        assert running.process.poll() is None, "".join(running.lines)
        tick.wait(0.1)


# --- processes -------------------------------------------------------------------------------


def descendants(pid: int) -> list[int]:
    """Every process below one, as the system has them."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            parents[int(entry.name)] = _parent(entry)
    found, open_ = [], [pid]
    while open_:
        above = open_.pop()
        below = [child for child, parent in parents.items() if parent == above]
        found += below
        open_ += below
    return found


def _parent(entry: Path) -> int:
    try:
        return int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError):
        return 0


def replica_pids(running: Cluster) -> list[int]:
    """The engines' processes, those that load too. While they work, a method ends their titles."""
    name = "ServeReplica:glimt:replica"
    return [pid for pid in descendants(running.process.pid) if name in words(pid)[0]]


def rank_pids(replica: int) -> list[int]:
    """Of the ranks below an engine's process."""
    return [pid for pid in descendants(replica) if "glimt.ranks" in words(pid)]


def variable(pid: int, name: str) -> str | None:
    """An environment variable as the process was given it."""
    lines = (Path("/proc") / str(pid) / "environ").read_bytes().decode().split("\0")
    return dict(line.partition("=")[::2] for line in lines).get(name)


def words(pid: int) -> list[str]:
    """The process's command line, or the title in its place."""
    try:
        return (Path("/proc") / str(pid) / "cmdline").read_bytes().decode().split("\0")
    except OSError:
        return [""]


def listening(pids: list[int]) -> set[tuple[str, int]]:
    """Where these processes listen: addresses in the kernel's hexadecimal form, and ports."""
    inodes = {inode for pid in pids for inode in _socket_inodes(pid)}
    found = set()
    for table in ("tcp", "tcp6"):
        for line in (Path("/proc/net") / table).read_text().splitlines()[1:]:
            columns = line.split()
            if columns[3] == "0A" and columns[9] in inodes:
                address, _, port = columns[1].partition(":")
                found.add((address, int(port, 16)))
    return found


def _socket_inodes(pid: int) -> set[str]:
    found = set()
    try:
        for entry in (Path("/proc") / str(pid) / "fd").iterdir():
            target = os.readlink(entry)
            if target.startswith("socket:["):
                found.add(target[8:-1])
    except OSError:
        return found
    return found


# --- streams ---------------------------------------------------------------------------------


def events(reply: requests.Response) -> list[Any]:
    """What a stream of events said, without its end mark."""
    lines = reply.content.decode().split("\n\n")
    said = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    return [json.loads(each) for each in said if each != "[DONE]"]
