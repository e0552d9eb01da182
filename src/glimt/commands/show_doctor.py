"""Prints what `glimt doctor` found, for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from rich.console import Console
from rich.text import Text

from glimt import __version__
from glimt.commands.console import out_console
from glimt.commands.doctor import CardState, Check, Facts, NativeKernels, is_healthy
from glimt.commands.machine import Library
from glimt.commands.tables import key_values
from glimt.devices.host import Threads
from glimt.devices.npu_smi import NpuState
from glimt.sizes import size_text

_MARKS = {
    "ok": ("ok      ", "green"),
    "warning": ("warning ", "yellow"),
    "problem": ("PROBLEM ", "red"),
}


def show(facts: Facts, checks: list[Check]) -> None:
    """Print the facts as tables and the checks as lines, the fix under each."""
    console = out_console()
    console.print(key_values("machine", _machine(facts)), "")
    console.print(key_values("devices", _devices(facts)), "")
    if facts.npus:
        console.print(key_values("NPUs", dict(map(_npu, facts.npus))), "")
    console.print(key_values("libraries", _libraries(facts)), "")
    console.print(key_values("extras", _extras(facts)), "")
    console.print(key_values("exported vision towers", _towers(facts)), "")
    for check in checks:
        _show_check(console, check)
    verdict = "nothing blocks" if is_healthy(checks) else "mend what is marked PROBLEM first"
    console.print("", verdict, sep="\n")


def _show_check(console: Console, check: Check) -> None:
    mark, colour = _MARKS[check.level]
    text = Text.assemble((mark, colour), (f"{check.name}: ", "bold"), check.says)
    console.print(text, soft_wrap=True)
    if check.fix:
        console.print(Text(f"        fix: {check.fix}"), soft_wrap=True)


def _machine(facts: Facts) -> dict[str, str]:
    cpu, memory = facts.processor, facts.memory
    cores = (
        f"{cpu.logical_cores} logical, {cpu.physical_cores} physical, {cpu.usable_cores:g} usable"
    )
    sets = cpu.instruction_sets
    rows = {
        "processor": f"{cpu.model} ({cpu.architecture})",
        "cores": cores,
        "NUMA nodes": str(facts.numa_nodes),
        "torch threads": str(facts.torch.num_threads or "unknown"),
        "kernels' threads": _threads(facts.threads),
        **_kernels(facts.kernels),
        "has": ", ".join(name for name in sets if sets[name]) or "none of those that matter",
        "has not": ", ".join(name for name in sets if not sets[name]) or "nothing that matters",
        "memory": f"{size_text(memory.total)}, {size_text(memory.available)} available",
        "disk cache": size_text(memory.disk_cache),
        "swap": f"{size_text(memory.swap_total)}, {size_text(memory.swap_used)} in use",
    }
    if memory.cgroup_limit is not None and memory.cgroup_free is not None:
        limit, free = size_text(memory.cgroup_limit), size_text(memory.cgroup_free)
        rows["container"] = f"may use {limit}, {free} left"
    if facts.limits is not None:
        rows["reads at most"] = f"{(facts.limits['read_bytes'] or 0) / 1e9:.1f} GB/s"
        rows["multiplies at most"] = ", ".join(_multiplies(facts.limits))
    return rows


def _threads(threads: Threads | None) -> str:
    if threads is None:
        return "unknown"
    if not threads.places:
        return str(threads.count)
    return f"{threads.count}, kept on processors {', '.join(map(str, threads.places))}"


def _multiplies(limits: Mapping[str, float | None]) -> Iterator[str]:
    for name, unit in (("bf16", "TFLOP/s in bfloat16"), ("int8", "TOP/s in int8")):
        if (ops := limits[f"{name}_ops"]) is not None:
            yield f"{ops / 1e12:.2f} {unit}"


def _kernels(kernels: NativeKernels | None) -> dict[str, str]:
    """What is used, what could be, and why the rest cannot."""
    if kernels is None or (kernels.error is not None and not kernels.instruction_sets):
        return {"native kernels": "unknown"}
    usable = ", ".join(kernels.instruction_sets) or "none"
    used = "nothing" if kernels.in_use is None else kernels.in_use
    rows = {"native kernels": f"{used} in use; usable: {usable}"}
    return rows | {f"not {isa}": reason for isa, reason in kernels.refused.items()}


def _devices(facts: Facts) -> dict[str, str]:
    if facts.devices_error:
        return {"none": facts.devices_error}
    rows: dict[str, str] = {}
    for device in facts.devices:
        rows[device.name] = device.unavailable or "can be used"
        rows |= {f"{device.name} card {card.index}": _card(card) for card in device.cards}
    return rows


def _card(card: CardState) -> str:
    driver = f"driver {card.driver}" if card.driver else "driver unknown"
    return f"{card.name}, {size_text(card.memory_bytes)}, capability {card.capability}, {driver}"


def _towers(facts: Facts) -> dict[str, str]:
    return {name: absent or "can be used" for name, absent in facts.towers.items()}


def _npu(npu: NpuState) -> tuple[str, str]:
    """Its numbers, and what it tells of itself."""
    memory = "unknown"
    if npu.used_mb is not None and npu.total_mb is not None:
        memory = f"{npu.used_mb} of {npu.total_mb} MB in use"
    told = [npu.name, npu.health, memory]
    told += [f"{npu.power_w:g} W"] if npu.power_w is not None else []
    told += [f"{npu.temperature_c:g} °C"] if npu.temperature_c is not None else []
    return f"{npu.npu}/{npu.chip}", ", ".join(told)


def _libraries(facts: Facts) -> dict[str, str]:
    rows = {"glimt": __version__, "python": facts.python}
    needed = [library for library in facts.libraries if not library.extra]
    return rows | {library.name: library.version or "not installed" for library in needed}


def _extras(facts: Facts) -> dict[str, str]:
    """What each optional part of glimt has, or how to get it."""
    parts: dict[str, list[Library]] = {}
    for library in facts.libraries:
        if library.extra:
            parts.setdefault(library.extra, []).append(library)
    return {extra: _extra(extra, libraries) for extra, libraries in parts.items()}


def _extra(extra: str, libraries: list[Library]) -> str:
    if any(library.version is None for library in libraries):
        return f"pip install 'glimt[{extra}]'"
    return ", ".join(f"{library.name} {library.version}" for library in libraries)
