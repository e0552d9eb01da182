"""A training view of the engine's own models: the same modules and parameters, without a cache.

Attention over paged caches cannot be differentiated, so TrainingDevice computes it over padded
rows instead; everything else of a model runs as it is served.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glimt.devices.base import AttentionBatch, Device, KVCache
from glimt.models.base import BuildContext, Model, ModelFamily
from glimt.models.pixels import CLIP_MEAN, CLIP_STD
from training.initial import initial_values


@dataclass(frozen=True, slots=True, eq=False)
class PaddedRows:
    """Rows of equal length, padded at the end; stands where the engine passes its AttentionBatch.

    mask: [num_rows, 1, length, length], true where a query may look; None means causal
    slots: where the engine would store keys and values; nothing is stored here
    """

    num_rows: int
    length: int
    mask: Tensor | None
    slots: None = None


class TrainingDevice(Device):
    """Differentiable attention over PaddedRows; keeps no cache."""

    name = "training"

    def write_kv(self, key: Tensor, value: Tensor, cache: KVCache, slots: Tensor) -> None:
        """Nothing is cached."""

    def paged_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cache: KVCache,
        batch: AttentionBatch,
        scale: float,
    ) -> Tensor:
        """query: [num_rows * length, num_heads, head_dim] -> the same."""
        rows: Any = batch
        q, k, v = (
            x.unflatten(0, (rows.num_rows, rows.length)).transpose(1, 2)
            for x in (query, key, value)
        )
        group = q.shape[1] // k.shape[1]
        q, v = q.to(v.dtype), v.repeat_interleave(group, 1)  # rotation may have widened q and k
        k = k.to(v.dtype).repeat_interleave(group, 1)
        mask = _causal(rows.length, query.device) if rows.mask is None else rows.mask
        return _attend(q, k, v, scale, mask).transpose(1, 2).flatten(0, 1)

    def varlen_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        query_starts: Sequence[int],
        key_starts: Sequence[int],
        scale: float,
    ) -> Tensor:
        """All pictures are of one size here, so that they are one batch."""
        count = len(query_starts) - 1
        q, k, v = (x.unflatten(0, (count, -1)).transpose(1, 2) for x in (query, key, value))
        return _attend(q, k, v, scale, None).transpose(1, 2).flatten(0, 1)


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """[…, heads, queries, head_dim] over […, heads, keys, head_dim]; mask true where to look.

    Written out on a CPU: for rows this short, the backward pass of torch's fused attention took
    44 % of a training step.
    """
    if q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, mask, scale=scale)
    scores = (q * scale) @ k.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(v.dtype) @ v


def _causal(length: int, device: torch.device) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Conversations, padded to one length.

    token_ids: [num_rows, length] int64
    positions: [channels, num_rows, length] int64
    labels:    [num_rows, length] int64, the next token where it is learnt, else -100
    mask:      as in PaddedRows
    places:    [num_rows, length] int64: the row of all pictures' features that stands there, or -1
    """

    token_ids: Tensor
    positions: Tensor
    labels: Tensor
    mask: Tensor | None
    places: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Pictures:
    """Pictures and what is known of them.

    pixels:   [num_images, height, width, 3] uint8
    garments: [num_images] int64, which garment; -1 where there is none
    layouts:  [num_images, num_patches] int64, what is where (training.data.layout); -1: not known
    middles:  [num_images, num_patches] int64, 1 where an object's middle is; -1: not known
    """

    pixels: Tensor
    garments: Tensor
    layouts: Tensor
    middles: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """What one step trains on.

    rows:     None while the tower is trained alone
    pictures: those of the rows come first; None where no row has one
    """

    rows: Rows | None
    pictures: Pictures | None

    def to(self, device: torch.device) -> Batch:
        """The same on another device."""
        return Batch(
            self.rows and _moved(self.rows, device), self.pictures and _moved(self.pictures, device)
        )


Held = TypeVar("Held", Rows, Pictures)


def _moved(tensors: Held, device: torch.device) -> Held:
    values = {field.name: getattr(tensors, field.name) for field in fields(tensors)}
    moved: dict[str, Any] = {k: x if x is None else x.to(device) for k, x in values.items()}
    return type(tensors)(**moved)


def _normalised(pixels: Tensor) -> Tensor:
    """[num_images, height, width, 3] uint8 -> [num_images, 3, height, width] float32."""
    mean, std = (torch.tensor(x, device=pixels.device) for x in (CLIP_MEAN, CLIP_STD))
    return ((pixels / 255 - mean) / std).permute(0, 3, 1, 2)


class _NoCache:
    """Stands for a layer's cache, which training does not have."""


def build(
    family: ModelFamily[Any], raw: dict[str, Any], max_positions: int, torch_device: str = "cpu"
) -> Model:
    """A family's model in float32 with fresh weights that can be trained; the same everywhere."""
    config = family.config.from_json(raw, "config.json")
    device = TrainingDevice(torch_device)
    context = BuildContext(device, torch.float32, max_positions)
    model = family.build(config, context)
    for name, value in initial_values(model, family.name).items():
        owner, _, attribute = name.rpartition(".")
        fresh = nn.Parameter(value.to(device.torch_device))
        setattr(model.get_submodule(owner), attribute, fresh)
    return model


class Seen(NamedTuple):
    """What a model makes of pictures.

    features: [num_images, num_tokens, hidden_size], what the language model is given
    states:   [num_images, num_patches, size], the tower's last, without its class token
    """

    features: Tensor
    states: Tensor


def see(model: Model, pixels: Tensor) -> Seen:
    """pixels: [num_images, height, width, 3] uint8."""
    kept: list[Tensor] = []
    tower: nn.Module = model.tower  # type: ignore[assignment]
    hook = tower.register_forward_hook(lambda _, __, states: kept.append(states))
    try:
        features = model.encode_pixels(_normalised(pixels))  # type: ignore[operator]
    finally:
        hook.remove()
    return Seen(features, kept[0].view(len(pixels), -1, kept[0].shape[-1])[:, 1:])


def answer(model: Model, rows: Rows, features: Tensor | None) -> tuple[Tensor, Tensor]:
    """Logits and labels of the learnt tokens: [num_learnt, vocab_size], [num_learnt]."""
    num_rows, length = rows.token_ids.shape
    hidden = model.embed(rows.token_ids.flatten())
    if features is not None:
        at = rows.places.flatten()
        placed = features.flatten(0, 1)[at.clamp(min=0)].to(hidden.dtype)
        hidden = torch.where((at >= 0)[:, None], placed, hidden)
    batch: Any = PaddedRows(num_rows, length, rows.mask)
    caches: Any = [_NoCache()] * model.num_layers
    hidden = model(hidden, rows.positions.flatten(1), batch, caches)
    labels = rows.labels.flatten()
    learnt = labels >= 0
    return model.logits(hidden[learnt]), labels[learnt]
