"""The originals' CSV files: headers and cells by the letter."""

from __future__ import annotations

import csv
import io

from glimt.bench.original_files import (
    averages,
    averages_csv,
    benchmark_csv,
    performance_csv,
    performance_name,
    throughput_csv,
)
from glimt.bench.performance import Case, PerformanceRow, RunDetail
from glimt.bench.throughput import ThroughputRow

HEADER = (
    "Batch,MaxSeqLen,InputSeqLen(Encoding),OutputSeqLen(Decoding),ResponseTime(ms),"
    "FirstTokenTime(ms),TimePerTokens(ms),TokensPerSecond(ms)"
)


def detail(first_s: float, step_s: float) -> RunDetail:
    return RunDetail(
        first_token_s=first_s,
        tower_s=0.0,
        mean_step_s=step_s,
        least_step_s=step_s / 2,
        median_step_s=step_s,
        most_step_s=step_s * 2,
        num_prefill_steps=1,
    )


def row(case: Case, *runs: RunDetail, left_out: str = "") -> PerformanceRow:
    return PerformanceRow(case=case, max_seq_len=2048, runs=runs, left_out=left_out)


def test_the_performance_file_is_the_originals():
    """Catches a renamed column, and a response that counts out-1 steps where the original counts
    out.
    """
    found = performance_csv(
        [
            row(Case(4, 32, 64), detail(0.157421, 0.0195312)),
            row(Case(4, 1024, 1024), left_out="2048 tokens exceed the context of 1024"),
        ]
    )
    # 157.421 + 19.5312 * 64 = 1407.4178; 1000 / 19.5312 = 51.2001...
    assert found == f"{HEADER}\n4,2048,32,64,1407.42,157.42,19.53,51.2\n4,2048,1024,1024,,,,\n"
    assert performance_name(8, "visualglm") == "8_batch_performance_visualglm.csv"


def test_repeats_are_told_by_their_medians():
    """Catches a mean, which one bad run moves."""
    runs = [detail(0.1, 0.01), detail(0.2, 0.03), detail(0.9, 0.02)]
    line = performance_csv([row(Case(1, 32, 10), *runs)]).splitlines()[1]
    assert line == "1,2048,32,10,400.0,200.0,20.0,50.0"


def test_averages_are_of_the_measured_rows_of_each_batch():
    """Catches an average that a row without a measure enters, and columns in another order."""
    rows = [
        row(Case(1, 32, 10), detail(0.1, 0.01)),  # 200 ms, 100 tokens/s
        row(Case(1, 64, 10), detail(0.3, 0.02)),  # 500 ms, 50 tokens/s
        row(Case(1, 64, 20), left_out="no room"),
        row(Case(2, 64, 20), left_out="no room"),
    ]
    assert averages(rows) == {1: (75.0, 350.0, 200.0, 15.0)}
    assert averages_csv(rows) == (
        "Batch,TokensPerSecond,ResponseTime(ms),FirstTokenTime(ms),TimePerTokens(ms)\n"
        "1,75.0,350.0,200.0,15.0\n"
    )


MEASURED = ThroughputRow(
    batch=2,
    input_len=5,
    output_len=3,
    embedding_len=1612,
    prefill_s=(0.25,),
    decode_s=(0.04, 0.0625),
    tower_s=0.2,
    wall_s=0.5,
)


def test_the_benchmark_file_is_the_originals():
    """Catches a renamed column, times of steps in milliseconds, and a lost blank before a time."""
    text = benchmark_csv(MEASURED)
    assert text == (
        "batch_size,input_seq_len,output_seq_len,e2e_time(ms),prefill_time(ms),"
        "decoder_token_time(ms),prefill_count,prefill_token_times,decode_token_times,"
        "prefill_average_time(ms)\n"
        '2,1612,3, 352.50, 250.00, 51.25,1,0.25,"0.04,0.0625", 125.00\n'
    )
    second = list(csv.reader(io.StringIO(text)))[1]  # as the original itself reads it again
    assert (int(second[1]), float(second[4]), float(second[5])) == (1612, 250.0, 51.25)


def test_the_throughput_file_is_the_originals():
    """Catches the misspelt column mended, and the gaps that the original's broken lines write."""
    gap = " " * 16
    left_out = ThroughputRow(batch=3, input_len=5, output_len=3, left_out="no room")
    assert throughput_csv([MEASURED, left_out]) == (
        f"batch, input_len, output_len, embedding_len, fisrt_token_time(ms), {gap}"
        "non_first_token_time(ms), ResponseTime(ms),E2E Throughput Average(Tokens/s)\n"
        f"2, 5, 3,1612, {gap}250.0,51.25, 500.0, {gap}12.0\n"
        "3, 5, 3,,,,,\n"
    )


def test_rows_come_back_from_their_plain_data():
    """Catches a resumed folder whose rows are not those that were measured."""
    measured = row(Case(4, 32, 64), detail(0.1, 0.02), detail(0.2, 0.01))
    assert PerformanceRow.from_dict(measured.as_dict()) == measured
    assert ThroughputRow.from_dict(MEASURED.as_dict()) == MEASURED
