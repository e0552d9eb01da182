"""`glimt bench synthetic`: how fast a published model would be here, with random weights."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

from glimt import __version__
from glimt.bench import report
from glimt.bench.synthetic import Measurements, SyntheticJob, run
from glimt.commands.console import note, out_console, print_json, told_as_json
from glimt.commands.machine import installed_version, read_processor
from glimt.commands.memory import plan_rows
from glimt.commands.reporting import check_file, command_line, write_output
from glimt.commands.tables import figures, key_values
from glimt.devices.host import read_memory, read_numa_nodes
from glimt.errors import ConfigError
from glimt.synthetic import SyntheticName, parse_name


def parse_batches(text: str) -> tuple[int, ...]:
    """Read "1,2,4" as (1, 2, 4). Raises ConfigError."""
    return parse_counts(text, "batch")


def parse_counts(text: str, field: str) -> tuple[int, ...]:
    """The same for any field, which the error names."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        said = f"is {text!r}; whole numbers above 0 with commas between them are needed: 1,2,4"
        raise ConfigError(field, [said])
    return tuple(int(part) for part in parts)


def bench_synthetic(
    model: str,
    layers: int | None,
    vision_layers: int | None,
    seed: int,
    batches: str,
    as_json: bool,
    out: Path | None,
    **options: Any,
) -> None:
    """Run and report. options: fields of SyntheticJob. Raises ConfigError before it starts."""
    with told_as_json(as_json):
        check_file(out, "out")
        name = _name(model, layers, vision_layers, seed)
        job = SyntheticJob(name=name, batches=parse_batches(batches), **options)
        found = run(job, note)
    data = report.as_dict(found, machine_facts(), command_line())
    print_json(data) if as_json else _print(found)
    if out is not None:  # last: what was measured is told even if it cannot be written
        text = json.dumps(data, ensure_ascii=False, indent=2, allow_nan=False) + "\n"
        write_output(out, text.encode(), "out")


def _name(model: str, layers: int | None, vision_layers: int | None, seed: int) -> SyntheticName:
    """Checked as a name of the same model would be, wherever one is given."""
    return parse_name(str(SyntheticName(model, layers, vision_layers, seed)))


def machine_facts() -> dict[str, Any]:
    """The machine and the versions that a figure belongs to."""
    names = ("torch", "numpy")
    return {
        "processor": asdict(read_processor()),
        "numa_nodes": read_numa_nodes(),
        "memory_bytes": read_memory().total,
        "system": platform.platform(),
        "versions": {
            "glimt": __version__,
            "python": platform.python_version(),
            **{name: installed_version(name) for name in names},
        },
    }


def _print(found: Measurements) -> None:
    console = out_console()
    title = f"{found.job.name}, {found.dtype}, {found.threads} threads, quant {found.job.quant}"
    if found.job.kv_dtype != "auto":
        title += f", KV cache {found.job.kv_dtype}"
    table = figures(*report.HEADINGS, title=title)
    for row in report.rows(found):
        table.add_row(*row)
    console.print(table, "")
    console.print(key_values("limits of the machine, first and last", report.limit_rows(found)), "")
    console.print(key_values("memory", plan_rows(found.memory, found.peak_rss)))
