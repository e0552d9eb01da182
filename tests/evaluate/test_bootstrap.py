"""compare_paired: intervals that can be computed by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from glimt.evaluate import bootstrap
from glimt.evaluate.bootstrap import compare_paired


def test_a_constant_difference_has_no_spread():
    """Catches an unpaired bootstrap: the pictures differ far more than the two files do."""
    first = np.array([0.1, 0.9, 0.4, 0.7] * 5)
    found = compare_paired(first, first + 0.01)
    assert found.num_pictures == 20
    for value in (found.mean_difference, found.low, found.high):
        assert value == pytest.approx(0.01)
    assert found.has_winner


def test_the_sign_is_second_minus_first():
    """Catches a winner who has lost."""
    found = compare_paired(np.full(10, 0.5), np.full(10, 0.25))
    assert (found.mean_difference, found.low, found.high) == (-0.25, -0.25, -0.25)


def test_the_interval_of_coin_flips_is_the_binomials():
    """Catches an interval of 90 or 99 %, one-sided tails, or draws without replacement.

    The mean of 100 draws of 0 and 1 is a binomial of p 0.5 over 100: its 2.5 and 97.5 % points
    are 40 and 60 of 100.
    """
    flips = np.array([0.0, 1.0] * 50)
    found = compare_paired(np.zeros(100), flips)
    assert found.mean_difference == 0.5
    assert (found.low, found.high) == (0.4, 0.6)


def test_the_interval_of_two_pictures_is_all_that_can_be_drawn():
    """Catches draws of another number of pictures than there are."""
    found = compare_paired(np.zeros(2), np.array([0.0, 1.0]))
    assert (found.low, found.high) == (0.0, 1.0)


def test_the_same_seed_gives_the_same_interval_in_any_parts(monkeypatch):
    """Catches a report that cannot be repeated, and memory that grows with the pictures."""
    random = np.random.default_rng(0)
    first, second = random.normal(size=(2, 50))
    once = compare_paired(first, second, seed=3)
    assert compare_paired(first, second, seed=3) == once
    assert compare_paired(first, second, seed=4) != once
    monkeypatch.setattr(bootstrap, "_DRAWN_AT_ONCE", 120)  # two draws at a time
    assert compare_paired(first, second, seed=3) == once


def test_the_width_shrinks_with_the_number_of_pictures():
    """Catches a spread of single pictures in the place of that of the mean."""
    random = np.random.default_rng(1)
    differences = random.normal(size=400)
    few = compare_paired(np.zeros(100), differences[:100])
    many = compare_paired(np.zeros(400), differences)
    assert (few.high - few.low) / (many.high - many.low) == pytest.approx(2, rel=0.2)
    error = differences.std() / math.sqrt(400)
    assert many.high - many.low == pytest.approx(2 * 1.96 * error, rel=0.1)


def test_too_few_pictures_have_no_winner():
    """Catches a winner over one picture, whose interval is a point."""
    assert not compare_paired(np.zeros(9), np.ones(9)).has_winner
    assert compare_paired(np.zeros(10), np.ones(10)).has_winner
    assert not compare_paired(np.zeros(10), np.zeros(10)).has_winner
