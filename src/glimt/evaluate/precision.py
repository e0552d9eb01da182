"""Two settings of one model along the same answers: how far apart, and where first.

Knows recordings and gates; nothing of engines, files and tables.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from glimt.evaluate.forced import compare
from glimt.evaluate.gates import FLOAT32, Gate
from glimt.evaluate.recording import Trace
from glimt.evaluate.stages import PATCHES, PIXELS

FEW_TOKENS = 2000  # below, the tail of the KL divergence says little
_FLAT = 0.05  # mean probability of the likeliest token: below, a model says nothing


@dataclass(frozen=True, slots=True, eq=False)
class TokenFigures:
    """Of every token of every answer, [num_tokens] float64 each.

    nll: of the answer's token, (reference, tested), nats
    error: the largest of any logit, as a share of the reference's range
    top: probability of the reference's likeliest token
    """

    cosine: Tensor
    kl: Tensor
    same_top: Tensor
    error: Tensor
    nll: tuple[Tensor, Tensor]
    top: Tensor


@dataclass(frozen=True, slots=True)
class StageFigures:
    """One stage over all probes that were watched.

    cosine_min, cosine_mean: row by row
    max_error: of any value
    relative_error: norm of all differences over the norm of the reference
    line:      the least cosine that passes; None: every value must be the same
    problem:   why nothing could be compared; "" if it could
    """

    name: str
    num_rows: int
    cosine_min: float
    cosine_mean: float
    max_error: float
    relative_error: float
    line: float | None
    problem: str = ""

    @property
    def passes(self) -> bool:
        """Within its line; NaN is not."""
        if self.problem:
            return False
        return self.max_error == 0 if self.line is None else self.cosine_min >= self.line


@dataclass(frozen=True, slots=True)
class Check:
    """One figure and its line; line: None where the pair has none, or where it says nothing.

    is_least: the figure must reach the line; else it must not pass it
    """

    name: str
    value: float
    line: float | None
    is_least: bool

    @property
    def passes(self) -> bool:
        """Within its line; NaN is not."""
        if self.line is None:
            return True
        return self.value >= self.line if self.is_least else self.value <= self.line


@dataclass(frozen=True, slots=True, eq=False)
class Precision:
    """What the comparison found.

    is_flat: the reference is sure of nothing, as random weights are: KL and agreement say nothing
    """

    gate: Gate
    checks: tuple[Check, ...]
    stages: tuple[StageFigures, ...]
    tokens: TokenFigures
    num_probes: int
    is_flat: bool

    @property
    def num_tokens(self) -> int:
        """Tokens compared."""
        return len(self.tokens.kl)

    @property
    def drift(self) -> StageFigures | None:
        """The first stage beyond its line."""
        return next((stage for stage in self.stages if not stage.passes), None)

    @property
    def passes(self) -> bool:
        """Every figure and every stage is within its line."""
        return self.drift is None and all(check.passes for check in self.checks)


def judge(pairs: Iterator[tuple[Trace, Trace]], gate: Gate) -> Precision:
    """Compare traces of the same probes, (reference, tested), one pair in memory at a time."""
    tokens: list[TokenFigures] = []
    stages: dict[str, list[_StagePair]] = {}
    for reference, tested in pairs:
        tokens.append(_token_figures(reference, tested.logits))
        for name, pair in _stage_pairs(reference.stages, tested.stages):
            stages.setdefault(name, []).append(pair)
    joined = _joined(tokens)
    is_flat = float(joined.top.mean()) < _FLAT
    checks = _checks(joined, gate, is_flat)
    return Precision(gate, checks, _stage_figures(stages, gate), joined, len(tokens), is_flat)


# --- tokens ----------------------------------------------------------------------------------


def _token_figures(reference: Trace, tested: Tensor) -> TokenFigures:
    ours, theirs = tested.double(), reference.logits.double()
    answer = torch.tensor(reference.token_ids)[:, None]
    p, q = theirs.log_softmax(-1), ours.log_softmax(-1)
    both = compare(theirs, ours)
    span = (theirs.amax(-1) - theirs.amin(-1)).clamp_min(1e-30)
    return TokenFigures(
        cosine=cosines(theirs, ours),
        kl=both.kl.clamp_min(0),  # rounding leaves a hair below
        same_top=both.same_top.double(),
        error=(ours - theirs).abs().amax(-1) / span,
        nll=(-p.gather(-1, answer)[:, 0], -q.gather(-1, answer)[:, 0]),
        top=p.amax(-1).exp(),
    )


def cosines(a: Tensor, b: Tensor) -> Tensor:
    """Of the rows of two [num_rows, width] float64; rows that are both zero are the same."""
    norms = a.norm(dim=-1) * b.norm(dim=-1)
    same = (a.abs().amax(-1) == 0) & (b.abs().amax(-1) == 0)
    return torch.where(same, 1.0, (a * b).sum(-1) / norms).clamp_max(1.0)


def _joined(parts: Sequence[TokenFigures]) -> TokenFigures:
    def all_of(name: str) -> Tensor:
        return torch.cat([getattr(part, name) for part in parts])

    nll = (torch.cat([part.nll[i] for part in parts]) for i in range(2))
    names = ("cosine", "kl", "same_top", "error", "top")
    reference, tested = nll
    return TokenFigures(nll=(reference, tested), **{name: all_of(name) for name in names})


def _checks(tokens: TokenFigures, gate: Gate, is_flat: bool) -> tuple[Check, ...]:
    def of_meaning(line: float | None) -> float | None:
        return None if is_flat and gate.name != FLOAT32.name else line

    reference, tested = tokens.nll
    p99 = float(np.quantile(tokens.kl.numpy(), 0.99))
    p1 = float(np.quantile(tokens.cosine.numpy(), 0.01))
    ratio = math.exp(min(700.0, float((tested - reference).mean())))
    return (
        Check("cosine of logits, least", float(tokens.cosine.min()), gate.cosine_min, True),
        Check("cosine of logits, 99 % reach", p1, gate.cosine_p1, True),
        Check("cosine of logits, mean", float(tokens.cosine.mean()), gate.cosine_mean, True),
        Check(
            "KL divergence, mean (nats)", float(tokens.kl.mean()), of_meaning(gate.mean_kl), False
        ),
        Check("KL divergence, p99 (nats)", p99, of_meaning(gate.p99_kl), False),
        Check("same likeliest token", float(tokens.same_top.mean()), of_meaning(gate.top1), True),
        Check("largest error / range", float(tokens.error.max()), gate.max_error, False),
        Check("perplexity ratio", ratio, of_meaning(gate.ppl_ratio), False),
    )


# --- stages ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class _StagePair:
    """Rows of both, float64; problem: why they cannot be compared."""

    reference: Tensor
    tested: Tensor
    problem: str = ""


def _stage_pairs(
    reference: Mapping[str, Tensor], tested: Mapping[str, Tensor]
) -> Iterator[tuple[str, _StagePair]]:
    for name, theirs in reference.items():
        ours = tested.get(name)
        if ours is None:
            yield name, _StagePair(theirs, theirs, "is missing in the tested setting")
        elif ours.shape != theirs.shape:
            shapes = f"{list(ours.shape)} against {list(theirs.shape)}"
            yield name, _StagePair(theirs, theirs, f"has another shape: {shapes}")
        else:
            yield name, _StagePair(theirs.double(), ours.double())


def _stage_figures(stages: Mapping[str, list[_StagePair]], gate: Gate) -> tuple[StageFigures, ...]:
    return tuple(_one_stage(name, pairs, gate) for name, pairs in stages.items())


def _one_stage(name: str, pairs: Sequence[_StagePair], gate: Gate) -> StageFigures:
    line = None if name == PIXELS else _line(name, gate)
    problem = next((pair.problem for pair in pairs if pair.problem), "")
    theirs = torch.cat([pair.reference for pair in pairs])
    ours = torch.cat([pair.tested for pair in pairs])
    along = cosines(theirs, ours)
    difference = ours - theirs
    relative = float(difference.norm() / theirs.norm().clamp_min(1e-30))
    return StageFigures(
        name=name,
        num_rows=len(theirs),
        cosine_min=float(along.min()),
        cosine_mean=float(along.mean()),
        max_error=float(difference.abs().max()),
        relative_error=relative,
        line=line,
        problem=problem,
    )


def _line(name: str, gate: Gate) -> float:
    """The tower's stages have the stricter line: nothing has been added up there yet."""
    of_picture = name == PATCHES or name.startswith("tower.")
    line = gate.tower_cosine if of_picture else gate.stage_cosine
    return 0.0 if line is None else line
