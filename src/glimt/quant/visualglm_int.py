"""The 8- and 4-bit weights that the original VisualGLM code makes and keeps in its checkpoints.

One float16 scale per output row, symmetric, weight-only:

    scale = fp16(max |w| / (2^(bits - 1) - 1)),  q = round_half_even(w / scale)
    4 bits: byte j of a row holds column 2j in its high half and 2j + 1 in its low half, signed

NAME.weight is int8 [n, k], or [n, k / 2] for 4 bits; NAME.weight_scale is float16 [n].
Source: quantization.py of the hub's chatglm-6b, and its published CPU kernels for the packing.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from glimt.quant.base import (
    Parts,
    QuantFormat,
    QuantisedWeight,
    StoredTensor,
    by_rows,
    pack_nibbles,
    padded,
    unpack_nibbles,
)

GROUP = 128  # of the kernels' form: the row's scale is repeated for each group
MIDDLE = 8  # the kernels' nibbles are unsigned


class VisualGlmInt(QuantFormat):
    """The original's own quantisation, under its own names in files."""

    def __init__(self, name: str, bits: int) -> None:
        self.name = name
        self.bits = bits

    def quantise(self, weight: Tensor) -> QuantisedWeight:
        """[n, k] of any float dtype, k even; as the original does, in float16's range."""
        signed, scales = by_rows(weight, self._round_rows)
        return self._weight(signed, scales, *weight.shape)

    def _round_rows(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        most = 2 ** (self.bits - 1) - 1
        scales = (rows.abs().amax(1) / most).half()
        # The original divides 0 by 0 for a row of zeros.
        divisor = torch.where(scales == 0, 1.0, scales.float())[:, None]
        # A scale that float16 rounds down can make a step of most + 1, which a byte still holds
        # for 4 bits but not for 8.
        return (rows / divisor).round().clamp(-most - 1, most).to(torch.int8), scales

    def stored(self, n: int, k: int) -> Mapping[str, StoredTensor]:
        """The original's tensors: the weight keeps its name."""
        width = k if self.bits == 8 else k // 2
        return {
            "": StoredTensor((n, width), torch.int8),
            "_scale": StoredTensor((n,), torch.float16),
        }

    def parts(self, weight: QuantisedWeight) -> dict[str, Tensor]:
        """Signed, the even column in the high half."""
        if weight.format == "int8":
            return {"": weight.values, "_scale": weight.scales.half()}
        steps = unpack_nibbles(weight.values)[:, : weight.k].to(torch.int8) - MIDDLE
        high, low = steps[:, 0::2] << 4, steps[:, 1::2] & 0xF
        return {"": high | low, "_scale": weight.scales[:, 0].half()}

    def restore(self, parts: Parts, n: int, k: int) -> QuantisedWeight:
        """Exact: only the order of the halves, the sign and the number of scales change."""
        signed = parts[""]
        if self.bits == 4:
            # An arithmetic shift gives the high half its sign; shifted up first, the low half too.
            signed = torch.stack((signed >> 4, (signed << 4) >> 4), dim=-1).flatten(1)
        return self._weight(signed, parts["_scale"], n, k)

    def _weight(self, signed: Tensor, scales: Tensor, n: int, k: int) -> QuantisedWeight:
        """signed: int8 [n, k] whatever the bits."""
        wide = scales.float()
        if self.bits == 8:
            return QuantisedWeight("int8", signed, wide, None, 0, n, k)
        whole = padded(k, GROUP)
        values = pack_nibbles(F.pad(signed, (0, whole - k)) + MIDDLE)
        repeated = wide[:, None].expand(-1, whole // GROUP).contiguous()
        return QuantisedWeight("int4", values, repeated, -MIDDLE * repeated, GROUP, n, k)


FORMATS = (VisualGlmInt("visualglm-int8", 8), VisualGlmInt("visualglm-int4", 4))
