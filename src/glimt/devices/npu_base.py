"""NpuDevice: what all Ascend chips do alike, by operators of torch_npu. Not run on hardware.

A chip's own file (npu_a2.py, npu_310p.py) says how it attends and rotates. Whatever an operator
does not take by its documentation (a dtype, a head size) goes the base's way in plain torch.
Sources: Ascend/op-plugin, docs/zh/custom_APIs; vllm-project/vllm-ascend; docs/ascend.md tells more.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from glimt.devices.base import (
    Activation,
    AttentionBatch,
    Device,
    LowBitWeight,
    MatrixWeight,
    RotaryStyle,
    add_residual,
)
from glimt.devices.chunks import chunk_parts
from glimt.devices.npu_weights import NpuWeight, hold_low_bits
from glimt.errors import ConfigError

FRACTAL_NZ = 29  # format number of matrices in tiles of 16 x 16
HEAD = 128  # dims that the attention operators take; smaller heads are padded with zeros
_LEAST_ROW_BYTES = 32  # of what is normalised, by the documentation of npu_rms_norm

T = TypeVar("T")


@dataclass(slots=True)
class Kept(Generic[T]):
    """What was last made of something, for the other layers of the same step.

    The source is held, so that no other can have its identity.
    """

    _source: object = None
    _key: Hashable = None
    _made: list[T] = field(default_factory=list)

    def of(self, source: object, make: Callable[[], T], key: Hashable = None) -> T:
        """make(), unless it was made of this very source, with this key, the last time."""
        if self._source is not source or self._key != key or not self._made:
            self._source, self._key, self._made = source, key, [make()]
        return self._made[0]


@dataclass(frozen=True, slots=True, eq=False)
class RotaryTables:
    """Cosines and sines, [1, num_tokens, 1, width] each, for the segments of a head in turn."""

    cos: tuple[Tensor, ...]
    sin: tuple[Tensor, ...]


class NpuDevice(Device, ABC):
    """One Ascend NPU.

    fused_dtypes:   what the operators take; other dtypes are computed in plain torch
    casts_weights:  matrices are stored in tiles (FRACTAL_NZ)
    pairs_as_halves: the rotation operator knows halves only, so neighbours are sorted before it
    """

    name = "npu"
    collectives = "hccl"
    product: ClassVar[str]
    pairs_as_halves: ClassVar[bool] = False

    def __init__(self, torch_npu: Any, torch_device: str, casts_weights: bool) -> None:
        super().__init__(torch_device)
        self.torch_npu = torch_npu
        self.casts_weights = casts_weights
        self.fused_dtypes = frozenset({torch.float16, torch.bfloat16})
        self._tables: Kept[RotaryTables] = Kept()
        # Without it a cast gives back the plain matrix on A2, with nothing but a warning.
        torch_npu.npu.config.allow_internal_format = True

    # --- the machine ---

    def free_bytes(self) -> int:
        """Memory of the NPU that is not in use by anybody, in bytes."""
        free, _ = self.torch_npu.npu.mem_get_info()
        return int(free)

    def peak_bytes(self) -> int | None:
        """The most that this process has held on the NPU, in bytes."""
        return int(self.torch_npu.npu.max_memory_allocated())

    def is_fused(self, *tensors: Tensor) -> bool:
        """Do the operators take tensors of such dtypes, all alike? Each: […], of any shape."""
        return tensors[0].dtype in self.fused_dtypes and len({x.dtype for x in tensors}) == 1

    def forget(self) -> None:
        """Drop what was made for the other layers of a step."""
        self._tables = Kept()

    def check_dtype(self, dtype: torch.dtype) -> None:
        """Raise ConfigError for a dtype that this chip does not compute in at all."""

    # --- products ---

    def prepare_weight(
        self, weight: Tensor | LowBitWeight, dtype: torch.dtype, is_paired: bool = False
    ) -> MatrixWeight:
        """In tiles where this chip wants that; one in few bits as its operator reads it.

        Raises ConfigError for a format or a dtype that this chip has no operator for.
        """
        self.check_dtype(dtype)
        if not isinstance(weight, Tensor):
            return self.hold_quantised(weight, dtype)
        is_cast = self.casts_weights and dtype in self.fused_dtypes
        return self.in_tiles(weight.detach().to(dtype)) if is_cast else weight

    def hold_quantised(self, weight: LowBitWeight, dtype: torch.dtype) -> MatrixWeight:
        """A matrix in few bits for its operator, or as it is where none takes it."""
        held = hold_low_bits(self.torch_npu, weight, dtype) if dtype in self.fused_dtypes else None
        return weight if held is None else held

    def in_tiles(self, matrix: Tensor) -> Tensor:
        """[…, n, k] -> the same in FRACTAL_NZ. Raises ConfigError if the cast did nothing."""
        cast: Tensor = self.torch_npu.npu_format_cast(matrix.contiguous(), FRACTAL_NZ)
        if int(self.torch_npu.get_npu_format(cast)) != FRACTAL_NZ:
            said = "did not cast a matrix to FRACTAL_NZ; internal formats are not allowed here"
            raise ConfigError("device", [f"torch_npu {said}: update torch-npu and CANN"])
        return cast

    def linear(
        self,
        x: Tensor,
        weight: MatrixWeight,
        bias: Tensor | None,
        activation: Activation = "none",
        residual: Tensor | None = None,
        residual_scale: float = 1.0,
    ) -> Tensor:
        """As the base, with what is in few bits multiplied as it is."""
        if not isinstance(weight, NpuWeight):
            return super().linear(x, weight, bias, activation, residual, residual_scale)
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        out = weight.times(self.torch_npu, rows, bias) if len(rows) else rows.new_empty(0, weight.n)
        y = self.activate(out.unflatten(0, x.shape[:-1]), activation)
        return add_residual(y, residual, residual_scale)

    # --- rows ---

    def can_norm(self, *tensors: Tensor) -> bool:
        """Do the norms' operators take them? Rows […, size], none empty or narrow; gain [size]."""
        x = tensors[0]
        is_wide = x.shape[-1] * x.element_size() >= _LEAST_ROW_BYTES
        return self.is_fused(*tensors) and is_wide and x.numel() > 0

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """As the base."""
        if not self.can_norm(x, weight):
            return super().rms_norm(x, weight, eps)
        out: Tensor = self.torch_npu.npu_rms_norm(x.contiguous(), weight, eps)[0]
        return out

    def gelu_tanh(self, x: Tensor) -> Tensor:
        """As the base."""
        return self._gelu(x, "tanh")

    def gelu_erf(self, x: Tensor) -> Tensor:
        """As the base. torch's own GELU has the tanh form on an NPU, whatever is asked for."""
        return self._gelu(x, "none")

    def _gelu(self, x: Tensor, form: str) -> Tensor:
        if not (self.is_fused(x) or x.dtype == torch.float32):
            return F.gelu(x, approximate=form)
        out: Tensor = self.torch_npu.npu_gelu(x.contiguous(), approximate=form)
        return out

    def rotate(
        self, x: Tensor, cos: Tensor, sin: Tensor, style: RotaryStyle, num_segments: int
    ) -> Tensor:
        """As the base, one segment of all heads at a time."""
        segments = 1 if style == "interleaved" else num_segments
        width = 2 * cos.shape[-1] // segments
        if not (self.is_fused(x, cos) and self.can_rotate(x, width)):
            return super().rotate(x, cos, sin, style, num_segments)
        tables = self._tables.of(
            cos, lambda: self._wide_tables(cos, sin, style, segments), (style, segments)
        )
        parts = [
            self._rotated(x[..., i * width : (i + 1) * width], c, s, style)
            for i, (c, s) in enumerate(zip(tables.cos, tables.sin, strict=True))
        ]
        return torch.cat((*parts, x[..., segments * width :]), dim=-1)

    def _wide_tables(
        self, cos: Tensor, sin: Tensor, style: RotaryStyle, segments: int
    ) -> RotaryTables:
        """Both dims of a pair have the same angle: beside each other, or half a segment apart."""
        is_beside = style == "interleaved" and not self.pairs_as_halves

        def widened(table: Tensor) -> tuple[Tensor, ...]:
            parts = table.chunk(segments, dim=-1)
            wide = (
                p.repeat_interleave(2, -1) if is_beside else torch.cat((p, p), -1) for p in parts
            )
            return tuple(one[None, :, None].contiguous() for one in wide)

        return RotaryTables(widened(cos), widened(sin))

    def _rotated(self, x: Tensor, cos: Tensor, sin: Tensor, style: RotaryStyle) -> Tensor:
        """One segment [num_tokens, num_heads, width]; its copy sorts pairs where that is needed."""
        if style == "half" or not self.pairs_as_halves:
            return self.rotate_segment(x.contiguous()[None], cos, sin, style)[0]
        halves = x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
        turned = self.rotate_segment(halves.contiguous()[None], cos, sin, "half")[0]
        return turned.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)

    @abstractmethod
    def can_rotate(self, x: Tensor, width: int) -> bool:
        """Does `rotate_segment` take so many dims of x [num_tokens, num_heads, head_dim]?"""

    @abstractmethod
    def rotate_segment(self, x: Tensor, cos: Tensor, sin: Tensor, style: RotaryStyle) -> Tensor:
        """[1, num_tokens, num_heads, width], contiguous, and tables of `_wide_tables` -> as x.

        x may be changed.
        """


