"""Products hold their matrix in whatever form the device gives it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from glimt.devices.base import Device
from glimt.layers.linear import Linear, PatchLinear, Product


class Turned(Device):
    """Keeps every matrix transposed."""

    def prepare_weight(self, weight, dtype, is_paired=False):
        return weight.T.contiguous()

    def linear(self, x, weight, *rest):
        return super().linear(x, weight.T, *rest)


def linear(device: Device) -> Product:
    return Linear(12, 5, False, device, torch.float32)


def patches(device: Device) -> Product:
    product = PatchLinear(3, 5, 2, device, torch.float32)
    product.bias = nn.Parameter(torch.ones(5), requires_grad=False)
    return product


@pytest.mark.parametrize("make", [linear, patches])
def test_a_device_may_keep_another_tensor(make):
    """Catches a tensor of the device's own that is dropped for the checkpoint's."""
    turned, plain = make(Turned()), make(Device())
    weight = nn.Parameter(torch.randn(plain.weight.shape), requires_grad=False)
    for product in (turned, plain):
        product.hold(weight)
    assert turned.matrix.shape == (12, 5)
    assert turned.weight.is_meta, "the checkpoint's own is not kept as well"
    assert plain.weight is weight, "what the device takes as it is stays the mapped file"
    x = torch.randn(4, 12)
    torch.testing.assert_close(turned(x), plain(x))
