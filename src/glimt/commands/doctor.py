"""`glimt doctor`: what this machine is, what is wrong with it for glimt, and how to mend it.

collect() reads, check() judges, and only show() prints: the first works on a machine where half
of what glimt needs is broken, which is when it is wanted most.
"""

from __future__ import annotations

import locale
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from glimt.commands.machine import Library, Processor, read_libraries, read_processor
from glimt.devices.host import Memory, Threads, plan_threads, read_memory, read_numa_nodes
from glimt.devices.npu_smi import NpuState, read_npus
from glimt.sizes import size_text

if TYPE_CHECKING:
    from glimt.devices.base import Device

Level = Literal["ok", "warning", "problem"]


@dataclass(frozen=True, slots=True)
class Torch:
    """The installed torch. error: why it cannot be imported.

    built_for:       "cuda 12.8", "rocm 6.4" or "cpu"
    has_accelerator: some accelerator of its kind can be used now
    """

    error: str | None = None
    built_for: str = "cpu"
    has_accelerator: bool = False
    num_threads: int = 0


@dataclass(frozen=True, slots=True)
class CardState:
    """An accelerator, as `devices.base.Card` has it."""

    index: int
    name: str
    memory_bytes: int
    capability: str
    driver: str


@dataclass(frozen=True, slots=True)
class DeviceState:
    """A device glimt knows. unavailable: why it cannot be used here, None if it can.

    cards:   the accelerators of its kind
    missing: what would make it faster and is not here: what that costs, and what to do
    """

    name: str
    unavailable: str | None
    cards: tuple[CardState, ...] = ()
    missing: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class NativeKernels:
    """The compiled kernels. path: None where they were not built; error: why they cannot be used.

    instruction_sets: those that are right here, best first
    refused: the others, each with its reason
    wanted: GLIMT_ISA, None if it is not set; in_use: what is computed with, None for plain torch
    """

    path: str | None = None
    error: str | None = None
    instruction_sets: tuple[str, ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)
    wanted: str | None = None
    in_use: str | None = None


@dataclass(frozen=True, slots=True)
class Facts:
    """All that the checks look at.

    devices_error: why the list of devices cannot be had
    threads_setting: OMP_NUM_THREADS, None if it is not set
    encoding: what Python reads and writes text in
    numa_nodes: parts of the machine with memory of their own
    threads: what a run without --threads takes
    kernels: None: not looked for
    limits: what the machine reads and multiplies in a second; None: not measured
    towers: what runs or compiles an exported vision tower, and why it cannot, None if it can
    npus: the chips that npu-smi lists
    """

    python: str
    processor: Processor
    memory: Memory
    torch: Torch
    devices: tuple[DeviceState, ...]
    devices_error: str | None
    libraries: tuple[Library, ...]
    threads_setting: str | None
    encoding: str
    numa_nodes: int = 1
    threads: Threads | None = None
    kernels: NativeKernels | None = None
    limits: Mapping[str, float | None] | None = None
    towers: Mapping[str, str | None] = field(default_factory=dict)
    npus: tuple[NpuState, ...] = ()


@dataclass(frozen=True, slots=True)
class Check:
    """One thing looked at. fix: what to do about it; empty when all is well."""

    name: str
    level: Level
    says: str
    fix: str = ""


# --- reading ---------------------------------------------------------------------------------


def collect(environment: Mapping[str, str] = os.environ, measures_limits: bool = False) -> Facts:
    """Read everything; what cannot be read is told in the facts and not raised.

    measures_limits: takes a second or two, and 768 MiB of memory
    """
    torch = _read_torch()
    devices, devices_error = _read_devices()
    return Facts(
        python=sys.version.split()[0],
        processor=read_processor(),
        memory=read_memory(),
        torch=torch,
        devices=devices,
        devices_error=devices_error,
        libraries=tuple(read_libraries()),
        threads_setting=environment.get("OMP_NUM_THREADS"),
        encoding=locale.getpreferredencoding(do_setlocale=False),
        numa_nodes=read_numa_nodes(),
        threads=plan_threads(),
        kernels=_read_kernels(environment.get("GLIMT_ISA")) if torch.error is None else None,
        limits=_measure_limits(torch) if measures_limits else None,
        towers=_read_towers(),
        npus=read_npus(),
    )


