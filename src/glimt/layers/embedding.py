"""Tables looked up by id."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from glimt.devices.base import Device
from glimt.layers.linear import PatchLinear, empty_parameter


class Embedding(nn.Module):
    """Rows of a table [num_rows, size]."""

    def __init__(self, num_rows: int, size: int, device: Device, dtype: torch.dtype) -> None:
        super().__init__()
        self.device = device
        self.weight = empty_parameter(num_rows, size, dtype=dtype)

    def forward(self, ids: Tensor) -> Tensor:
        """[n] int64 -> [n, size]."""
        return self.device.embedding(ids, self.weight)


class PatchEmbedding(nn.Module):
    """Patches of equal-sized pictures as tokens: a class token first, then row by row.

    Every token has a learned position of its own, so the number of patches is fixed.
    """

    def __init__(
        self, patch_size: int, num_positions: int, size: int, device: Device, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.patch = PatchLinear(3, size, patch_size, device, dtype)
        self.cls = empty_parameter(1, size, dtype=dtype)
        self.position = empty_parameter(num_positions, size, dtype=dtype)

    def forward(self, patches: Tensor) -> Tensor:
        """[num_images, num_patches, values] -> packed [num_images * (1 + num_patches), size]."""
        x = self.patch(patches)
        cls = self.cls.expand(len(x), 1, -1)
        return (torch.cat((cls, x), dim=1) + self.position).flatten(0, 1)
