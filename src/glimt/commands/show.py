"""Prints what `inspect` found and what `convert` and `quantize` wrote: tables, or JSON."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from glimt.commands.console import (
    byte_bar,
    note,
    out_console,
    print_json,
    told_as_json,
    warn,
)
from glimt.commands.convert import SAT_FILE, ConvertReport, convert_sat
from glimt.commands.inspect import CheckpointSummary, TensorGroup, describe
from glimt.commands.quantize import QuantizeReport, plan_quantize, quantize
from glimt.commands.tables import figures, key_values
from glimt.loader import model_folder
from glimt.quant.plan import QuantOptions
from glimt.sizes import size_text


def show_checkpoint(folder: Path, as_json: bool) -> bool:
    """Print a model folder's summary. True if its weights can be loaded."""
    with told_as_json(as_json):
        summary = describe(model_folder(str(folder)))
    if as_json:
        print_json(summary.as_dict())
    else:
        _print_summary(summary)
    return not summary.problems


def _print_summary(summary: CheckpointSummary) -> None:
    console = out_console()
    console.print(_facts(summary), "")
    if summary.files:
        console.print(_groups(summary.groups), "")
    console.print(_memory(summary))
    for problem in summary.problems:
        warn(f"problem: {problem}")


def _facts(summary: CheckpointSummary) -> Table:
    files = f"{len(summary.files)}, {size_text(sum(summary.files.values()))}"
    dtypes = ", ".join(f"{name} ({count} tensors)" for name, count in summary.dtypes.items())
    quantised = {
        "quantised": ", ".join(f"{role} {name}" for role, name in summary.quantised.items())
    }
    rows = {
        "family": summary.family,
        "parameters": f"{summary.num_parameters:,}",
        **(quantised if summary.quantised else {}),
        "declared dtype": summary.declared_dtype,
        "context": f"{summary.context_tokens:,} tokens",
        "vocabulary": f"{summary.vocab_size:,} tokens",
        "weight files": files if summary.files else "none that can be read",
        "their dtypes": dtypes or "none",
    }
    return key_values(summary.folder, rows)


def _groups(groups: Sequence[TensorGroup]) -> Table:
    table = figures("tensors", "how many", "elements", "in the files", title="in the files")
    for group in groups:
        # No parameter takes these: position tables and the like, that are computed instead.
        name = "not read" if group.name == "other" else group.name
        if group.num_tensors:
            numbers = str(group.num_tensors), f"{group.num_elements:,}", size_text(group.nbytes)
            table.add_row(name, *numbers)
    return table


def _memory(summary: CheckpointSummary) -> Table:
    headings = "dtype", "weights", "KV cache per token", "KV cache, full context"
    table = figures(*headings, title="in memory")
    for dtype, nbytes in summary.weight_bytes.items():
        per_token = summary.kv_bytes_per_token[dtype]
        full = size_text(per_token * summary.context_tokens)
        table.add_row(dtype, size_text(nbytes), size_text(per_token), full)
    return table


# --- convert ---------------------------------------------------------------------------------


def convert_with_bar(
    source: Path, target: Path, qkv_layout: str, tokenizer: Path | None, as_json: bool
) -> None:
    """Convert a SAT checkpoint, showing progress, and tell what was written."""
    with told_as_json(as_json), byte_bar("converting", _size_of(source)) as on_tensor:
        report = convert_sat(
            source, target, qkv_layout=qkv_layout, tokenizer=tokenizer, on_tensor=on_tensor
        )
    print_json(report.as_dict()) if as_json else _tell(report)


def _files(names: Sequence[str]) -> str:
    return "1 file" if len(names) == 1 else f"{len(names)} files"


def _size_of(source: Path) -> int | None:
    """Bytes of the one checkpoint file, which are about those of its tensors."""
    files = [source] if source.is_file() else sorted(source.rglob(SAT_FILE))
    return files[0].stat().st_size if len(files) == 1 else None


def _tell(report: ConvertReport) -> None:
    out_console().print(
        f"{report.target}: {report.num_tensors} tensors, {size_text(report.nbytes)} "
        f"in {_files(report.files)}, QKV layout {report.qkv_layout}",
        soft_wrap=True,
    )
    for name in report.dropped:
        note(f"left out, because the hub form has no such tensor: {name}")
    for said in report.notes:
        warn(f"note: {said}")


# --- quantize --------------------------------------------------------------------------------


def quantize_with_bar(
    source: Path, target: Path, names: tuple[str, str, str], force: bool, as_json: bool
) -> None:
    """Quantise a model folder, showing progress, and tell what was written.

    names: formats of the language blocks, the head and the tower
    """
    blocks, head, tower = names
    with told_as_json(as_json):
        options = QuantOptions(blocks=blocks, head=head, tower=tower)
        job = plan_quantize(source, target, options, force)
        with byte_bar("quantising", job.nbytes) as on_bytes:
            report = quantize(job, on_bytes)
    print_json(report.as_dict()) if as_json else _tell_quantised(report)


def _tell_quantised(report: QuantizeReport) -> None:
    roles = ", ".join(f"{role} {name}" for role, name in report.formats.items())
    sizes = f"{size_text(report.source_bytes)} -> {size_text(report.nbytes)}"
    out_console().print(
        f"{report.target}: {report.num_weights} weights quantised ({roles}), {sizes} "
        f"in {_files(report.files)}",
        soft_wrap=True,
    )
