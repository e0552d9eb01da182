"""A few minutes of training make a model that the engine serves and that sees garments."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from training.data.mixture import held_out_questions

from glimt import LLM, SamplingParams
from training import train

NUM_ASKED = 60


@pytest.mark.timeout(2700)  # two cores take two minutes, but others may use them too
def test_quick_training_beats_chance_by_far(
    tmp_path: Path, fashion: Path, font: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a training path that runs and learns nothing; a guess is right one time in ten.

    Fewer steps than a user's, which name four of ten; by chance 15 of 60 come once in 1,000 times.
    """
    monkeypatch.setattr(train, "QUICK", replace(train.QUICK, steps=100, tower_steps=30))
    train.main("visualglm", out=tmp_path, quick=True)
    llm = LLM(str(tmp_path), max_num_seqs=16)
    right = 0
    for sample in held_out_questions("garments", NUM_ASKED, 3, fashion=fashion):
        (exchange,) = sample.exchanges
        parts = [
            {"type": "image", "image": sample.image},
            {"type": "text", "text": exchange.question},
        ]
        answer = llm.chat(
            [{"role": "user", "content": parts}], SamplingParams(temperature=0, max_tokens=24)
        ).text
        right += answer == llm.engine.opened.processor.finish_text(exchange.answer)
    assert right >= NUM_ASKED * 0.25
