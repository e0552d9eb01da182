"""What `glimt judge` found, as a report: figures, distributions, pictures with both answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from glimt.evaluate.bootstrap import NUM_RESAMPLES
from glimt.evaluate.judge import BLEU, PREFIX, Figure
from glimt.evaluate.judge_words import (
    Told,
    interval_text,
    line_text,
    remarks,
    winner_text,
)
from glimt.evaluate.pictures import card
from glimt.reports.document import Card, Cards, Document, Paragraph, Plot, Section, Table
from glimt.reports.plots import Axis, draw_histogram

MAX_CARDS = 60  # a report of more is too large for a browser to scroll
UNTOLD = "no difference shown"
_DRAWN = ("cosine", "clip_score", "cider_d")


def judge_document(
    told: Told, failed: Sequence[tuple[str, str]], facts: Mapping[str, str]
) -> Document:
    """The report. failed: pictures that were not judged, and why."""
    found = told.found
    sections: list[Section] = [_means(told)]
    if found.comparisons:
        sections += [_comparisons(told), Paragraph(_verdict(told))]
    sections += [Paragraph(f"{remark}.") for remark in remarks(told)]
    sections += [_plot(told, each) for each in found.figures if each.name in _DRAWN]
    sections.append(_cards(told))
    if failed:
        rows = frozenset(range(len(failed)))
        sections.append(Table("Not judged", ("picture", "why"), tuple(failed), marked=rows))
    title = "Judged answers about pictures"
    return Document(title, _status(told, failed), not failed, facts, tuple(sections))


def _status(told: Told, failed: Sequence[tuple[str, str]]) -> str:
    count = len(told.found.pictures)
    if failed:
        return f"Errors: {len(failed)} answers were not judged, {count} were"
    said = f" {winner_text(told)}" if told.found.comparisons else ""
    return f"Whole run: {count} pictures judged.{said}"


def _verdict(told: Told) -> str:
    return " ".join(filter(None, (winner_text(told), line_text(told))))


def _means(told: Told) -> Table:
    rows = [
        (each.label, each.variant, *(f"{v.mean(each.name):.5f}" for v in told.found.verdicts))
        for each in told.found.figures
    ]
    rows += bleu_rows(told)
    note = (
        f"Means over {len(told.found.pictures)} pictures; BLEU is of all answers together. The "
        f"prefix of CLIPScore and RefCLIPScore is '{PREFIX}'."
    )
    return Table("Figures", ("figure", "variant", *told.labels), tuple(rows), note)


def bleu_rows(told: Told) -> list[tuple[str, ...]]:
    """BLEU-1 to BLEU-4 of each file; none without captions."""
    if not told.found.verdicts[0].bleu:
        return []
    scores = [verdict.bleu for verdict in told.found.verdicts]
    return [
        (f"BLEU-{n + 1}", "of all answers together", *(f"{each[n]:.5f}" for each in scores))
        for n in range(len(BLEU))
    ]


def _comparisons(told: Told) -> Table:
    first, second = told.labels
    rows = tuple(
        (
            each.label,
            interval_text(compared),
            str(compared.num_pictures),
            told.better(compared) or UNTOLD,
        )
        for each in told.found.figures
        if (compared := told.found.comparisons.get(each.name))
    )
    headings = ("figure", "mean difference [95 % interval]", "pictures", "better")
    how = f"paired bootstrap, {NUM_RESAMPLES:,} resamples"
    note = f"{second} minus {first}, picture by picture; {how}."
    return Table("Difference", headings, rows, note)


def _plot(told: Told, figure: Figure) -> Plot:
    groups = [
        (label, [float(value) for value in verdict.figures[figure.name] if not np.isnan(value)])
        for label, verdict in zip(told.labels, told.found.verdicts, strict=True)
    ]
    said = f"{figure.label} of each answer ({figure.variant}); the dashed line is the mean."
    png = draw_histogram(groups, Axis(figure.label if figure.name != "cosine" else "cosine"))
    return Plot(f"Distribution: {figure.label}", f"judge_{figure.name}", png, said)


# --- pictures --------------------------------------------------------------------------------


def _cards(told: Told) -> Cards:
    order = _order(told)
    cards = [_card(told, i) for i in order[:MAX_CARDS]]
    by = next(each.label for each in told.found.figures if each.name == told.ranking)
    first = "largest differences" if len(told.labels) == 2 else "lowest"
    more = len(order) - MAX_CARDS
    note = f"{more} more are in the CSV file, if one was asked for." if more > 0 else ""
    return Cards(f"Pictures and answers, {first} of {by} first", tuple(filter(None, cards)), note)


def _order(told: Told) -> list[int]:
    """Worst first: where two files are furthest apart, or the lowest figure of one."""
    values = [verdict.figures[told.ranking] for verdict in told.found.verdicts]
    badness = -abs(values[1] - values[0]) if len(values) == 2 else values[0]
    return [int(i) for i in np.argsort(np.nan_to_num(badness, nan=np.inf), kind="stable")]


def _card(told: Told, i: int) -> Card | None:
    picture = told.found.pictures[i]
    answers = zip(told.labels, picture.answers, strict=True)
    lines = [(label, answer.strip() or "(empty)") for label, answer in answers]
    for figure in told.found.figures:
        values = [verdict.figures[figure.name][i] for verdict in told.found.verdicts]
        lines.append((figure.label.removeprefix("mean "), " / ".join(f"{v:.4f}" for v in values)))
    return card(picture.key, picture.path, lines)
