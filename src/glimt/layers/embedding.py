"""Tables looked up by id."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from glimt.devices.base import Device
from glimt.layers.linear import PatchLinear, empty_parameter
from glimt.parallel import Shard


class Embedding(nn.Module):
    """Rows of a table [num_rows, size].

    shard: of `divided_vocabulary`; every rank gives the rows that it has, and they are summed
    """

    def __init__(
        self,
        num_rows: int,
        size: int,
        device: Device,
        dtype: torch.dtype,
        shard: Shard | None = None,
    ) -> None:
        super().__init__()
        self.device = device
        self.shards = {"weight": shard} if shard else {}
        shape = (num_rows, size)
        self.weight = empty_parameter(*(shard.shape(shape) if shard else shape), dtype=dtype)

    def forward(self, ids: Tensor) -> Tensor:
        """[n] int64 -> [n, size]."""
        shard = self.shards.get("weight")
        if shard is None:
            return self.device.embedding(ids, self.weight)
        ((first, _),) = shard.ranges
        own = ids - first
        is_here = (own >= 0) & (own < len(self.weight))
        rows = self.device.embedding(own.where(is_here, 0), self.weight)
        return shard.group.all_reduce(rows.where(is_here[:, None], 0))


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
        cls = self.cls.expand(x.shape[0], 1, -1)
        return (torch.cat((cls, x), dim=1) + self.position).flatten(0, 1)
