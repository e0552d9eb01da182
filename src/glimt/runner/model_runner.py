"""ModelRunner: a step's plan -> logits. Owns the model, the KV tensors and the picture features."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from glimt.devices.base import Device, KVCache
from glimt.models.base import Model
from glimt.runner.batch import Batch, flatten
from glimt.runner.feature_cache import FeatureCache
from glimt.runner.kv_cache import clear_blocks, clear_slots
from glimt.types import ImageInput, ImageSlice, StepPlan


@dataclass(slots=True)
class RunnerCounters:
    """Totals since start."""

    tower_images: int = 0  # pictures that went through the tower
    feature_hits: int = 0  # pictures whose features were cached when first needed
    tower_s: float = 0.0


@dataclass(frozen=True, slots=True, eq=False)
class StepLogits:
    """logits: [num_sampled, vocab_size]; image_s: tower seconds per sequence id."""

    logits: Tensor
    image_s: dict[int, float] = field(default_factory=dict)


class ModelRunner:
    """Runs one step at a time; keeps no state of a request."""

    def __init__(
        self,
        model: Model,
        caches: Sequence[KVCache],
        features: FeatureCache,
        device: Device,
        dtype: torch.dtype,
        tower_patches: int,
    ) -> None:
        self.model = model
        self.caches = caches
        self.features = features
        self.device = device
        self.dtype = dtype
        self.tower_patches = tower_patches
        self.counters = RunnerCounters()
        # Pictures that running sequences go on with later: kept beside the cache, whose budget may
        # be too small for one of them, so that their next chunk does not run the tower again.
        self._open: dict[bytes, Tensor] = {}

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> StepLogits:
        """Compute a step's tokens. Returns the logits of plan.sampled_rows, in order."""
        block_size = self.caches[0].block_size
        batch = flatten(plan, block_size, self.dtype, self.device.torch_device)
        # Decodes read their last block whole, and NaN that its last owner left is NaN under a mask.
        clear_blocks(self.caches, batch.opened_blocks)
        pictures, image_s = self._pictures(plan)
        known = self._open | pictures
        self._open = {d: known[d] for d in plan.open_images if d in known}
        hidden = self.model.embed(batch.token_ids)
        for offset, part in _placed_slices(plan):
            rows = pictures[part.image.digest][part.feature_start :][: part.length]
            hidden[offset : offset + part.length] = rows
        hidden = self.model(hidden, batch.positions, batch.attention, self.caches)
        self._clear_broken_drafts(batch, hidden)
        return StepLogits(self.model.logits(hidden[batch.sampled]), image_s)

    def _clear_broken_drafts(self, batch: Batch, hidden: Tensor) -> None:
        """Take back what is not finite of tokens that may never be said.

        A draft that is refused stays in the cache until its place is written again, and decodes
        read their last block whole: under a mask, but NaN under a mask is NaN.
        hidden: [num_tokens, hidden_size]
        """
        is_broken = ~hidden[batch.drafted].isfinite().all(-1)
        if is_broken.any():
            clear_slots(self.caches, batch.attention.slots[batch.drafted[is_broken]])

    def _pictures(self, plan: StepPlan) -> tuple[dict[bytes, Tensor], dict[int, float]]:
        """Features of every picture the step needs, from the cache or the tower."""
        ready: dict[bytes, Tensor] = {}
        image_s: dict[int, float] = {}
        for row in plan.rows:
            wanted = {part.image.digest: part for part in reversed(row.images)}  # its first part
            missing = [
                part.image
                for digest, part in wanted.items()
                if digest not in ready and not self._take_cached(part, ready)
            ]
            if missing:
                image_s[row.sequence_id] = self._encode(missing, ready)
        return ready, image_s

    def _take_cached(self, part: ImageSlice, ready: dict[bytes, Tensor]) -> bool:
        features = self.features.get(part.image.digest)
        if features is None:
            features = self._open.get(part.image.digest)
        if features is None:
            return False
        ready[part.image.digest] = features
        # Later chunks of one picture find it cached as well; only its first counts as a hit.
        self.counters.feature_hits += part.is_first
        return True

    def _encode(self, images: Sequence[ImageInput], ready: dict[bytes, Tensor]) -> float:
        """Run the tower over pictures, as many at a time as the patch limit allows.

        Returns the seconds it took.
        """
        began = time.perf_counter()
        for group in _groups(images, self.tower_patches):
            for image, features in zip(group, self.model.image_features(group), strict=True):
                ready[image.digest] = features
                if features.isfinite().all():  # or the picture's next request would fail as well
                    self.features.put(image.digest, features)
        spent = time.perf_counter() - began
        self.counters.tower_images += len(images)
        self.counters.tower_s += spent
        return spent


def _groups(images: Sequence[ImageInput], max_patches: int) -> Iterator[list[ImageInput]]:
    """Split pictures into runs of at most max_patches patches, at least one picture each."""
    group: list[ImageInput] = []
    patches = 0
    for image in images:
        size = image.grid[0] * image.grid[1]
        if group and patches + size > max_patches:
            yield group
            group, patches = [], 0
        group.append(image)
        patches += size
    if group:
        yield group


def _placed_slices(plan: StepPlan) -> Iterator[tuple[int, ImageSlice]]:
    """Every picture slice with its offset in the flattened step."""
    start = 0
    for row in plan.rows:
        for part in row.images:
            yield start + part.offset, part
        start += len(row.token_ids)