def _read_torch() -> Torch:
    try:
        import torch
    except Exception as error:  # a broken installation can raise almost anything
        return Torch(error=f"{type(error).__name__}: {error}")
    cuda, rocm = torch.version.cuda, torch.version.hip
    return Torch(
        built_for=f"cuda {cuda}" if cuda else f"rocm {rocm}" if rocm else "cpu",
        has_accelerator=torch.accelerator.is_available(),
        num_threads=torch.get_num_threads(),
    )


def _read_kernels(wanted: str | None) -> NativeKernels:
    """Tries every instruction set, each in a process of its own, unless it was tried before."""
    from glimt.errors import ConfigError
    from glimt.kernels.choose import chosen_isa, reasons
    from glimt.kernels.library import available, library_path

    path = library_path()
    try:
        if path is not None:
            available(path)
    except OSError as error:  # of another build, or not for this machine
        return NativeKernels(path, str(error))
    tried = {} if path is None else reasons(path)
    found = NativeKernels(
        path=path,
        instruction_sets=tuple(isa for isa, reason in tried.items() if reason is None),
        refused={isa: reason for isa, reason in tried.items() if reason is not None},
        wanted=wanted,
    )
    try:
        return replace(found, in_use=chosen_isa(wanted, path) if path or wanted else None)
    except ConfigError as error:  # nothing would start
        return replace(found, error="; ".join(error.problems))


def _measure_limits(torch: Torch) -> Mapping[str, float | None] | None:
    """Bytes and operations per second; None without a torch."""
    if torch.error is not None:
        return None
    from glimt.kernels.limits import LimitMeter

    meter = LimitMeter(torch.num_threads)
    meter.warm_up()
    return asdict(meter.measure())


def _read_devices() -> tuple[tuple[DeviceState, ...], str | None]:
    try:
        from glimt.devices.base import all_devices

        known = sorted(all_devices().items())
        return tuple(_read_device(name, kind) for name, kind in known), None
    except Exception as error:  # a device's own library may be broken
        return (), f"{type(error).__name__}: {error}"


def _read_device(name: str, kind: type[Device]) -> DeviceState:
    cards = tuple(CardState(**asdict(card)) for card in kind.cards())
    return DeviceState(name, kind.unavailable_reason(), cards, kind.missing())


def _read_towers() -> dict[str, str | None]:
    """Nobody needs these but who exports a tower, so that none is a problem."""
    try:
        from glimt.export.atc import find_atc
        from glimt.runtimes.base import all_runtimes

        found = {name: runtime.absent() for name, runtime in sorted(all_runtimes().items())}
    except Exception:  # numpy may be broken, which other checks tell
        return {}
    atc = None if find_atc() else "not on PATH; source CANN's set_env.sh"
    return {**found, "atc": atc}


# --- judging ---------------------------------------------------------------------------------


def check(facts: Facts) -> list[Check]:
    """Judge the facts; at least one check of each kind, also where all is well."""
    return [
        *_check_libraries(facts),
        *_check_torch(facts),
        *_check_devices(facts),
        *_check_npus(facts),
        _check_instructions(facts.processor),
        *_check_kernels(facts.kernels),
        *_check_memory(facts.memory),
        *_check_threads(facts),
        _check_encoding(facts.encoding),
    ]


def _check_libraries(facts: Facts) -> Iterator[Check]:
    if not facts.libraries:
        fix = "pip install -e . in its checkout"
        yield Check("libraries", "warning", "glimt is not installed, so none can be checked", fix)
        return
    wrong = [lib for lib in facts.libraries if lib.is_too_old or _is_absent(lib)]
    for library in wrong:
        found = f"{library.version} is older" if library.version else "is not installed"
        says = f"{library.name} {found}; glimt needs {library.name}{library.wanted}"
        level: Level = "warning" if library.extra else "problem"
        yield Check("libraries", level, says, f"pip install '{library.name}{library.wanted}'")
    if not wrong:
        yield Check("libraries", "ok", "all that glimt needs are installed")


def _is_absent(library: Library) -> bool:
    """An extra is nobody's duty."""
    return library.version is None and not library.extra


def _check_torch(facts: Facts) -> Iterator[Check]:
    torch = facts.torch
    if torch.error is not None:
        fix = "install it again: pip install --force-reinstall torch"
        yield Check("torch", "problem", f"cannot be imported: {torch.error}", fix)
    elif torch.built_for != "cpu" and not torch.has_accelerator:
        says = f"is built for {torch.built_for}, but no card can be used"
        fix = (
            "see whether the driver lists the card (nvidia-smi, rocm-smi); without a card the "
            "smaller build will do: pip install torch --index-url "
            "https://download.pytorch.org/whl/cpu"
        )
        yield Check("torch", "warning", says, fix)
    else:
        yield Check("torch", "ok", f"is built for {torch.built_for}")


