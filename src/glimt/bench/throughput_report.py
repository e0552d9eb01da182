"""A throughput sweep as a document: the rows, and plots by batch size against the roofline."""

from __future__ import annotations

from collections.abc import Mapping

from glimt.bench.sweep import NONE, memory_rows, status_line
from glimt.bench.throughput import ThroughputResult, ThroughputRow
from glimt.reports.document import Document, Paragraph, Plot, Section, Table
from glimt.reports.plots import Axis, Series, draw_lines

HEADINGS = ("batch", "prompt", "first token", "of it pictures", "token", "response", "tokens/s")
_LIMIT_NOTE = (
    "Dashed: what the machine's reading and multiplying allow, measured after the last row."
)


def document(found: ThroughputResult, facts: Mapping[str, str]) -> Document:
    """The whole report. facts: of `commands.reporting.run_facts`."""
    sections: list[Section] = [_rows_table(found)]
    if found.measured:
        sections += [_throughput_plot(found), _first_token_plot(found)]
    memory = tuple(memory_rows(found).items())
    sections.append(Table("Memory", ("what", "figure"), memory))
    if found.remark:
        sections.append(Paragraph(f"Not as usual: {found.remark}."))
    title = f"Throughput of {found.family}: one picture, growing batches"
    return Document(
        title, status_line(found, "batch sizes"), not found.failed, dict(facts), tuple(sections)
    )


# --- tables ----------------------------------------------------------------------------------


def cells_of(row: ThroughputRow) -> tuple[str, ...]:
    """A measured row under HEADINGS."""
    return (
        str(row.batch),
        str(row.embedding_len),
        f"{sum(row.prefill_s) * 1000:.1f} ms",
        f"{row.tower_s * 1000:.1f} ms",
        f"{row.step_s * 1000:.2f} ms",
        f"{row.wall_s * 1000:.1f} ms",
        f"{row.tokens_per_s:.2f}",
    )


def _rows_table(found: ThroughputResult) -> Table:
    rows = []
    for row in found.rows:
        if row.left_out:
            rows.append((str(row.batch), *[NONE] * len(HEADINGS), row.left_out))
        else:
            spread = f"{min(row.decode_s) * 1000:.2f} … {max(row.decode_s) * 1000:.2f} ms"
            rows.append((*cells_of(row), spread, ""))
    marked = frozenset(i for i, row in enumerate(found.rows) if row.left_out)
    said = (
        "Prompt: tokens with template and picture. Token: the average decoding step, and its "
        "spread. Response and tokens/s: over everything, with resizing and tokenizing."
    )
    return Table(
        "Batch sizes", (*HEADINGS, "spread of a token", "why not"), tuple(rows), said, marked
    )


# --- plots -----------------------------------------------------------------------------------


def _throughput_plot(found: ThroughputResult) -> Plot:
    x = [row.batch for row in found.measured]
    series = [
        Series("end to end", x, [row.tokens_per_s for row in found.measured]),
        Series("decoding alone", x, [row.batch / row.step_s for row in found.measured]),
    ]
    limits = found.limits
    if limits is not None:
        machine = limits.read_bytes, limits.bf16_ops
        context = [row.embedding_len + row.output_len / 2 for row in found.measured]
        costs = zip(found.measured, context, strict=True)
        steps = [found.costs.decode_limit_s(row.batch, tokens, *machine) for row, tokens in costs]
        most = [batch / step for batch, step in zip(x, steps, strict=True)]
        series.append(Series("limit of decoding", x, most, is_limit=True, colour=1))
    png = draw_lines(series, Axis("batch size"), Axis("tokens per second", is_log=True))
    said = f"Tokens per second of all rows together, by batch size. {_LIMIT_NOTE}"
    return Plot("Throughput", "throughput-rate", png, said)


def _first_token_plot(found: ThroughputResult) -> Plot:
    x = [row.batch for row in found.measured]
    series = [
        Series("first token", x, [sum(row.prefill_s) * 1000 for row in found.measured]),
        Series("of it pictures", x, [row.tower_s * 1000 for row in found.measured]),
    ]
    limits = found.limits
    if limits is not None:
        machine = limits.read_bytes, limits.bf16_ops
        least = [
            found.costs.prefill_limit_s(row.batch, row.embedding_len, 1, *machine) * 1000
            for row in found.measured
        ]
        series.append(Series("limit of the first token", x, least, is_limit=True, colour=0))
    png = draw_lines(series, Axis("batch size"), Axis("ms", is_log=True))
    said = f"Time to the first token of the whole batch, by batch size. {_LIMIT_NOTE}"
    return Plot("First token", "throughput-first-token", png, said)
