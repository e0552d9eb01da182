"""Who adds a residual: the product before a norm, or the norm."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from glimt.devices.base import Device
from glimt.layers.norm import RMSNorm


class Adding(Device):
    """Adds with its norm; counts how often."""

    adds_with_norm = True

    def __init__(self) -> None:
        super().__init__()
        self.num_added = 0

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        self.num_added += 1
        return super().add_rms_norm(x, residual, weight, eps)


class NeverAdding(Device):
    """Its product adds, and rounds once where two operations would round twice."""

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        raise AssertionError("the product has added already")


def norm(device: Device) -> RMSNorm:
    made = RMSNorm(8, 1e-5, device, torch.float32)
    made.weight = torch.nn.Parameter(torch.linspace(0.5, 2, 8), requires_grad=False)
    return made


def product(value: Tensor, handed: list[Tensor | None]) -> Callable[[Tensor | None], Tensor]:
    def run(residual: Tensor | None) -> Tensor:
        handed.append(residual)
        return value if residual is None else value + residual

    return run


@pytest.mark.parametrize("device", [Adding(), NeverAdding()], ids=["norm", "product"])
def test_a_residual_is_added_once_where_the_device_says(device: Device) -> None:
    """Catches a residual that is added twice, or by nobody, and a sum that is not the next one."""
    generator = torch.Generator().manual_seed(0)
    value, residual = (torch.randn(3, 8, generator=generator) for _ in range(2))
    handed: list[Tensor | None] = []
    layer = norm(device)
    normed, total = layer.of_sum(product(value, handed), residual)
    assert torch.equal(total, value + residual)
    assert torch.equal(normed, layer(value + residual))
    (given,) = handed
    assert given is (None if device.adds_with_norm else residual)
    if isinstance(device, Adding):
        assert device.num_added == 1
