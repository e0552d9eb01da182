"""`glimt evaluate`: a folder of questions asked of a model in any setting."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glimt.commands.console import count_bar, out_console, print_json, told_as_json, warn
from glimt.commands.memory import note_plan
from glimt.commands.reporting import check_folder, run_facts, write_report
from glimt.commands.tables import figures
from glimt.errors import ConfigError
from glimt.evaluate.evaluation_report import Asked, Failure, evaluation_document, status_line
from glimt.evaluate.questions import Question, read_questions
from glimt.evaluate.tasks import BATCH, Evaluation, evaluate
from glimt.llm import LLM


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateJob:
    """What was asked for.

    engine:  fields of EngineConfig
    against: dtype of a reference to compare with, not quantised here; None for none
    limit:   questions of each task and language at most
    """

    engine: Mapping[str, Any]
    questions: Path
    against: str | None
    limit: int | None
    as_json: bool
    report: Path | None = None
    is_verbose: bool = False


def run(job: EvaluateJob) -> None:
    """Ask, count, print. Raises ConfigError for bad questions or settings."""
    failures: list[Failure] = []
    with told_as_json(job.as_json):
        found, facts = _found(job, failures)
    print_json(found.as_dict()) if job.as_json else _print(found, job)
    if job.report is not None:
        write_report(
            evaluation_document(found, _asked(job), failures, facts), job.report, "evaluate"
        )


def _asked(job: EvaluateJob) -> Asked:
    return Asked(str(job.questions), job.against, job.limit)


def _found(job: EvaluateJob, failures: list[Failure]) -> tuple[Evaluation, dict[str, str]]:
    """What came of it, and what the figures belong to where a report asks for that.

    failures: gets the questions that could not be asked or answered
    """
    if job.limit is not None and job.limit < 1:
        raise ConfigError("limit", [f"is {job.limit}; it must be at least 1"])
    check_folder(job.report, "report")
    questions = _limited(read_questions(job.questions), job.limit)
    llm = _load(job.engine)
    if job.is_verbose:
        note_plan(llm.engine)
    plain = {"dtype": job.against, "kv_dtype": "auto"}
    plain |= dict.fromkeys(("quant", "quant_head", "quant_tower"), "none")
    reference = _load({**job.engine, **plain}) if job.against else None

    def note_failure(question: Question, why: str) -> None:
        _warn_of(question, why)
        failures.append(Failure(question.id, question.task, question.language, why))

    with count_bar("asking", len(questions)) as on_done:
        found = evaluate(llm, questions, reference, on_done, note_failure)
    return found, _facts(llm, job) if job.report else {}


def _warn_of(question: Question, why: str) -> None:
    shown = ", ".join(question.pictures)
    warn(f"question {question.id} counts as wrong: {why}{f' ({shown})' if shown else ''}")


def _facts(llm: LLM, job: EvaluateJob) -> dict[str, str]:
    reference = f"the same model in {job.against}, not quantised" if job.against else "none"
    repeats = "one run: greedy answers are the same each time"
    engine = llm.engine
    return run_facts(engine.opened, engine.config, repeats, {"reference": reference})


def _load(engine: Mapping[str, Any]) -> LLM:
    """Questions share no prefix worth keeping, and each picture is asked about once."""
    return LLM(**engine, max_num_seqs=BATCH, enable_prefix_cache=False)


def _limited(questions: list[Question], limit: int | None) -> list[Question]:
    taken: dict[tuple[str, str], int] = {}
    kept = []
    for question in questions:
        key = question.task, question.language
        taken[key] = taken.get(key, 0) + 1
        if limit is None or taken[key] <= limit:
            kept.append(question)
    return kept


def _print(found: Evaluation, job: EvaluateJob) -> None:
    against = job.against
    more = (f"as {against}",) if against else ()
    table = figures("task", "language", "asked", "right", *more, title="answers")
    for tally in found.tallies:
        row = [tally.task, tally.language, str(tally.asked), f"{tally.accuracy:.1%}"]
        if tally.agreed is not None:
            row.append(f"{tally.agreed / tally.asked:.1%}")
        table.add_row(*row)
    console = out_console()
    console.print(table)
    console.print(status_line(found, _asked(job)), soft_wrap=True)
    if found.divergence:
        far = found.divergence
        console.print(
            f"from {against}, over {far.num_tokens:,} tokens: mean KL {far.mean_kl:.2e}, "
            f"99th percentile {far.p99_kl:.2e} nats, same likeliest token {far.top1:.2%}",
            soft_wrap=True,
        )
