"""An evaluation as a document: accuracies, divergence, and what could not be answered."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from glimt.evaluate.forced import Divergence
from glimt.evaluate.tasks import Evaluation, Tally
from glimt.reports.document import Document, Paragraph, Plot, Section, Table
from glimt.reports.plots import Axis, draw_bars


@dataclass(frozen=True, slots=True)
class Failure:
    """A question that counts as wrong because it could not be asked or answered."""

    question_id: str
    task: str
    language: str
    why: str


@dataclass(frozen=True, slots=True)
class Asked:
    """What was asked: of which folder, compared with what, and of how many questions.

    against: dtype of the reference; None without one
    limit:   questions of each task and language at most; None for all
    """

    folder: str
    against: str | None
    limit: int | None


def status_line(found: Evaluation, asked: Asked) -> str:
    """One sentence: how much was asked, how much of it is right, and what failed."""
    num = sum(tally.asked for tally in found.tallies)
    right = sum(tally.right for tally in found.tallies)
    failed = sum(tally.failed for tally in found.tallies)
    said = f"{num:,} questions asked, {right / num:.1%} answered right"
    part = f" (only the first {asked.limit} of each task and language)" if asked.limit else ""
    if failed:
        return f"With errors: {said}, {failed} could not be asked or answered{part}"
    return f"{'Part' if asked.limit else 'Whole'}: {said}{part}"


def evaluation_document(
    found: Evaluation, asked: Asked, failures: Sequence[Failure], facts: Mapping[str, str]
) -> Document:
    """The whole report. facts: of the run, as every report tells them."""
    return Document(
        title="Right answers",
        status=status_line(found, asked),
        is_whole=not failures and asked.limit is None,
        facts={"questions": asked.folder, "decoding": "greedy", **facts},
        sections=tuple(_sections(found, asked, failures)),
    )


def _sections(found: Evaluation, asked: Asked, failures: Sequence[Failure]) -> Iterator[Section]:
    yield _accuracies(found.tallies, asked.against)
    yield _plot(found.tallies)
    if found.divergence and asked.against:
        yield _divergence(found.divergence, asked.against)
    if failures:
        rows = tuple((each.question_id, each.task, each.language, each.why) for each in failures)
        headings = ("question", "task", "language", "why")
        yield Table("Questions that failed", headings, rows, "They count as wrong.")
    else:
        yield Paragraph("Every question could be asked and answered.")


def _accuracies(tallies: Sequence[Tally], against: str | None) -> Table:
    more = (f"as {against}",) if against else ()
    headings = ("task", "language", "asked", "right", "accuracy", "failed", *more)
    marked = frozenset(i for i, tally in enumerate(tallies) if tally.failed)
    note = "An answer is right if it equals the only right one, character by character."
    return Table("Accuracy", headings, tuple(map(_row, tallies)), note, marked)


def _row(tally: Tally) -> tuple[str, ...]:
    agreed = () if tally.agreed is None else (f"{tally.agreed / tally.asked:.1%}",)
    return (
        tally.task,
        tally.language,
        f"{tally.asked:,}",
        f"{tally.right:,}",
        f"{tally.accuracy:.1%}",
        f"{tally.failed:,}",
        *agreed,
    )


def _plot(tallies: Sequence[Tally]) -> Plot:
    """A bar for each task and language; none where it was not asked."""
    tasks = sorted({tally.task for tally in tallies})
    shares = {(tally.task, tally.language): 100 * tally.accuracy for tally in tallies}
    groups = [
        (language, [shares.get((task, language), math.nan) for task in tasks])
        for language in sorted({tally.language for tally in tallies})
    ]
    drawn = draw_bars(tasks, groups, Axis("right answers (%)"))
    said = "Share of right answers by task and language."
    return Plot("Accuracy by task and language", "accuracy", drawn, said)


def _divergence(far: Divergence, against: str) -> Table:
    rows = (
        ("tokens compared", f"{far.num_tokens:,}"),
        ("mean KL divergence", f"{far.mean_kl:.3e} nats"),
        ("its 99th percentile", f"{far.p99_kl:.3e} nats"),
        ("same likeliest token", f"{far.top1:.3%}"),
    )
    note = "Along the reference's own greedy answers: KL(reference || this setting)."
    return Table(f"Divergence from {against}, not quantised", ("", ""), rows, note)
