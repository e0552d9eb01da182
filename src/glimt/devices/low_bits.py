"""Products with matrices in few bits, in torch's operations, without a whole matrix in floats."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from glimt.devices.base import LowBitWeight, int8_steps, rounded_to_int8

_PART_ELEMENTS = 2**23  # of a matrix in floats at once: 120 MB with what is made on the way
_LEAST_ROWS = 32  # of an integer product: cuBLAS takes none of 16 rows or fewer


def low_bit_product(
    x: Tensor, weight: LowBitWeight, bias: Tensor | None, has_integers: bool
) -> Tensor:
    """[m, k] -> [m, n], in x's dtype: x Wᵀ + b.

    has_integers: torch multiplies int8 with int8 here; used where x is rounded row by row
    """
    if has_integers and _takes_integers(weight):
        return _integer_product(x, weight, bias)
    rounded = rounded_to_int8(x, weight.group) if weight.quantises_x else x
    out = x.new_empty(len(x), weight.n)
    step = max(1, _PART_ELEMENTS // weight.k)
    for start in range(0, weight.n, step):
        stop = min(start + step, weight.n)
        part = weight.rows(start, stop).dequantise().to(x.dtype)
        out[:, start:stop] = F.linear(rounded, part, None if bias is None else bias[start:stop])
    return out


def _takes_integers(weight: LowBitWeight) -> bool:
    """Source: the checks of torch._int_mm on a card."""
    return weight.quantises_x and not weight.group and not (weight.k % 8 or weight.n % 8)


def _integer_product(x: Tensor, weight: LowBitWeight, bias: Tensor | None) -> Tensor:
    """Exact sums of int8 products, scaled by the row's step and the weight's."""
    rounded, steps = (part[:, 0] for part in int8_steps(x, 0))  # one group: the row
    values = rounded.to(torch.int8)
    if len(x) < _LEAST_ROWS:
        values = F.pad(values, (0, 0, 0, _LEAST_ROWS - len(x)))
    sums = torch._int_mm(values, weight.values.t())[: len(x)]
    y = sums * steps * weight.scales
    # A row that is not finite has no integers; it stays what it is.
    y = y.masked_fill(~rounded.isfinite().all(-1, keepdim=True), float("nan"))
    return (y if bias is None else y + bias).to(x.dtype)
