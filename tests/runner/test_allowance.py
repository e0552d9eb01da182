"""When a step begins no further part of the tower, by hand-made times."""

from __future__ import annotations

from glimt.runner.allowance import Allowance


def test_a_part_that_would_pass_the_end_is_not_begun():
    """Catches an overshoot by a whole part: they are judged by the longest, not by the last."""
    times = iter([0.0, 4.0, 5.0, 7.0])
    allowance = Allowance(10.0, lambda: next(times))
    assert [allowance.is_spent() for _ in range(3)] == [False, False, True]


def test_a_part_that_just_fits_is_begun():
    """Catches a step that leaves a part's time unused."""
    times = iter([0.0, 2.0, 4.0])
    allowance = Allowance(4.0, lambda: next(times))
    assert [allowance.is_spent() for _ in range(2)] == [False, True]
