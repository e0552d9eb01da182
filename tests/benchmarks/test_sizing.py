"""The sizing page says what its script computes, and the script what the shapes say."""

from __future__ import annotations

from pathlib import Path

import pytest
from benchmarks.sizing import (
    CARDS,
    Sized,
    batch_of,
    divided_table,
    first_token_s,
    limits_table,
    models,
    plan_table,
    requests_per_s,
    step_s,
)

PAGE = Path(__file__).parents[2] / "docs" / "sizing.md"


@pytest.fixture(scope="module")
def counted() -> tuple[Sized, ...]:
    return models()


@pytest.mark.parametrize("table", [limits_table, plan_table, divided_table])
def test_the_page_has_the_script_s_tables(table, counted):
    """Would catch figures that were written by hand, or outlived a change of the formulas."""
    assert "\n".join(table(counted)) in PAGE.read_text(encoding="utf-8")


def test_the_tower_is_that_of_all_layers(counted):
    """Would catch a tower of one or two layers: 73.96 and 0.53 TFLOP, counted in full."""
    assert counted[0].costs.image_ops == 73_961_658_311_680
    assert counted[1].costs.image_ops / 1e12 == pytest.approx(0.53, abs=0.02)


def test_one_card_by_hand(counted):
    """Would catch a limit that is of the wrong resource: GLM-4v on the first card.

    Weights of a step: 17.6 GB of 1.6 TB/s. Tower and prompt: 74 and 28 TFLOP of 313 TFLOPS.
    """
    model, card = counted[0], CARDS[0]
    assert step_s(model, card, 1) == pytest.approx(0.0110, rel=0.01)
    assert first_token_s(model, card) == pytest.approx(0.325, rel=0.01)
    assert batch_of(model, card) == 64
    per_request_s = 0.325 + 256 * step_s(model, card, 64) / 64
    assert requests_per_s(model, card, is_seen=False) == pytest.approx(1 / per_request_s, rel=0.01)
    assert requests_per_s(model, card, is_seen=True) > 6 * requests_per_s(model, card, False)
