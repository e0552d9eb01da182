"""Weights before the first step: scaled so that signals keep their size, places told apart."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from glimt.models.base import Model

# GLM-4v's tower adds normalised branches to what it has: with gains of 1 twelve of them would
# bury the patches, and it learnt nothing for a thousand steps.
_BRANCH_GAIN = 0.1
_PLACE_SIZE = 0.7  # of a position against a patch, which is about 1


def initial_values(model: Model, family: str) -> dict[str, Tensor]:
    """A fresh float32 value for every parameter, drawn from torch's global generator."""
    return {
        name: _initial(name, tuple(parameter.shape), model.num_layers, family)
        for name, parameter in model.named_parameters()
    }


def _initial(name: str, shape: tuple[int, ...], num_layers: int, family: str) -> Tensor:
    if len(shape) == 1:
        return torch.full(shape, _gain(name, family) if name.endswith("weight") else 0.0)
    if "position" in name:
        return places(*shape)
    if "embedding" in name or "queries" in name or name.endswith(("begin", "end")):
        return torch.randn(shape) * 0.5
    if "cls" in name or "head" in name:
        return torch.randn(shape) * 0.02
    return torch.randn(shape) * _scale(name, num_layers) / math.sqrt(math.prod(shape[1:]))


def _gain(name: str, family: str) -> float:
    ends_branch = "tower.blocks" in name and family == "glm4v_9b"
    return _BRANCH_GAIN if ends_branch else 1.0


def _scale(name: str, num_layers: int) -> float:
    """Matrices that end a branch are smaller; the adapter's last is divided by 8 afterwards."""
    if name == "adapter.down.weight":
        return 8.0
    ends_branch = name.endswith(("dense.weight", "down.weight"))
    return 1 / math.sqrt(2 * num_layers) if ends_branch else 1.0


def places(num_positions: int, size: int) -> Tensor:
    """A class token's place, then a square grid's: sines and cosines of row and column.

    Source: the two-dimensional form of Attention Is All You Need, arXiv 1706.03762, section 3.5,
    as MAE (arXiv 2111.06377) starts its towers.
    """
    side = math.isqrt(num_positions - 1)
    rates = 100.0 ** -(torch.arange(size // 4) / (size // 4))
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    angles = [place.flatten()[:, None] * rates for place in (x, y)]
    waves = torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1)
    return torch.cat((torch.zeros(1, size), waves)) * _PLACE_SIZE
