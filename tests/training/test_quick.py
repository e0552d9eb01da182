"""`--quick`: minutes of training beat chance by far, from the first step to a checkpoint."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from training.data.garments import FASHION_FOLDER, NAMES
from training.data.texts import FONT
from training.held_out import write

from glimt.evaluate.questions import read_questions
from glimt.evaluate.tasks import evaluate
from glimt.llm import LLM

CHECKOUT = Path(__file__).parents[2]


@pytest.mark.timeout(900)
def test_quick_training_beats_chance_by_far(tmp_path: Path) -> None:
    """Catches a loop that learns nothing, and a checkpoint that is not what was trained."""
    for path, package in ((FASHION_FOLDER, "dataset-fashion-mnist"), (FONT, "fonts-wqy-microhei")):
        if not path.exists():
            pytest.skip(f"needs {path}; on Debian: apt-get install {package}")
    pytest.importorskip("easy_vqa", reason="needs easy-vqa, which is among the development tools")
    command = [sys.executable, "-m", "training.train", "visualglm", "--quick"]
    done = subprocess.run(
        [*command, "--out", tmp_path / "model"], cwd=CHECKOUT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "model").iterdir()} >= {"curves.png", "state.pt"}
    write(tmp_path / "held-out", 200, None)
    questions = [q for q in read_questions(tmp_path / "held-out") if q.task == "garments"]
    found = evaluate(LLM(str(tmp_path / "model"), dtype="float32"), questions)
    right = sum(tally.right for tally in found.tallies) / len(questions)
    assert right > 3 / len(NAMES)
