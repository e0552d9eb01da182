"""Exact-match accuracy on the held-out questions: `python -m training.score DIR`.

The answers come from the engine as it is served, greedily, in batches.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from glimt.llm import LLM
from glimt.types import SamplingParams
from training.data.mixture import held_out_questions
from training.data.sample import Exchange, Sample

TASKS = ("garments", "scenes", "yes_no", "texts", "second_turns", "photos")
_BATCH = 64  # conversations answered together


@dataclass(frozen=True, slots=True)
class Score:
    """Right answers of one task in one language."""

    task: str
    language: str
    right: int
    asked: int

    @property
    def share(self) -> float:
        """Right answers over questions."""
        return self.right / max(1, self.asked)


def score(llm: LLM, task: str, samples: Iterator[Sample]) -> list[Score]:
    """Ask every sample's question and compare the answer, character by character."""
    counts: dict[str, list[int]] = {}
    while batch := list(islice(samples, _BATCH)):
        for sample, is_right in zip(batch, _judge(llm, batch), strict=True):
            tally = counts.setdefault(sample.language, [0, 0])
            tally[0] += is_right
            tally[1] += 1
    return [Score(task, language, *tally) for language, tally in sorted(counts.items())]


def _judge(llm: LLM, batch: Sequence[Sample]) -> list[bool]:
    """A second turn is asked on top of the right first answer, so that only it is judged."""
    asked = [_last(sample.exchanges[0]) for sample in batch]
    sampling = SamplingParams(temperature=0, max_tokens=48)
    outputs = llm.chat([conversation(sample) for sample in batch], sampling)
    expected = [llm.engine.opened.processor.finish_text(turn.answer) for turn in asked]
    return [output.text == text for output, text in zip(outputs, expected, strict=True)]


def _last(exchange: Exchange) -> Exchange:
    return exchange.follow_up or exchange


def conversation(sample: Sample) -> list[dict[str, Any]]:
    """A held-out sample as messages that end with the question to be judged."""
    exchange = sample.exchanges[0]
    picture = [{"type": "image", "image": sample.image}] if sample.image else []
    parts = [*picture, {"type": "text", "text": exchange.question}]
    messages: list[dict[str, Any]] = [{"role": "user", "content": parts}]
    if exchange.follow_up:
        messages.append({"role": "assistant", "content": exchange.answer})
        messages.append({"role": "user", "content": exchange.follow_up.question})
    return messages


def main(
    model: Annotated[Path, typer.Argument(help="Folder of a trained model.")],
    count: Annotated[int, typer.Option(help="Questions per task, half in each language.")] = 2000,
    photos: Annotated[Path | None, typer.Option(help="Folder of photographs to decline.")] = None,
    dtype: Annotated[str, typer.Option(help="To compute in.")] = "float32",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON line.")] = False,
) -> None:
    """Print the accuracy of each task in each language."""
    llm = LLM(str(model), dtype=dtype, max_num_seqs=_BATCH, enable_prefix_cache=False)
    tasks = [task for task in TASKS if photos or task != "photos"]
    scores = [
        found
        for task in track(tasks, "scoring", console=Console(stderr=True))
        for found in score(llm, task, held_out_questions(task, count, seed=1, photos=photos))
    ]
    if as_json:
        print(json.dumps({f"{s.task} {s.language}": s.share for s in scores}))
        return
    table = Table("task", "language", "right", "asked", "share")
    for s in scores:
        table.add_row(s.task, s.language, str(s.right), str(s.asked), f"{s.share:.1%}")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
