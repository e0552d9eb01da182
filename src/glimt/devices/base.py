"""Device: every arithmetic operation the models need, in plain torch.

A new device subclasses Device in its own file and overrides only what it does better; what it
leaves alone is slow but right. Knows shapes and caches, no model and no request.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeAlias, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from glimt.devices.host import read_memory
from glimt.errors import ConfigError

RotaryStyle = Literal["interleaved", "half"]
# What a product may end with. "silu_mul": the first half of the columns goes through SiLU and is
# multiplied with the second half.
Activation = Literal["none", "gelu_erf", "gelu_tanh", "silu_mul"]


@runtime_checkable
class LowBitWeight(Protocol):
    """A matrix [n, k] in few bits; glimt.quant.base.QuantisedWeight says what each part is."""

    @property
    def format(self) -> str: ...  # noqa: D102
    @property
    def values(self) -> Tensor: ...  # noqa: D102
    @property
    def scales(self) -> Tensor: ...  # noqa: D102
    @property
    def offsets(self) -> Tensor | None: ...  # noqa: D102
    @property
    def group(self) -> int: ...  # noqa: D102
    @property
    def n(self) -> int: ...  # noqa: D102
    @property
    def k(self) -> int: ...  # noqa: D102
    @property
    def quantises_x(self) -> bool: ...  # noqa: D102

    def dequantise(self) -> Tensor:
        """[n, k] float32."""

    def rows(self, start: int, stop: int) -> LowBitWeight:
        """The matrix of these rows alone, [stop - start, k]; nothing is copied."""


class DeviceWeight(Protocol):
    """A matrix in a form of one device's own, which `Device.prepare_weight` made."""

    @property
    def nbytes(self) -> int:
        """Memory that it takes, in bytes."""


MatrixWeight: TypeAlias = "Tensor | LowBitWeight | DeviceWeight"