def _check_devices(facts: Facts) -> Iterator[Check]:
    usable = [device.name for device in facts.devices if device.unavailable is None]
    if usable:
        yield Check("devices", "ok", f"usable: {', '.join(usable)}")
    elif facts.devices_error and facts.torch.error is None:
        fix = "mend or remove the package it names"
        yield Check("devices", "problem", f"cannot be listed: {facts.devices_error}", fix)
    elif facts.torch.error is None:
        yield Check("devices", "problem", "none can be used", "see the reasons in the list")
    for device in facts.devices:
        yield from _check_cards(device)


def _check_cards(device: DeviceState) -> Iterator[Check]:
    """What a device lacks, and which models its cards cannot hold."""
    for says, fix in device.missing:
        yield Check(device.name, "warning", says, fix)
    for card in device.cards:
        has = f"card {card.index} has {size_text(card.memory_bytes)}"
        short = [
            f"{name} ({size_text(need)})"
            for name, need in _NEEDS.items()
            if need > card.memory_bytes
        ]
        if short:
            fix = "--quant int8 or int4, or --tp with more cards"
            says = f"{has}; in 16 bits there is no room for {' and '.join(short)}"
            yield Check(device.name, "warning", says, fix)
        else:
            yield Check(device.name, "ok", f"{has}, enough for {' and '.join(_NEEDS)} in 16 bits")


def _check_npus(facts: Facts) -> Iterator[Check]:
    """Chips that are here and cannot be used; who has none is told nothing."""
    if not facts.npus:
        return
    names = sorted({npu.name for npu in facts.npus})
    found = f"{len(facts.npus)} found ({', '.join(names)})"
    ill = [f"{npu.npu}/{npu.chip} is {npu.health}" for npu in facts.npus if npu.health != "OK"]
    reason = next((it.unavailable for it in facts.devices if it.name == "npu"), None)
    if reason:
        yield Check("NPUs", "warning", f"{found}, but they cannot be used", reason)
    elif ill:
        fix = "see npu-smi info -t health -i and the number, or leave it out of "
        fix += "ASCEND_RT_VISIBLE_DEVICES"
        yield Check("NPUs", "warning", f"{found}; {', '.join(ill)}", fix)
    else:
        yield Check("NPUs", "ok", found)


def _check_instructions(processor: Processor) -> Check:
    sets = processor.instruction_sets
    present = [name for name, is_present in sets.items() if is_present]
    if not {"avx2", "asimd"} & set(present):
        fix = "use a newer machine; on a virtual one, let it see the host's processor"
        return Check("processor", "warning", "has neither AVX2 nor ASIMD: answers are slow", fix)
    return Check("processor", "ok", f"has {', '.join(present)}")


def _check_kernels(kernels: NativeKernels | None) -> Iterator[Check]:
    if kernels is None:
        return
    if kernels.error is not None:
        level: Level = "problem" if kernels.wanted else "warning"
        fix = "unset GLIMT_ISA" if kernels.wanted else _BUILD
        yield Check("kernels", level, f"cannot be used: {kernels.error}", fix)
    elif kernels.path is None:
        yield Check("kernels", "warning", "are not built; torch's own are slower", _BUILD)
    elif kernels.wanted == "none":
        says = "are switched off by GLIMT_ISA; torch's own are slower"
        yield Check("kernels", "warning", says, "unset GLIMT_ISA")
    elif kernels.in_use is None:
        says = "hold nothing that is right on this processor; torch's own are used"
        yield Check("kernels", "warning", says, _BUILD)
    else:
        yield Check("kernels", "ok", f"of {kernels.in_use} are used")


_BUILD = (
    "install a C++ compiler and glimt again; in a checkout: "
    "cmake -S . -B build && make -C build && cp build/_native.so src/glimt/kernels/"
)

