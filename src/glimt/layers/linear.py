"""Matrix products with weights from the checkpoint."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from glimt.devices.base import Activation, Device, LowBitWeight, MatrixWeight, add_residual
from glimt.parallel import Shard


def empty_parameter(*shape: int, dtype: torch.dtype) -> nn.Parameter:
    """A parameter on the meta device: a shape that `weights.load_weights` fills."""
    return nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False)


class Product(nn.Module):
    """What is multiplied with: a weight whose first axis is the outputs, and perhaps a bias.

    shards: by parameter, what of the checkpoint's tensor is here; not those that are here whole

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
        self.shards: dict[str, Shard] = {}

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
    """y = x Wᵀ + b with W [out_features, in_features], or this rank's part of it.

    is_paired: "silu_mul" follows every product
    shard:     of the weight. Along axis 0 the outputs are divided, and so is what comes out; along
               axis 1 the inputs are, x is this rank's part of them and the ranks' products are
               summed. None: the whole is here
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        device: Device,
        dtype: torch.dtype,
        is_paired: bool = False,
        shard: Shard | None = None,
    ) -> None:
        shape = out_features, in_features
        super().__init__(shard.shape(shape) if shard else shape, bias, device, dtype, is_paired)
        if shard:
            self.shards["weight"] = shard
            if bias and shard.axis == 0:
                self.shards["bias"] = shard
        self._summed = shard.group if shard and shard.axis == 1 else None

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
        if self._summed is None:
            return self.device.linear(
                x, self.matrix, self.bias, activation, residual, residual_scale
            )
        y = self.summed(self.device.linear(x, self.matrix, None))
        return add_residual(self.device.activate(y, activation), residual, residual_scale)

    @property
    def is_summed(self) -> bool:
        """Whether every rank has only a part of each sum."""
        return self._summed is not None

    def summed(self, partial: Tensor) -> Tensor:
        """[…, out_features], this rank's x Wᵀ, -> the same of all ranks, and the bias.

        partial is changed.
        """
        assert self._summed is not None
        y = self._summed.all_reduce(partial)
        return y if self.bias is None else y.add_(self.bias)


class Head(Linear):
    """The output head: [n, hidden_size] -> [n, vocab_size], whole on every rank.

    shard: of `divided_vocabulary`
    """

    def __init__(
        self,
        hidden_size: int,
        vocab_size: int,
        device: Device,
        dtype: torch.dtype,
        shard: Shard | None = None,
    ) -> None:
        super().__init__(hidden_size, vocab_size, False, device, dtype, shard=shard)
        self._vocab_size = vocab_size
        self._gathered = shard.group if shard else None

    def forward(
        self,
        x: Tensor,
        activation: Activation = "none",
        residual: Tensor | None = None,
        residual_scale: float = 1.0,
    ) -> Tensor:
        """[…, hidden_size] -> […, vocab_size]; the rest is as in Linear, on the rank's own part."""
        logits = super().forward(x, activation, residual, residual_scale)
        if self._gathered is None:
            return logits
        return self._gathered.all_gather(logits)[..., : self._vocab_size]


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

    The rest is as in Device.linear. up is divided by its outputs if down is by its inputs.
    """
    if not down.is_summed:
        return up.device.mlp(
            x, up.matrix, down.matrix, up.bias, down.bias, activation, residual, residual_scale
        )
    partial = up.device.mlp(x, up.matrix, down.matrix, up.bias, None, activation)
    return add_residual(down.summed(partial), residual, residual_scale)
