"""A performance sweep as a document: averages, plots against the roofline, what was left out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, median

from glimt.bench import original_files as files
from glimt.bench.performance import PerformanceResult, PerformanceRow
from glimt.bench.sweep import NONE, MachineLimits, memory_rows, status_line
from glimt.reports.document import Document, Paragraph, Plot, Section, Table
from glimt.reports.plots import Axis, Series, draw_lines

_LIMIT_NOTE = (
    "Dashed: what the machine's reading and multiplying allow at most, measured after the last row."
    " A model that fits a processor's caches can be read faster than memory."
)


def document(found: PerformanceResult, facts: Mapping[str, str]) -> Document:
    """The whole report. facts: of `commands.reporting.run_facts`."""
    measured = found.measured
    sections: list[Section] = [_averages_table(found)]
    if measured:
        sections += [_decode_plot(found, measured), _first_token_plot(found, measured)]
    told = picture_rows(found)
    sections.append(Table("Pictures and memory", ("what", "figure"), tuple(told.items())))
    if len(measured) < len(found.rows):
        sections.append(_left_out_table(found.rows))
    if found.remark:
        sections.append(Paragraph(f"Not as usual: {found.remark}."))
    sections.append(_rows_table(measured))
    title = f"Performance of {found.family}: batch sizes and lengths"
    return Document(
        title, status_line(found, "rows"), not found.failed, dict(facts), tuple(sections)
    )


# --- tables ----------------------------------------------------------------------------------


def _averages_table(found: PerformanceResult) -> Table:
    rows = tuple(
        (str(batch), *(f"{value:.2f}" for value in values), _mbu(found, batch))
        for batch, values in files.averages(found.rows).items()
    )
    headings = (*files.AVERAGES_HEADER.split(","), "MBU")
    said = (
        "Means over the rows of a batch size. TokensPerSecond is of one request, as the original "
        "counts it; MBU: share of the read limit that the weights of a decoding step take."
    )
    return Table("Averages", headings, rows, said)


def _mbu(found: PerformanceResult, batch: int) -> str:
    if found.limits is None:
        return NONE
    steps = [row.step_s for row in found.rows if row.case.batch == batch and not row.left_out]
    return f"{found.costs.mbu(fmean(steps), found.limits.read_bytes):.1%}"


def picture_rows(found: PerformanceResult) -> dict[str, str]:
    """Picture process time and peak memory, for a table."""
    rows = {}
    if found.pictures:
        later = found.pictures.later_s
        spread = f"{min(later) * 1000:.1f} … {max(later) * 1000:.1f} ms"
        rows["picture process time, first"] = f"{found.pictures.first_s * 1000:.1f} ms"
        rows["picture process time, later"] = f"{median(later) * 1000:.1f} ms ({spread})"
    return rows | memory_rows(found)


def _left_out_table(rows: Sequence[PerformanceRow]) -> Table:
    left = [row for row in rows if row.left_out]
    cells = tuple((*_case(row), row.left_out) for row in left)
    marked = frozenset(i for i, row in enumerate(left) if row.is_error)
    said = "Marked: begun, and ended with an error."
    return Table("Rows without a measure", ("batch", "input", "output", "why"), cells, said, marked)


def _rows_table(measured: Sequence[PerformanceRow]) -> Table:
    headings = ("batch", "input", "output", "first token", "of it pictures", "token", "spread")
    rows = tuple((*_case(row), *_times(row)) for row in measured)
    said = (
        "Milliseconds. Token: the average decoding step; spread: the least and the most of single "
        "steps over all repeats."
    )
    return Table("Every row", headings, rows, said)


def _case(row: PerformanceRow) -> tuple[str, str, str]:
    return str(row.case.batch), str(row.case.input_len), str(row.case.output_len)


def _times(row: PerformanceRow) -> tuple[str, str, str, str]:
    least = min(run.least_step_s for run in row.runs)
    most = max(run.most_step_s for run in row.runs)
    tower = median(run.tower_s for run in row.runs)
    spread = f"{least * 1000:.2f} … {most * 1000:.2f}"
    first, step = row.first_token_s * 1000, row.step_s * 1000
    return f"{first:.2f}", f"{tower * 1000:.2f}" if tower else NONE, f"{step:.2f}", spread


# --- plots -----------------------------------------------------------------------------------

_Figure = Callable[[PerformanceRow], float]


def _decode_plot(found: PerformanceResult, measured: Sequence[PerformanceRow]) -> Plot:
    def limit(row: PerformanceRow, limits: MachineLimits) -> float:
        context = _prompt_tokens(row) + row.case.output_len / 2
        machine = limits.read_bytes, limits.bf16_ops
        return row.case.batch / found.costs.decode_limit_s(row.case.batch, context, *machine)

    series = _lines(found, measured, lambda row: row.case.batch / row.step_s, limit)
    png = draw_lines(
        series, _INPUT, Axis("tokens/s of the whole batch (dashed: limit)", is_log=True)
    )
    said = "Decoding by input length; the band is the spread over output lengths."
    return Plot("Decoding", "performance-decode", png, f"{said} {_LIMIT_NOTE}")


def _first_token_plot(found: PerformanceResult, measured: Sequence[PerformanceRow]) -> Plot:
    def limit(row: PerformanceRow, limits: MachineLimits) -> float:
        machine = limits.read_bytes, limits.bf16_ops
        sizes = row.case.batch, _prompt_tokens(row), int(row.image_tokens > 0)
        return found.costs.prefill_limit_s(*sizes, *machine) * 1000

    series = _lines(found, measured, lambda row: row.first_token_s * 1000, limit)
    png = draw_lines(
        series, _INPUT, Axis("first token of the batch, ms (dashed: limit)", is_log=True)
    )
    said = "Time to the first token of the whole batch; the band is the spread over output lengths."
    return Plot("First token", "performance-first-token", png, f"{said} {_LIMIT_NOTE}")


_INPUT = Axis("input length, tokens", is_log=True)


def _prompt_tokens(row: PerformanceRow) -> int:
    return row.case.input_len + row.image_tokens


def _lines(
    found: PerformanceResult,
    measured: Sequence[PerformanceRow],
    figure: _Figure,
    limit: Callable[[PerformanceRow, MachineLimits], float],
) -> list[Series]:
    """A line for each batch size, and its limit in the same colour."""
    series = []
    limits = found.limits
    for colour, batch in enumerate(sorted({row.case.batch for row in measured})):
        rows = [row for row in measured if row.case.batch == batch]
        x = sorted({row.case.input_len for row in rows})
        groups = [[row for row in rows if row.case.input_len == length] for length in x]
        of_each = [[figure(row) for row in group] for group in groups]
        line = [median(values) for values in of_each]
        low, high = [min(values) for values in of_each], [max(values) for values in of_each]
        series.append(Series(f"batch {batch}", x, line, low, high, colour=colour))
        if limits is not None:
            most = [median(limit(row, limits) for row in group) for group in groups]
            series.append(Series("", x, most, is_limit=True, colour=colour))
    return series
