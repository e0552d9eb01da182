"""The ranks that hold one model together: who they are, what is whose, how partial results meet.

Tensor parallelism as in Megatron-LM (arXiv 1909.08053, section 3): a block's first product is
divided by its outputs, its second by its inputs, and one sum makes the whole of the parts. Knows
tensors, no model and no request.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Group:
    """A rank among `size`, all of which make the same calls in the same order. Alone by default."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank = rank
        self.size = size

    def all_reduce(self, x: Tensor) -> Tensor:
        """[…] of each rank -> […], their sum, on each of them; x may be changed."""
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """[…, n] of each rank -> […, size * n], in the order of the ranks, on each of them."""
        return x

    def broadcast(self, x: Tensor) -> Tensor:
        """[…] of each rank -> rank 0's; x is changed in place where it is not rank 0's."""
        return x

    def close(self) -> None:
        """Leave the others: nothing is asked of the group any more."""

    def for_units(self, count: int) -> Group:
        """Who divides so many heads or columns: this group, or nobody if they do not divide."""
        return self if count % self.size == 0 else ALONE


ALONE = Group()


class TorchGroup(Group):
    """Ranks joined by torch.distributed, over gloo, nccl or hccl."""

    def __init__(self, group: ProcessGroup) -> None:
        super().__init__(group.rank(), group.size())
        self._group: ProcessGroup | None = group

    def all_reduce(self, x: Tensor) -> Tensor:
        """[…] of each rank -> […], their sum; x is changed if it is contiguous."""
        x = x.contiguous()
        self._join_in(torch.distributed.all_reduce, x)
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """[…, n] of each rank -> […, size * n]."""
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(self.size)]
        self._join_in(torch.distributed.all_gather, parts, x)
        return torch.cat(parts, dim=-1)

    def broadcast(self, x: Tensor) -> Tensor:
        """[…] of each rank -> rank 0's; x must be contiguous."""
        assert x.is_contiguous(), "the others would get another order"
        self._join_in(torch.distributed.broadcast, x, 0)
        return x

    def _join_in(self, collective: Callable[..., object], *arguments: object) -> None:
        """Take part in a collective; an error of it does not hold the group by torch's frames."""
        try:
            collective(*arguments, group=self._group)
        except Exception as error:
            raise error.with_traceback(None) from None

    def close(self) -> None:
        """Leave the group and end its threads.

        Layers of the model hold this object, so torch's group would outlive the interpreter. A
        thread of gloo that still owns the last sum's tensors then asks for the interpreter's lock,
        is ended by it, and takes the process with it ("terminate called", SIGABRT).
        """
        if self._group is not None:
            self._group = None
            torch.distributed.destroy_process_group()


# --- what is whose ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Part:
    """One of the neighbouring stretches of an axis: `count` units of `width` rows or columns.

    Units are what cannot be divided: a head, or a single column. Where there are fewer units than
    ranks, neighbours hold the same one.
    """

    count: int
    width: int = 1

    @property
    def length(self) -> int:
        """Of the whole stretch, in rows or columns."""
        return self.count * self.width

    def share_of(self, group: Group) -> tuple[int, int]:
        """First and one past the last row of a rank, within the stretch."""
        first = group.rank * self.count // group.size
        last = max(first + 1, (group.rank + 1) * self.count // group.size)
        return first * self.width, last * self.width


def in_blocks(length: int, group: Group) -> Part:
    """Rows that are divided in blocks: where a matrix is in groups of 4 bits, none is cut.

    64 where there are enough of them for all ranks, else the largest power of two that gives each
    rank one.
    """
    assert length >= group.size, f"{length} rows for {group.size} ranks"
    fits = (w for w in (64, 32, 16, 8, 4, 2, 1) if length % w == 0 and length // w >= group.size)
    width = next(fits, 1)
    return Part(length // width, width)


@dataclass(frozen=True, slots=True)
class Shard:
    """Which part of a checkpoint's tensor is this rank's, along one axis.

    group:  the ranks that hold the parts
    full:   the axis' length in the checkpoint
    ranges: first and one past the last of what is taken, in order; what lies beyond `full` is zeros
    """

    group: Group
    axis: int
    full: int
    ranges: tuple[tuple[int, int], ...]

    @property
    def length(self) -> int:
        """Of the axis, here."""
        return sum(stop - start for start, stop in self.ranges)

    def shape(self, full: tuple[int, ...]) -> tuple[int, ...]:
        """What is here of a tensor of this shape in the checkpoint."""
        assert full[self.axis] == self.full, f"axis {self.axis} of {full} is not {self.full}"
        return (*full[: self.axis], self.length, *full[self.axis + 1 :])

    def full_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The checkpoint's shape of what has this one here."""
        return (*shape[: self.axis], self.full, *shape[self.axis + 1 :])

    def of(self, tensor: Tensor) -> Tensor:
        """[…, full, …] -> […, length, …]: this rank's part; a view if that is possible."""
        parts = [self._range(tensor, start, stop) for start, stop in self.ranges]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=self.axis)

    def _range(self, tensor: Tensor, start: int, stop: int) -> Tensor:
        first, last = min(start, self.full), min(stop, self.full)
        part = tensor.narrow(self.axis, first, last - first)
        missing = (stop - start) - (last - first)
        if not missing:
            return part
        shape = (*tensor.shape[: self.axis], missing, *tensor.shape[self.axis + 1 :])
        return torch.cat((part, tensor.new_zeros(shape)), dim=self.axis)


def divided(group: Group, axis: int, *parts: Part) -> Shard | None:
    """A rank's share of each of the neighbouring parts of an axis; None for who is alone.

    A rank may have a unit more than another. Fewer units than ranks must divide their number.
    """
    if group.size == 1:
        return None
    ranges, start = [], 0
    for part in parts:
        assert part.count >= group.size or group.size % part.count == 0, f"{part} over {group.size}"
        first, last = part.share_of(group)
        ranges.append((start + first, start + last))
        start += part.length
    return Shard(group, axis, start, tuple(ranges))


def divided_vocabulary(group: Group, num_rows: int) -> Shard | None:
    """A rank's rows of a table of any length, the last ranks' padded with zeros."""
    if group.size == 1:
        return None
    each = -(-num_rows // group.size)
    return Shard(group, 0, num_rows, ((group.rank * each, (group.rank + 1) * each),))


def share(group: Group, count: int) -> int:
    """How many of so many units a rank holds: at least one."""
    assert count % group.size == 0 or group.size % count == 0, f"{count} units, {group.size} ranks"
    return max(1, count // group.size)
