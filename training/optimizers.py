"""What moves the weights: Muon for the matrices inside, AdamW for everything else."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from training.plan import Plan

# Quintic whose iteration pulls all singular values near 1. Source: Keller Jordan and others,
# "Muon: an optimizer for hidden layers in neural networks", 2024.
_QUINTIC = (3.4445, -4.7750, 2.0315)
_NUM_ITERATIONS = 5


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal; matrices of one shape are computed together.

    The step is scaled to the size of AdamW's, so that one rate suits both.
    Source: the same, and Moonlight, arXiv 2502.16982, section 2.2.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], weight_decay: float) -> None:
        super().__init__(groups, {"lr": 0.0, "weight_decay": weight_decay, "momentum": 0.95})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every matrix that has a gradient."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
            for matrix in group["params"]:
                if matrix.grad is not None:
                    by_shape[matrix.shape].append(matrix)
            for matrices in by_shape.values():
                self._update(matrices, group)

    def _update(self, matrices: list[nn.Parameter], group: Mapping[str, Any]) -> None:
        gradients = [matrix.grad for matrix in matrices if matrix.grad is not None]
        buffers = [self._buffer(matrix) for matrix in matrices]
        torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])
        ahead = torch._foreach_lerp(gradients, buffers, group["momentum"])
        updates = orthogonalised(torch.stack(ahead))
        rows, columns = matrices[0].shape
        rate = group["lr"] * 0.2 * max(rows, columns) ** 0.5
        values: list[Tensor] = list(matrices)
        torch._foreach_mul_(values, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(values, list(updates.unbind()), alpha=-rate)

    def _buffer(self, matrix: nn.Parameter) -> Tensor:
        state = self.state[matrix]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(matrix)
        return state["momentum"]


def orthogonalised(matrices: Tensor) -> Tensor:
    """[count, rows, columns] -> the same with singular values of about 1."""
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    x = (matrices.mT if is_tall else matrices).bfloat16()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    a, b, c = _QUINTIC
    for _ in range(_NUM_ITERATIONS):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return (x.mT if is_tall else x).to(matrices.dtype)


def optimizers(named: Mapping[str, nn.Parameter], plan: Plan) -> list[torch.optim.Optimizer]:
    """Those of a model's and its heads' parameters; `scale` of a group multiplies its rate."""
    inner = {name: p for name, p in named.items() if p.dim() == 2 and "blocks." in name}
    rest = {name: p for name, p in named.items() if name not in inner}
    decayed = [p for name, p in rest.items() if p.dim() > 1 and "embedding" not in name]
    others = [p for name, p in rest.items() if p.dim() <= 1 or "embedding" in name]
    groups = [
        {"params": decayed, "weight_decay": plan.weight_decay, "scale": 1.0},
        {"params": others, "weight_decay": 0.0, "scale": 1.0},
    ]
    matrices = [{"params": list(inner.values()), "scale": plan.matrix_scale}]
    return [
        Muon(matrices, plan.weight_decay),
        torch.optim.AdamW(groups, lr=plan.peak_rate, betas=(0.9, 0.98), fused=True),
    ]
