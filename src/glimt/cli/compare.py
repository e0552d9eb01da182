"""`glimt evaluate`, `precision`, `predict`, `judge`: what users compare. Options and help only."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from glimt.cli.options import (
    ASK,
    ENGINE,
    OUT,
    RUN,
    AsJson,
    Commands,
    Fields,
    Language,
    Report,
    Threads,
    Verbose,
    gathers,
    max_tokens_by_default,
    option,
)

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
    report: Report = None,
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
            report=report,
            is_verbose=verbose,
        )
    )


@compare_app.command()
@gathers(engine=ENGINE)
def precision(
    *,
    engine: Fields,
    against: Annotated[
        str | None,
        option(
            "--against",
            "What to compare with: a dtype (nothing is quantised then), changes such as "
            "quant=none,isa=none, or a file that --record wrote. Default: float32.",
            RUN,
            "WHAT",
        ),
    ] = None,
    record: Annotated[
        Path | None,
        option("--record", "Store this setting as a reference; compare nothing.", RUN, "FILE"),
    ] = None,
    images: Annotated[
        Path | None,
        option("--images", "Ask about the pictures of a folder. Default: drawn ones.", ASK, "DIR"),
    ] = None,
    prompt: Annotated[
        str | None,
        option("--prompt -p", "What to ask of each. Default: four questions in turn.", ASK, "TEXT"),
    ] = None,
    num_probes: Annotated[
        int, option("--probes", "Ask at least so many questions.", RUN, "N")
    ] = 64,
    num_tokens: Annotated[
        int,
        option("--tokens", "And until their answers have so many tokens, 512 at most.", RUN, "N"),
    ] = 2000,
    max_tokens: Annotated[int, option("--max-tokens", "Of one answer.", RUN, "N")] = 32,
    num_staged: Annotated[
        int, option("--stages", "Watch every stage of so many questions.", RUN, "N")
    ] = 4,
    seed: Annotated[int, option("--seed", "Of the drawn pictures.", RUN, "S")] = 0,
    report: Report = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Tell how far a setting is from another one, where first, and whether too far (status 1)."""
    from glimt.commands.precision import PrecisionJob, run
    from glimt.evaluate.recording import RecordingSize

    size = RecordingSize(
        num_probes=num_probes,
        num_tokens=num_tokens,
        max_tokens=max_tokens,
        num_staged=num_staged,
    )
    job = PrecisionJob(
        engine=engine,
        against=against,
        record=record,
        images=images,
        prompt=prompt,
        size=size,
        seed=seed,
        report=report,
        as_json=as_json,
        is_verbose=verbose,
    )
    if not run(job):
        raise typer.Exit(1)


@compare_app.command()
@gathers(engine=ENGINE, sampling=max_tokens_by_default(256))
def predict(
    *,
    images: Annotated[
        str | None,
        option(
            "--images",
            "A folder of pictures, asked in the order of their names. Default: three pictures "
            "drawn here, each with its own question.",
            ASK,
            "DIR",
        ),
    ] = None,
    prompt: Annotated[
        str | None,
        option(
            "--prompt -p",
            "What is asked about each picture. Default: 描述这张图片. For glimt judge ask in "
            "English, and for one short sentence.",
            ASK,
            "TEXT",
        ),
    ] = None,
    lang: Language = "auto",
    engine: Fields,
    sampling: Fields,
    batch: Annotated[
        int,
        option(
            "--batch",
            "How many pictures of --images are in the engine together; drawn ones are asked one "
            "after another.",
            RUN,
            "N",
        ),
    ] = 8,
    restart: Annotated[
        bool,
        option("--restart", "Ask all pictures anew, those that FILE answers already too.", RUN),
    ] = False,
    out: Annotated[
        Path | None,
        option(
            "--out",
            "The predictions, one JSON object of paths and answers; what FILE holds of other "
            "pictures stays. Default: predict_result.json, and none for the drawn pictures.",
            OUT,
            "FILE",
        ),
    ] = None,
    report: Report = None,
    as_json: AsJson = False,
) -> None:
    """Answer one question about every picture of a folder; greedy, at most 256 tokens each.

    Sampled if --temperature, --top-p, --top-k, --min-p or --seed is given. A stopped run goes on
    where it was.
    """
    from glimt.commands.predict import run
    from glimt.commands.predict_job import PredictJob

    is_whole = run(
        PredictJob(
            engine=engine,
            sampling=sampling,
            images=images,
            prompt=prompt,
            language=lang,
            out=out,
            batch=batch,
            restarts=restart,
            report=report,
            as_json=as_json,
        )
    )
    if not is_whole:
        raise typer.Exit(1)


JUDGE = "Judge"


@compare_app.command()
def judge(
    *,
    predictions: Annotated[
        list[Path],
        option(
            "--predictions",
            "What glimt predict or MindIE wrote; given twice, the two are compared.",
            ASK,
            "FILE",
        ),
    ],
    other: Annotated[
        Path | None,
        typer.Argument(metavar="FILE", help="The second file, after the first one."),
    ] = None,
    images: Annotated[
        str | None,
        option(
            "--images", "The folder that each key is joined with; an absolute key wins.", ASK, "DIR"
        ),
    ] = None,
    captions: Annotated[
        Path | None,
        option(
            "--captions",
            "Reference captions, one JSON object a line (file, captions): adds CIDEr-D, BLEU, "
            "ROUGE-L, exact match.",
            ASK,
            "FILE",
        ),
    ] = None,
    weights: Annotated[
        Path | None,
        option(
            "--weights",
            "open_clip_pytorch_model.bin (or .safetensors) in open_clip's names, or a Hugging "
            "Face CLIP folder. May be left out if captions judge.",
            JUDGE,
            "PATH",
        ),
    ] = None,
    tokenizer: Annotated[
        Path | None,
        option(
            "--tokenizer",
            "bpe_simple_vocab_16e6.txt.gz, which open_clip's wheel ships; needed with an "
            "open_clip file.",
            JUDGE,
            "FILE",
        ),
    ] = None,
    architecture: Annotated[
        str | None,
        option(
            "--architecture",
            "Of an open_clip file: ViT-H-14, ViT-B-32-quickgelu … or an open_clip_config.json. "
            "Default: that file beside the weights, else what their shapes tell.",
            JUDGE,
            "NAME",
        ),
    ] = None,
    batch: Annotated[
        int, option("--batch", "How many pictures go through the CLIP together.", RUN, "N")
    ] = 16,
    threads: Threads = None,
    seed: Annotated[int, option("--seed", "Seed of the bootstrap.", RUN, "S")] = 0,
    csv: Annotated[
        Path | None,
        option("--csv", "Write every picture's answers and figures to this file.", OUT, "FILE"),
    ] = None,
    report: Report = None,
    as_json: AsJson = False,
) -> None:
    """Judge answers about pictures with a CLIP, with reference captions, or both; compare two."""
    from glimt.commands.judge import JudgeJob, run

    run(
        JudgeJob(
            predictions=[*predictions, *([other] if other else [])],
            weights=weights,
            tokenizer=tokenizer,
            architecture=architecture,
            images=images,
            captions=captions,
            batch=batch,
            seed=seed,
            num_threads=threads,
            csv=csv,
            report=report,
            as_json=as_json,
        )
    )
