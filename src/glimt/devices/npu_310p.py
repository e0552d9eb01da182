"""Atlas 300I DUO (Ascend 310P): operators of ATB, float16 alone, matrices and caches in tiles.

A prompt that begins its sequence is attended to at once, with a causal mask or with none. Every
other token, be it decoded, part of a later chunk or VisualGLM's <sop>, is one row of the paged
attention, which sees as much of the cache as it is told and needs no mask. Source:
Ascend/op-plugin, op_plugin/ops/atb; vllm-project/vllm-ascend, vllm_ascend/_310p; docs/ascend.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from glimt.devices.base import AttentionBatch, KVCache, LowBitWeight, MatrixWeight, RotaryStyle
from glimt.devices.npu_base import (
    FRACTAL_NZ,
    HEAD,
    Kept,
    NpuDevice,
    Stretch,
    stretches,
    widened_heads,
)
from glimt.errors import ConfigError

_TILE = 16  # rows and columns of a tile
_MOST_BLOCK = 128  # tokens
_MOST_BLOCK_VALUES = 16384  # of one head in a block
_MOST_ROWS = 2048  # of one call of the paged attention
_ROTATED = (64, 128)  # dims of a segment
_NO_LIMIT = 2147483647  # tokens that the prompt attention sees to either side


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class TiledCache(KVCache):
    """key, value: [num_blocks, num_heads * head_dim / 16, block_size, 16] in FRACTAL_NZ.

    write: puts keys and values [n, num_heads, head_dim] into slots [n] of this cache
    """

    num_heads: int
    head_dim: int
    write: Callable[[Tensor, Tensor, TiledCache, Tensor], None]

    @property
    def block_size(self) -> int:
        """Tokens per block."""
        return self.key.shape[2]

    @property
    def num_kv_heads(self) -> int:
        """Heads of each token."""
        return self.num_heads

    def read(self, blocks: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values of whole blocks, [*blocks.shape, block_size, num_kv_heads, head_dim]."""
        shape = self.num_heads, self.head_dim
        key, value = (
            part[blocks].transpose(-3, -2).flatten(-2).unflatten(-1, shape)
            for part in (self.key, self.value)
        )
        return key, value

    def clear_blocks(self, blocks: Tensor) -> None:
        """Zero whole blocks. blocks: [n] int64."""
        places = torch.arange(self.block_size, device=blocks.device)
        self.clear_slots((blocks[:, None] * self.block_size + places).flatten())

    def clear_slots(self, slots: Tensor) -> None:
        """Zero single places, by the operator that writes them. slots: [n] int64."""
        nothing = self.key.new_zeros(len(slots), self.num_heads, self.head_dim)
        self.write(nothing, nothing, self, slots)


@dataclass(frozen=True, slots=True, eq=False)
class _Prompts:
    """Prompts that begin their sequences, end to end.

    tokens:  [n] int64, which of the step's; padding: zeros to put behind them
    lengths: [num_prompts] int32 on the host; the last one holds the padding
    mask:    [1, side / 16, side, 16] in FRACTAL_NZ, 0 or the least number; None: all see all
    """

    tokens: Tensor
    padding: int
    lengths: Tensor
    mask: Tensor | None


@dataclass(frozen=True, slots=True, eq=False)
class _Rows:
    """Tokens that see what is in the cache.

    tokens: [n] int64; tables: [n, max_blocks] int32; lengths: [n] int32, what each sees
    """

    tokens: Tensor
    tables: Tensor
    lengths: Tensor


@dataclass(frozen=True, slots=True)
class _Plan:
    prompts: tuple[_Prompts, ...]
    rows: tuple[_Rows, ...]


