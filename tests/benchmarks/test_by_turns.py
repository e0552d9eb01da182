"""The arithmetic of comparisons, without any clock."""

from __future__ import annotations

import json

import pytest
from benchmarks.peers.by_turns import noise_picture, report, summarise, take_turns

PAIRS = [({"prefill": 1.0}, {"prefill": 3.0}), ({"prefill": 2.0}, {"prefill": 4.0})]


def test_a_ratio_is_of_neighbours_and_not_of_medians() -> None:
    """Catches a ratio of medians, which a machine that changes its speed makes meaningless."""
    row = summarise([*PAIRS, ({"prefill": 10.0}, {"prefill": 10.0})], ("ours", "theirs"))["prefill"]
    assert row == {"ours_s": 2.0, "theirs_s": 4.0, "ratio": 2.0, "least": 1.0, "most": 3.0}


def test_the_first_pair_is_left_out_and_both_see_the_same_turns() -> None:
    """Catches a warm-up that is counted, and pictures that only one side has seen before."""
    seen: list[tuple[str, int]] = []
    sides = [lambda i, s=side: seen.append((s, i)) or {"turn": float(i)} for side in "ab"]
    assert take_turns(sides, 2) == [({"turn": 1.0}, {"turn": 1.0}), ({"turn": 2.0}, {"turn": 2.0})]
    assert seen == [("a", 0), ("b", 0), ("a", 1), ("b", 1), ("a", 2), ("b", 2)]


def test_the_table_and_the_last_line_say_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches columns that are swapped, and a last line that no program can read."""
    report(summarise(PAIRS, ("ours", "theirs")), ("glimt", "a peer"), {"quant": "int8"})
    *table, last = capsys.readouterr().out.splitlines()
    row = next(line for line in table if "prefill" in line)
    shown = [cell.strip() for cell in row.replace("│", "|").split("|") if cell.strip()]
    assert shown == ["prefill", "1.500", "3.500", "2.50", "2.00 … 3.00"]
    said = json.loads(last)
    assert said["quant"] == "int8"
    assert said["figures"]["prefill"]["ratio"] == 2.5


def test_no_two_pictures_are_alike() -> None:
    """Catches a picture that the feature cache knows."""
    assert noise_picture(1).size == (1120, 1120)
    assert noise_picture(1).tobytes() != noise_picture(2).tobytes()
