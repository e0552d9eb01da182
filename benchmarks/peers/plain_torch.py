"""The native kernels against this package's own plain torch path.

usage: python -m benchmarks.peers.plain_torch glm-4v-9b --layers 4 --vision-layers 4 [--quant w8a8]

Two engines with the same random weights in one process, the second with GLIMT_ISA=none. They answer
the same request by turns, each time with a picture nobody has seen, so that both meet the machine
in the same state. Printed: median seconds and, of each pair of neighbours, the ratio; then one JSON
line. The plain engine has no quantisation: what is compared is a choice that a user has.
"""

from __future__ import annotations

import os
from typing import Annotated

import typer

from benchmarks.peers.by_turns import (
    Seconds,
    conversation,
    exactly,
    noise_picture,
    report,
    seconds_of,
    summarise,
    take_turns,
)
from glimt import LLM


def open_engine(name: str, isa: str | None, quant: str, tower: str) -> LLM:
    """An engine on the kernels of one instruction set; None is the best there is."""
    if isa is None:
        os.environ.pop("GLIMT_ISA", None)
    else:
        os.environ["GLIMT_ISA"] = isa
    return LLM(name, dtype="bfloat16", quant=quant, quant_tower=tower, max_num_seqs=8)


def main(
    model: Annotated[str, typer.Argument(help="glm-4v-9b or visualglm-6b.")] = "glm-4v-9b",
    layers: Annotated[int, typer.Option(help="Of the language model.")] = 4,
    vision_layers: Annotated[int, typer.Option(help="Of the tower.")] = 4,
    quant: Annotated[str, typer.Option(help="Format of the native engine's blocks.")] = "none",
    quant_tower: Annotated[str, typer.Option(help="And of its tower.")] = "none",
    repeats: Annotated[int, typer.Option(help="Pairs after one to warm up.")] = 4,
    tokens: Annotated[int, typer.Option(min=2, help="Of each answer.")] = 12,
) -> None:
    """Measure by turns, print a table and one JSON line."""
    name = f"synthetic:{model},layers={layers},vision-layers={vision_layers}"
    native = open_engine(name, None, quant, quant_tower)
    plain = open_engine(name, "none", "none", "none")

    def ask(llm: LLM, turn: int) -> Seconds:
        return seconds_of(llm.chat(conversation(noise_picture(turn)), exactly(tokens)))

    pairs = take_turns((lambda i: ask(native, i), lambda i: ask(plain, i)), repeats)
    said = {"quant": quant, "quant_tower": quant_tower, "pairs": repeats}
    report(summarise(pairs, ("native", "plain")), ("native", "plain torch"), said)


if __name__ == "__main__":
    typer.run(main)
