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

from benchmarks.peers import by_turns
from glimt import LLM


def open_engine(name: str, isa: str | None, quant: str, tower: str) -> LLM:
    """An engine on the kernels of one instruction set; None is the best there is."""
    if isa is None:
        os.environ.pop("GLIMT_ISA", None)
    else:
        os.environ["GLIMT_ISA"] = isa
    return by_turns.open_glimt(name, quant, tower)


def main(
    model: Annotated[str, typer.Argument(help="glm-4v-9b or visualglm-6b.")] = "glm-4v-9b",
    layers: by_turns.Layers = 4,
    vision_layers: by_turns.VisionLayers = 4,
    quant: by_turns.Quant = "none",
    quant_tower: by_turns.QuantTower = "none",
    repeats: by_turns.Repeats = 4,
    tokens: by_turns.Tokens = 12,
) -> None:
    """Measure by turns, print a table and one JSON line."""
    name = f"synthetic:{model},layers={layers},vision-layers={vision_layers}"
    native = open_engine(name, None, quant, quant_tower)
    plain = open_engine(name, "none", "none", "none")
    by_turns.compare(
        [lambda i: by_turns.ask(native, i, tokens), lambda i: by_turns.ask(plain, i, tokens)],
        ("native", "plain"),
        ("native", "plain torch"),
        repeats,
        {"quant": quant, "quant_tower": quant_tower},
    )


if __name__ == "__main__":
    typer.run(main)
