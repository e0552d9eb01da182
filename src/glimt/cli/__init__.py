"""The command line: options and help. The work is in commands/, loaded when a command runs.

Nothing here imports torch, so that `glimt --help` and the completion of a shell are instant.
"""

from __future__ import annotations

import io
import logging
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from glimt import __version__
from glimt.cli.bench import bench_app
from glimt.cli.cluster import cluster_app
from glimt.cli.compare import compare_app
from glimt.cli.export import export_app
from glimt.cli.options import (
    ASK,
    ENGINE,
    OUT,
    SAMPLE,
    SAMPLING,
    AsJson,
    Commands,
    Fields,
    Images,
    Language,
    System,
    Verbose,
    gathers,
    option,
)
from glimt.cli.serve import serve_app

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Run the GLM vision-language models, VisualGLM-6B and GLM-4v-9B.",
)


def main() -> None:
    """The entry point of the installed command."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed, as by >&-
            nothing = open(os.devnull, mode, encoding="utf-8")  # noqa: SIM115 open until the end
            setattr(sys, name, nothing)
    for stream in (sys.stdout, sys.stderr):
        # Where the terminal is not UTF-8, an answer with question marks beats a traceback.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    if "WORLD_SIZE" in os.environ and os.environ.get("RANK", "0") != "0":
        # torchrun starts one command for all ranks; those but the first are told by it what to do.
        from glimt.ranks import main as serve_rank

        sys.exit(serve_rank())
    app(prog_name="glimt")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"glimt {__version__}")
        raise typer.Exit


@app.callback()
def root(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show log lines, and the traceback of every error.")
    ] = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    """What comes before the command."""
    if debug:
        logging.basicConfig(level=logging.INFO, stream=sys.stderr)
        logging.getLogger("glimt").setLevel(logging.DEBUG)


# --- commands --------------------------------------------------------------------------------


@app.command()
@gathers(engine=ENGINE, sampling=SAMPLING)
def generate(
    *,
    engine: Fields,
    prompt: Annotated[
        str | None,
        option("--prompt -p", "The question; - reads it from standard input.", ASK, "TEXT"),
    ] = None,
    messages: Annotated[
        Path | None,
        option(
            "--messages",
            "A JSON file with a whole conversation, instead of --prompt.",
            ASK,
            "FILE",
        ),
    ] = None,
    image: Images = None,
    system: System = None,
    lang: Language = "auto",
    sampling: Fields,
    n: Annotated[int, option("--n -n", "How many answers, at most 64.", SAMPLE, "N")] = 1,
    logprobs: Annotated[
        int | None,
        option("--logprobs", "With --json: log-probabilities, and the K likeliest.", SAMPLE, "K"),
    ] = None,
    prompt_logprobs: Annotated[
        int | None,
        option("--prompt-logprobs", "The same of the prompt's own tokens.", SAMPLE, "K"),
    ] = None,
    as_json: AsJson = False,
    quiet: Annotated[bool, option("--quiet -q", "Nothing but the answer.", OUT)] = False,
    verbose: Verbose = False,
) -> None:
    """Answer one question about pictures or text."""
    from glimt.commands.generate import GenerateJob
    from glimt.commands.generate import generate as run

    job = GenerateJob(
        engine=engine,
        sampling={**sampling, "n": n, "logprobs": logprobs, "prompt_logprobs": prompt_logprobs},
        prompt=prompt,
        messages=messages,
        images=tuple(image or ()),
        system=system,
        language=lang,
        as_json=as_json,
        is_quiet=quiet,
        is_verbose=verbose,
    )
    run(job)


@app.command()
@gathers(engine=ENGINE, sampling=SAMPLING)
def chat(
    *,
    engine: Fields,
    image: Images = None,
    system: System = None,
    lang: Language = "auto",
    sampling: Fields,
    verbose: Verbose = False,
) -> None:
    """Talk about pictures; /help inside lists what else can be typed."""
    from glimt.commands.chat import ChatJob
    from glimt.commands.chat import chat as run

    job = ChatJob(
        engine=engine,
        sampling=sampling,
        images=tuple(image or ()),
        system=system,
        language=lang,
        is_verbose=verbose,
    )
    run(job)


@app.command()
def inspect(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="A model folder; or demo, demo-visualglm.")
    ],
    as_json: AsJson = False,
) -> None:
    """Tell what a model folder holds, what it takes to run, and what is wrong with it."""
    from glimt.commands.show import show_checkpoint

    if not show_checkpoint(folder, as_json):
        raise typer.Exit(1)


@app.command()
def convert(
    source: Annotated[
        Path, typer.Argument(metavar="SRC", help="VisualGLM's SAT folder, or its .pt file.")
    ],
    target: Annotated[
        Path, typer.Argument(metavar="DST", help="The folder to write; new or empty.")
    ],
    qkv_layout: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Order of the source's query, key and value rows: auto, blocks or interleaved.",
        ),
    ] = "auto",
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH", help="ice_text.model or its folder; else looked for beside SRC."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make a model folder of a VisualGLM checkpoint in its SAT form."""
    from glimt.commands.show import convert_with_bar

    convert_with_bar(source, target, qkv_layout, tokenizer, as_json)


@app.command()
def quantize(
    source: Annotated[
        Path, typer.Argument(metavar="SRC", help="A model folder; or demo, demo-visualglm.")
    ],
    target: Annotated[
        Path, typer.Argument(metavar="DST", help="The folder to write; new or empty.")
    ],
    blocks: Annotated[
        str,
        typer.Option(
            "--format",
            metavar="NAME",
            help="Of the language model: none, int8, w8a8, int4, int4-g32, int4-g128, int4-asym …",
        ),
    ] = "int8",
    head: Annotated[
        str, typer.Option(metavar="NAME", help="Of the output head; auto: what suits --format.")
    ] = "auto",
    tower: Annotated[str, typer.Option(metavar="NAME", help="Of the vision tower.")] = "none",
    force: Annotated[
        bool, typer.Option("--force", help="Replace DST if it is a model folder.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Write a model folder with quantised weights; it loads in seconds and takes less memory."""
    from glimt.commands.show import quantize_with_bar

    quantize_with_bar(source, target, (blocks, head, tower), force, as_json)


app.add_typer(serve_app)
app.add_typer(cluster_app)
app.add_typer(compare_app)


@app.command()
def doctor(
    as_json: AsJson = False,
    limits: Annotated[
        bool,
        typer.Option("--limits", help="Measure what the machine reads and multiplies at most."),
    ] = False,
) -> None:
    """Tell what this machine can run, what is wrong, and how to mend it."""
    from glimt.commands.doctor import doctor as run

    if not run(as_json, limits):
        raise typer.Exit(1)


app.add_typer(export_app, name="export")
app.add_typer(bench_app, name="bench")
