"""The tensors of the KV cache. Which block belongs to whom is the scheduler's business."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from glimt.devices.base import Device, KVCache
from glimt.kernels.pages import large_pages
from glimt.models.base import Model

_SCALE = torch.float32  # of a head's keys or values of one token, where they are int8


def cache_dtype(kv_dtype: str, dtype: torch.dtype) -> torch.dtype:
    """What keys and values are stored in. kv_dtype: of EngineConfig; dtype: of the activations."""
    return torch.int8 if kv_dtype == "int8" else dtype


def kv_bytes_per_token(model: Model, dtype: torch.dtype) -> int:
    """Keys and values of all layers for one token, in bytes. dtype: of `cache_dtype`."""
    per_head = model.head_dim * dtype.itemsize + (_SCALE.itemsize if dtype == torch.int8 else 0)
    return 2 * model.num_layers * model.num_kv_heads * per_head


class KVCaches(list[KVCache]):
    """One cache per layer."""

    def clear_blocks(self, blocks: Sequence[int]) -> None:
        """Zero blocks, so that reads beyond what is written find nothing that is not finite."""
        if not blocks:
            return
        index = torch.tensor(blocks, device=self[0].key.device)
        for cache in self:
            cache.clear_blocks(index)

    def clear_slots(self, slots: Tensor) -> None:
        """Zero single places. slots: [num_slots] int64, as in AttentionBatch."""
        for cache in self:
            cache.clear_slots(slots)


def allocate_kv(
    model: Model, num_blocks: int, block_size: int, dtype: torch.dtype, device: Device
) -> KVCaches:
    """One cache per layer, with scales where dtype is int8, laid out as the device wants it.

    Zeroed, because padded reads touch slots that nobody has written: garbage there could be NaN,
    and 0 * NaN is NaN even under a mask.
    """
    shape = (num_blocks, block_size, model.num_kv_heads, model.head_dim)

    def zeros(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        if device.torch_device.type == "cpu":
            return _zeros_on_demand(shape, dtype)
        return torch.zeros(shape, dtype=dtype, device=device.torch_device)

    def scales() -> Tensor | None:
        return zeros(shape[:-1], _SCALE) if dtype == torch.int8 else None

    return KVCaches(
        device.lay_out_cache(KVCache(zeros(shape, dtype), zeros(shape, dtype), scales(), scales()))
        for _ in range(model.num_layers)
    )


def _zeros_on_demand(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Zeros that take memory only where they are written: few runs fill the whole cache.

    In large pages where the system has them, for attention reads blocks from all over it.
    """
    pages = large_pages(math.prod(shape) * dtype.itemsize)
    return torch.frombuffer(pages, dtype=dtype).view(*shape)
