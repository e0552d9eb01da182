"""Which samples count, and what they come to."""

import pytest

from glimt.bench.samples import Sample, summarise


def test_a_time_around_which_the_machine_changed_is_left_out():
    """Catches a slow moment of the host reported as the program's speed."""
    steady = [Sample(1.0, 100, 100), Sample(3.0, 100, 86), Sample(2.0, 90, 100)]
    changed = [Sample(50.0, 100, 84), Sample(0.01, 10, 100)]
    found = summarise([*steady, *changed], work=50)
    assert (found.median_s, found.least_s, found.most_s) == (2.0, 1.0, 3.0)
    assert (found.num_steady, found.num_left_out) == (3, 2)
    assert len(found.all_s) == 5


def test_each_sample_is_held_against_its_own_limit():
    """Catches the share of one median time in one median limit: they need not belong together."""
    found = summarise([Sample(1.0, 100, 100), Sample(2.0, 50, 50)], work=50)
    assert found.share == 0.5


def test_without_a_steady_sample_there_is_no_figure():
    """Catches a median of nothing, and a figure nobody should believe."""
    found = summarise([Sample(1.0, 1, 2)], work=1)
    assert found.median_s is None
    assert found.share is None
    assert found.as_dict()["num_left_out"] == 1


def test_no_work_and_no_time_are_a_share_of_nothing():
    """Catches a division by zero where a cached picture took no time at all."""
    found = summarise([Sample(0.0, 100, 100)], work=0)
    assert (found.median_s, found.share) == (0.0, None)
    assert summarise([Sample(1.0, 5, 5)], work=0).share == pytest.approx(0)
