"""int8: eight bits per weight, one scale per output channel; activations stay as they are.

Symmetric, rounded to nearest: at 127 steps a search for a better scale gains nothing that shows.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from glimt.quant.base import Parts, QuantFormat, QuantisedWeight, StoredTensor, by_rows

MOST = 127  # -128 is not used: the negative of a value is then a value too


class Int8(QuantFormat):
    """A scale for each row: the largest magnitude over 127."""

    def __init__(self, name: str, quantises_x: bool) -> None:
        self.name = name
        self.quantises_x = quantises_x

    def quantise(self, weight: Tensor) -> QuantisedWeight:
        """[n, k] of any float dtype."""
        values, scales = by_rows(weight, round_rows)
        return self._weight(values, scales, *weight.shape)

    def stored(self, n: int, k: int) -> Mapping[str, StoredTensor]:
        """Values, and float32 scales."""
        return {
            ".values": StoredTensor((n, k), torch.int8),
            ".scales": StoredTensor((n,), torch.float32),
        }

    def parts(self, weight: QuantisedWeight) -> dict[str, Tensor]:
        """As they are."""
        return {".values": weight.values, ".scales": weight.scales}

    def restore(self, parts: Parts, n: int, k: int) -> QuantisedWeight:
        """As they are."""
        return self._weight(parts[".values"], parts[".scales"], n, k)

    def _weight(self, values: Tensor, scales: Tensor, n: int, k: int) -> QuantisedWeight:
        return QuantisedWeight("int8", values, scales, None, 0, n, k, self.quantises_x)


def round_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """[m, k] float32 -> int8 values and float32 scales [m]; a row of zeros has scale 0."""
    scales = rows.abs().amax(1) / MOST
    steps = rows / torch.where(scales > 0, scales, 1.0)[:, None]
    return steps.round().clamp(-MOST, MOST).to(torch.int8), scales


FORMATS = (Int8("int8", quantises_x=False),)