class Atlas310P(NpuDevice):
    """Ascend 310P. Sums beyond 65,504 stay there instead of becoming infinite."""

    product = "Atlas 300I DUO"
    pairs_as_halves = True

    def __init__(self, torch_npu: Any, torch_device: str, casts_weights: bool = True) -> None:
        super().__init__(torch_npu, torch_device, casts_weights)
        self.fused_dtypes = frozenset({torch.float16})
        self._plans: Kept[_Plan] = Kept()
        self._slots: Kept[Tensor] = Kept()
        torch_npu.npu.set_compile_mode(jit_compile=False)  # or every new length is compiled

    def preferred_dtype(self, declared: torch.dtype) -> torch.dtype:
        """float16 in place of bfloat16, which this chip has not."""
        return torch.float16 if declared == torch.bfloat16 else declared

    def check_dtype(self, dtype: torch.dtype) -> None:
        """Raise ConfigError for bfloat16."""
        if dtype == torch.bfloat16:
            said = f"{self.product} does not compute in bfloat16; use float16"
            raise ConfigError("dtype", [said])

    def block_size(self, wanted: int) -> int:
        """128, or what is wanted. Raises ConfigError for blocks that ATB cannot read."""
        if wanted % _TILE == 0 and wanted <= _MOST_BLOCK:
            return wanted or _MOST_BLOCK
        said = f"is {wanted}, but {self.product} reads blocks of 16 to 128 tokens, a multiple of 16"
        raise ConfigError("block_size", [f"{said}; leave it out for 128"])

    def hold_quantised(self, weight: LowBitWeight, dtype: torch.dtype) -> MatrixWeight:
        """int8 alone, with x in float16. Raises ConfigError for the rest."""
        if weight.format == "int8" and not weight.quantises_x:
            return super().hold_quantised(weight, dtype)
        what = "weights in int4" if weight.format == "int4" else "activations in int8"
        said = f"{self.product} has no operator for {what}; use int8"
        raise ConfigError("quant", [said])

    # --- rows ---

    def can_rotate(self, x: Tensor, width: int) -> bool:
        """Segments of 64 or 128 dims. x: [num_tokens, num_heads, head_dim]."""
        return width in _ROTATED and x.numel() > 0

    def rotate_segment(self, x: Tensor, cos: Tensor, sin: Tensor, style: RotaryStyle) -> Tensor:
        """[1, num_tokens, num_heads, width] -> the same, in place.

        The operator wants queries and keys together; the keys' part is one head, and is left.
        """
        unused = x[:, :, :1].clone()
        self.torch_npu.npu_apply_rotary_pos_emb(
            x, unused, cos, sin, layout="BSND", rotary_mode="half"
        )
        return x

    # --- the cache ---

    def lay_out_cache(self, cache: KVCache) -> KVCache:
        """In tiles; as it is where no operator reads such: int8, float32, small heads."""
        _, block_size, heads, dim = cache.key.shape
        fits = dim % _TILE == 0 and block_size * dim <= _MOST_BLOCK_VALUES
        if cache.scales is not None or dim != HEAD or not (fits and self.is_fused(cache.key)):
            return cache
        key, value = (
            self.in_tiles(part.flatten(2).unflatten(-1, (-1, _TILE)).transpose(1, 2))
            for part in (cache.key, cache.value)
        )
        return TiledCache(key, value, num_heads=heads, head_dim=dim, write=self._write)

    def _write(self, key: Tensor, value: Tensor, cache: TiledCache, slots: Tensor) -> None:
        narrow = self._slots.of(slots, slots.int)
        new = key.contiguous(), value.contiguous()
        self.torch_npu._npu_reshape_and_cache(*new, cache.key, cache.value, narrow)

    def write_kv(self, key: Tensor, value: Tensor, cache: KVCache, slots: Tensor) -> None:
        """As the base."""
        if isinstance(cache, TiledCache):
            self._write(key, value, cache, slots)
        else:
            super().write_kv(key, value, cache, slots)

    # --- attention ---

    def varlen_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        query_starts: Sequence[int],
        key_starts: Sequence[int],
        scale: float,
    ) -> Tensor:
        """As the base, heads padded to 128 dims."""
        if not (self.is_fused(query, key, value) and query.shape[-1] <= HEAD):
            return super().varlen_attention(query, key, value, query_starts, key_starts, scale)
        q, k, v = (widened_heads(x) for x in (query, key, value))
        if list(query_starts) == list(key_starts):
            counts = [stop - start for start, stop in pairwise(query_starts)]
            out = self._attend_all(q, k, v, _on_host(counts), scale)
        else:
            spans = zip(pairwise(query_starts), pairwise(key_starts), strict=True)
            parts = [self._cross(q[a:b], k[c:d], v[c:d], scale) for (a, b), (c, d) in spans]
            out = torch.cat(parts)
        return out[..., : query.shape[-1]]

    def _attend_all(self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, scale: float) -> Tensor:
        """Every token of a sequence sees all of it. lengths: [num_sequences] int32 on the host."""
        out = torch.empty_like(q)
        self.torch_npu._npu_flash_attention_unpad(
            q, k, v, lengths, scale, q.shape[1], k.shape[1], out
        )
        return out

    def _cross(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """[n, num_heads, 128] over [m, num_heads, 128], without a mask."""
        out: Tensor = self.torch_npu.npu_prompt_flash_attention(
            q[None],
            k[None],
            v[None],
            num_heads=q.shape[1],
            scale_value=scale,
            pre_tokens=_NO_LIMIT,
            next_tokens=_NO_LIMIT,
            input_layout="BSND",
        )
        return out[0]

    def paged_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cache: KVCache,
        batch: AttentionBatch,
        scale: float,
    ) -> Tensor:
        """As the base."""
        if not isinstance(cache, TiledCache):
            return super().paged_attention(query, key, value, cache, batch, scale)
        plan = self._plans.of(batch, lambda: self._planned(batch, query.dtype))
        out = torch.empty_like(query)
        for prompts in plan.prompts:
            q, k, v = (x.index_select(0, prompts.tokens) for x in (query, key, value))
            out.index_copy_(0, prompts.tokens, self._attend_prompts(q, k, v, prompts, scale))
        for rows in plan.rows:
            part = self._attend_rows(query.index_select(0, rows.tokens), cache, rows, scale)
            out.index_copy_(0, rows.tokens, part)
        return out

    def _attend_prompts(
        self, q: Tensor, k: Tensor, v: Tensor, prompts: _Prompts, scale: float
    ) -> Tensor:
        if prompts.mask is None:
            return self._attend_all(q, k, v, prompts.lengths, scale)
        q, k, v = (F.pad(x, (0, 0, 0, 0, 0, prompts.padding)) for x in (q, k, v))
        out = torch.empty_like(q)
        self.torch_npu._npu_flash_attention(
            q, k, v, prompts.mask, prompts.lengths, scale, q.shape[1], k.shape[1], out
        )
        return out[: len(prompts.tokens)]

    def _attend_rows(self, query: Tensor, cache: TiledCache, rows: _Rows, scale: float) -> Tensor:
        out = torch.empty_like(query)
        self.torch_npu._npu_paged_attention(
            query,
            cache.key,
            cache.value,
            cache.num_heads,
            query.shape[1],
            scale,
            rows.tables,
            rows.lengths,
            out,
        )
        return out

    # --- a step's plan ---

    def _planned(self, batch: AttentionBatch, dtype: torch.dtype) -> _Plan:
        """Which tokens go which way; the same for every layer."""
        found = stretches(batch)
        whole = [s for s in found if s.first == 0 and s.count == s.length > 1]
        kinds = ([s for s in whole if s.is_open], [s for s in whole if not s.is_open])
        rest = [s for s in found if s not in whole]
        return _Plan(
            tuple(self._prompts(kind, dtype) for kind in kinds if kind),
            tuple(_rows_of(rest, batch)) if rest else (),
        )

    def _prompts(self, chosen: Sequence[Stretch], dtype: torch.dtype) -> _Prompts:
        lengths = [stretch.count for stretch in chosen]
        tokens = torch.tensor(_tokens_of(chosen), device=self.torch_device)
        if chosen[0].is_open:
            return _Prompts(tokens, 0, _on_host(lengths), None)
        padding = -sum(lengths) % _TILE
        lengths[-1] += padding
        return _Prompts(tokens, padding, _on_host(lengths), self._mask(max(lengths), dtype))

    def _mask(self, length: int, dtype: torch.dtype) -> Tensor:
        """Causal, up to that length, in tiles: [c, r, i] hides key 16 c + i from query r."""
        side = length + -length % _TILE
        least = torch.finfo(torch.float16).min
        mask = torch.full((side, side), least, dtype=dtype).triu_(1)
        tiles = mask.view(side, side // _TILE, _TILE).transpose(0, 1)
        cast: Tensor = self.torch_npu.npu_format_cast(
            tiles[None].contiguous().to(self.torch_device), FRACTAL_NZ
        )
        return cast


def _rows_of(chosen: Sequence[Stretch], batch: AttentionBatch) -> list[_Rows]:
    """Each token for itself, at most as many in a call as the operator takes."""
    where = batch.block_tables.device
    tokens = torch.tensor(_tokens_of(chosen), device=where)
    owners = torch.tensor([s.row for s in chosen for _ in range(s.count)], device=where)
    seen = [length for s in chosen for length in s.seen()]
    lengths = torch.tensor(seen, dtype=torch.int32, device=where)
    tables = batch.block_tables.int().index_select(0, owners)
    parts = (part.split(_MOST_ROWS) for part in (tokens, tables, lengths))
    return [_Rows(*part) for part in zip(*parts, strict=True)]


def _tokens_of(chosen: Sequence[Stretch]) -> list[int]:
    return [token for stretch in chosen for token in range(stretch.start, stretch.stop)]


def _on_host(lengths: Sequence[int]) -> Tensor:
    """int32 on the CPU, where ATB reads them before it launches anything."""
    return torch.tensor(lengths, dtype=torch.int32)
