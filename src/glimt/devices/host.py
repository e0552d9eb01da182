"""The host as this process may use it: processors, their parts of memory, and a container's limits.

Every reader takes the folders it reads, so that a test can give it another machine's files.
"""

from __future__ import annotations

import os
import re
import resource
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
CGROUP = Path("/sys/fs/cgroup")
PROCESSORS = Path("/sys/devices/system/cpu")
NODES = Path("/sys/devices/system/node")


# --- processors ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Threads:
    """How many threads should compute, and where.

    count:   at most one for each core, and no more than a container's share of time allows
    places:  the processor of each thread, those of one NUMA node side by side; empty where the
             system may move them, which costs nothing as long as all memory is equally near
    """

    count: int
    places: tuple[int, ...] = ()


def plan_threads(
    wanted: int | None = None,
    proc: Path = PROC,
    cgroup: Path = CGROUP,
    processors: Path = PROCESSORS,
    nodes: Path = NODES,
    part: tuple[int, int] = (0, 1),
) -> Threads:
    """Threads for this process; wanted: as many, whatever the cores.

    part: this process' index and the count of those that divide the cores among themselves

    The second thread of a core adds nothing where all threads wait for the same multipliers.
    """
    allowed = sorted(os.sched_getaffinity(0))
    cores = _one_of_each_core(allowed, processors)
    quota = read_cpu_quota(proc, cgroup)
    usable = len(cores) if quota is None else min(len(cores), int(quota))
    count = wanted or max(1, usable // part[1])
    by_node = _by_node(cores, nodes)
    cores = _part_of(sorted(cores, key=lambda number: (by_node[number], number)), *part)
    if len(set(by_node.values())) < 2 or count > len(cores):
        return Threads(count)
    step = len(cores) / count  # fewer threads than cores: as many on every node
    return Threads(count, tuple(cores[int(i * step)] for i in range(count)))


def _one_of_each_core(allowed: Collection[int], processors: Path) -> list[int]:
    """Of processors that share a core, the first that is allowed."""
    first: dict[str, int] = {}
    for number in sorted(allowed):
        siblings = read_text(processors / f"cpu{number}" / "topology" / "thread_siblings_list")
        first.setdefault(siblings.strip() or str(number), number)
    return sorted(first.values())


def _part_of(cores: Sequence[int], index: int, count: int) -> list[int]:
    """Neighbouring cores of one process of several; some are shared if there are fewer."""
    each = max(1, len(cores) // count)
    first = (index * each) % len(cores)
    return list(cores[first : first + each])


def _by_node(cores: Collection[int], nodes: Path) -> dict[int, int]:
    """Each processor's node; 0 where the system does not say."""
    found = dict.fromkeys(cores, 0)
    for folder in nodes.glob("node[0-9]*"):
        for number in parse_list(read_text(folder / "cpulist")):
            if number in found:
                found[number] = int(folder.name.removeprefix("node"))
    return found


def parse_list(text: str) -> list[int]:
    """The system's way to write numbers: "0-2,5" -> [0, 1, 2, 5]."""
    found: list[int] = []
    for low, high in re.findall(r"(\d+)(?:-(\d+))?", text):
        found += range(int(low), int(high or low) + 1)
    return found


def read_numa_nodes(nodes: Path = NODES) -> int:
    """Parts of the machine with memory of their own; 1 where the system does not say."""
    return max(1, len(list(nodes.glob("node[0-9]*"))))


# --- memory ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes. Of the machine, but for the container's limit if that is lower.

    available:    what programs can still get, the disk cache given back
    disk_cache:   files kept in memory; a model's weight files are best off there
    cgroup_limit: the container's limit, None if there is none below the machine's memory
    cgroup_free:  what is left of it, its disk cache given back
    """

    total: int
    available: int
    disk_cache: int
    swap_total: int
    swap_used: int
    cgroup_limit: int | None = None
    cgroup_free: int | None = None

    @property
    def usable(self) -> int:
        """Bytes that this process can still get."""
        return self.available if self.cgroup_free is None else min(self.available, self.cgroup_free)


def read_memory(proc: Path = PROC, cgroup: Path = CGROUP) -> Memory:
    """Read /proc/meminfo and the container's limit; figures that are not there are 0."""
    info = {
        name: int(value.split()[0]) * 1024
        for name, value in fields_of(read_text(proc / "meminfo")).items()
        if value.split()[:1] and value.split()[0].isdigit()
    }
    total = info.get("MemTotal", 0)
    limits = [pair for pair in _memory_limits(proc, cgroup) if pair[0] < total]
    swap_total = info.get("SwapTotal", 0)
    return Memory(
        total=total,
        available=info.get("MemAvailable", info.get("MemFree", 0)),
        disk_cache=info.get("Cached", 0),
        swap_total=swap_total,
        swap_used=swap_total - info.get("SwapFree", 0),
        cgroup_limit=min((limit for limit, _ in limits), default=None),
        cgroup_free=min((free for _, free in limits), default=None),
    )


# --- control groups, version 1 and 2 ---------------------------------------------------------


def peak_bytes() -> int:
    """The most memory that this process has held; Linux counts in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _memory_limits(proc: Path, cgroup: Path) -> Iterator[tuple[int, int]]:
    """(limit, free) of every group above this process that has a limit."""
    names = ("memory.max", "memory.current", "inactive_file")
    yield from _limits(_group_folders(proc, cgroup, ""), names)
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    yield from _limits(_group_folders(proc, cgroup, "memory"), names)


def _limits(folders: Sequence[Path], names: tuple[str, str, str]) -> Iterator[tuple[int, int]]:
    limit_file, usage_file, cache_name = names
    for folder in folders:
        limit, usage = (
            read_text(folder / limit_file).strip(),
            read_text(folder / usage_file).strip(),
        )
        if limit.isdigit() and usage.isdigit():
            cache = re.search(rf"^{cache_name} (\d+)$", read_text(folder / "memory.stat"), re.M)
            used = int(usage) - (int(cache[1]) if cache else 0)
            yield int(limit), max(0, int(limit) - used)


def read_cpu_quota(proc: Path = PROC, cgroup: Path = CGROUP) -> float | None:
    """Processors' worth of time that the container may use; None without a limit."""
    quotas = []
    for folder in _group_folders(proc, cgroup, ""):
        quotas.append(read_text(folder / "cpu.max").split())
    for folder in _group_folders(proc, cgroup, "cpu"):
        files = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        quotas.append([read_text(folder / name).strip() for name in files])
    return min((int(q[0]) / int(q[1]) for q in quotas if _is_quota(q)), default=None)


def _is_quota(words: Sequence[str]) -> bool:
    """Version 2 writes "max" and version 1 -1 where there is no limit."""
    return len(words) == 2 and all(word.isdigit() and int(word) > 0 for word in words)


def _group_folders(proc: Path, cgroup: Path, controller: str) -> list[Path]:
    """The folders of this process's group and of those above it, as far as they are mounted.

    controller: "" for version 2, whose one hierarchy holds all
    """
    found: list[Path] = []
    for line in read_text(proc / "self" / "cgroup").splitlines():
        number, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        if (controller in names.split(",")) if controller else (number == "0" and not names):
            mount = cgroup / controller
            inner = mount / path.lstrip("/")
            found += [inner, *(above for above in inner.parents if above.is_relative_to(mount))]
    return found


# --- shared ----------------------------------------------------------------------------------


def fields_of(text: str) -> dict[str, str]:
    """Lines of `name : value`."""
    pairs = (line.partition(":") for line in text.splitlines() if ":" in line)
    return {name.strip(): value.strip() for name, _, value in pairs}


def read_text(path: Path) -> str:
    """The text of a file, empty where there is no such file."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
