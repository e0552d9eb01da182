"""`glimt predict` without a folder: three drawn pictures, each with its fixed question."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

from glimt.commands.answer_file import open_answers
from glimt.commands.console import note, printable
from glimt.commands.predict_job import PredictJob
from glimt.commands.running import answer_request, facts, load_engine
from glimt.engine import Engine
from glimt.evaluate.predict import Prediction, prediction
from glimt.evaluate.predict_report import Predictions
from glimt.evaluate.scenes import Scene, scenes
from glimt.inputs.request import RequestOptions
from glimt.types import RequestOutput


def predict_scenes(job: PredictJob) -> tuple[Engine, Predictions]:
    """Ask one after the other; each answer is told with its times, and written if job.out is set.

    One at a time, so that the first picture's process time is that of a cold engine and the
    others' are those of a warm one.
    """
    engine = load_engine(job.config, job.as_json)
    say: Callable[[str], None] = note if job.as_json else _print
    begun = time.monotonic()
    done = tuple(_answers(engine, job, say))
    found = Predictions("its own question", done, 0, (), time.monotonic() - begun, 1)
    _write(job, found)
    return engine, found


def times(found: Predictions) -> dict[str, Any]:
    """Picture process time in seconds, of the first picture and, on average, of the later ones."""
    first, *later = [each.image_s for each in found.done]
    return {"image_s_first": first, "image_s_later": sum(later) / len(later)}


def _answers(engine: Engine, job: PredictJob, say: Callable[[str], None]) -> Iterator[Prediction]:
    for scene, question in zip(scenes(), job.questions, strict=True):
        output = _ask(engine, job, scene, question)
        answered = prediction(scene.name, output)
        said = answered.answer if answered.error is None else f"none: {answered.error}"
        say(f"{scene.name}\n  Q  {question}\n  A  {' '.join((said or '').split())}")
        say(f"  {facts(output.usage, output.timings)}")
        yield answered


def _ask(engine: Engine, job: PredictJob, scene: Scene, question: str) -> RequestOutput:
    parts = [{"type": "image", "image": scene.picture}, {"type": "text", "text": question}]
    options = RequestOptions(language=job.language)
    messages = [{"role": "user", "content": parts}]
    return answer_request(engine, engine.prepare_chat(messages, job.asking.sampling, options))


def _write(job: PredictJob, found: Predictions) -> None:
    """Three answers are asked anew every time, and take the place of earlier ones."""
    if job.out is None:
        return
    names = [each.picture for each in found.done]
    with open_answers(job.out, names, job.settings, len(names), restarts=True) as file:
        for each in found.answered:
            file.add(each.picture, each.answer or "")
        file.save()


def _print(text: str) -> None:
    print(printable(text), flush=True)
