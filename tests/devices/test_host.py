"""The host: another machine's files, and how many threads should compute where."""

import os
from pathlib import Path

import pytest

from glimt.devices.host import (
    Memory,
    Threads,
    parse_list,
    plan_threads,
    read_cpu_quota,
    read_memory,
    read_numa_nodes,
)

GIB = 2**30


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    folder = tmp_path / "proc"
    (folder / "self").mkdir(parents=True)
    return folder


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


# --- memory and containers -------------------------------------------------------------------


MEMINFO = """MemTotal:       16777216 kB
MemFree:         1048576 kB
MemAvailable:    8388608 kB
Cached:          4194304 kB
SwapTotal:       2097152 kB
SwapFree:         524288 kB
HugePages_Total:       0
"""


def test_memory_is_read_in_bytes(proc, tmp_path):
    """Catches KiB taken for bytes, and free taken for available."""
    found = read_memory(write(proc, {"meminfo": MEMINFO}), tmp_path)
    assert found == Memory(16 * GIB, 8 * GIB, 4 * GIB, 2 * GIB, 3 * GIB // 2)
    assert found.usable == 8 * GIB


V2 = {
    "a/b/memory.max": "max\n",
    "a/b/memory.current": "5\n",
    "a/memory.max": f"{4 * GIB}\n",
    "a/memory.current": f"{3 * GIB}\n",
    "a/memory.stat": f"anon 1\ninactive_file {GIB}\n",
    "a/cpu.max": "150000 100000\n",
    "a/b/cpu.max": "max 100000\n",
}
V1 = {
    "memory/a/b/memory.limit_in_bytes": "9223372036854771712\n",
    "memory/a/b/memory.usage_in_bytes": "5\n",
    "memory/a/memory.limit_in_bytes": f"{4 * GIB}\n",
    "memory/a/memory.usage_in_bytes": f"{3 * GIB}\n",
    "memory/a/memory.stat": f"total_inactive_file {GIB}\n",
    "cpu/a/b/cpu.cfs_quota_us": "-1\n",
    "cpu/a/b/cpu.cfs_period_us": "100000\n",
    "cpu/cpu.cfs_quota_us": "150000\n",
    "cpu/cpu.cfs_period_us": "100000\n",
}
GROUPS = [("0::/a/b\n", V2), ("4:memory:/a/b\n1:cpuacct,cpu:/a/b\n2:cpu:/a/b\n0::/\n", V1)]


@pytest.mark.parametrize(("membership", "files"), GROUPS, ids=["version 2", "version 1"])
def test_a_containers_limits_are_found_wherever_they_are_set(proc, tmp_path, membership, files):
    """Catches a limit on a group above being missed, and its disk cache counted as used."""
    write(proc, {"meminfo": MEMINFO, "self/cgroup": membership, "cpuinfo": ""})
    groups = write(tmp_path / "cgroup", files)
    found = read_memory(proc, groups)
    assert (found.cgroup_limit, found.cgroup_free) == (4 * GIB, 2 * GIB)
    assert found.usable == 2 * GIB
    assert read_cpu_quota(proc, groups) == 1.5
    assert plan_threads(None, proc, groups).count == 1


# --- threads ---------------------------------------------------------------------------------


def machine(tmp_path: Path, num_nodes: int, cores_per_node: int, monkeypatch) -> dict[str, Path]:
    """Two threads for each core; the second ones are numbered after all the first ones."""
    cores = num_nodes * cores_per_node
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(2 * cores)))
    siblings = {
        f"cpu{i}/topology/thread_siblings_list": f"{i % cores},{i % cores + cores}\n"
        for i in range(2 * cores)
    }
    lists = {}
    for node in range(num_nodes):
        first = node * cores_per_node
        last = first + cores_per_node - 1
        lists[f"node{node}/cpulist"] = f"{first}-{last},{first + cores}-{last + cores}\n"
    return {
        "proc": tmp_path / "absent",
        "cgroup": tmp_path / "absent",
        "processors": write(tmp_path / "cpu", siblings),
        "nodes": write(tmp_path / "node", lists),
    }


def test_one_thread_for_each_core_and_none_is_kept_anywhere_on_one_node(tmp_path, monkeypatch):
    """Catches both threads of a core computing, and threads bound where it brings nothing."""
    folders = machine(tmp_path, 1, 4, monkeypatch)
    assert plan_threads(None, **folders) == Threads(4)
    assert plan_threads(7, **folders) == Threads(7)


def test_threads_lie_side_by_side_on_each_of_two_nodes(tmp_path, monkeypatch):
    """Catches neighbours' parts of a weight in the other node's memory, and a node left idle."""
    folders = machine(tmp_path, 2, 4, monkeypatch)
    assert plan_threads(None, **folders) == Threads(8, (0, 1, 2, 3, 4, 5, 6, 7))
    assert plan_threads(4, **folders) == Threads(4, (0, 2, 4, 6))
    assert plan_threads(9, **folders) == Threads(9)  # more than cores: they must be movable


def test_processes_of_one_model_divide_the_cores(tmp_path, monkeypatch):
    """Catches two ranks that compute on the same cores, and one whose cores are far apart."""
    folders = machine(tmp_path, 2, 4, monkeypatch)
    assert plan_threads(None, **folders, part=(0, 2)) == Threads(4, (0, 1, 2, 3))
    assert plan_threads(None, **folders, part=(1, 2)) == Threads(4, (4, 5, 6, 7))
    assert plan_threads(1, **folders, part=(1, 2)) == Threads(1, (4,))
    assert plan_threads(None, **folders, part=(11, 16)) == Threads(1, (3,))


def test_threads_stay_where_this_process_may_run(tmp_path, monkeypatch):
    """Catches threads placed on processors that a container or taskset keeps from us."""
    folders = machine(tmp_path, 2, 4, monkeypatch)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {10, 2, 5})  # 10 is core 2 again
    assert plan_threads(None, **folders) == Threads(2, (2, 5))


def test_the_share_of_time_bounds_the_threads(tmp_path, proc, monkeypatch):
    """Catches 8 threads in a container of 3 processors' time, which the system stops in turns."""
    folders = machine(tmp_path, 1, 8, monkeypatch)
    write(proc, {"self/cgroup": "0::/a\n"})
    groups = write(tmp_path / "groups", {"a/cpu.max": "350000 100000\n"})
    assert plan_threads(None, **(folders | {"proc": proc, "cgroup": groups})) == Threads(3)
    write(groups, {"a/cpu.max": "50000 100000\n"})
    assert plan_threads(None, **(folders | {"proc": proc, "cgroup": groups})) == Threads(1)


@pytest.mark.parametrize(
    ("text", "numbers"), [("0-2,5\n", [0, 1, 2, 5]), ("7", [7]), ("", []), ("1,3-4", [1, 3, 4])]
)
def test_lists_of_processors_are_read(text, numbers):
    """Catches a range's last number lost."""
    assert parse_list(text) == numbers


def test_nodes_are_counted_by_their_folders(tmp_path):
    """Catches two sockets taken for one, and no folder taken for no memory."""
    for name in ("node0", "node1", "power"):
        (tmp_path / name).mkdir()
    assert read_numa_nodes(tmp_path) == 2
    assert read_numa_nodes(tmp_path / "absent") == 1
