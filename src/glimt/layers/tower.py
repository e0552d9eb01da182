"""A picture tower over equal-sized pictures, which can pause between its blocks and inside them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Sequence
from itertools import pairwise
from typing import TypeAlias, TypeVar, cast

import torch
from torch import Tensor, nn

from glimt.layers.embedding import PatchEmbedding

PART_ROWS = 256  # of a large picture: a part is then short, and its products still fill the cores

T = TypeVar("T")
Stages: TypeAlias = Generator[float | None, None, T]
"""A computation that pauses after each of its parts; what the last one returns is the result.

A part yields which share of a block of the tower it was; None: a whole one.
"""


def run_through(stages: Stages[T]) -> T:
    """Run every part that is left, without a pause; what the last one returns."""
    while True:
        try:
            next(stages)
        except StopIteration as end:
            return cast("T", end.value)


def by_rows(
    apply: Callable[[slice], Tensor], num_rows: int, part_rows: int, share: float, dim: int = 0
) -> Stages[Tensor]:
    """What apply makes of [num_rows, …], so many rows at a time, joined along dim.

    share: of a block, all of it together
    """
    if num_rows <= part_rows:
        whole = apply(slice(None))  # no number of rows: a traced graph may be given more pictures
        yield share
        return whole
    parts = []
    for start in range(0, num_rows, part_rows):
        stop = min(start + part_rows, num_rows)
        parts.append(apply(slice(start, stop)))
        yield share * (stop - start) / num_rows
    return torch.cat(parts, dim)


def without_last_pause(stages: Stages[T]) -> Stages[T]:
    """The same without a pause between the last part and the result."""
    share = None
    is_first = True
    while True:
        try:
            upcoming = next(stages)
        except StopIteration as end:
            return cast("T", end.value)
        if not is_first:
            yield share
        share, is_first = upcoming, False


def part_rows_for(cu_seqlens: Sequence[int], most: int) -> int:
    """Rows of a part: `most` if a picture has more than two parts of it, else all at once."""
    longest = max(stop - start for start, stop in pairwise(cu_seqlens))
    return most if longest > 2 * most else max(1, cu_seqlens[-1])


class TowerBlock(nn.Module, ABC):
    """A block that can pause inside where pictures are large; `stages` is its arithmetic."""

    part_rows = PART_ROWS

    def forward(self, x: Tensor, cu_seqlens: Sequence[int]) -> Tensor:
        """[num_tokens, hidden_size] -> the same: every part, so the same bits."""
        return run_through(self.stages(x, cu_seqlens))

    @abstractmethod
    def stages(self, x: Tensor, cu_seqlens: Sequence[int]) -> Stages[Tensor]:
        """[num_tokens, hidden_size] -> the same, part by part."""


class PatchTower(nn.Module):
    """A class token and all patches of a picture through blocks of full attention.

    blocks: each takes packed tokens [num_tokens, hidden_size] and cu_seqlens, and gives the same
        shape. Source: An Image is Worth 16x16 Words, arXiv 2010.11929, section 3.1.
    """

    def __init__(self, embed: PatchEmbedding, blocks: Iterable[TowerBlock]) -> None:
        super().__init__()
        self.embed = embed
        self.blocks = nn.ModuleList(blocks)

    def forward(self, patches: Tensor) -> Tensor:
        """[num_images, num_patches, values] -> packed [num_images * (1 + num_patches), hidden]."""
        return run_through(self.stages(patches, pauses_inside=False))

    def stages(self, patches: Tensor, pauses_inside: bool = True) -> Stages[Tensor]:
        """[num_images, num_patches, values] -> what `forward` gives, part by part.

        pauses_inside: within the blocks of large pictures too; else each block is one part
        """
        num_images, num_patches, _ = patches.shape
        cu_seqlens = [i * (num_patches + 1) for i in range(num_images + 1)]
        x = self.embed(patches)
        for block in self.blocks:
            if pauses_inside:
                x = yield from cast("TowerBlock", block).stages(x, cu_seqlens)
            else:
                x = block(x, cu_seqlens)
                yield None
        return x
