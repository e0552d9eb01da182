"""Benchmarks that reach into the engine still run: what they tell, not how fast it was."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def told(*command: str) -> Any:
    """The JSON line that a benchmark ends with."""
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_parts_of_a_step_add_up() -> None:
    """Catches a stage that was renamed, and one that is counted twice."""
    result = told("benchmarks/steps.py", "--model", "demo", "--batch", "2", "--steps", "3")
    parts = result["results"]["2"]
    assert parts["step"] > 0
    assert {"plan_step", "flatten", "clear_blocks", "forward", "logits", "commit"} <= parts.keys()
    assert parts["tensors"] > 0


def test_every_setting_of_ranks_answers_alike() -> None:
    """Catches a rank that computes something else, and a process that is left behind."""
    sizes = ["--prompt", "8", "--tokens", "5", "--repeats", "1", "--dtype", "float32"]
    result = told("-m", "benchmarks.ranks", "demo", *sizes)
    assert len(result["runs"]) == 3
    answers = {tuple(runs[0]["tokens"]) for runs in result["runs"].values()}
    assert len(answers) == 1
    assert len(answers.pop()) == 5
