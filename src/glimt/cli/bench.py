"""`glimt bench`: what users measure. Options and help only."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from glimt.cli.bench_serve import bench_serve
from glimt.cli.options import (
    ENGINE,
    MODEL,
    OUT,
    RUN,
    AsJson,
    Commands,
    Fields,
    Group,
    Report,
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


# A draft gives several tokens in a step, so a batch with drafts is not static.
_STATIC: Group = {name: value for name, value in ENGINE.items() if name != "num_draft_tokens"}
Seed = Annotated[int, option("--seed", "Seed of texts and pictures.", RUN, "S")]
Restart = Annotated[
    bool,
    option("--restart", "Throw away what an earlier run left in the folder, and begin anew.", OUT),
]


@bench_app.command("performance")
@gathers(engine=_STATIC)
def bench_performance(
    *,
    engine: Fields,
    batch: Annotated[
        str, option("--batch", "How many requests run together: 1,2,4.", RUN, "N,N")
    ] = "1,2,4,8",
    input_len: Annotated[
        str,
        option(
            "--input",
            "Tokens of each prompt, template included and picture excluded.",
            RUN,
            "N,N",
        ),
    ] = "32,64,128,256,512,1024",
    output_len: Annotated[
        str, option("--output-len", "Tokens of each answer, at least 2.", RUN, "N,N")
    ] = "32,64,128,256,512,1024",
    repeats: Annotated[
        int, option("--repeats", "Runs of each row; medians are told.", RUN, "N")
    ] = 1,
    image: Annotated[
        str | None,
        option(
            "--image -i",
            "A picture in each prompt: a file, or random for noise. Default: text alone.",
            RUN,
            "PATH",
        ),
    ] = None,
    seed: Seed = 0,
    out: Annotated[
        Path,
        option("--out", "The folder of the CSV files; a stopped run goes on in it.", OUT, "DIR"),
    ] = Path("performance"),
    restart: Restart = False,
    report: Report = None,
    as_json: AsJson = False,
) -> None:
    """Time batch sizes by input and output lengths, as VisualGLM's --mode performance does."""
    from glimt.commands.performance import PerformanceCommand, run

    run(
        PerformanceCommand(
            engine=engine,
            batch=batch,
            input_len=input_len,
            output_len=output_len,
            repeats=repeats,
            seed=seed,
            image=image,
            out=out,
            restart=restart,
            report=report,
            as_json=as_json,
        )
    )


@bench_app.command("throughput")
@gathers(engine=_STATIC)
def bench_throughput(
    *,
    engine: Fields,
    batch: Annotated[
        str, option("--batch", "How many requests run together: 1,2,4.", RUN, "N,N")
    ] = "1,2,3,4,5,6,7,8,9,10",
    output_len: Annotated[
        int, option("--output-len", "Tokens of each answer, at least 2.", RUN, "N")
    ] = 256,
    image: Annotated[
        str, option("--image -i", "The picture: a file, or random for noise.", RUN, "PATH")
    ] = "random",
    prompt: Annotated[
        str, option("--prompt -p", "What is asked about it.", RUN, "TEXT")
    ] = "描述这张图片",
    seed: Seed = 0,
    out: Annotated[
        Path,
        option("--out", "The folder of the CSV files; a stopped run goes on in it.", OUT, "DIR"),
    ] = Path("throughput"),
    restart: Restart = False,
    report: Report = None,
    as_json: AsJson = False,
) -> None:
    """Time one picture and one prompt by batch size, as MindIE's --performance for GLM-4v does."""
    from glimt.commands.throughput import ThroughputCommand, run

    run(
        ThroughputCommand(
            engine=engine,
            batch=batch,
            output_len=output_len,
            image=image,
            prompt=prompt,
            seed=seed,
            out=out,
            restart=restart,
            report=report,
            as_json=as_json,
        )
    )


bench_app.command("serve")(bench_serve)
