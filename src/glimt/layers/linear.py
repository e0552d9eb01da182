"""Matrix products with weights from the checkpoint."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from glimt.devices.base import Device
from glimt.quant.base import QuantisedWeight


def empty_parameter(*shape: int, dtype: torch.dtype) -> nn.Parameter:
    """A parameter on the meta device: a shape that `weights.load_weights` fills."""
    return nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False)


class Linear(nn.Module):
    """y = x Wᵀ + b with W [out_features, in_features]."""

    def __init__(
        self, in_features: int, out_features: int, bias: bool, device: Device, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.device = device
        self.weight = empty_parameter(out_features, in_features, dtype=dtype)
        self.bias = empty_parameter(out_features, dtype=dtype) if bias else None
        self.quantised: QuantisedWeight | None = None

    def set_weight(self, weight: QuantisedWeight) -> None:
        """Take a quantised weight instead of the parameter, which stays on the meta device."""
        self.quantised = weight

    def forward(self, x: Tensor) -> Tensor:
        """[…, in_features] -> […, out_features]."""
        if self.quantised is None:
            return self.device.linear(x, self.weight, self.bias)
        return self.device.linear(x, self.quantised.dequantise().to(x.dtype), self.bias)


class PatchLinear(nn.Module):
    """A convolution whose stride is its kernel size, as one product over packed patches.

    weight: [out_channels, in_channels, kernel, kernel], the checkpoint's own shape; flattened it
    is a view, so nothing is copied.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int, device: Device, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.device = device
        self.weight = empty_parameter(out_channels, in_channels, kernel, kernel, dtype=dtype)
        self.bias = empty_parameter(out_channels, dtype=dtype)

    def forward(self, patches: Tensor) -> Tensor:
        """[num_patches, in_channels * kernel**2], values in (channel, y, x) order -> [num_patches,
        out_channels].
        """
        return self.device.linear(patches, self.weight.flatten(1), self.bias)
