"""`glimt evaluate`: what users compare. Options and help only."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from glimt.cli.options import ENGINE, AsJson, Commands, Fields, Verbose, gathers

compare_app = typer.Typer(cls=Commands)


@compare_app.command()
@gathers(engine=ENGINE)
def evaluate(
    *,
    questions: Annotated[
        Path, typer.Argument(metavar="DIR", help="A folder with questions.jsonl and its pictures.")
    ],
    engine: Fields,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="TYPE", help="Compare with the same model in this dtype, not quantised."
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Ask at most N questions of each task and language. Default: all."
        ),
    ] = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Count right answers to a folder of questions, by task and language."""
    from glimt.commands.evaluate import EvaluateJob, run

    run(
        EvaluateJob(
            engine=engine,
            questions=questions,
            against=against,
            limit=limit,
            as_json=as_json,
            is_verbose=verbose,
        )
    )
