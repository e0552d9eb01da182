"""A rank's part of a matrix in few bits: the same values, or a plain refusal."""

from __future__ import annotations

import pytest
import torch

from glimt.errors import ConfigError
from glimt.parallel import Group, Part, divided, in_blocks
from glimt.quant.base import find_format, part_of

WEIGHT = torch.randn(12, 192, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ["int8", "int4", "int4-g32", "w8a8"])
@pytest.mark.parametrize("axis", [0, 1])
def test_parts_hold_the_wholes_values(name: str, axis: int) -> None:
    """Catches rows that lose their scales, and nibbles that are cut apart."""
    chosen = find_format(name)
    assert chosen is not None
    whole = chosen.quantise(WEIGHT)
    for rank in range(2):
        group = Group(rank, 2)
        length = WEIGHT.shape[axis]
        shard = divided(group, axis, in_blocks(length, group) if axis else Part(length))
        assert shard is not None
        part = part_of(whole, shard)
        assert torch.equal(part.dequantise(), shard.of(whole.dequantise()))
        assert part.quantises_x == whole.quantises_x


def test_a_group_is_not_cut_between_ranks() -> None:
    """Catches columns that get a neighbour's scale."""
    chosen = find_format("int4")
    shard = divided(Group(0, 2), 1, Part(192))
    assert chosen is not None
    assert shard is not None
    with pytest.raises(ConfigError, match=r"tp_size.*192 columns in groups of 64.*2 ranks"):
        part_of(chosen.quantise(WEIGHT), shard)


def test_blocks_give_every_rank_its_columns_once() -> None:
    """Catches columns that nobody has, or two ranks."""
    for length in (13696, 15360, 6144, 168, 80, 8):
        for size in (1, 2, 4, 8):
            ranges = [
                in_blocks(length, Group(r, size)).share_of(Group(r, size)) for r in range(size)
            ]
            assert [start for start, _ in ranges] == [0, *[stop for _, stop in ranges[:-1]]]
            assert ranges[-1][1] == length
