"""What this machine is: processor, memory, limits and installed libraries. Judges nothing.

Every reader takes the folders it reads, so that a test can give it another machine's files.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

PROC = Path("/proc")
CGROUP = Path("/sys/fs/cgroup")
NODES = Path("/sys/devices/system/node")

_X86_SETS = (
    "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16",
    "amx_tile", "amx_bf16", "amx_int8",
)  # fmt: skip
_ARM_SETS = ("asimd", "asimdhp", "asimddp", "bf16", "i8mm", "sve", "sve2", "sme")


# --- the processor ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Processor:
    """The processor as this process may use it.

    logical_cores, physical_cores: of the machine
    usable_cores: of this process, by affinity and by the container's quota, which may be a part
    instruction_sets: those that matter here, and whether the processor has them
    """

    model: str
    architecture: str
    logical_cores: int
    physical_cores: int
    usable_cores: float
    instruction_sets: Mapping[str, bool]


def read_processor(proc: Path = PROC, cgroup: Path = CGROUP) -> Processor:
    """Read /proc/cpuinfo and the limits on this process."""
    architecture = platform.machine()
    blocks = _cpuinfo(proc)
    first: Mapping[str, str] = blocks[0] if blocks else {}
    flags = set((first.get("flags") or first.get("Features") or "").split())
    is_arm = architecture.startswith(("aarch64", "arm")) or "Features" in first
    cores = {(block.get("physical id"), block["core id"]) for block in blocks if "core id" in block}
    logical = os.cpu_count() or 1
    quota = read_cpu_quota(proc, cgroup)
    allowed = len(os.sched_getaffinity(0))
    return Processor(
        model=_model_name(first) or platform.processor() or architecture,
        architecture=architecture,
        logical_cores=logical,
        physical_cores=len(cores) or logical,
        usable_cores=allowed if quota is None else min(allowed, quota),
        instruction_sets={name: name in flags for name in (_ARM_SETS if is_arm else _X86_SETS)},
    )


def _cpuinfo(proc: Path) -> list[dict[str, str]]:
    """One dictionary per logical processor."""
    blocks = _read(proc / "cpuinfo").strip().split("\n\n")
    return [_fields(block) for block in blocks if block.strip()]


def _model_name(block: Mapping[str, str]) -> str | None:
    """ARM kernels give no name, but two numbers that tell the maker and the core."""
    if name := block.get("model name"):
        return name
    if "CPU implementer" in block:
        return f"ARM implementer {block['CPU implementer']} part {block.get('CPU part', '?')}"
    return None


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
        for name, value in _fields(_read(proc / "meminfo")).items()
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


def _memory_limits(proc: Path, cgroup: Path) -> Iterator[tuple[int, int]]:
    """(limit, free) of every group above this process that has a limit."""
    names = ("memory.max", "memory.current", "inactive_file")
    yield from _limits(_group_folders(proc, cgroup, ""), names)
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    yield from _limits(_group_folders(proc, cgroup, "memory"), names)


def _limits(folders: Sequence[Path], names: tuple[str, str, str]) -> Iterator[tuple[int, int]]:
    limit_file, usage_file, cache_name = names
    for folder in folders:
        limit, usage = _read(folder / limit_file).strip(), _read(folder / usage_file).strip()
        if limit.isdigit() and usage.isdigit():
            cache = re.search(rf"^{cache_name} (\d+)$", _read(folder / "memory.stat"), re.M)
            used = int(usage) - (int(cache[1]) if cache else 0)
            yield int(limit), max(0, int(limit) - used)


def read_cpu_quota(proc: Path = PROC, cgroup: Path = CGROUP) -> float | None:
    """Processors' worth of time that the container may use; None without a limit."""
    quotas = []
    for folder in _group_folders(proc, cgroup, ""):
        quotas.append(_read(folder / "cpu.max").split())
    for folder in _group_folders(proc, cgroup, "cpu"):
        files = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        quotas.append([_read(folder / name).strip() for name in files])
    return min((int(q[0]) / int(q[1]) for q in quotas if _is_quota(q)), default=None)


def _is_quota(words: Sequence[str]) -> bool:
    """Version 2 writes "max" and version 1 -1 where there is no limit."""
    return len(words) == 2 and all(word.isdigit() and int(word) > 0 for word in words)


def _group_folders(proc: Path, cgroup: Path, controller: str) -> list[Path]:
    """The folders of this process's group and of those above it, as far as they are mounted.

    controller: "" for version 2, whose one hierarchy holds all
    """
    found: list[Path] = []
    for line in _read(proc / "self" / "cgroup").splitlines():
        number, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        if (controller in names.split(",")) if controller else (number == "0" and not names):
            mount = cgroup / controller
            inner = mount / path.lstrip("/")
            found += [inner, *(above for above in inner.parents if above.is_relative_to(mount))]
    return found


# --- libraries -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Library:
    """A package that glimt names as needed.

    wanted:  the condition on its version, as ">=11.3"
    extra:   the optional part of glimt that it is for; "" if all of glimt needs it
    version: what is installed, None if nothing is
    """

    name: str
    wanted: str
    extra: str
    version: str | None

    @property
    def is_too_old(self) -> bool:
        """Installed, but older than wanted."""
        if self.version is None:
            return False
        least = version_numbers(self.wanted)
        padding = (0,) * len(least)  # 2 is no older than 2.0
        return version_numbers(self.version) + padding < least


def read_libraries() -> list[Library]:
    """Every requirement of the installed glimt, but for its developers' own."""
    try:
        requirements = metadata.requires("glimt") or []
    except metadata.PackageNotFoundError:
        return []
    found = [_library(requirement) for requirement in requirements]
    return [library for library in found if library.extra != "dev"]


def _library(requirement: str) -> Library:
    condition, _, marker = requirement.partition(";")
    match = re.match(r"[\w.-]+", condition)
    assert match, f"a requirement begins with a name: {requirement!r}"
    extra = re.search(r"extra == ['\"]([^'\"]+)", marker)
    wanted = re.sub(r"^\[[^\]]*\]", "", condition[match.end() :].strip())
    return Library(match[0], wanted, extra[1] if extra else "", installed_version(match[0]))


def installed_version(name: str) -> str | None:
    """The version of an installed package, without importing it."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def version_numbers(text: str) -> tuple[int, ...]:
    """The leading numbers of a version or of a condition: ">=11.3" -> (11, 3)."""
    match = re.search(r"\d+(\.\d+)*", text)
    return tuple(int(part) for part in match[0].split(".")) if match else ()


# --- shared ----------------------------------------------------------------------------------


def _fields(text: str) -> dict[str, str]:
    """Lines of `name : value`."""
    pairs = (line.partition(":") for line in text.splitlines() if ":" in line)
    return {name.strip(): value.strip() for name, _, value in pairs}


def _read(path: Path) -> str:
    """The text of a file, empty where there is no such file."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