# Bytes of the parameters in 16 bits, and what one conversation of full length takes beside them:
# the KV cache (448 KiB a token and 2,048 tokens; 40 KiB and 8,192) and 1.5 GiB for activations.
_NEEDS = {
    "VisualGLM-6B": 2 * 7_802_193_408 + 896 * 2**20 + 3 * 2**29,
    "GLM-4v-9B": 2 * 13_906_320_896 + 320 * 2**20 + 3 * 2**29,
}
_LEAST = 2**30  # torch, glimt and a toy model


def _check_memory(memory: Memory) -> Iterator[Check]:
    if not memory.total:
        says = "cannot be read: there is no /proc/meminfo"
        yield Check("memory", "warning", says, "see for yourself that enough is free")
        return
    free = f"{size_text(memory.usable)} of memory can be had"
    free += ", by the container's limit" if memory.usable < memory.available else ""
    yield _check_fit(memory, free)
    if memory.swap_used > 2**30:
        used = size_text(memory.swap_used)
        says = f"{used} are in use: weights that are swapped out stall an answer"
        yield Check("swap", "warning", says, "close other programs, then swapoff -a; swapon -a")
    if memory.cgroup_limit is not None and memory.usable < min(_NEEDS.values()):
        says = (
            f"this container may use {size_text(memory.cgroup_limit)} of {size_text(memory.total)}"
        )
        yield Check("container", "warning", says, "start it with a higher limit (docker: --memory)")
    elif memory.disk_cache > 0:
        says = (
            f"{size_text(memory.disk_cache)} of files are kept in memory and given back when needed"
        )
        yield Check("disk cache", "ok", says)


def _check_fit(memory: Memory, free: str) -> Check:
    if memory.usable < _LEAST:
        return Check("memory", "problem", f"{free}, too little for anything", _MEMORY_FIX)
    short = [f"{name} ({size_text(need)})" for name, need in _NEEDS.items() if need > memory.usable]
    if short:
        says = f"{free}; in 16 bits there is no room for {' and '.join(short)}"
        return Check("memory", "warning", says, _MEMORY_FIX)
    return Check("memory", "ok", f"{free}, enough for {' and '.join(_NEEDS)} in 16 bits")


_MEMORY_FIX = "close other programs, or use a machine with more memory"


def _check_threads(facts: Facts) -> Iterator[Check]:
    given, cores = facts.threads_setting, facts.processor.usable_cores
    whole = max(1, int(cores))
    if given is not None and not (given.isdigit() and int(given) > 0):
        says = f"OMP_NUM_THREADS is {given!r}, which is no number of threads"
        yield Check("threads", "warning", says, f"export OMP_NUM_THREADS={whole}")
    elif given is not None and int(given) < whole:
        says = f"OMP_NUM_THREADS is {given}, which leaves {whole - int(given)} cores idle"
        yield Check("threads", "warning", says, "unset OMP_NUM_THREADS")
    elif facts.torch.num_threads > cores:
        says = f"torch uses {facts.torch.num_threads} threads on {cores:g} cores: they only wait"
        yield Check("threads", "warning", says, f"export OMP_NUM_THREADS={whole}")
    elif facts.torch.num_threads:
        says = f"torch uses {facts.torch.num_threads} threads on {cores:g} cores"
        yield Check("threads", "ok", says)


def _check_encoding(encoding: str) -> Check:
    if encoding.lower().replace("-", "").replace("_", "") == "utf8":
        return Check("text", "ok", "is read and written in UTF-8")
    says = f"is read and written in {encoding}: Chinese would be lost"
    return Check("text", "warning", says, "export LANG=C.UTF-8, or PYTHONUTF8=1")


def is_healthy(checks: list[Check]) -> bool:
    """No check found a problem; warnings do not stop anything."""
    return not any(check.level == "problem" for check in checks)


# --- telling ---------------------------------------------------------------------------------


def as_dict(facts: Facts, checks: list[Check]) -> dict[str, Any]:
    """Facts and checks as plain data, for JSON."""
    memory = asdict(facts.memory) | {"usable": facts.memory.usable}
    everything = asdict(facts) | {"memory": memory}
    return {"ok": is_healthy(checks), "checks": [asdict(check) for check in checks], **everything}


def doctor(as_json: bool, measures_limits: bool = False) -> bool:
    """Look, judge and print. True if nothing blocks."""
    from glimt.commands.console import print_json
    from glimt.commands.show_doctor import show

    facts = collect(measures_limits=measures_limits)
    checks = check(facts)
    if as_json:
        print_json(as_dict(facts, checks))
    else:
        show(facts, checks)
    return is_healthy(checks)
