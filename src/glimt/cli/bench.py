"""`glimt bench`: what users measure. Options and help only."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from glimt.cli.options import (
    ENGINE,
    MODEL,
    OUT,
    RUN,
    AsJson,
    Commands,
    Fields,
    Group,
    gathers,
    option,
)

bench_app = typer.Typer(
    cls=Commands, no_args_is_help=True, help="Measure how fast this machine is."
)
_SYNTHETIC: Group = {
    name: ENGINE[name]
    for name in (
        "dtype", "kv_dtype", "quant", "quant_head", "quant_tower", "device", "num_threads",
        "memory_limit_bytes",
    )
}  # fmt: skip


@bench_app.command("synthetic")
@gathers(settings=_SYNTHETIC)
def bench_synthetic(
    *,
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="glm-4v-9b, visualglm-6b, or a folder whose config.json gives the shapes.",
        ),
    ],
    layers: Annotated[
        int | None, option("--layers", "Of the language model. Default: all.", MODEL, "N")
    ] = None,
    vision_layers: Annotated[
        int | None, option("--vision-layers", "Of the vision tower. Default: all.", MODEL, "N")
    ] = None,
    settings: Fields,
    batch: Annotated[
        str,
        option(
            "--batch", "How many sequences decode together: sizes with commas between.", RUN, "N,N"
        ),
    ] = "1,2,4,8,10",
    output_len: Annotated[
        int, option("--output-len", "Tokens of each answer, at least 2.", RUN, "N")
    ] = 64,
    repeats: Annotated[
        int, option("--repeats", "Steady samples of each first token.", RUN, "N")
    ] = 5,
    seed: Annotated[int, option("--seed", "Seed of weights, texts and pictures.", RUN, "S")] = 0,
    as_json: AsJson = False,
    out: Annotated[
        Path | None, option("--out", "Write the JSON object to a file as well.", OUT, "FILE")
    ] = None,
) -> None:
    """Time a published model's shapes with random weights; nothing is downloaded."""
    from glimt.commands.bench import bench_synthetic as run

    run(
        model,
        layers,
        vision_layers,
        seed,
        batch,
        as_json,
        out,
        **settings,
        output_len=output_len,
        repeats=repeats,
    )
