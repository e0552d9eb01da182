"""The text of the CSV files that the original programs write, to the letter.

Sources: `main.py` of VisualGLM's Ascend port (performance_test); MindIE-LLM,
examples/atb_models/examples/multimodal_runner.py (performance_save) and server/generate.py
(generate_req). Scripts that read those files read these.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from statistics import fmean

from glimt.bench.performance import PerformanceRow
from glimt.bench.throughput import ThroughputRow

# --- VisualGLM -------------------------------------------------------------------------------

PERFORMANCE_HEADER = (
    "Batch,MaxSeqLen,InputSeqLen(Encoding),OutputSeqLen(Decoding),ResponseTime(ms),"
    "FirstTokenTime(ms),TimePerTokens(ms),TokensPerSecond(ms)"
)
AVERAGES_HEADER = "Batch,TokensPerSecond,ResponseTime(ms),FirstTokenTime(ms),TimePerTokens(ms)"


def performance_name(batch: int | str, family: str) -> str:
    """The file of one batch size; of "*", a pattern for all of them."""
    return f"{batch}_batch_performance_{family}.csv"


def performance_csv(rows: Sequence[PerformanceRow]) -> str:
    """Rows of one batch size; one that was not measured has only its first four cells."""
    return "\n".join([PERFORMANCE_HEADER, *(_performance_line(row) for row in rows)]) + "\n"


def _performance_line(row: PerformanceRow) -> str:
    case = row.case
    cells = [case.batch, row.max_seq_len, case.input_len, case.output_len]
    measures = ["", "", "", ""] if row.left_out else [str(value) for value in measures_of(row)]
    return ",".join([*map(str, cells), *measures])


def measures_of(row: PerformanceRow) -> tuple[float, float, float, float]:
    """Response, first token and average step in ms, and tokens per second of one request.

    Section 8 of the port's description: first + average · output length; rounded to 2 places.
    """
    first, average = row.first_token_s * 1000, row.step_s * 1000
    response = first + average * row.case.output_len
    return round(response, 2), round(first, 2), round(average, 2), round(1000 / average, 2)


def averages(rows: Sequence[PerformanceRow]) -> dict[int, tuple[float, float, float, float]]:
    """Of each batch size's measured rows: tokens per second, then ms as in AVERAGES_HEADER."""
    found = {}
    for batch in sorted({row.case.batch for row in rows}):
        measured = [measures_of(r) for r in rows if r.case.batch == batch and not r.left_out]
        if measured:
            response, first, step, rate = (fmean(column) for column in zip(*measured, strict=True))
            found[batch] = (round(rate, 2), round(response, 2), round(first, 2), round(step, 2))
    return found


def averages_csv(rows: Sequence[PerformanceRow]) -> str:
    """One line for each batch size, in the columns of the original's table of averages."""
    lines = [",".join(map(str, (batch, *found))) for batch, found in averages(rows).items()]
    return "\n".join([AVERAGES_HEADER, *lines]) + "\n"


# --- GLM-4v ----------------------------------------------------------------------------------

_GAP = " " * 16  # the original breaks its lines inside the text, and so writes the indent
THROUGHPUT_HEADER = (
    f"batch, input_len, output_len, embedding_len, fisrt_token_time(ms), {_GAP}"
    "non_first_token_time(ms), ResponseTime(ms),E2E Throughput Average(Tokens/s)"
)
BENCHMARK_COLUMNS = (
    "batch_size",
    "input_seq_len",
    "output_seq_len",
    "e2e_time(ms)",
    "prefill_time(ms)",
    "decoder_token_time(ms)",
    "prefill_count",
    "prefill_token_times",
    "decode_token_times",
    "prefill_average_time(ms)",
)


def benchmark_csv(row: ThroughputRow) -> str:
    """The file of one batch that was measured; the times of single steps are in seconds."""
    prefill, decode = sum(row.prefill_s), sum(row.decode_s)
    cells = (
        row.batch,
        row.embedding_len,
        row.output_len,
        _ms(prefill + decode),
        _ms(prefill),
        _ms(row.step_s),
        len(row.prefill_s),
        ",".join(map(str, row.prefill_s)),
        ",".join(map(str, row.decode_s)),
        _ms(prefill / row.batch),
    )
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerows([BENCHMARK_COLUMNS, cells])
    return stream.getvalue()


def _ms(seconds: float) -> str:
    """Two places, with the original's blank in the place of a sign."""
    return f"{seconds * 1000: .2f}"


def throughput_csv(rows: Sequence[ThroughputRow]) -> str:
    """One line for each batch size; of one that was not measured, what is known without."""
    return "\n".join([THROUGHPUT_HEADER, *(_throughput_line(row) for row in rows)]) + "\n"


def _throughput_line(row: ThroughputRow) -> str:
    if row.left_out:
        return f"{row.batch}, {row.input_len}, {row.output_len},,,,,"
    # The two times come from the benchmark file, so they have its two places.
    first, step = float(_ms(sum(row.prefill_s))), float(_ms(row.step_s))
    return (
        f"{row.batch}, {row.input_len}, {row.output_len},{row.embedding_len}, {_GAP}"
        f"{first},{step}, {row.wall_s * 1000}, {_GAP}{row.tokens_per_s}"
    )
