"""Figures of a comparison by hand, and what is beyond its line."""

from __future__ import annotations

import math

import pytest
import torch

from glimt.evaluate.gates import BFLOAT16, FLOAT32, INT8, Gate
from glimt.evaluate.precision import Precision, cosines, judge
from glimt.evaluate.precision_report import verdict
from glimt.evaluate.probes import Probe
from glimt.evaluate.recording import Trace

PROBE = Probe("p", (), "什么？")
SURE = torch.tensor([[4.0, 0.0, 0.0], [0.0, 8.0, 0.0]])


def trace(logits: torch.Tensor, stages: dict[str, torch.Tensor] | None = None) -> Trace:
    return Trace(PROBE, (0, 1)[: len(logits)], logits, stages or {})


def judged(ours: torch.Tensor, gate: Gate = FLOAT32, theirs: torch.Tensor = SURE) -> Precision:
    return judge(iter([(trace(theirs), trace(ours))]), gate)


def value(found: Precision, name: str) -> float:
    return next(check.value for check in found.checks if check.name.startswith(name))


def test_the_figures_are_those_of_their_definitions():
    """Catches a divergence the wrong way round, and an error that is not relative to the range."""
    ours = torch.tensor([[4.0, 0.0, 1.0], [0.0, 8.0, 0.0]])
    found = judged(ours)
    weights = [math.exp(4), 1.0, 1.0]
    p = [w / sum(weights) for w in weights]
    other = [math.exp(4), 1.0, math.e]
    q = [w / sum(other) for w in other]
    kl = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    assert value(found, "KL divergence, mean") == pytest.approx(kl / 2)
    assert value(found, "KL divergence, p99") == pytest.approx(0.99 * kl)
    assert value(found, "cosine of logits, least") == pytest.approx(16 / (4 * math.sqrt(17)))
    assert value(found, "largest error") == pytest.approx(0.25)
    assert value(found, "same likeliest") == 1.0
    assert value(found, "perplexity") == pytest.approx(math.sqrt(p[0] / q[0]))


def test_another_likeliest_token_fails_where_none_may_differ():
    """Catches agreement by the mean of something else."""
    found = judged(torch.tensor([[0.0, 4.0, 0.0], [0.0, 8.0, 0.0]]))
    assert value(found, "same likeliest") == 0.5
    assert not found.passes


def test_values_that_are_no_numbers_fail():
    """Catches NaN, which is on neither side of any line."""
    found = judged(torch.tensor([[math.nan, 0.0, 0.0], [0.0, 8.0, 0.0]]), BFLOAT16)
    assert not found.passes
    assert verdict(found).startswith("FAIL: beyond their lines: cosine of logits, least")


def test_a_flat_reference_has_no_line_of_agreement():
    """Catches a verdict on random weights by what they do not know."""
    flat = torch.zeros(2, 100).index_fill(1, torch.tensor([3]), 0.1)
    ours = torch.zeros(2, 100).index_fill(1, torch.tensor([5]), 0.1)
    assert judged(ours, INT8, flat).is_flat
    lines = {check.name: check.line for check in judged(ours, INT8, flat).checks}
    assert lines["same likeliest token"] is lines["perplexity ratio"] is None
    assert lines["cosine of logits, mean"] == INT8.cosine_mean
    exact = {check.name: check.line for check in judged(ours, FLOAT32, flat).checks}
    assert exact["same likeliest token"] == 1.0


def of_stages(theirs: dict[str, torch.Tensor], ours: dict[str, torch.Tensor]) -> Precision:
    return judge(iter([(trace(SURE, theirs), trace(SURE, ours))]), BFLOAT16)


ROWS = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
OFF = torch.tensor([[1.0, 0.1], [0.0, 1.0]])  # a cosine of 0.995 in its first row


def test_the_first_stage_beyond_its_line_is_the_drift():
    """Catches the worst stage in the place of the first, and a stage without its row's least."""
    theirs = {"pixels": ROWS, "tower.embed": ROWS, "blocks.0": ROWS, "blocks.1": ROWS}
    worse = torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    found = of_stages(theirs, theirs | {"blocks.0": OFF, "blocks.1": worse})
    assert found.drift
    assert found.drift.name == "blocks.0"
    assert found.drift.cosine_min == pytest.approx(1 / math.sqrt(1.01))
    assert found.drift.relative_error == pytest.approx(0.1 / math.sqrt(2))
    assert "first stage that drifts: blocks.0 (cosine 0.995037, at least 0.999" in verdict(found)


def test_towers_have_a_stricter_line_and_pixels_none_but_equality():
    """Catches pixels that may be a shade off, which resizing by another rule is."""
    near = torch.tensor([[1.0, 0.02], [0.0, 1.0]])  # 0.9998
    assert of_stages({"blocks.0": ROWS}, {"blocks.0": near}).passes
    assert not of_stages({"tower.embed": ROWS}, {"tower.embed": near}).passes
    found = of_stages({"pixels": 255 * ROWS}, {"pixels": 255 * ROWS + 1})
    assert "first stage that drifts: pixels (values differ by up to 1, none may)" in verdict(found)


def test_a_stage_that_is_not_there_or_of_another_shape_fails():
    """Catches a stage that is compared with nothing and passes."""
    missing = of_stages({"blocks.0": ROWS}, {})
    assert "blocks.0 (is missing in the tested setting)" in verdict(missing)
    wider = of_stages({"blocks.0": ROWS}, {"blocks.0": torch.ones(2, 3)})
    assert "has another shape: [2, 3] against [2, 2]" in verdict(wider)


def test_two_zero_rows_are_the_same():
    """Catches a padding row that is NaN, and one that only one side has."""
    zero, one = torch.zeros(1, 2).double(), torch.ones(1, 2).double()
    assert cosines(zero, zero).tolist() == [1.0]
    assert not cosines(zero, one)[0] >= 0
