"""QuantisedWeight: a matrix in few bits. QuantFormat: how one is made, and how files hold it.

A format is a file in this folder that ends in FORMATS; `all_formats` scans the folder. Knows
tensors, no model and no checkpoint.
"""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from glimt.errors import ConfigError
from glimt.parallel import Shard

NONE = "none"  # what stands for no format
BitFormat = Literal["int8", "int4"]


@dataclass(frozen=True, slots=True, eq=False)
class QuantisedWeight:
    """A matrix [n, k] whose rows are output channels, as the kernels' PlainWeight has it.

    int8: values [n, k] int8, scales [n] float32: w = q * scale
    int4: values [n, padded_k / 2] uint8, the even column in the low half, unsigned 0 … 15;
          scales, offsets [n, padded_k / group] float32: w = q * scale + offset
    padded_k is k rounded up to whole groups: a last group that k does not fill goes on with
    columns that meet no x (quantisers fill them with 0), and dequantise() leaves them out.
    A scale of int4 may be negative: the 16 steps reach one further on one side, and its sign
    says on which.

    group:       int4: columns that share a scale, 32, 64 or 128; int8: 0
    quantises_x: x is rounded to int8 as well, row by row (of int4: group by group), by amax / 127
    """

    format: BitFormat
    values: Tensor
    scales: Tensor
    offsets: Tensor | None
    group: int
    n: int
    k: int
    quantises_x: bool = False

    def __post_init__(self) -> None:
        is_int4 = self.format == "int4"
        width = self.padded_k // 2 if is_int4 else self.k
        assert self.values.shape == (self.n, width), f"values are {tuple(self.values.shape)}"
        assert self.values.dtype == (torch.uint8 if is_int4 else torch.int8)
        shape = (self.n, self.padded_k // self.group) if is_int4 else (self.n,)
        assert self.scales.shape == shape, f"scales are {tuple(self.scales.shape)}"
        assert self.scales.dtype == torch.float32
        assert (self.offsets is not None) == is_int4, "int4 has offsets, int8 has none"
        assert self.offsets is None or self.offsets.shape == shape
        assert self.offsets is None or self.offsets.dtype == torch.float32

    @property
    def padded_k(self) -> int:
        """Columns in `values`: whole groups."""
        return padded(self.k, self.group)

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors in memory."""
        return sum(t.nbytes for t in (self.values, self.scales, self.offsets) if t is not None)

    def to(self, torch_device: torch.device) -> QuantisedWeight:
        """The same on a device; itself where it is there already."""
        if self.values.device == torch_device:
            return self
        moved = {
            name: tensor.to(torch_device)
            for name in ("values", "scales", "offsets")
            if (tensor := getattr(self, name)) is not None
        }
        return replace(self, **moved)

    def dequantise(self) -> Tensor:
        """[n, k] float32: what the values stand for."""
        if self.offsets is None:
            return self.values.float() * self.scales[:, None]
        steps = unpack_nibbles(self.values).float().view(self.n, -1, self.group)
        whole = steps * self.scales[..., None] + self.offsets[..., None]
        return whole.flatten(1)[:, : self.k]

    def rows(self, start: int, stop: int) -> QuantisedWeight:
        """The matrix of these rows alone, [stop - start, k]; nothing is copied."""
        offsets = None if self.offsets is None else self.offsets[start:stop]
        values, scales = self.values[start:stop], self.scales[start:stop]
        return replace(self, values=values, scales=scales, offsets=offsets, n=len(values))


def part_of(weight: QuantisedWeight, shard: Shard) -> QuantisedWeight:
    """A rank's part of a matrix, of the same steps and scales.

    Where columns are divided inside a group, each rank would need a scale of its own: raises
    ConfigError.
    """
    if shard.axis == 0:
        rows = (weight.values, weight.scales, weight.offsets)
        values, scales, offsets = (None if t is None else shard.of(t) for t in rows)
        assert values is not None
        assert scales is not None
        return replace(weight, values=values, scales=scales, offsets=offsets, n=shard.length)
    return _columns_of(weight, shard)


def _columns_of(weight: QuantisedWeight, shard: Shard) -> QuantisedWeight:
    ((start, stop),) = shard.ranges
    if weight.offsets is None:
        return replace(weight, values=weight.values[:, start:stop].contiguous(), k=stop - start)
    if start % weight.group or (stop % weight.group and stop != weight.k):
        said = f"of {weight.k} columns in groups of {weight.group} cannot be divided among"
        advice = "use fewer ranks, or the checkpoint in floats"
        raise ConfigError("tp_size", [f"a stored matrix {said} {shard.group.size} ranks: {advice}"])
    first, last = start // weight.group, padded(stop, weight.group) // weight.group
    return replace(
        weight,
        values=weight.values[:, start // 2 : last * weight.group // 2].contiguous(),
        scales=weight.scales[:, first:last].contiguous(),
        offsets=weight.offsets[:, first:last].contiguous(),
        k=stop - start,
    )


@runtime_checkable
class TakesQuantised(Protocol):
    """A module whose `weight` may be a quantised one instead."""

    def set_weight(self, weight: QuantisedWeight) -> None:
        """Use this weight from now on."""


def padded(k: int, group: int) -> int:
    """k rounded up to whole groups; k itself where there are none (group 0)."""
    return -(-k // group) * group if group else k


def pack_nibbles(steps: Tensor) -> Tensor:
    """[n, k] of 0 … 15 -> [n, k / 2] uint8, the even column in the low half."""
    steps = steps.to(torch.uint8)
    return steps[:, 0::2] | (steps[:, 1::2] << 4)


def unpack_nibbles(values: Tensor) -> Tensor:
    """[n, m] uint8 -> [n, 2 m] of 0 … 15: the reverse of pack_nibbles."""
    return torch.stack((values & 0xF, values >> 4), dim=-1).flatten(-2)


# --- formats ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Shape and dtype of a tensor that files hold for a quantised weight."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


Parts = Mapping[str, Tensor]  # by name ending


class QuantFormat(ABC):
    """One way to write a weight in few bits.

    name:        what --quant and config.json say
    quantises_x: whether activations are rounded too (see QuantisedWeight)
    head:        name of the format that the output head has beside this one, where none is chosen

    In files, a weight NAME is the tensors NAME + ending of `stored`.
    """

    name: str
    quantises_x: bool = False

    @property
    def head(self) -> str:
        """This format itself, unless it harms the logits too much."""
        return self.name

    @abstractmethod
    def quantise(self, weight: Tensor) -> QuantisedWeight:
        """[n, k] of any float dtype; not changed."""

    @abstractmethod
    def stored(self, n: int, k: int) -> Mapping[str, StoredTensor]:
        """What files hold for a weight [n, k], by name ending."""

    @abstractmethod
    def parts(self, weight: QuantisedWeight) -> dict[str, Tensor]:
        """The tensors for a file, as `stored` describes those of [n, k]. Loses nothing."""

    @abstractmethod
    def restore(self, parts: Parts, n: int, k: int) -> QuantisedWeight:
        """The reverse; values are the very tensor given, so they may be a mapped file."""


def all_formats() -> dict[str, QuantFormat]:
    """Every format in this folder, by name; a module without FORMATS has none."""
    package = importlib.import_module("glimt.quant")
    found: dict[str, QuantFormat] = {}
    for info in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"glimt.quant.{info.name}")
        found |= {one.name: one for one in getattr(module, "FORMATS", ())}
    return found


def find_format(name: str, field: str = "quant") -> QuantFormat | None:
    """The format of that name, None for "none". Raises ConfigError if it is unknown.

    field: the setting that named it, for the error
    """
    if name == NONE:
        return None
    formats = all_formats()
    if name not in formats:
        known = ", ".join((NONE, *sorted(formats)))
        raise ConfigError(field, [f"{name!r} is unknown; choose one of {known}"])
    return formats[name]


_CHUNK_ELEMENTS = 2**22  # of float32: the working memory stays below 100 MB


def by_rows(weight: Tensor, quantise: Callable[[Tensor], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """quantise(rows [m, k] float32) over chunks of a [n, k] weight, joined along the rows.

    A head of 150,000 rows would take gigabytes of float32 at once.
    """
    rows = max(1, _CHUNK_ELEMENTS // max(1, weight.shape[1]))
    chunks = [quantise(chunk.float()) for chunk in weight.split(rows)]
    return tuple(torch.cat(joined) for joined in zip(*chunks, strict=True))
