"""Tables looked up by id."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from glimt.devices.base import Device
from glimt.layers.linear import empty_parameter


class Embedding(nn.Module):
    """Rows of a table [num_rows, size]."""

    def __init__(self, num_rows: int, size: int, device: Device, dtype: torch.dtype) -> None:
        super().__init__()
        self.device = device
        self.weight = empty_parameter(num_rows, size, dtype=dtype)

    def forward(self, ids: Tensor) -> Tensor:
        """[n] int64 -> [n, size]."""
        return self.device.embedding(ids, self.weight)
