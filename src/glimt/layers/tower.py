"""A picture tower over equal-sized pictures, which can pause between its blocks."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from typing import TypeAlias, TypeVar, cast

from torch import Tensor, nn

from glimt.layers.embedding import PatchEmbedding

T = TypeVar("T")
Stages: TypeAlias = Generator[None, None, T]
"""A computation that pauses after each of its parts; what the last one returns is the result."""


def run_through(stages: Stages[T]) -> T:
    """Run every part that is left, without a pause; what the last one returns."""
    while True:
        try:
            next(stages)
        except StopIteration as end:
            return cast("T", end.value)


class PatchTower(nn.Module):
    """A class token and all patches of a picture through blocks of full attention.

    blocks: each takes packed tokens [num_tokens, hidden_size] and cu_seqlens, and gives the same
        shape. Source: An Image is Worth 16x16 Words, arXiv 2010.11929, section 3.1.
    """

    def __init__(self, embed: PatchEmbedding, blocks: Iterable[nn.Module]) -> None:
        super().__init__()
        self.embed = embed
        self.blocks = nn.ModuleList(blocks)

    def forward(self, patches: Tensor) -> Tensor:
        """[num_images, num_patches, values] -> packed [num_images * (1 + num_patches), hidden]."""
        return run_through(self.stages(patches))

    def stages(self, patches: Tensor) -> Stages[Tensor]:
        """[num_images, num_patches, values] -> what `forward` gives, one block a part."""
        num_images, num_patches, _ = patches.shape
        cu_seqlens = [i * (num_patches + 1) for i in range(num_images + 1)]
        x = self.embed(patches)
        for block in self.blocks:
            x = block(x, cu_seqlens)
            yield
        return x
