"""Matrices in few bits in the form in which an NPU's operators multiply with them.

int8    npu_weight_quant_batchmatmul: x stays in 16 bits
w8a8    npu_dynamic_quant and npu_quant_matmul: both sides in int8
int4    npu_weight_quant_batchmatmul with eight weights in an int32: x stays in 16 bits, also where
        the format would round it, for nothing would be gained
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from glimt.devices.base import LowBitWeight

_INT4_MIDDLE = 8  # the nibble that the operator takes for 0
_INT4_COLUMNS = 8  # in an int32


@dataclass(frozen=True, slots=True, eq=False)
class NpuWeight(ABC):
    """A matrix [n, k], held transposed. scales: of every output, or of its groups.

    values: [k, n] int8, of int4 [k, n / 8] int32
    """

    values: Tensor
    scales: Tensor
    n: int

    @property
    def nbytes(self) -> int:
        """Memory that it takes, in bytes."""
        return sum(tensor.nbytes for tensor in self.tensors())

    def tensors(self) -> tuple[Tensor, ...]:
        """All that it holds: values [k, n], scales [n]."""
        return self.values, self.scales

    @abstractmethod
    def times(self, torch_npu: Any, x: Tensor, bias: Tensor | None) -> Tensor:
        """[m, k] contiguous, m at least 1, [n] -> [m, n] of x's dtype."""


class Int8Weight(NpuWeight):
    """scales: [n], dtype of x."""

    __slots__ = ()

    def times(self, torch_npu: Any, x: Tensor, bias: Tensor | None) -> Tensor:
        """x in 16 bits."""
        out: Tensor = torch_npu.npu_weight_quant_batchmatmul(
            x, self.values, self.scales, bias=_bias_for(x, bias)
        )
        return out


class BothInt8Weight(NpuWeight):
    """scales: [n] float32. x is rounded row by row."""

    __slots__ = ()

    def times(self, torch_npu: Any, x: Tensor, bias: Tensor | None) -> Tensor:
        """The default output would be int8, so its dtype is said."""
        rounded, steps = torch_npu.npu_dynamic_quant(x)
        out: Tensor = torch_npu.npu_quant_matmul(
            rounded,
            self.values,
            self.scales,
            pertoken_scale=steps,
            bias=None if bias is None else bias.float(),
            output_dtype=x.dtype,
        )
        return out


@dataclass(frozen=True, slots=True, eq=False)
class Int4Weight(NpuWeight):
    """scales, offsets: [padded_k / group, n], dtype of x; w = (q + offset) * scale, q in -8 … 7."""

    offsets: Tensor
    group: int

    def tensors(self) -> tuple[Tensor, ...]:
        """All that it holds: values [k, n / 8], the others [groups, n]."""
        return self.values, self.scales, self.offsets

    def times(self, torch_npu: Any, x: Tensor, bias: Tensor | None) -> Tensor:
        """x is padded with zeros to whole groups."""
        missing = len(self.values) - x.shape[-1]
        out: Tensor = torch_npu.npu_weight_quant_batchmatmul(
            F.pad(x, (0, missing)) if missing else x,
            self.values,
            self.scales,
            antiquant_offset=self.offsets,
            bias=_bias_for(x, bias),
            antiquant_group_size=self.group,
        )
        return out


def _bias_for(x: Tensor, bias: Tensor | None) -> Tensor | None:
    """The operator adds a bias of float32 to a product in bfloat16, of float16 to one in that."""
    if bias is None:
        return None
    return bias.float() if x.dtype == torch.bfloat16 else bias.to(x.dtype)


def hold_low_bits(torch_npu: Any, weight: LowBitWeight, dtype: torch.dtype) -> NpuWeight | None:
    """The matrix for its operator; None where its sizes are not those that the operator takes."""
    if weight.format == "int4":
        return _hold_int4(torch_npu, weight, dtype)
    values = weight.values.T.contiguous()
    if weight.quantises_x:
        return BothInt8Weight(values, weight.scales.float(), weight.n)
    return Int8Weight(values, weight.scales.to(dtype), weight.n)


def _hold_int4(torch_npu: Any, weight: LowBitWeight, dtype: torch.dtype) -> NpuWeight | None:
    """From w = q * scale + offset with q in 0 … 15 to the operator's form."""
    padded_k = 2 * weight.values.shape[1]
    if weight.n % _INT4_COLUMNS or padded_k <= weight.group:
        return None
    assert weight.offsets is not None, "int4 has offsets"
    pairs = torch.stack((weight.values & 0xF, weight.values >> 4), dim=-1)
    steps = pairs.flatten(-2).to(torch.int32) - _INT4_MIDDLE
    # A group without a scale is its offset in every column, which the operator would multiply by 0.
    is_flat = weight.scales == 0
    steps = steps.where(~is_flat.repeat_interleave(weight.group, dim=1), 0)
    scales = weight.scales.where(~is_flat, 1.0)
    offsets = (weight.offsets / scales + _INT4_MIDDLE).where(~is_flat, weight.offsets)
    packed = torch_npu.npu_convert_weight_to_int4pack(steps.T.contiguous())
    grouped = (part.T.to(dtype).contiguous() for part in (scales, offsets))
    return Int4Weight(packed, next(grouped), weight.n, next(grouped), weight.group)
