"""`glimt predict`: a folder of pictures, answered into a predictions file; resumable."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any

from glimt.commands.answer_file import AnswerFile, open_answers
from glimt.commands.console import count_bar, note, print_json, told_as_json, warn
from glimt.commands.predict_job import PredictJob, check_job
from glimt.commands.predict_scenes import predict_scenes, times
from glimt.commands.reporting import run_facts, write_report
from glimt.commands.running import load_engine
from glimt.engine import Engine
from glimt.evaluate.pictures import Folder, list_pictures
from glimt.evaluate.predict import Prediction, predict
from glimt.evaluate.predict_report import Predictions, predict_document
from glimt.evaluate.scenes import scenes

_SHOWN_NAMES = 5


def run(job: PredictJob) -> bool:
    """Ask, write, print; whether every picture has its answer.

    Raises ConfigError or RequestError for what can be mended before anything runs.
    """
    with told_as_json(job.as_json):
        check_job(job)
        engine, found = predict_scenes(job) if job.images is None else _of_folder(job, job.images)
    if job.as_json:
        print_json(_as_dict(job, found))
    else:
        _print(job, found)
    _report(job, engine, found)
    return not found.failed


def _of_folder(job: PredictJob, images: str) -> tuple[Engine | None, Predictions]:
    """What became of a folder; no engine is loaded where nothing is left to ask."""
    folder = list_pictures(images)
    _tell_others(folder.others)
    with open_answers(job.path, folder.pictures, job.settings, job.batch, job.restarts) as file:
        pictures = [picture for picture in folder.pictures if picture not in file.answers]
        skipped = len(folder.pictures) - len(pictures)
        if skipped:
            note(f"{job.path} answers {skipped} of {len(folder.pictures)} pictures already")
        if not pictures:
            return None, Predictions(job.asking.prompt, (), skipped, folder.others, 0.0, job.batch)
        engine = load_engine(job.config, job.as_json)
        return engine, _asked(engine, pictures, job, file, folder, skipped)


def _asked(
    engine: Engine,
    pictures: Sequence[str],
    job: PredictJob,
    file: AnswerFile,
    folder: Folder,
    skipped: int,
) -> Predictions:
    begun = time.monotonic()
    done = tuple(_taken(engine, pictures, job, file))
    seconds = time.monotonic() - begun
    return Predictions(job.asking.prompt, done, skipped, folder.others, seconds, job.batch)


def _taken(
    engine: Engine, pictures: Sequence[str], job: PredictJob, file: AnswerFile
) -> Iterator[Prediction]:
    """Every prediction; whatever ends the run early, the answers so far are in the file."""
    predicted = predict(engine, pictures, job.asking, job.batch)
    try:
        with count_bar("asking", len(pictures)) as on_done, closing(predicted):
            for each in predicted:
                if each.answer is None:
                    warn(f"{each.picture} has no answer: {each.error}")
                else:
                    file.add(each.picture, each.answer)
                if on_done:
                    on_done(1)
                yield each
    finally:
        file.save()


def _report(job: PredictJob, engine: Engine | None, found: Predictions) -> None:
    if job.report and engine is None:
        warn("no report is written: nothing was asked; --restart asks all pictures anew")
    elif job.report and engine:
        facts = run_facts(engine.opened, job.config, "each picture once")
        drawn = {scene.name: scene.picture for scene in scenes()}
        document = predict_document(found, facts, drawn if job.images is None else {})
        write_report(document, job.report, "predict")


def _tell_others(names: Sequence[str]) -> None:
    if names:
        shown = ", ".join(names[:_SHOWN_NAMES]) + (" …" if len(names) > _SHOWN_NAMES else "")
        are = "1 entry is no picture" if len(names) == 1 else f"{len(names)} entries are no picture"
        note(f"{are}, and skipped: {shown}")


def _print(job: PredictJob, found: Predictions) -> None:
    if found.answered:
        rates = f"{found.pictures_per_s:.2f} pictures/s · {found.tokens_per_s:.1f} tokens/s"
        note(f"{found.seconds:.1f} s · {rates} · {found.num_cut} cut at the longest answer")
    if job.images is None:
        first, later = times(found).values()
        print(f"picture process time: first {first:.3f} s, later {later:.3f} s")
    where = f"{job.path}: " if job.images or job.out else ""
    print(f"{where}{found.status}")


def _as_dict(job: PredictJob, found: Predictions) -> dict[str, Any]:
    drawn = {**times(found), "answers": _answers(found)} if job.images is None else {}
    return {
        "out": str(job.path) if job.images or job.out else None,
        "answered": len(found.answered),
        "skipped": found.skipped,
        "failed": [{"picture": each.picture, "reason": each.error} for each in found.failed],
        "not_pictures": list(found.others),
        "cut": found.num_cut,
        "tokens": found.num_tokens,
        "seconds": found.seconds,
        **drawn,
        "settings": job.settings,
    }


def _answers(found: Predictions) -> dict[str, str | None]:
    return {each.picture: each.answer for each in found.done}
