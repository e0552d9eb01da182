"""How much new work fits beside running answers, by hand-made times."""

from __future__ import annotations

import pytest

from glimt.pace import Pace


def test_without_a_limit_everything_is_allowed():
    """Catches an offline batch that is slowed down for nobody."""
    pace = Pace(None)
    pace.saw(4, 100, 1.0)
    assert (pace.prefill_tokens, pace.tower_s(0.5), pace.decode_s) == (None, None, None)


def test_a_step_may_take_as_many_times_as_long_as_asked():
    """Catches a limit of the addition in the place of the whole, and the other way round."""
    pace = Pace(3.0)
    pace.saw(4, 0, 0.1)
    pace.saw(4, 50, 0.2)  # 2 ms a token
    assert pace.decode_s == pytest.approx(0.1)
    assert pace.prefill_tokens == 100
    assert pace.tower_s(0.1) == pytest.approx(0.2)
    assert pace.tower_s(0.25) == pytest.approx(0.05)
    assert pace.tower_s(0.4) == pytest.approx(-0.1)  # one part runs all the same


def test_a_step_that_was_held_up_leaves_the_tower_to_the_next():
    """Catches a gap that is a slow token and a part of the tower in one."""
    pace = Pace(2.0)
    pace.saw(1, 0, 0.1)
    assert [pace.lets_tower_wait(spent_s) for spent_s in (0.1, 0.15, 0.16)] == [False, False, True]


def test_the_tower_goes_on_even_where_there_is_never_time():
    """Catches a picture that waits for ever beside a long prompt or on a slow machine."""
    pace = Pace(2.0)
    pace.saw(1, 0, 0.1)
    waits = [pace.lets_tower_wait(0.5) for _ in range(8)]
    assert waits == [True, True, True, False] * 2


def test_without_a_limit_or_a_measure_the_tower_does_not_wait():
    """Catches a picture that is held up for nobody's sake."""
    assert not Pace(2.0).lets_tower_wait(9.0)
    free = Pace(None, decode_s=0.1)
    assert not free.lets_tower_wait(9.0)


def test_a_prompt_goes_on_even_where_there_is_no_room():
    """Catches a request that waits for ever because its tokens are dear."""
    pace = Pace(1.5)
    pace.saw(1, 0, 0.1)
    pace.saw(1, 10, 2.0)
    assert pace.prefill_tokens == 16


def test_what_is_not_known_is_tried_carefully():
    """Catches a first prompt that takes the whole step, before anything was measured."""
    pace = Pace(2.0)
    assert (pace.prefill_tokens, pace.tower_s(1.0)) == (32, 0.0)
    pace.saw(0, 2000, 1.0)  # nobody decoded
    assert pace.token_s is None


def test_one_slow_step_changes_little():
    """Catches an estimate that follows every accident."""
    pace = Pace(2.0)
    for _ in range(10):
        pace.saw(1, 0, 0.1)
    pace.saw(1, 0, 0.2)
    assert pace.decode_s == pytest.approx(0.12)
    pace.saw(1, 0, 60.0)  # the machine slept
    assert pace.decode_s == pytest.approx(0.12)
