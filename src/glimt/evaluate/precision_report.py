"""A comparison of two settings as rows of texts, and as a document."""

from __future__ import annotations

import math
from collections.abc import Mapping

from glimt.evaluate.gates import Setting
from glimt.evaluate.precision import Check, Precision, StageFigures
from glimt.evaluate.recording import Recording
from glimt.reports.document import Document, Paragraph, Plot, Table
from glimt.reports.plots import Axis, Series, draw_histogram, draw_lines

_FLOOR = 1e-9  # what a logarithm shows of no difference at all
_SIGNS = {True: "passes", False: "FAILS"}


def verdict(found: Precision) -> str:
    """One sentence: passes or fails, and where first."""
    failed = [check.name for check in found.checks if not check.passes]
    if found.passes:
        return f"PASS: all figures and stages within their lines ({found.num_tokens} tokens)"
    parts = [f"beyond their lines: {', '.join(failed)}"] if failed else []
    if drift := found.drift:
        parts.append(f"first stage that drifts: {drift.name}{_why(drift)}")
    else:
        parts.append("every stage of the prompt is within its line")
    return f"FAIL: {'; '.join(parts)}"


def _why(stage: StageFigures) -> str:
    if stage.problem:
        return f" ({stage.problem})"
    if stage.line is None:
        return f" (values differ by up to {stage.max_error:g}, none may)"
    return f" (cosine {stage.cosine_min:.6f}, at least {stage.line:g} is needed)"


# --- rows ------------------------------------------------------------------------------------


def check_rows(found: Precision) -> list[tuple[str, str, str, str]]:
    """Name, value, line and sign of each figure."""
    return [(c.name, _value(c.value), _line(c), _sign(c)) for c in found.checks]


def _value(value: float) -> str:
    """Near 1 what is missing matters, near 0 the magnitude."""
    return f"{value:.7f}" if 0.5 < value < 2 else f"{value:.2e}" if value else "0"


def _line(check: Check) -> str:
    return "" if check.line is None else f"{'≥' if check.is_least else '≤'} {check.line:g}"


def _sign(check: Check) -> str:
    return "" if check.line is None else _SIGNS[check.passes]


def stage_rows(found: Precision) -> list[tuple[str, ...]]:
    """Name, rows, cosines, largest error, line and sign of each stage."""
    return [
        (
            stage.name,
            str(stage.num_rows),
            f"{stage.cosine_min:.7f}",
            f"{stage.cosine_mean:.7f}",
            f"{stage.max_error:.2e}",
            "exact" if stage.line is None else f"≥ {stage.line:g}",
            stage.problem or _SIGNS[stage.passes],
        )
        for stage in found.stages
    ]


# --- the document ----------------------------------------------------------------------------


def document(
    found: Precision, reference: Recording, tested: Setting, facts: Mapping[str, str]
) -> Document:
    """The whole report; facts: of the tested run."""
    checks, stages = check_rows(found), stage_rows(found)
    failed = frozenset(i for i, check in enumerate(found.checks) if not check.passes)
    drifted = frozenset(i for i, stage in enumerate(found.stages) if not stage.passes)
    words = f"{tested.said()} against {reference.setting.said()}"
    asked = f"{found.num_probes} probes, {found.num_tokens} tokens of the reference's own answers"
    flat = "The reference is sure of nothing, as random weights are: KL and agreement say nothing."
    theirs = {f"reference: {name}": value for name, value in reference.facts.items()}
    return Document(
        title=f"Precision: {words}",
        status=f"Whole, no errors. {verdict(found)}",
        is_whole=found.passes,
        facts={**facts, **theirs},
        sections=(
            Paragraph(f"{asked}. Lines: {found.gate.name}."),
            *([Paragraph(flat)] if found.is_flat else []),
            Table("Figures", ("figure", "value", "line", ""), tuple(checks), marked=failed),
            _stage_plot(found),
            _kl_plot(found),
            Table(
                "Stages",
                ("stage", "rows", "cosine, least", "mean", "largest error", "line", ""),
                tuple(stages),
                marked=drifted,
            ),
        ),
    )


def _stage_plot(found: Precision) -> Plot:
    names = tuple(stage.name for stage in found.stages)
    places = list(range(len(names)))
    lost = [max(1 - stage.cosine_min, _FLOOR) for stage in found.stages]
    line = [_FLOOR if s.line is None else max(1 - s.line, _FLOOR) for s in found.stages]
    series = [Series("least of any row", places, lost), Series("line", places, line, is_limit=True)]
    axes = Axis("stage", ticks=_thinned(names)), Axis("1 - cosine", is_log=True)
    said = "What each stage has lost: one minus the least cosine of its rows, and its line."
    return Plot("Precision by stage", "precision-by-stage", draw_lines(series, *axes), said)


def _thinned(names: tuple[str, ...]) -> tuple[str, ...]:
    """Of many names every so manieth; the places between stay without one."""
    step = math.ceil(len(names) / 40)
    return tuple(name if i % step == 0 else "" for i, name in enumerate(names))


def _kl_plot(found: Precision) -> Plot:
    values = [math.log10(max(float(value), _FLOOR)) for value in found.tokens.kl]
    png = draw_histogram([("tokens", values)], Axis("log10 of the KL divergence, nats"))
    said = "How many tokens are how far from the reference; the dashed line is the mean logarithm."
    return Plot("KL divergence by token", "precision-kl", png, said)
