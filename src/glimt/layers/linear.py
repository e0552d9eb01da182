"""Matrix products with weights from the checkpoint."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from glimt.devices.base import Activation, Device, LowBitWeight, MatrixWeight


def empty_parameter(*shape: int, dtype: torch.dtype) -> nn.Parameter:
    """A parameter on the meta device: a shape that `weights.load_weights` fills."""
    return nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False)


class Product(nn.Module):
    """What is multiplied with: a weight whose first axis is the outputs, and perhaps a bias.

    The matrix is the parameter `weight` where the device takes it as it is. Else the device's own
    form of it is held beside, and the parameter stays on the meta device.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        bias: bool,
        device: Device,
        dtype: torch.dtype,
        is_paired: bool = False,
    ) -> None:
        super().__init__()
        self.device = device
        self.is_paired = is_paired
        self.weight = empty_parameter(*shape, dtype=dtype)
        self.bias = empty_parameter(shape[0], dtype=dtype) if bias else None
        self.held: MatrixWeight | None = None

    def hold(self, weight: Tensor | LowBitWeight) -> None:
        """Take the weight, plain or in few bits, in the form that the device wants.

        weight: [outputs, …], of the parameter's shape; one in few bits has two axes
        """
        matrix = weight.flatten(1) if isinstance(weight, Tensor) else weight
        held = self.device.prepare_weight(matrix, self.weight.dtype, self.is_paired)
        if isinstance(weight, Tensor) and held is matrix:
            self.weight = _as_parameter(weight)
        else:
            self.held = held

    @property
    def matrix(self) -> MatrixWeight:
        """[outputs, inputs] as the device wants it."""
        return self.weight.flatten(1) if self.held is None else self.held


class Linear(Product):
    """y = x Wᵀ + b with W [out_features, in_features].

    is_paired: "silu_mul" follows every product
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        device: Device,
        dtype: torch.dtype,
        is_paired: bool = False,
    ) -> None:
        super().__init__((out_features, in_features), bias, device, dtype, is_paired)

    def set_weight(self, weight: LowBitWeight) -> None:
        """Take the matrix in few bits."""
        self.hold(weight)

    def forward(
        self,
        x: Tensor,
        activation: Activation = "none",
        residual: Tensor | None = None,
        residual_scale: float = 1.0,
    ) -> Tensor:
        """[…, in_features] -> […, out_features]; see Device.linear."""
        return self.device.linear(x, self.matrix, self.bias, activation, residual, residual_scale)


class PatchLinear(Product):
    """A convolution whose stride is its kernel size, as one product over packed patches.

    weight: [out_channels, in_channels, kernel, kernel], the checkpoint's own shape; flattened it
    is a view, so nothing is copied. Never in few bits.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int, device: Device, dtype: torch.dtype
    ) -> None:
        super().__init__((out_channels, in_channels, kernel, kernel), True, device, dtype)

    def forward(self, patches: Tensor) -> Tensor:
        """[num_patches, in_channels * kernel**2], values in (channel, y, x) order -> [num_patches,
        out_channels].
        """
        return self.device.linear(patches, self.matrix, self.bias)


def _as_parameter(tensor: Tensor) -> nn.Parameter:
    """A parameter stays the same object, so that tied modules keep sharing it."""
    if isinstance(tensor, nn.Parameter):
        return tensor
    return nn.Parameter(tensor, requires_grad=False)


def mlp(
    up: Linear,
    down: Linear,
    x: Tensor,
    activation: Activation,
    residual: Tensor | None = None,
    residual_scale: float = 1.0,
) -> Tensor:
    """[n, in] -> [n, out]: two linears with an activation between, as one call of their device.

    The rest is as in Device.linear.
    """
    return up.device.mlp(
        x, up.matrix, down.matrix, up.bias, down.bias, activation, residual, residual_scale
    )
