"""What all comparisons share: options, the request, turns in one process, table and JSON line.

A shared machine's speed moves by a factor of two within minutes, so both sides answer by turns and
each pair of neighbours gives a ratio; the medians of the seconds alone would compare two machines.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import numpy as np
import typer
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table

from glimt import LLM, SamplingParams
from glimt.types import RequestOutput

SIDE = 1120  # pixels of GLM-4v's pictures
QUESTION = "what does the picture show, and what is unusual in it?"
FIGURES = ("picture", "prefill", "first token", "per token")

Layers = Annotated[int, typer.Option(help="Of the language model.")]
VisionLayers = Annotated[int, typer.Option(help="Of the tower.")]
Quant = Annotated[str, typer.Option(help="Format of glimt's blocks.")]
QuantTower = Annotated[str, typer.Option(help="And of its tower.")]
Repeats = Annotated[int, typer.Option(min=1, help="Pairs after one to warm up.")]
Tokens = Annotated[int, typer.Option(min=2, help="Of each answer.")]

Seconds = Mapping[str, float]  # by figure
Rows = dict[str, dict[str, float]]  # by figure, then by key of the JSON line


def noise_picture(seed: int) -> Image.Image:
    """A picture that no cache holds."""
    pixels = np.random.default_rng(seed).integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def conversation(picture: Image.Image) -> list[dict[str, Any]]:
    """The one request that is measured."""
    parts = [{"type": "image", "image": picture}, {"type": "text", "text": QUESTION}]
    return [{"role": "user", "content": parts}]


def exactly(num_tokens: int) -> SamplingParams:
    """Likeliest tokens, and no stop before their number is reached."""
    return SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)


def open_glimt(name: str, quant: str, quant_tower: str) -> LLM:
    """glimt's side of a comparison: an engine with the model of that name."""
    return LLM(name, dtype="bfloat16", quant=quant, quant_tower=quant_tower, max_num_seqs=8)


def ask(llm: LLM, turn: int, num_tokens: int) -> Seconds:
    """What glimt's answer of a turn costs."""
    return seconds_of(llm.chat(conversation(noise_picture(turn)), exactly(num_tokens)))


def prompt_ids(llm: LLM, picture: Image.Image, num_tokens: int) -> Sequence[int]:
    """The same request as the original writes it: what the other side is asked."""
    request = llm.engine.prepare_chat(conversation(picture), exactly(num_tokens))
    return request.prompt.original_token_ids


def seconds_of(output: RequestOutput) -> Seconds:
    """The figures of an engine's answer."""
    times = output.timings
    per_token = times.decode_s / (output.usage.completion_tokens - 1)
    values = (times.image_s, times.prefill_s, times.ttft_s, per_token)
    return dict(zip(FIGURES, values, strict=True))


def compare(
    sides: Sequence[Callable[[int], Seconds]],
    names: tuple[str, str],
    headings: tuple[str, str],
    repeats: int,
    said: Mapping[str, Any],
) -> None:
    """Let two sides answer by turns and report; the arguments are those of the three below."""
    pairs = take_turns(sides, repeats)
    report(summarise(pairs, names), headings, {**said, "pairs": repeats})


def take_turns(
    sides: Sequence[Callable[[int], Seconds]], repeats: int
) -> list[tuple[Seconds, Seconds]]:
    """Let two sides answer by turns; the first pair warms up and is left out.

    sides: each takes the number of the turn, so that both show the same new picture in it
    """
    ours, theirs = sides
    pairs = []
    for i in track(range(repeats + 1), "by turns", console=Console(stderr=True)):
        pairs.append((ours(i), theirs(i)))
    return pairs[1:]


def summarise(pairs: Sequence[tuple[Seconds, Seconds]], names: tuple[str, str]) -> Rows:
    """Median seconds of both, and of the ratios of neighbours the median, the least and the most.

    names: what the two are called in the JSON line
    """
    rows: Rows = {}
    for figure in pairs[0][0]:
        of_both = [(ours[figure], theirs[figure]) for ours, theirs in pairs]
        ratios = [theirs / ours for ours, theirs in of_both]
        rows[figure] = {
            f"{name}_s": statistics.median(values)
            for name, values in zip(names, zip(*of_both, strict=True), strict=True)
        } | {"ratio": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}
    return rows


def report(rows: Rows, headings: tuple[str, str], said: Mapping[str, Any]) -> None:
    """Print the table for people and one JSON line for programs.

    headings: the two columns of seconds; said: what else the JSON line tells of the run
    """
    table = Table("", *(f"{heading} s" for heading in headings), "ratio", "least … most")
    for figure, row in rows.items():
        ours, theirs, ratio, least, most = row.values()
        table.add_row(
            figure, f"{ours:.3f}", f"{theirs:.3f}", f"{ratio:.2f}", f"{least:.2f} … {most:.2f}"
        )
    Console().print(table)
    print(json.dumps({"command": " ".join(sys.argv), **said, "figures": rows}))
