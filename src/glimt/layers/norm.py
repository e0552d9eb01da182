"""Normalisation over the last axis."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from glimt.devices.base import Device
from glimt.layers.linear import empty_parameter


class LayerNorm(nn.Module):
    """Layer normalisation with gain and bias."""

    def __init__(self, size: int, eps: float, device: Device, dtype: torch.dtype) -> None:
        super().__init__()
        self.device = device
        self.eps = eps
        self.weight = empty_parameter(size, dtype=dtype)
        self.bias = empty_parameter(size, dtype=dtype)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """[…, size] -> […, size], plus the residual."""
        return self.device.layer_norm(x, self.weight, self.bias, self.eps, residual)


class RMSNorm(nn.Module):
    """Root-mean-square normalisation with gain."""

    def __init__(self, size: int, eps: float, device: Device, dtype: torch.dtype) -> None:
        super().__init__()
        self.device = device
        self.eps = eps
        self.weight = empty_parameter(size, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[…, size] -> […, size]."""
        return self.device.rms_norm(x, self.weight, self.eps)

    def of_sum(
        self, product: Callable[[Tensor | None], Tensor], residual: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The norm of a product plus a residual, and that sum, each […, size].

        product:  gives its value […, size], plus the residual if it is handed one
        residual: […, size]; the device says whether the product adds it, or the norm
        """
        if self.device.adds_with_norm:
            return self.device.add_rms_norm(product(None), residual, self.weight, self.eps)
        total = product(residual)
        return self(total), total