# --- what attention needs --------------------------------------------------------------------


def widened_heads(x: Tensor) -> Tensor:
    """[n, num_heads, head_dim] contiguous, with zeros up to 128 dims: they change no score."""
    return F.pad(x, (0, HEAD - x.shape[-1])) if x.shape[-1] < HEAD else x.contiguous()


@dataclass(frozen=True, slots=True)
class Stretch:
    """Neighbouring tokens of one row that see alike.

    row:    of the batch; start, stop: among the step's tokens
    first:  the first token's index in its sequence
    length: of what is seen, in tokens of the sequence: all of it by all, if `is_open`; else each
            token sees up to itself, and the last one all
    """

    row: int
    start: int
    stop: int
    first: int
    length: int
    is_open: bool

    @property
    def count(self) -> int:
        """Tokens that see."""
        return self.stop - self.start

    def seen(self) -> list[int]:
        """How many tokens each of them sees."""
        if self.is_open:
            return [self.length] * self.count
        return list(range(self.first + 1, self.first + 1 + self.count))


def stretches(batch: AttentionBatch) -> list[Stretch]:
    """The step's tokens in order: of a row, those that see its whole shared part, then the others.

    What sees only up to itself needs a causal mask, and the rest needs none: operators have no mask
    of any other form.
    """
    found: list[Stretch] = []
    for row, context in enumerate(batch.context_lens):
        start, stop = batch.query_starts[row], batch.query_starts[row + 1]
        first = context - (stop - start)
        found += [
            Stretch(
                row=row,
                start=start + part.start,
                stop=start + part.stop,
                first=first + part.start,
                length=part.num_keys,
                is_open=not part.is_causal,
            )
            for part in chunk_parts(stop - start, context, batch.num_shared[row])
        ]
    return found
