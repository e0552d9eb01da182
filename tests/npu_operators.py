"""Operators of torch_npu on the CPU, each with the limits that its documentation states.

Every function first checks what it is given and raises ContractBroken where an NPU would refuse it,
or worse, would read the wrong place; then it computes in float32. What is uninitialised is NaN.
Source of the limits: shared/specs/ascend-backend.md, sections 2.1 to 2.7.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

NZ = 29
TILE = 16
INT8_OUT = 1  # torch's numbers of dtypes, which a dispatcher's `int? output_dtype` gets
OUT_DTYPES = {5: torch.float16, 15: torch.bfloat16, 6: torch.float32}


class ContractBroken(Exception):
    """An operator was called as its documentation does not allow."""


def need(holds: bool, said: str) -> None:
    if not holds:
        raise ContractBroken(said)


@dataclass
class Chip:
    """What is simulated.

    kind:     "a2" or "310p"
    is_exact: float32 is taken wherever the chip takes 16 bits, to compare values
    tiled:    tensors in FRACTAL_NZ; hosts: tensors that were made on the host
    is_rehearsal: what is computed is thrown away, so contexts may be longer than anybody's
    """

    kind: str
    is_exact: bool = False
    allows_tiles: bool | None = None
    is_rehearsal: bool = False
    tiled: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)
    hosts: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)

    @property
    def dtypes(self) -> set[torch.dtype]:
        """What operators compute in."""
        floats = {torch.float16} if self.kind == "310p" else {torch.float16, torch.bfloat16}
        return floats | ({torch.float32} if self.is_exact else set())

    # --- what is checked everywhere ---

    def floats(self, *tensors: Tensor) -> None:
        """All of one dtype that the chip takes."""
        kinds = {x.dtype for x in tensors}
        need(len(kinds) == 1, f"dtypes differ: {kinds}")
        need(kinds <= self.dtypes, f"{kinds} on {self.kind}")
        self.whole(*tensors)

    def whole(self, *tensors: Tensor) -> None:
        need(all(x.is_contiguous() for x in tensors), "a tensor is not contiguous")

    def only(self, kind: str, operator: str) -> None:
        need(self.kind == kind, f"{operator} is not on {self.kind}")

    def on_host(self, x: Tensor) -> None:
        need(x in self.hosts, "lengths must be on the host")

    def on_chip(self, x: Tensor) -> None:
        need(x not in self.hosts, "a table or mask is still on the host")

    def in_tiles(self, x: Tensor) -> bool:
        return x in self.tiled

    # --- formats ---

    def npu_format_cast(self, x: Tensor, acl_format: int) -> Tensor:
        need(acl_format == NZ, f"format {acl_format} is not modelled")
        need(x.dtype != torch.float32 or self.is_exact, "float32 is never cast to tiles")
        self.whole(x)
        out = x.clone()
        if self.allows_tiles or (self.allows_tiles is None and self.kind == "310p"):
            self.tiled[out] = True
        return out

    # --- rows ---

    def npu_rms_norm(
        self, x: Tensor, gamma: Tensor, epsilon: float = 1e-6
    ) -> tuple[Tensor, Tensor]:
        self.floats(x, gamma)
        need(gamma.shape == x.shape[-1:], "gamma is not of the last axis' length")
        need(x.shape[-1] * x.element_size() >= 32, "the last axis is below 32 bytes")
        rstd = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + epsilon)
        return (x.float() * rstd * gamma.float()).to(x.dtype), rstd

    def npu_add_rms_norm(
        self, x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float = 1e-6
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The norm is of the sum before it is rounded, which is the larger of two differences."""
        self.floats(x1, x2, gamma)
        need(x1.shape == x2.shape, "what is added is of other shapes")
        need(gamma.shape == x1.shape[-1:], "gamma is not of the last axis' length")
        need(x1.numel() > 0, "empty tensors are not taken")
        total = x1.float() + x2.float()
        rstd = torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + epsilon)
        normed = (total * rstd * gamma.float()).to(x1.dtype)
        if self.kind == "310p":
            rstd = torch.full_like(rstd, torch.nan)  # documented as not valid there
        return normed, rstd, total.to(x1.dtype)

    def npu_swiglu(self, x: Tensor, dim: int = -1) -> Tensor:
        self.only("a2", "npu_swiglu")
        self.floats(x)
        need(dim == -1, "another axis is not modelled")
        need(x.shape[-1] % 2 == 0 and x.numel() > 0, "halves of the last axis")
        gate, up = x.float().chunk(2, -1)
        return (torch.nn.functional.silu(gate) * up).to(x.dtype)

    def npu_gelu(self, x: Tensor, *, approximate: str = "none") -> Tensor:
        need(x.dtype in self.dtypes | {torch.float32}, f"{x.dtype} on {self.kind}")
        need(approximate in ("none", "tanh"), f"approximate {approximate!r}")
        return torch.nn.functional.gelu(x.float(), approximate=approximate).to(x.dtype)

    def npu_rotary_mul(
        self, x: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half"
    ) -> Tensor:
        self.only("a2", "npu_rotary_mul of 64 dims")
        self.floats(x, r1, r2)
        need(x.dim() == 4 and r1.shape == r2.shape == (1, x.shape[1], 1, x.shape[3]), "BSND tables")
        need(x.shape[-1] % 2 == 0 and x.shape[-1] < 896, "an even width below 896")
        need(rotary_mode in ("half", "interleave"), f"mode {rotary_mode!r}")
        beside = rotary_mode == "interleave"
        need(not beside or x.shape[0] * x.shape[2] < 1000, "fewer than 1000 heads")
        return turned(x, r1, r2, beside)

    def npu_apply_rotary_pos_emb(
        self,
        query: Tensor,
        key: Tensor,
        cos: Tensor,
        sin: Tensor,
        layout: str,
        rotary_mode: str,
    ) -> tuple[Tensor, Tensor]:
        """In place, although the schema does not say so."""
        self.floats(query, key, cos, sin)
        need(layout == "BSND", f"layout {layout}: its default changed between versions")
        need(rotary_mode == "half", "only halves are documented for A2 and 310P")
        need(query.shape[-1] in (64, 128) and key.shape[-1] == query.shape[-1], "64 or 128 dims")
        need(cos.shape == sin.shape == (*query.shape[:2], 1, query.shape[3]), "BSND tables")
        query.copy_(turned(query, cos, sin, False))
        key.copy_(turned(key, cos, sin, False))
        return query, key

    # --- products in few bits ---

    def npu_convert_weight_to_int4pack(self, weight: Tensor, inner_k_tiles: int = 0) -> Tensor:
        self.only("a2", "npu_convert_weight_to_int4pack")
        self.whole(weight)
        need(weight.dtype == torch.int32 and weight.shape[-1] % 8 == 0, "int32, columns by 8")
        need(int(weight.min()) >= -8 and int(weight.max()) <= 7, "a value is beyond 4 bits")
        shifts = torch.arange(0, 32, 4)
        packed = ((weight.long() & 0xF).unflatten(-1, (-1, 8)) << shifts).sum(-1)
        return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)

    def npu_weight_quant_batchmatmul(
        self,
        x: Tensor,
        weight: Tensor,
        antiquant_scale: Tensor,
        antiquant_offset: Tensor | None = None,
        quant_scale: Tensor | None = None,
        quant_offset: Tensor | None = None,
        bias: Tensor | None = None,
        antiquant_group_size: int = 0,
    ) -> Tensor:
        self.floats(x, antiquant_scale)
        self.whole(weight)
        need(quant_scale is None and quant_offset is None, "outputs in int8 are not modelled")
        values, group = self._weight_values(weight, antiquant_group_size), antiquant_group_size
        need(x.dim() == 2 and x.shape[1] == len(values), "x and weight disagree on k")
        shape = (len(values) // group, values.shape[1]) if group else values.shape[1:]
        need(antiquant_scale.shape == shape, f"scales {tuple(antiquant_scale.shape)}")
        wide, scale = values.float(), antiquant_scale.float()
        offset = None if antiquant_offset is None else antiquant_offset.float()
        if group:
            scale = scale.repeat_interleave(group, 0)
            offset = None if offset is None else offset.repeat_interleave(group, 0)
        out = x.float() @ ((wide if offset is None else wide + offset) * scale)
        if bias is not None:
            wanted = torch.float32 if x.dtype == torch.bfloat16 else x.dtype
            need(bias.dtype == wanted, f"a bias of {bias.dtype} for x of {x.dtype}")
            out = out + bias.float()
        return out.to(x.dtype)

    def _weight_values(self, weight: Tensor, group: int) -> Tensor:
        """[k, n] of -128 … 127, or of -8 … 7."""
        if weight.dtype == torch.int8:
            need(group == 0, "int8 has a scale for each output here")
            return weight
        self.only("a2", "int4")
        need(weight.dtype == torch.int32, f"a weight of {weight.dtype}")
        need(group % 32 == 0 and 32 <= group < len(weight), f"groups of {group}")
        nibbles = (weight.long()[..., None] >> torch.arange(0, 32, 4)) & 0xF
        return torch.where(nibbles >= 8, nibbles - 16, nibbles).flatten(-2)

    def npu_dynamic_quant(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.only("a2", "npu_dynamic_quant")
        self.floats(x)
        scale = x.float().abs().amax(-1).clamp_min(1e-30) / 127
        return (x.float() / scale[..., None]).round().to(torch.int8), scale

    def npu_quant_matmul(
        self,
        x1: Tensor,
        x2: Tensor,
        scale: Tensor,
        *,
        pertoken_scale: Tensor | None = None,
        bias: Tensor | None = None,
        output_dtype: int | torch.dtype = INT8_OUT,
    ) -> Tensor:
        self.only("a2", "npu_quant_matmul by tokens")
        self.whole(x1, x2)
        need(x1.dtype == x2.dtype == torch.int8, "both sides in int8")
        dtype = OUT_DTYPES.get(output_dtype) if isinstance(output_dtype, int) else output_dtype
        need(dtype in self.dtypes, f"output dtype {output_dtype}: the default is int8")
        need(scale.dtype == torch.float32 and scale.shape == x2.shape[1:], "scales [n] float32")
        need(pertoken_scale is not None, "a scale for each token")
        assert pertoken_scale is not None
        need(pertoken_scale.shape == x1.shape[:1], "a scale for each token")
        out = (x1.double() @ x2.double()).float() * scale * pertoken_scale[:, None]
        if bias is not None:
            need(bias.dtype == torch.float32, f"a bias of {bias.dtype}")
            out = out + bias
        return out.to(dtype)

    # --- the cache ---

    def npu_scatter_pa_kv_cache(
        self,
        key: Tensor,
        value: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        slot_mapping: Tensor,
        *,
        cache_mode: str | None = "PA_NZ",
    ) -> None:
        self.only("a2", "npu_scatter_pa_kv_cache")
        need(cache_mode == "Norm", "the cache is plain, but the default mode writes tiles")
        self._write_plain(key, value, key_cache, value_cache, slot_mapping)

    def _npu_reshape_and_cache(
        self, key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slots: Tensor
    ) -> None:
        tiled = [self.in_tiles(cache) for cache in (key_cache, value_cache)]
        need(tiled[0] == tiled[1], "one cache is in tiles, the other is not")
        need(tiled[0] == (self.kind == "310p"), f"a cache of this form on {self.kind}")
        if not tiled[0]:
            self._write_plain(key, value, key_cache, value_cache, slots)
            return
        self._check_write(key, value, key_cache, slots, key_cache.shape[2])
        need(key_cache.shape[1] * TILE == key.shape[1] * key.shape[2], "tiles of other heads")
        need(key_cache.shape[3] == TILE, "tiles are 16 wide")
        block, offset = slots.long() // key_cache.shape[2], slots.long() % key_cache.shape[2]
        for new, cache in ((key, key_cache), (value, value_cache)):
            cache[block, :, offset] = new.flatten(1).unflatten(1, (-1, TILE))

    def _write_plain(self, key: Tensor, value: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> None:
        need(k.shape == v.shape and k.shape[2:] == key.shape[1:], "a cache of other heads")
        self._check_write(key, value, k, slots, k.shape[1])
        for new, cache in ((key, k), (value, v)):
            cache.view(-1, *cache.shape[2:])[slots.long()] = new

    def _check_write(
        self, key: Tensor, value: Tensor, cache: Tensor, slots: Tensor, block_size: int
    ) -> None:
        self.floats(key, value, cache)
        self.on_chip(slots)
        need(slots.dtype == torch.int32 and slots.shape == key.shape[:1], "slots [n] int32")
        listed = slots.tolist()
        need(len(set(listed)) == len(listed), "a slot is written twice")
        need(all(0 <= s < len(cache) * block_size for s in listed), "a slot is out of range")

    # --- attention ---

    def npu_fused_infer_attention_score(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        atten_mask: Tensor | None = None,
        actual_seq_lengths: Sequence[int] | None = None,
        actual_seq_lengths_kv: Sequence[int] | None = None,
        block_table: Tensor | None = None,
        num_heads: int = 1,
        scale: float = 1.0,
        input_layout: str = "BSH",
        num_key_value_heads: int = 0,
        sparse_mode: int = 0,
        block_size: int = 0,
    ) -> tuple[Tensor, Tensor]:
        self.only("a2", "npu_fused_infer_attention_score")
        self.floats(query, key, value)
        need(input_layout == "TND", f"layout {input_layout} is not modelled")
        need(query.dim() == 3 and query.shape[1] == num_heads <= 256, "heads of the query")
        need(query.shape[2] in (128, 192), f"{query.shape[2]} dims; TND takes 128 or 192")
        need(scale != 1.0, "the default scale")
        kv_heads = num_key_value_heads or num_heads
        need(num_heads % kv_heads == 0 and num_heads // kv_heads <= 64, "heads per KV head")
        ends = cumulative(actual_seq_lengths, len(query))
        self._check_mask(atten_mask, sparse_mode)
        if block_table is None:
            stops = cumulative(actual_seq_lengths_kv, len(key))
            need(key.shape[1:] == (kv_heads, query.shape[2]), "keys of other heads")
            contexts = [(key[a:b], value[a:b]) for a, b in pairwise((0, *stops))]
        else:
            lengths = list(actual_seq_lengths_kv or ())
            self._check_table(block_table, lengths, len(key), key.shape[1])
            need(block_size == key.shape[1], "block_size is not the cache's")
            need(block_size % 128 == 0 and block_size <= 512, f"blocks of {block_size}")
            need(key.dim() == 3 and key.shape[2] == kv_heads * query.shape[2], "cache [b, s, h]")
            contexts = [
                tuple(gathered(c, row, n, kv_heads) for c in (key, value))
                for row, n in zip(block_table.tolist(), lengths, strict=True)
            ]
        need(len(contexts) == len(ends), "as many contexts as sequences")
        out = torch.full_like(query, float("nan"))
        for (start, stop), (keys, values) in zip(pairwise((0, *ends)), contexts, strict=True):
            need(sparse_mode == 0 or len(keys) >= stop - start, "more queries than keys")
            hidden = causal(stop - start, len(keys)) if sparse_mode == 3 else None
            out[start:stop] = attended(query[start:stop], keys, values, scale, hidden)
        return out, torch.empty(0)

    def _check_mask(self, mask: Tensor | None, sparse_mode: int) -> None:
        need(sparse_mode in (0, 3), f"sparse_mode {sparse_mode} is not modelled")
        if sparse_mode == 0:
            need(mask is None, "TND takes no mask of one's own")
            return
        need(mask is not None, "sparse_mode 3 wants its fixed mask")
        assert mask is not None
        need(mask.dtype in (torch.int8, torch.bool, torch.uint8), f"a mask of {mask.dtype}")
        need(mask.shape == (2048, 2048), f"a mask {tuple(mask.shape)}")
        need(not mask[1, 0] and bool(mask[0, 1]) and not mask[7, 7], "1 hides: upper triangle")

    def _check_table(
        self, table: Tensor, lengths: Sequence[int], num_blocks: int, block_size: int
    ) -> None:
        self.on_chip(table)
        need(table.dtype == torch.int32 and table.dim() == 2, f"a table of {table.dtype}")
        need(len(table) == len(lengths), "a row of the table for each sequence, not cumulative")
        for row, length in zip(table.tolist(), lengths, strict=True):
            used = row[: -(-length // block_size)]
            need(0 < length <= len(row) * block_size, f"length {length} beyond the table")
            need(all(0 <= block < num_blocks for block in used), "a block is out of range")
            once = len(set(used)) == len(used) or self.is_rehearsal
            need(once, "a context has a block twice: a length is too long")

    def npu_prompt_flash_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        num_heads: int = 1,
        scale_value: float = 1.0,
        pre_tokens: int = 2147483647,
        next_tokens: int = 0,
        input_layout: str = "BSH",
        num_key_value_heads: int = 0,
    ) -> Tensor:
        self.floats(query, key, value)
        need(input_layout == "BSND", f"layout {input_layout} is not modelled")
        need(query.dim() == 4 and query.shape[2] == key.shape[2] == num_heads, "equal heads")
        need(num_key_value_heads == 0, "310P takes no grouped heads")
        need(pre_tokens == 2147483647 and next_tokens in (0, 2147483647), "limits of 310P")
        need(query.shape[0] <= 128 and query.shape[1] <= 65535 and query.shape[3] <= 512, "sizes")
        parts = zip(query, key, value, strict=True)
        return torch.stack([attended(q, k, v, scale_value) for q, k, v in parts])

    def _npu_flash_attention_unpad(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        seq_len: Tensor,
        scale_value: float,
        num_heads: int,
        num_kv_heads: int,
        out: Tensor,
    ) -> None:
        self._check_packed(query, key, value, seq_len, (num_heads, num_kv_heads), out)
        out.fill_(float("nan"))
        for a, b in pairwise((0, *seq_len.cumsum(0).tolist())):
            out[a:b] = attended(query[a:b], key[a:b], value[a:b], scale_value)

    def _npu_flash_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor,
        seq_len: Tensor,
        scale_value: float,
        num_heads: int,
        num_kv_heads: int,
        out: Tensor,
    ) -> None:
        self.only("310p", "_npu_flash_attention with a mask in tiles")
        self._check_packed(query, key, value, seq_len, (num_heads, num_kv_heads), out)
        need(len(query) % TILE == 0, f"{len(query)} tokens are no multiple of 16")
        need(self.in_tiles(mask), "the mask is not cast to tiles")
        self.floats(mask)
        side = mask.shape[2]
        need(
            mask.shape == (1, side // TILE, side, TILE) and side % TILE == 0,
            "mask [1, s/16, s, 16]",
        )
        need(side >= int(seq_len.max()), "a sequence is longer than the mask")
        added = mask[0].transpose(0, 1).flatten(1).float()
        out.fill_(float("nan"))
        for a, b in pairwise((0, *seq_len.cumsum(0).tolist())):
            hidden = added[: b - a, : b - a] < -1e4
            out[a:b] = attended(query[a:b], key[a:b], value[a:b], scale_value, hidden)

    def _check_packed(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        seq_len: Tensor,
        heads: tuple[int, int],
        out: Tensor,
    ) -> None:
        self.floats(query, key, value, out)
        need((query.shape[1], key.shape[1]) == heads, "heads are not those of the tensors")
        need(query.shape[2] % TILE == 0 and query.shape[2] <= 256, f"{query.shape[2]} dims")
        need(out.shape == query.shape, "out is not of the query's shape")
        need(seq_len.dtype == torch.int32, f"lengths of {seq_len.dtype}")
        self.on_host(seq_len)
        need(int(seq_len.sum()) == len(query) == len(key), "lengths and tokens disagree")

    def _npu_paged_attention(
        self,
        query: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        num_kv_heads: int,
        num_heads: int,
        scale_value: float,
        block_table: Tensor,
        context_lens: Tensor,
        out: Tensor,
    ) -> None:
        self.only("310p", "_npu_paged_attention over tiles")
        self.floats(query, key_cache, value_cache, out)
        need(self.in_tiles(key_cache) and self.in_tiles(value_cache), "a cache is not in tiles")
        num_blocks, width, block_size, tile = key_cache.shape
        dim = query.shape[2]
        need(tile == TILE and width * TILE == num_kv_heads * dim, "tiles of other heads")
        need(block_size % 16 == 0 and block_size <= 128, f"blocks of {block_size}")
        need(block_size * dim <= 16384 and len(query) <= 2048, "limits of 310P")
        need(query.shape[1] == num_heads and out.shape == query.shape, "heads")
        need(context_lens.dtype == torch.int32, f"lengths of {context_lens.dtype}")
        lengths = context_lens.tolist()
        need(len(lengths) == len(query), "a length for each query")
        self._check_table(block_table, lengths, num_blocks, block_size)
        flat = [cache.transpose(1, 2).flatten(2) for cache in (key_cache, value_cache)]
        out.fill_(float("nan"))
        for i, (row, length) in enumerate(zip(block_table.tolist(), lengths, strict=True)):
            keys, values = (gathered(cache, row, length, num_kv_heads) for cache in flat)
            out[i : i + 1] = attended(query[i : i + 1], keys, values, scale_value)


# --- plain arithmetic ------------------------------------------------------------------------


def turned(x: Tensor, cos: Tensor, sin: Tensor, beside: bool) -> Tensor:
    """x cos + other sin, where the other of a pair is beside it, or half the width apart."""
    wide = x.float()
    if beside:
        a, b = wide.unflatten(-1, (-1, 2)).unbind(-1)
        other = torch.stack((-b, a), -1).flatten(-2)
    else:
        a, b = wide.chunk(2, -1)
        other = torch.cat((-b, a), -1)
    return (wide * cos.float() + other * sin.float()).to(x.dtype)


def cumulative(ends: Sequence[int] | None, total: int) -> list[int]:
    listed = list(ends or ())
    need(0 < len(listed) <= 4096, f"{len(listed)} lengths")
    need(all(type(end) is int for end in listed), "lengths are Python numbers")
    need(listed == sorted(listed), "lengths are not cumulative")
    need(listed[-1] == total, f"the last of the lengths is {listed[-1]}, of {total} tokens")
    return listed


def gathered(cache: Tensor, blocks: Sequence[int], length: int, kv_heads: int) -> Tensor:
    """[num_blocks, block_size, h] -> what one sequence has in it, [length, kv_heads, dim]."""
    used = list(blocks)[: -(-length // cache.shape[1])]
    return cache[used].flatten(0, 1)[:length].unflatten(-1, (kv_heads, -1))


def causal(queries: int, keys: int) -> Tensor:
    """True where hidden, aligned to the bottom right."""
    return torch.ones(queries, keys, dtype=torch.bool).triu_(1 + keys - queries)


def attended(
    query: Tensor, key: Tensor, value: Tensor, scale: float, hidden: Tensor | None = None
) -> Tensor:
    """[n, heads, dim] over [m, kv_heads, dim] in float32."""
    group = query.shape[1] // key.shape[1]
    keys, values = (x.float().repeat_interleave(group, 1).transpose(0, 1) for x in (key, value))
    scores = query.float().transpose(0, 1) @ keys.transpose(1, 2) * scale
    if hidden is not None:
        scores = scores.masked_fill(hidden, float("-inf"))
    return (scores.softmax(-1) @ values).transpose(0, 1).to(query.dtype)
