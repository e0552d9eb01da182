"""int4: four bits per weight, a scale for each group of 32, 64 or 128 columns.

Symmetric: w = (q - 8) * scale. Eight steps on one side and seven on the other, the sign of the
scale says which: the side of the group's largest magnitude has eight.
Asymmetric: w = q * scale + offset.

No data is needed. Around the scale that just holds the largest weight, others are tried too, and
of each the least-squares scale for the steps it gives; the one with the smallest squared error
over the group is kept. Scales and offsets are rounded to bfloat16 before the last rounding of the
weights, which therefore takes that error in: files and kernels may hold 16 bits.

Activations are rounded to int8 over the same groups, which costs nothing that shows beside the
weights' four bits and keeps the product in integers; int4-a16 leaves them as they are.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from glimt.kernels.native import fit_groups
from glimt.quant.base import (
    Parts,
    QuantFormat,
    QuantisedWeight,
    StoredTensor,
    by_rows,
    pack_nibbles,
    padded,
)

STEPS = 15  # the largest nibble
MIDDLE = 8  # the nibble that stands for 0
_TRIED = tuple(1.1 - 0.06 * i for i in range(8))  # shares of the scale that just holds all


class Int4(QuantFormat):
    """Nibbles with a scale, and perhaps an offset, per group."""

    def __init__(
        self, name: str, group: int, has_offsets: bool = False, quantises_x: bool = True
    ) -> None:
        self.name = name
        self.group = group
        self.has_offsets = has_offsets
        self.quantises_x = quantises_x

    @property
    def head(self) -> str:
        """int8: four bits there cost as much again as all the blocks' do."""
        return "int8"

    def quantise(self, weight: Tensor) -> QuantisedWeight:
        """[n, k] of any float dtype."""
        values, scales, offsets = by_rows(weight, self._round_rows)
        return self._weight(values, scales, offsets, *weight.shape)

    def _round_rows(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        m, k = rows.shape
        filled = F.pad(rows, (0, padded(k, self.group) - k))
        groups = filled.view(-1, self.group)
        fitted = fit_groups(groups, self.has_offsets) or plain_fit(groups, self.has_offsets)
        values, scales, offsets = (part.view(m, -1) for part in fitted)
        return values, scales, offsets

    def stored(self, n: int, k: int) -> Mapping[str, StoredTensor]:
        """Scales are bfloat16 by their making; symmetric offsets follow from them."""
        whole = padded(k, self.group)
        of_groups = StoredTensor((n, whole // self.group), torch.bfloat16)
        offsets = {".offsets": of_groups} if self.has_offsets else {}
        values = StoredTensor((n, whole // 2), torch.uint8)
        return {".values": values, ".scales": of_groups} | offsets

    def parts(self, weight: QuantisedWeight) -> dict[str, Tensor]:
        """Scales and offsets in bfloat16."""
        parts = {".values": weight.values, ".scales": weight.scales.bfloat16()}
        if self.has_offsets and weight.offsets is not None:
            parts[".offsets"] = weight.offsets.bfloat16()
        return parts

    def restore(self, parts: Parts, n: int, k: int) -> QuantisedWeight:
        """Scales and offsets in float32 again."""
        scales = parts[".scales"].float()
        offsets = parts[".offsets"].float() if self.has_offsets else -MIDDLE * scales
        return self._weight(parts[".values"], scales, offsets, n, k)

    def _weight(
        self, values: Tensor, scales: Tensor, offsets: Tensor, n: int, k: int
    ) -> QuantisedWeight:
        return QuantisedWeight("int4", values, scales, offsets, self.group, n, k, self.quantises_x)


# --- rounding in plain torch; the kernels' fit_groups does the same ---------------------------


def plain_fit(groups: Tensor, has_offsets: bool) -> tuple[Tensor, Tensor, Tensor]:
    """[m, group] float32 -> nibbles [m, group / 2], scales and offsets [m]."""
    scales, offsets = (fit_asymmetric if has_offsets else fit_symmetric)(groups)
    return pack_nibbles(_steps(groups, scales, offsets)), scales, offsets


def fit_symmetric(groups: Tensor) -> tuple[Tensor, Tensor]:
    """[m, group] float32 -> scales and offsets [m], exact in bfloat16; offset = -8 scale."""
    at = groups.abs().argmax(1, keepdim=True)
    widest = groups.gather(1, at)[:, 0] / -MIDDLE
    best = _Best(groups)
    for share in _TRIED:
        for sign in (1, -1):
            scales = _bfloat16(sign * share * widest)
            best.offer(scales, -MIDDLE * scales)
            steps = _steps(groups, scales, -MIDDLE * scales) - MIDDLE
            fitted = (groups * steps).sum(1) / (steps * steps).sum(1).clamp(min=1)
            scales = _bfloat16(fitted)
            best.offer(scales, -MIDDLE * scales)
    return best.scales, best.offsets


def fit_asymmetric(groups: Tensor) -> tuple[Tensor, Tensor]:
    """[m, group] float32 -> scales and offsets [m], exact in bfloat16."""
    low, high = groups.amin(1), groups.amax(1)
    best = _Best(groups)
    for share in _TRIED:
        middle, half = (high + low) / 2, share * (high - low) / 2
        scales, offsets = _bfloat16(2 * half / STEPS), _bfloat16(middle - half)
        best.offer(scales, offsets)
        best.offer(*_regression(groups, _steps(groups, scales, offsets)))
    return best.scales, best.offsets


def _regression(groups: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
    """The least-squares line through (step, weight) of each group."""
    apart = steps - steps.mean(1, keepdim=True)
    slope = (apart * groups).sum(1) / (apart * apart).sum(1).clamp(min=1e-9)
    scales = _bfloat16(slope)
    return scales, _bfloat16(groups.mean(1) - scales * steps.mean(1))


class _Best:
    """The scales and offsets with the smallest squared error so far, group by group."""

    def __init__(self, groups: Tensor) -> None:
        self.groups = groups
        self.scales = groups.new_zeros(len(groups))
        self.offsets = groups.new_zeros(len(groups))
        self.error = groups.new_full((len(groups),), float("inf"))

    def offer(self, scales: Tensor, offsets: Tensor) -> None:
        steps = _steps(self.groups, scales, offsets)
        made = steps * scales[:, None] + offsets[:, None]
        error = (made - self.groups).square().sum(1)
        is_better = error < self.error
        self.error = torch.where(is_better, error, self.error)
        self.scales = torch.where(is_better, scales, self.scales)
        self.offsets = torch.where(is_better, offsets, self.offsets)


def _steps(groups: Tensor, scales: Tensor, offsets: Tensor) -> Tensor:
    """The nearest of 0 … 15 for each weight, float32; where the scale is 0, the middle."""
    divisor = torch.where(scales == 0, 1.0, scales)[:, None]
    steps = ((groups - offsets[:, None]) / divisor).round().clamp(0, STEPS)
    return torch.where(scales[:, None] == 0, float(MIDDLE), steps)


def _bfloat16(x: Tensor) -> Tensor:
    return x.bfloat16().float()


FORMATS = (
    Int4("int4", 64),
    Int4("int4-g32", 32),
    Int4("int4-g128", 128),
    Int4("int4-asym", 64, has_offsets=True),
    Int4("int4-asym-g32", 32, has_offsets=True),
    Int4("int4-asym-g128", 128, has_offsets=True),
    Int4("int4-a16", 64, quantises_x=False),
)
