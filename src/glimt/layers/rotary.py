"""Rotary position tables. Each model owns its own; positions come from the prompt alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from glimt.devices.base import Device, RotaryStyle

TableMode = Literal["fp32_product", "hub_fp16"]


@dataclass(frozen=True, slots=True)
class RotarySpec:
    """How a family turns positions into rotations.

    style:        how dims are paired (see Device.rotate)
    inv_freq:     [num_pairs] float32, angle per position of every pair
    channels:     per pair, the position channel it follows: all 0 with one channel; VisualGLM's
                  second half follows channel 1; sections of one head can follow three
    num_segments: equal segments inside which "half" pairs are formed
    mode:         "fp32_product" keeps the angle in float32; "hub_fp16" rounds position, angle
                  and cosine to float16 one after the other, as VisualGLM's hub code does
    """

    style: RotaryStyle
    inv_freq: Tensor
    channels: tuple[int, ...]
    num_segments: int = 1
    mode: TableMode = "fp32_product"


class Rotary:
    """Cosine and sine tables [max_positions, num_pairs], in the dtype of the model."""

    def __init__(
        self, spec: RotarySpec, max_positions: int, device: Device, dtype: torch.dtype
    ) -> None:
        self.spec = spec
        self.device = device
        cos, sin = _tables(spec, max_positions)
        self._cos = cos.to(device=device.torch_device, dtype=dtype)
        self._sin = sin.to(device=device.torch_device, dtype=dtype)
        self._channels = torch.tensor(spec.channels, device=device.torch_device)
        self._pairs = torch.arange(len(spec.channels), device=device.torch_device)

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """[channels, num_tokens] int64 -> cosines and sines, each [num_tokens, num_pairs]."""
        rows = positions[self._channels].T
        return self._cos[rows, self._pairs], self._sin[rows, self._pairs]

    def rotate(self, x: Tensor, cos_sin: tuple[Tensor, Tensor]) -> Tensor:
        """Rotate [num_tokens, num_heads, head_dim] by what `at` returned."""
        return self.device.rotate(x, *cos_sin, self.spec.style, self.spec.num_segments)


def inverse_frequencies(width: int, base: float) -> Tensor:
    """[width / 2] float32: base^(-2i/width) for each pair i. Source: RoFormer, arXiv 2104.09864."""
    return 1.0 / (base ** (torch.arange(0, width, 2, dtype=torch.float32) / width))


def repeated(channels: Sequence[int], pairs_each: int) -> tuple[int, ...]:
    """Channel map with `pairs_each` pairs for each of the given channels in turn."""
    return tuple(channel for channel in channels for _ in range(pairs_each))


def _tables(spec: RotarySpec, max_positions: int) -> tuple[Tensor, Tensor]:
    positions = torch.arange(max_positions, dtype=torch.float32)
    if spec.mode == "fp32_product":
        angles = torch.outer(positions, spec.inv_freq)
        return angles.cos(), angles.sin()
    angles = torch.outer(positions.half().float(), spec.inv_freq).half().float()
    return angles.cos().half(), angles.sin().half()
