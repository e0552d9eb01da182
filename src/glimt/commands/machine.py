"""What this machine is: its processor and the installed libraries. Judges nothing."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from glimt.devices.host import CGROUP, PROC, fields_of, read_cpu_quota, read_text

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
    blocks = read_text(proc / "cpuinfo").strip().split("\n\n")
    return [fields_of(block) for block in blocks if block.strip()]


def _model_name(block: Mapping[str, str]) -> str | None:
    """ARM kernels give no name, but two numbers that tell the maker and the core."""
    if name := block.get("model name"):
        return name
    if "CPU implementer" in block:
        return f"ARM implementer {block['CPU implementer']} part {block.get('CPU part', '?')}"
    return None


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
