"""`glimt judge`: one or two predictions files judged by a CLIP, by captions, or by both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from glimt.commands.console import count_bar, note, out_console, print_json, told_as_json, warn
from glimt.commands.judge_output import as_csv, as_dict, tables
from glimt.commands.reporting import (
    check_apart,
    check_file,
    check_folder,
    file_digest,
    files_digest,
    place_facts,
    write_output,
    write_report,
)
from glimt.devices.host import plan_threads
from glimt.errors import ConfigError
from glimt.evaluate.bootstrap import NUM_RESAMPLES
from glimt.evaluate.captions import References, read_captions
from glimt.evaluate.clip import Clip, load_clip
from glimt.evaluate.judge import judge
from glimt.evaluate.judge_files import Paired, read_pairs
from glimt.evaluate.judge_report import judge_document
from glimt.evaluate.judge_words import Told, labels_of, line_text, remarks, winner_text
from glimt.evaluate.predictions import read_origins


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgeJob:
    """What was asked for.

    weights:      an open_clip file, or a folder; None: captions alone judge
    architecture: of an open_clip file, where its shapes do not tell
    predictions:  one file or two
    images:       the folder that the keys are looked for in
    batch:        pictures that go through the CLIP together
    seed:         of the bootstrap
    csv:          a row for each picture
    """

    predictions: Sequence[Path]
    weights: Path | None = None
    tokenizer: Path | None = None
    architecture: str | None = None
    images: str | None = None
    captions: Path | None = None
    batch: int = 16
    seed: int = 0
    num_threads: int | None = None
    csv: Path | None = None
    report: Path | None = None
    as_json: bool = False


def run(job: JudgeJob) -> None:
    """Judge, print, write.

    Raises ConfigError, CheckpointError or MissingDependency for what can be mended; pictures and
    answers that cannot be judged are told, unless none can.
    """
    with told_as_json(job.as_json):
        _check(job)
        paired = read_pairs(job.predictions, job.images, by_name=job.weights is None)
        captions = read_captions(job.captions) if job.captions else None
        _tell_pairs(job, paired)
        clip = _load(job)
        told = _judged(job, paired, clip, captions)
    failed = (*paired.refused, *told.found.failed)
    name = clip.name if clip else None
    if job.as_json:
        print_json(as_dict(told, failed, name, paired.only_in))
    else:
        _print(told, name)
    _write(job, told, failed, clip)  # last: what was judged is told even if it cannot be written


def _check(job: JudgeJob) -> None:
    """Raise ConfigError for what is wrong with the options alone; makes the folders."""
    problems = [
        f"{name} is {value}; it must be {low} or more"
        for name, value, low in (
            ("batch", job.batch, 1),
            ("seed", job.seed, 0),
            ("threads", 1 if job.num_threads is None else job.num_threads, 1),
        )
        if value < low
    ]
    if not 1 <= len(job.predictions) <= 2:
        problems.append(
            f"predictions: {len(job.predictions)} files are given; one or two are judged"
        )
    if job.weights is None and job.captions is None:
        problems.append("give --weights (a CLIP), --captions (reference captions), or both")
    if job.weights is None:
        problems += [
            f"{name} belongs to --weights, which is not given"
            for name, value in (
                ("tokenizer", job.tokenizer),
                ("architecture", job.architecture),
                ("threads", job.num_threads),
            )
            if value is not None
        ]
    if job.images is not None and not Path(job.images).is_dir():
        problems.append(f"images: {job.images} is not a folder; name the one with the pictures")
    if problems:
        raise ConfigError("judge", problems)
    check_file(job.csv, "csv")
    check_apart(job.csv, "csv", _read_files(job))
    check_folder(job.report, "report")


def _read_files(job: JudgeJob) -> list[Path]:
    """Every file or folder that the options name to be read."""
    given = (*job.predictions, job.weights, job.tokenizer, job.captions)
    return [path for path in given if path is not None]


def _load(job: JudgeJob) -> Clip | None:
    if job.weights is None:
        return None
    torch.set_num_threads(plan_threads(job.num_threads).count)
    return load_clip(job.weights, job.tokenizer, job.architecture)


def _judged(job: JudgeJob, paired: Paired, clip: Clip | None, captions: References | None) -> Told:
    with count_bar("judging", len(paired.pictures) if clip else 0) as on_done:
        found = judge(paired.pictures, clip, captions, job.batch, job.seed, on_done)
    for picture, why in found.failed:
        warn(f"{picture} is not judged: {why}")
    if not found.pictures:
        said = f"none of {len(paired.pictures)} pictures can be read"
        raise ConfigError("images", [f"{said}; name the folder that holds them with --images"])
    if not found.figures:
        said = f"none of {len(paired.pictures)} pictures, {paired.pictures[0].name} for one"
        raise ConfigError("captions", [f"{job.captions} has captions of {said}"])
    return Told(labels_of([str(file) for file in job.predictions]), found)


def _tell_pairs(job: JudgeJob, paired: Paired) -> None:
    for key, why in paired.refused:
        warn(f"{key} is not judged: {why}")
    for file, count in zip(job.predictions, paired.only_in, strict=True):
        if count:
            note(f"{count} of the pictures in {file} are not in the other file, and left out")


# --- what comes out --------------------------------------------------------------------------


def _print(told: Told, clip: str | None) -> None:
    console = out_console()
    for table in tables(told, clip):
        console.print(table)
        console.print()
    if told.found.comparisons:
        console.print(winner_text(told), soft_wrap=True)
        if line := line_text(told):
            console.print(line, soft_wrap=True)
    for remark in remarks(told):
        note(remark)


def _write(job: JudgeJob, told: Told, failed: Sequence[tuple[str, str]], clip: Clip | None) -> None:
    if job.csv:
        write_output(job.csv, as_csv(told), "csv")
    if job.report:
        document = judge_document(told, failed, _facts(job, clip))
        write_report(document, job.report, "judge")


def _facts(job: JudgeJob, clip: Clip | None) -> dict[str, str]:
    """What the figures belong to: the judge's weights, the files, the captions, the machine."""
    judged_by = (
        {"judge": clip.name, "judge digest": files_digest(sorted(clip.files))} if clip else {}
    )
    files = {f"predictions {i + 1}": file for i, file in enumerate(job.predictions)}
    given = {**files, **({"captions": job.captions} if job.captions else {})}
    asked = {f"asked {i + 1}": _asked(file) for i, file in enumerate(job.predictions)}
    draws = f"each picture once; intervals from {NUM_RESAMPLES:,} resamples, seed {job.seed}"
    return {
        **judged_by,
        **{name: f"{file}, {file_digest(file)}" for name, file in given.items()},
        **{name: said for name, said in asked.items() if said},
        "settings": f"batch {job.batch}",
        "repeats and spread": draws,
        **place_facts(),
    }


def _asked(file: Path) -> str:
    """Model and prompt of a predictions file, if they stand beside it."""
    found = read_origins(file, "predictions").values()
    said = [f"{each.get('model')}: {each.get('prompt')}" for each in found]
    return "; ".join(dict.fromkeys(said))
