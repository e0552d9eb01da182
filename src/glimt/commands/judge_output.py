"""A judgement as a table, as a JSON object, and as CSV with a row for each picture."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from rich.table import Table

from glimt.commands.tables import figures
from glimt.evaluate.judge import BLEU, COSINE
from glimt.evaluate.judge_report import UNTOLD, bleu_rows
from glimt.evaluate.judge_words import Told, interval_text, line_result


def tables(told: Told, clip: str | None) -> Iterator[Table]:
    """Every figure with its variant; of two files also the differences with their intervals."""
    judged_by = f"judged by {clip}" if clip else "judged by captions"
    count = len(told.found.pictures)
    means = figures("figure", *told.labels, "variant", title=f"{count} pictures, {judged_by}")
    means.columns[-1].justify = "left"
    for each in told.found.figures:
        row = [f"{verdict.mean(each.name):.5f}" for verdict in told.found.verdicts]
        means.add_row(each.label, *row, each.variant)
    for label, variant, *values in bleu_rows(told):
        means.add_row(label, *values, variant)
    yield means
    if told.found.comparisons:
        yield _differences(told)


def _differences(told: Told) -> Table:
    first, second = told.labels
    title = f"{second} minus {first}, mean and 95 % interval"
    shown = figures("figure", "difference [interval]", "better", title=title)
    for each in told.found.figures:
        if compared := told.found.comparisons.get(each.name):
            shown.add_row(each.label, interval_text(compared), told.better(compared) or UNTOLD)
    return shown


def as_dict(
    told: Told, failed: Sequence[tuple[str, str]], clip: str | None, only_in: Sequence[int]
) -> dict[str, Any]:
    """The same as plain data; lists have one entry for each file."""
    found = told.found
    line = found.comparisons.get(COSINE)
    return {
        "judge": clip,
        "predictions": list(told.labels),
        "pictures": len(found.pictures),
        "only_in": list(only_in),
        "failed": [{"picture": picture, "reason": why} for picture, why in failed],
        "captioned": found.num_captioned,
        "cut": [verdict.num_cut for verdict in found.verdicts],
        "empty": [verdict.num_empty for verdict in found.verdicts],
        "figures": {each.name: _figure(told, each.name, each.variant) for each in found.figures},
        "bleu": [dict(zip(BLEU, v.bleu, strict=True)) if v.bleu else None for v in found.verdicts],
        "agreement": found.agreement if len(told.labels) == 2 else None,
        "ranked_by": told.ranking if found.comparisons else None,
        "winner": told.winner,
        "pass_line": line_result(line) if line else None,
    }


def _figure(told: Told, name: str, variant: str) -> dict[str, Any]:
    compared = told.found.comparisons.get(name)
    difference = asdict(compared) | {"has_winner": compared.has_winner} if compared else None
    means = [verdict.mean(name) for verdict in told.found.verdicts]
    return {"variant": variant, "means": means, "difference": difference}


def as_csv(told: Told) -> bytes:
    """A row for each picture: its key, then each file's answer and figures."""
    names = [each.name for each in told.found.figures]
    numbers = range(1, len(told.labels) + 1)
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    columns = [f"{name}_{i}" for i in numbers for name in ("answer", *names)]
    writer.writerow(["picture", *columns])
    for i, picture in enumerate(told.found.pictures):
        row = [picture.key]
        for answer, verdict in zip(picture.answers, told.found.verdicts, strict=True):
            row += [answer, *(_cell(float(verdict.figures[name][i])) for name in names)]
        writer.writerow(row)
    return stream.getvalue().encode("utf-8", "backslashreplace")


def _cell(value: float) -> str:
    """All digits that tell two figures apart; nothing where there is no figure."""
    return "" if math.isnan(value) else f"{value:.9g}"