@dataclass(frozen=True, slots=True, eq=False)
class KVCache:
    """One layer's keys and values: two tensors [num_blocks, block_size, num_kv_heads, head_dim].

    A token's slot is block * block_size + offset. Source: PagedAttention, arXiv 2309.06180.
    key_scales, value_scales: of a cache in int8, float32 [num_blocks, block_size, num_kv_heads];
        a value is q * scale, as `rounded_heads` makes them
    """

    key: Tensor
    value: Tensor
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None

    @property
    def block_size(self) -> int:
        """Tokens per block."""
        return self.key.shape[1]

    @property
    def num_kv_heads(self) -> int:
        """Heads of each token."""
        return self.key.shape[2]

    @property
    def scales(self) -> tuple[Tensor, Tensor] | None:
        """Of keys and of values, each [num_blocks, block_size, num_kv_heads]; None without any."""
        if self.key_scales is None or self.value_scales is None:
            return None
        return self.key_scales, self.value_scales

    def tensors(self) -> tuple[Tensor, ...]:
        """All that it holds, each [num_blocks, block_size, …]."""
        parts = self.key, self.value, self.key_scales, self.value_scales
        return tuple(part for part in parts if part is not None)

    def read(self, blocks: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values of whole blocks, [*blocks.shape, block_size, num_kv_heads, head_dim].

        dtype: to widen int8 to; else they come in their own
        """
        return (
            _read_blocks(self.key, self.key_scales, blocks, dtype),
            _read_blocks(self.value, self.value_scales, blocks, dtype),
        )

    def clear_blocks(self, blocks: Tensor) -> None:
        """Zero whole blocks. blocks: [n] int64."""
        for tensor in self.tensors():
            tensor.index_fill_(0, blocks, 0)

    def clear_slots(self, slots: Tensor) -> None:
        """Zero single places. slots: [n] int64."""
        for tensor in self.tensors():
            tensor.flatten(0, 1).index_fill_(0, slots, 0)


@dataclass(frozen=True, slots=True, eq=False)
class AttentionBatch:
    """Which cached tokens each token of a flattened step may see; the same for every layer.

    The first num_decodes rows have one token each; the others are prefill chunks.

    query_starts:  num_rows + 1 offsets into the flattened tokens
    context_lens:  per row, tokens in the cache once this step is written
    num_shared:    per row, the tokens at its beginning that all of its tokens see, later or not
    slots:         [num_tokens] int64, where each token's key and value go
    block_tables:  [num_rows, max_blocks] int64, padded with the row's first block
    decode_lens:   [num_decodes] int64, context_lens of the decodes
    masks:         those that a device has made of this, for the other layers
    """

    num_decodes: int
    query_starts: tuple[int, ...]
    context_lens: tuple[int, ...]
    num_shared: tuple[int, ...]
    slots: Tensor
    block_tables: Tensor
    decode_lens: Tensor
    masks: dict[int, Tensor | None] = field(default_factory=dict)

    @property
    def is_decode(self) -> bool:
        """Every row has one token."""
        return self.num_decodes == len(self.context_lens)

    def decode_mask(self, block_size: int, dtype: torch.dtype) -> Tensor:
        """[num_decodes, 1, 1, width]: 0 up to each row's context, -inf beyond.

        width: block_size times the blocks of the longest decoding row
        """
        if -1 not in self.masks:
            longest = max(self.context_lens[: self.num_decodes])
            width = -(-longest // block_size) * block_size
            seen = torch.arange(width, device=self.slots.device) < self.decode_lens[:, None]
            self.masks[-1] = _additive(seen, dtype)[:, None, None, :]
        mask = self.masks[-1]
        assert mask is not None
        return mask

    def prefill_mask(self, row: int, dtype: torch.dtype) -> Tensor | None:
        """[chunk, context]: query i sees key j if j <= i or j < num_shared.

        None when that is plain causal attention from the first token on.
        """
        if row not in self.masks:
            chunk = self.query_starts[row + 1] - self.query_starts[row]
            context, shared = self.context_lens[row], self.num_shared[row]
            queries = torch.arange(context - chunk, context, device=self.slots.device)[:, None]
            keys = torch.arange(context, device=self.slots.device)[None, :]
            is_plain = chunk == context and shared == 0
            seen = (keys <= queries) | (keys < shared)
            self.masks[row] = None if is_plain else _additive(seen, dtype)
        return self.masks[row]


# One step of a model: hidden states [num_tokens, hidden_size], positions [channels, num_tokens] and
# the batch -> hidden states, as of Model.forward.
ModelStep: TypeAlias = Callable[[Tensor, Tensor, AttentionBatch], Tensor]


@dataclass(frozen=True, slots=True)
class Card:
    """An accelerator, as its driver tells of it.

    capability: what its instructions are called, such as "8.6"; driver: "" if it is not known
    """

    index: int
    name: str
    memory_bytes: int
    capability: str
    driver: str


@dataclass(frozen=True, slots=True)
class Seat:
    """This process among those of one model on this machine: which of how many.

    They share the processor's cores, and each takes a card of its own.
    """

    index: int = 0
    count: int = 1


ONLY_SEAT = Seat()


class Device:
    """The operations in plain torch, on any torch device.

    collectives: torch's backend for sums over ranks that compute on such devices
    adds_with_norm: a residual costs least in the RMS norm behind it (`add_rms_norm`); else it is
        the product before it that adds
    num_scratch_blocks: cache blocks behind the scheduler's own that `recorded` may write to
    """

    name = "base"
    collectives = "gloo"
    num_scratch_blocks = 0
    adds_with_norm = False

    def __init__(self, torch_device: str = "cpu") -> None:
        self.torch_device = torch.device(torch_device)

    # --- the machine ---

    @classmethod
    def open(cls, num_threads: int | None = None, seat: Seat = ONLY_SEAT) -> Device:
        """The device to use here, which may be of a class that suits this machine better.

        num_threads: of the host; None: what torch and the device take by themselves
        """
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        return cls()

    @classmethod
    def unavailable_reason(cls) -> str | None:
        """Why this device cannot be used here, and what to do; None when it can."""
        return None

    def preferred_dtype(self, declared: torch.dtype) -> torch.dtype:
        """The dtype to compute in when the user leaves it to the checkpoint."""
        return declared

    def free_bytes(self) -> int:
        """Memory that could still be allocated, in bytes; 4 GiB where the host does not say."""
        return read_memory().usable or 4 * 2**30

    def peak_bytes(self) -> int | None:
        """The most held on the device so far, in bytes; None where its memory is the host's."""
        return None

    def keep_freed_memory(self) -> None:
        """The weights are in place: from here on every step asks for the same memory again."""

    @classmethod
    def cards(cls) -> tuple[Card, ...]:
        """The accelerators of this kind that can be used here."""
        return ()

    @classmethod
    def missing(cls) -> tuple[tuple[str, str], ...]:
        """What would make this device faster and is not here: what that costs, and what to do."""
        return ()

    def recorded(self, step: ModelStep, cache: KVCache) -> ModelStep:
        """A function that does what `step` does, for batches of which every row has one token.

        A device may record the step's operations and replay them; what it returns is then
        overwritten by the next call. The tensors that the step holds must stay where they are.
        cache: of one layer, with num_scratch_blocks behind the blocks that are in use
        """
        return step

    def block_size(self, wanted: int) -> int:
        """Tokens per cache block: those wanted, or if that is 0 what suits this device.

        Raises ConfigError if its attention cannot read such blocks.
        """
        return wanted or 32  # a multiple of 32 suits the packed CPU kernels

    def lay_out_cache(self, cache: KVCache) -> KVCache:
        """The same cache, on this device, in the form in which it is written and read here."""
        return cache

    # --- elementwise and small ---

    def embedding(self, token_ids: Tensor, table: Tensor) -> Tensor:
        """[n] int64, [vocab_size, hidden_size] -> [n, hidden_size]."""
        return F.embedding(token_ids, table)

    def prepare_weight(
        self, weight: Tensor | LowBitWeight, dtype: torch.dtype, is_paired: bool = False
    ) -> MatrixWeight:
        """A matrix [out, in] in the form in which this device multiplies with it.

        dtype: of the activations; is_paired: "silu_mul" always follows, which some devices want
        to know in advance
        """
        return weight

    def linear(
        self,
        x: Tensor,
        weight: MatrixWeight,
        bias: Tensor | None,
        activation: Activation = "none",
        residual: Tensor | None = None,
        residual_scale: float = 1.0,
    ) -> Tensor:
        """[…, in], [out, in], [out] -> […, out]: act(x Wᵀ + b) + residual_scale * residual.

        weight: what `prepare_weight` made; "silu_mul" halves out; residual: as what is returned.
        A device may round once where this rounds four times.
        """
        y = self.activate(F.linear(*_as_matrices(x, weight), bias), activation)
        return add_residual(y, residual, residual_scale)

    def mlp(
        self,
        x: Tensor,
        up: MatrixWeight,
        down: MatrixWeight,
        up_bias: Tensor | None,
        down_bias: Tensor | None,
        activation: Activation,
        residual: Tensor | None = None,
        residual_scale: float = 1.0,
    ) -> Tensor:
        """Two products with an activation between: […, in] -> […, out].

        up: [inner, in], of "silu_mul" [2 * inner, in]; down: [out, inner]; the rest as in `linear`.
        A device need not hold what is between whole.
        """
        inner = self.linear(x, up, up_bias, activation)
        return self.linear(inner, down, down_bias, "none", residual, residual_scale)

    def activate(self, x: Tensor, activation: Activation) -> Tensor:
        """[…, n] -> the same, of "silu_mul" […, n / 2]."""
        if activation == "gelu_erf":
            return self.gelu_erf(x)
        if activation == "gelu_tanh":
            return self.gelu_tanh(x)
        return self.silu_mul(*x.chunk(2, dim=-1)) if activation == "silu_mul" else x

    def layer_norm(
        self, x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None = None
    ) -> Tensor:
        """[…, size] -> the same, over the last axis, then plus the residual of the same shape.

        weight, bias: [size]; the statistics are in float32 whatever the dtype.
        """
        return add_residual(F.layer_norm(x, x.shape[-1:], weight, bias, eps), residual)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """[…, size] -> the same, over the last axis, with one cast at the end. weight: [size].

        The product with the weight is taken in float32, as GLM-4's own code does; LLaMA's casts
        before it. Source: the hub's modeling_chatglm.py of GLM-4, class RMSNorm.
        """
        wide = x.float()
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        return (wide * scale * weight.float()).to(x.dtype)

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """The RMS norm of x + residual, and that sum: […, size] twice -> […, size] twice.

        As `add_residual` and `rms_norm` give them; a device may norm the sum before it is rounded.
        """
        total = add_residual(x, residual)
        return self.rms_norm(total, weight, eps), total

    def gelu_tanh(self, x: Tensor) -> Tensor:
        """[…, n] -> the same: GELU in its tanh form."""
        return F.gelu(x, approximate="tanh")

    def gelu_erf(self, x: Tensor) -> Tensor:
        """[…, n] -> the same: GELU in its exact form."""
        return F.gelu(x)

    def silu_mul(self, gate: Tensor, up: Tensor) -> Tensor:
        """[…, n], […, n] -> the same: silu(gate) * up."""
        return F.silu(gate) * up

    def rotate(
        self, x: Tensor, cos: Tensor, sin: Tensor, style: RotaryStyle, num_segments: int
    ) -> Tensor:
        """Rotate the first 2 * num_pairs dims of every head; the rest passes through.

        x: [num_tokens, num_heads, head_dim]; cos, sin: [num_tokens, num_pairs], dtype of x.
        "interleaved": pair i is dims (2i, 2i+1). "half": within each of num_segments equal
        segments of width w, pair i is dims (i, i + w/2).
        Source: RoFormer, arXiv 2104.09864, section 3.4.2.
        """
        tokens, heads, _ = x.shape
        num_pairs = cos.shape[-1]
        turned, rest = x[..., : 2 * num_pairs], x[..., 2 * num_pairs :]
        pair_axis = -1 if style == "interleaved" else -2
        shape = (num_segments, num_pairs // num_segments)
        pairs = (*shape, 2) if style == "interleaved" else (shape[0], 2, shape[1])
        a, b = turned.reshape(tokens, heads, *pairs).unbind(pair_axis)
        c, s = cos.view(tokens, 1, *shape), sin.view(tokens, 1, *shape)
        rotated = torch.stack((a * c - b * s, b * c + a * s), dim=pair_axis)
        return torch.cat((rotated.reshape(tokens, heads, 2 * num_pairs), rest), dim=-1)

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
        """Full attention inside each of several packed sequences (`cu_seqlens`).

        query: [num_queries, num_heads, head_dim]; key, value: [num_keys, num_heads, head_dim];
        sequence s owns rows starts[s] … starts[s+1]-1. Returns the shape of query.
        """
        out = torch.empty_like(query)
        for s in range(len(query_starts) - 1):
            q0, q1 = query_starts[s], query_starts[s + 1]
            k0, k1 = key_starts[s], key_starts[s + 1]
            out[q0:q1] = _attend(query[q0:q1], key[k0:k1], value[k0:k1], scale)
        return out

    def write_kv(self, key: Tensor, value: Tensor, cache: KVCache, slots: Tensor) -> None:
        """Copy one step's keys and values into their cache slots, in place.

        key, value: [num_tokens, num_kv_heads, head_dim], rounded where the cache is in int8;
        slots: [num_tokens] int64.
        """
        _write_slots(key, cache.key, cache.key_scales, slots)
        _write_slots(value, cache.value, cache.value_scales, slots)

    def paged_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cache: KVCache,
        batch: AttentionBatch,
        scale: float,
    ) -> Tensor:
        """Attention of one step's tokens over their cached contexts, which hold them already.

        query: [num_tokens, num_heads, head_dim]; key, value: this step's own, as written to the
        cache, so that a first chunk need not read them back; where the cache rounds, it does, or
        a prompt would differ from the same in chunks. Query head j uses KV head
        j // (num_heads / num_kv_heads). Returns the shape of query.
        """
        if batch.is_decode:
            return self.decode_attention(query, cache, batch, scale)
        out = torch.empty_like(query)
        if batch.num_decodes:
            out[: batch.num_decodes] = self.decode_attention(query, cache, batch, scale)
        for row in range(batch.num_decodes, len(batch.context_lens)):
            start, stop = batch.query_starts[row], batch.query_starts[row + 1]
            keys, values = key[start:stop], value[start:stop]
            if cache.scales is not None or batch.context_lens[row] > stop - start:
                blocks = batch.block_tables[row, : -(-batch.context_lens[row] // cache.block_size)]
                keys, values = (
                    part.flatten(0, 1)[: batch.context_lens[row]]
                    for part in cache.read(blocks, query.dtype)
                )
            out[start:stop] = self.chunk_attention(
                query[start:stop], keys, values, batch, row, scale
            )
        return out

    def chunk_attention(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        batch: AttentionBatch,
        row: int,
        scale: float,
    ) -> Tensor:
        """A prefill row's chunk over its whole context: the row's part of `paged_attention`.

        query: [chunk, num_heads, head_dim]; keys, values: [context, num_kv_heads, head_dim]
        """
        mask = batch.prefill_mask(row, query.dtype)
        return _attend(query, keys, values, scale, mask, mask is None)

    def decode_attention(
        self, query: Tensor, cache: KVCache, batch: AttentionBatch, scale: float
    ) -> Tensor:
        """One query per row over its whole context, all rows at once.

        Returns [num_decodes, num_heads, head_dim].
        """
        rows, (_, heads, dim) = batch.num_decodes, query.shape
        mask = batch.decode_mask(cache.block_size, query.dtype)
        # The mask is as wide as the decodes need; a prefill row may have a longer table.
        tables = batch.block_tables[:rows, : mask.shape[-1] // cache.block_size]
        kv_heads = cache.num_kv_heads
        keys, values = (
            part.flatten(1, 2).transpose(1, 2) for part in cache.read(tables, query.dtype)
        )
        grouped = query[:rows].reshape(rows, kv_heads, heads // kv_heads, dim)
        out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=scale)
        return out.reshape(rows, heads, dim)


def add_residual(y: Tensor, residual: Tensor | None, scale: float = 1.0) -> Tensor:
    """y + scale * residual, both […, n]; y alone where there is no residual."""
    if residual is None:
        return y
    return (residual if scale == 1.0 else residual * scale) + y


def _additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where something is seen, else -inf."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(
        ~seen, float("-inf")
    )


def _as_matrices(x: Tensor, weight: MatrixWeight) -> tuple[Tensor, Tensor]:
    """x and the weight as torch multiplies them; of a weight in few bits, all that it rounds."""
    if isinstance(weight, Tensor):
        return x, weight
    assert isinstance(weight, LowBitWeight), "only its own device multiplies with another form"
    rounded = rounded_to_int8(x, weight.group) if weight.quantises_x else x
    return rounded, weight.dequantise().to(x.dtype)


def rounded_to_int8(x: Tensor, group: int) -> Tensor:
    """[…, k] -> the same, with the values that `int8_steps` leaves."""
    values, steps = int8_steps(x, group)
    return (values * steps).flatten(-2)[..., : x.shape[-1]].to(x.dtype)


def int8_steps(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Every row, or every group of its columns, in steps of its largest magnitude / 127.

    x: […, k]; group: columns, 0 for whole rows. Returns float32 of whole numbers, […, num_groups,
    group], with zeros behind the last column, and steps, […, num_groups, 1]. A group that is not
    finite has numbers that are not.
    """
    wide, size = x.float(), group or x.shape[-1]
    wide = F.pad(wide, (0, -x.shape[-1] % size)).unflatten(-1, (-1, size))
    steps = wide.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / 127
    return (wide / steps).round(), steps


def rounded_heads(x: Tensor) -> tuple[Tensor, Tensor]:
    """[…, head_dim] as int8 and float32 scales […]: q = round(x * (127 / largest)), ties to even.

    scale: largest / 127, of the magnitudes of one head. A head that is not finite gets a scale that
    is not: what is wrong stays wrong when it is read.
    """
    wide = x.float()
    largest = wide.abs().amax(-1)
    has_values = largest.isfinite() & (largest > 1e-30)  # below, 127 / largest would overflow
    factor = torch.full_like(largest, 127.0) / largest
    values = (wide * factor[..., None]).round()
    return torch.where(has_values[..., None], values, 0.0).to(torch.int8), largest / 127


def _write_slots(x: Tensor, cache: Tensor, scales: Tensor | None, slots: Tensor) -> None:
    if scales is not None:
        x, scale = rounded_heads(x)
        scales.flatten(0, 1).index_copy_(0, slots, scale)
    cache.flatten(0, 1).index_copy_(0, slots, x)


def _read_blocks(
    cache: Tensor, scales: Tensor | None, blocks: Tensor, dtype: torch.dtype
) -> Tensor:
    if scales is None:
        return cache[blocks]
    return (cache[blocks] * scales[blocks][..., None]).to(dtype)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    mask: Tensor | None = None,
    causal: bool = False,
) -> Tensor:
    """Attention of one sequence: [q, heads, dim] over [k, kv_heads, dim]."""
    group = query.shape[1] // key.shape[1]
    if group > 1:
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    out = F.scaled_dot_product_attention(
        query.transpose(0, 1)[None],
        key.transpose(0, 1)[None],
        value.transpose(0, 1)[None],
        attn_mask=mask,
        is_causal=causal,
        scale=scale,
    )
    return out[0].transpose(0, 1)


def all_devices() -> dict[str, type[Device]]:
    """Every device class in this folder, by name; a module without DEVICE is none."""
    package = importlib.import_module("glimt.devices")
    found: dict[str, type[Device]] = {}
    for info in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"glimt.devices.{info.name}")
        if hasattr(module, "DEVICE"):
            found[module.DEVICE.name] = module.DEVICE
    return found


def find_device(name: str) -> type[Device]:
    """The device of that name. Raises ConfigError if it is unknown or not usable here."""
    devices = all_devices()
    if name not in devices:
        known = ", ".join(sorted(devices))
        raise ConfigError("device", [f"{name!r} is unknown; choose one of {known}"])
    reason = devices[name].unavailable_reason()
    if reason:
        raise ConfigError("device", [f"{name} cannot be used here: {reason}"])
    return devices[name]


def open_device(name: str, num_threads: int | None = None, seat: Seat = ONLY_SEAT) -> Device:
    """The device of that name, as `find_device` raises; num_threads and seat as of Device.open."""
    return find_device(name).open(num_threads, seat)
