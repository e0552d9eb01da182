"""`main.py` of VisualGLM's Ascend port: python -m glimt.compat.visualglm --mode … --model_path P.

Knows its arguments and their defaults, and which command of glimt does the same.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

from glimt.compat.launch import run_glimt, say_ignored

MODES = ("run", "performance", "precision", "predict")
PREDICTIONS = "predict_result.json"
PRECISION_REPORT = "precision"  # a folder


def parser() -> argparse.ArgumentParser:
    """The original's arguments; the model folder has no default, being another on each machine."""
    made = argparse.ArgumentParser(
        prog="python -m glimt.compat.visualglm",
        description="VisualGLM's main.py: talk to it, time it, prove it precise, compare answers.",
    )
    made.add_argument("--mode", choices=MODES, default="performance", help="default: performance")
    made.add_argument("--model_path", required=True, metavar="P", help="the model folder")
    made.add_argument("--device_id", metavar="N", help="a card's number; ignored on a processor")
    return made


def translated(mode: str, model_path: str) -> list[str]:
    """The arguments of `glimt` that do what a mode did; files go where the original puts them.

    The batch sizes of "performance" are the four that the original's README tells.
    """
    model = ["-m", model_path]
    commands = {
        "run": ["chat", *model],
        "performance": ["bench", "performance", *model, "--out", "."],
        "precision": ["precision", *model, "--report", PRECISION_REPORT],
        "predict": ["predict", *model, "--out", PREDICTIONS],
    }
    return commands[mode]


def main(arguments: Sequence[str] | None = None) -> None:
    """Translate and run; arguments: None for those of the process."""
    given = parser().parse_args(arguments)
    is_device_given = given.device_id is not None
    say_ignored(os.environ, [f"--device_id {given.device_id}"] if is_device_given else [])
    run_glimt(translated(given.mode, given.model_path))


if __name__ == "__main__":
    main()
