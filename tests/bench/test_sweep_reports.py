"""The sweeps' documents: what the first line says, and what is shown of rows without a measure."""

from __future__ import annotations

from dataclasses import replace

import pytest

from glimt.bench import performance_report, throughput_report
from glimt.bench.performance import (
    Case,
    PerformanceResult,
    PerformanceRow,
    PictureTimes,
    RunDetail,
)
from glimt.bench.roofline import ModelCosts
from glimt.bench.sweep import MachineLimits
from glimt.bench.throughput import ThroughputResult, ThroughputRow
from glimt.reports import plots
from glimt.reports.document import Paragraph, Plot, Table

COSTS = ModelCosts(
    layer_products=90,
    head_products=10,
    step_bytes=1000,
    kv_bytes=0,
    num_layers=1,
    attention_size=0,
    image_ops=0,
)
RUN = RunDetail(
    first_token_s=0.1,
    tower_s=0.05,
    mean_step_s=0.02,
    least_step_s=0.01,
    median_step_s=0.02,
    most_step_s=0.04,
    num_prefill_steps=1,
)
GOOD = PerformanceRow(case=Case(2, 32, 8), max_seq_len=64, image_tokens=4, runs=(RUN,))
UNFIT = PerformanceRow(case=Case(2, 64, 8), max_seq_len=64, left_out="too long")
FAILED = PerformanceRow(case=Case(2, 64, 16), max_seq_len=64, left_out="NaN", is_error=True)
RESULT = PerformanceResult(
    family="toy",
    rows=(GOOD,),
    num_runs=1,
    pictures=PictureTimes(0.3, (0.1, 0.2, 0.4)),
    host_bytes=3 * 2**20,
    device_bytes=None,
    limits=MachineLimits(read_bytes=100_000, bf16_ops=1e9),
    costs=COSTS,
)


def tables(document) -> dict[str, Table]:
    return {each.title: each for each in document.sections if isinstance(each, Table)}


@pytest.mark.parametrize(
    ("rows", "num_runs", "status", "is_whole"),
    [
        ((GOOD,), 1, "Whole: 1 of 1 rows measured.", True),
        (
            (GOOD, UNFIT),
            2,
            "Whole: 1 of 2 rows measured; 1 do not fit the context or the cache; in 2 runs, each "
            "going on where the one before stopped.",
            True,
        ),
        (
            (UNFIT, FAILED),
            1,
            "With errors: 0 of 2 rows measured; 1 ended with an error; 1 do not fit the context "
            "or the cache.",
            False,
        ),
    ],
)
def test_the_first_line_says_what_is_missing(rows, num_runs, status, is_whole):
    """Catches a report that looks whole and is not."""
    found = replace(RESULT, rows=rows, num_runs=num_runs)
    document = performance_report.document(found, {})
    assert (document.status, document.is_whole) == (status, is_whole)


def test_rows_without_a_measure_are_listed_and_failures_marked():
    """Catches a failure among the rows that merely do not fit."""
    document = performance_report.document(replace(RESULT, rows=(GOOD, UNFIT, FAILED)), {})
    left = tables(document)["Rows without a measure"]
    assert left.rows == (("2", "64", "8", "too long"), ("2", "64", "16", "NaN"))
    assert left.marked == {1}
    assert tables(document)["Every row"].rows == (
        ("2", "32", "8", "100.00", "50.00", "20.00", "10.00 … 40.00"),
    )


def test_averages_stand_beside_the_share_of_the_read_limit():
    """Catches a share of another limit, or of a step that reads nothing."""
    (row,) = tables(performance_report.document(RESULT, {}))["Averages"].rows
    assert row == ("2", "50.00", "260.00", "100.00", "20.00", "50.0%")
    unknown = performance_report.document(replace(RESULT, limits=None), {})
    assert tables(unknown)["Averages"].rows[0][-1] == "-"


def test_memory_and_pictures_are_told_for_host_and_device():
    """Catches a card's memory that is told as the host's."""
    assert performance_report.picture_rows(RESULT) == {
        "picture process time, first": "300.0 ms",
        "picture process time, later": "200.0 ms (100.0 … 400.0 ms)",
        "peak memory, host": "3.0 MiB",
        "peak memory, device": "- (the host)",
    }
    on_card = replace(RESULT, device_bytes=2**30, pictures=None)
    assert performance_report.picture_rows(on_card) == {
        "peak memory, host": "3.0 MiB",
        "peak memory, device": "1.0 GiB",
    }


def test_each_line_has_its_limit_in_its_colour(monkeypatch):
    """Catches dashed lines that nobody can tell apart, and a limit of one row for the batch."""
    drawn = []
    monkeypatch.setattr(
        performance_report, "draw_lines", lambda series, x, y: drawn.append(series) or b"PNG"
    )
    alone = replace(GOOD, case=Case(1, 32, 8))
    performance_report.document(replace(RESULT, rows=(alone, GOOD)), {})
    decode = [(s.name, s.colour, s.is_limit, list(s.y)) for s in drawn[0]]
    assert decode == [  # reading 1000 of 100,000 bytes a second takes 10 ms
        ("batch 1", 0, False, [50.0]),
        ("", 0, True, [100.0]),
        ("batch 2", 1, False, [100.0]),
        ("", 1, True, [200.0]),
    ]


def test_an_unnamed_line_is_not_in_the_legend():
    """Catches an empty entry, and a warning about it."""
    line = plots.Series("one", [1, 2], [1, 2], colour=1)
    dashed = plots.Series("", [1, 2], [3, 4], is_limit=True, colour=1)
    assert plots.draw_lines([line, dashed], plots.Axis("x"), plots.Axis("y"))[:4] == b"\x89PNG"


MEASURED = ThroughputRow(
    batch=2,
    input_len=5,
    output_len=3,
    embedding_len=40,
    prefill_s=(0.25,),
    decode_s=(0.04, 0.06),
    tower_s=0.2,
    wall_s=0.5,
)


def test_a_throughput_report_lists_every_batch_size():
    """Catches a batch that is missing, and a failure in a report that says it is whole."""
    failed = ThroughputRow(batch=3, input_len=5, output_len=3, left_out="NaN", is_error=True)
    found = ThroughputResult(
        family="toy",
        rows=(MEASURED, failed),
        num_runs=1,
        host_bytes=2**20,
        device_bytes=None,
        limits=RESULT.limits,
        costs=COSTS,
        remark="several steps",
    )
    document = throughput_report.document(found, {})
    said = "With errors: 1 of 2 batch sizes measured; 1 ended with an error."
    assert (document.status, document.is_whole) == (said, False)
    table = tables(document)["Batch sizes"]
    figures = ("2", "40", "250.0 ms", "200.0 ms", "50.00 ms", "500.0 ms", "12.00")
    assert table.rows[0] == (*figures, "40.00 … 60.00 ms", "")
    assert table.rows[1] == ("3", *["-"] * 7, "NaN")
    assert table.marked == {1}
    assert sum(isinstance(section, Plot) for section in document.sections) == 2
    assert Paragraph("Not as usual: several steps.") in document.sections
