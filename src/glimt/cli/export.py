"""`glimt export`: parts of a model as files for other programs. Options and help only."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from glimt.cli.options import MODEL, OUT, RUN, AsJson, Commands, Model, option

export_app = typer.Typer(
    cls=Commands, no_args_is_help=True, help="Write parts of a model for other programs."
)


@export_app.callback()
def export() -> None:
    """Write parts of a model for other programs."""


@export_app.command()
def vision(
    *,
    model: Model = "demo",
    to: Annotated[str, option("--to", "What to write: onnx or om.", RUN, "FORMAT")] = "onnx",
    output: Annotated[
        Path, option("--output -o", "The file to write, NAME.onnx or NAME.om.", OUT, "PATH")
    ],
    opset: Annotated[
        int, option("--opset", "Of the ONNX graph: 13 to 20; ATC takes up to 18.", RUN, "N")
    ] = 13,
    batch: Annotated[
        str,
        option("--batch", "Pictures at once: a number, or dynamic for any number.", RUN, "N"),
    ] = "1",
    dtype: Annotated[
        str,
        option("--dtype", "Of weights and output: float32 or float16.", MODEL, "TYPE"),
    ] = "float32",
    soc_version: Annotated[
        str | None,
        option("--soc-version", "With --to om: the chip, such as Ascend910B3.", RUN, "NAME"),
    ] = None,
    precision: Annotated[
        str | None,
        option(
            "--precision-mode",
            "With --to om: ATC's precision_mode_v2. Default: fp16 for float32, origin for float16.",
            RUN,
            "NAME",
        ),
    ] = None,
    print_only: Annotated[
        bool,
        option("--print-only", "With --to om: do not run ATC, only tell its command.", RUN),
    ] = False,
    check: Annotated[
        bool,
        option("--check/--no-check", "Compare with the torch tower through onnxruntime.", RUN),
    ] = True,
    force: Annotated[bool, option("--force", "Replace files that exist.", OUT)] = False,
    as_json: AsJson = False,
) -> None:
    """Write the vision tower as an offline model: pixels in, features out."""
    from glimt.commands.export import ExportJob, run

    job = ExportJob(
        model=model,
        to=to,
        output=output,
        opset=opset,
        batch=batch,
        dtype=dtype,
        soc_version=soc_version,
        precision=precision,
        force=force,
        checks=check,
        print_only=print_only,
    )
    run(job, as_json)
