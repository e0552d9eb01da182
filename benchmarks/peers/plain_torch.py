"""The native kernels against plain torch, which multiplies as the original programs do.

usage: python -m benchmarks.peers.plain_torch glm-4v-9b --layers 4 --vision-layers 4 [--quant w8a8]

Two engines with the same random weights in one process, the second with GLIMT_ISA=none. They answer
the same request by turns, each time with a picture nobody has seen, so that both meet the machine
in the same state. Printed: median seconds and, of each pair of neighbours, the ratio; then one JSON
line. The plain engine has no quantisation: what is compared is a choice that a user has.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
from typing import Annotated

import numpy as np
import typer
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table

from glimt import LLM, SamplingParams
from glimt.types import RequestOutput

SIDE = 1120  # pixels of GLM-4v's pictures
FIGURES = ("picture", "prefill", "first token", "per token")


def open_engine(name: str, isa: str | None, quant: str, tower: str) -> LLM:
    """An engine on the kernels of one instruction set; None is the best there is."""
    if isa is None:
        os.environ.pop("GLIMT_ISA", None)
    else:
        os.environ["GLIMT_ISA"] = isa
    return LLM(name, dtype="bfloat16", quant=quant, quant_tower=tower, max_num_seqs=8)


def ask(llm: LLM, seed: int, num_tokens: int) -> RequestOutput:
    """One request with a picture of noise."""
    pixels = np.random.default_rng(seed).integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)
    parts = [
        {"type": "image", "image": Image.fromarray(pixels)},
        {"type": "text", "text": "what does the picture show, and what is unusual in it?"},
    ]
    sampling = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    return llm.chat([{"role": "user", "content": parts}], sampling)


def seconds_of(output: RequestOutput) -> dict[str, float]:
    """The figures of one answer."""
    times = output.timings
    per_token = times.decode_s / (output.usage.completion_tokens - 1)
    return dict(
        zip(FIGURES, (times.image_s, times.prefill_s, times.ttft_s, per_token), strict=True)
    )


def main(
    model: Annotated[str, typer.Argument(help="glm-4v-9b or visualglm-6b.")] = "glm-4v-9b",
    layers: Annotated[int, typer.Option(help="Of the language model.")] = 4,
    vision_layers: Annotated[int, typer.Option(help="Of the tower.")] = 4,
    quant: Annotated[str, typer.Option(help="Format of the native engine's blocks.")] = "none",
    quant_tower: Annotated[str, typer.Option(help="And of its tower.")] = "none",
    repeats: Annotated[int, typer.Option(help="Pairs after one to warm up.")] = 4,
    tokens: Annotated[int, typer.Option(help="Of each answer.")] = 12,
) -> None:
    """Measure by turns, print a table and one JSON line."""
    name = f"synthetic:{model},layers={layers},vision-layers={vision_layers}"
    native = open_engine(name, None, quant, quant_tower)
    plain = open_engine(name, "none", "none", "none")
    pairs = []
    for i in track(range(repeats + 1), "by turns", console=Console(stderr=True)):
        pairs.append([seconds_of(ask(llm, i, tokens)) for llm in (native, plain)])
    rows = {figure: _summary([(a[figure], b[figure]) for a, b in pairs[1:]]) for figure in FIGURES}
    table = Table("", "native s", "plain torch s", "ratio", "least … most")
    for figure, row in rows.items():
        table.add_row(
            figure, f"{row['native_s']:.3f}", f"{row['plain_s']:.3f}", f"{row['ratio']:.2f}",
            f"{row['least']:.2f} … {row['most']:.2f}",
        )  # fmt: skip
    Console().print(table)
    said = {"command": " ".join(sys.argv), "quant": quant, "quant_tower": quant_tower}
    print(json.dumps(said | {"pairs": repeats, "figures": rows}))


def _summary(pairs: list[tuple[float, float]]) -> dict[str, float]:
    ratios = [plain / native for native, plain in pairs]
    return {
        "native_s": statistics.median(native for native, _ in pairs),
        "plain_s": statistics.median(plain for _, plain in pairs),
        "ratio": statistics.median(ratios),
        "least": min(ratios),
        "most": max(ratios),
    }


if __name__ == "__main__":
    typer.run(main)
