"""ModelRunner: a step's plan -> logits. Owns the model, the KV tensors and the picture features."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, field

import torch
from torch import Tensor

from glimt.devices.base import Device, KVCache
from glimt.models.base import Model
from glimt.runner.batch import Batch, flatten
from glimt.runner.feature_cache import FeatureCache
from glimt.runner.kv_cache import clear_blocks, clear_slots
from glimt.runner.tower import TowerJob, groups_of
from glimt.types import ImageInput, ImageSlice, PictureWait, StepPlan


@dataclass(slots=True)
class RunnerCounters:
    """Totals since start."""

    tower_images: int = 0  # pictures that went through the tower
    tower_slices: int = 0  # times that a part of the tower ran beside other sequences' tokens
    feature_hits: int = 0  # pictures whose features were cached when first needed
    tower_s: float = 0.0


@dataclass(frozen=True, slots=True, eq=False)
class StepLogits:
    """logits: [num_sampled, vocab_size]; image_s: tower seconds by request id."""

    logits: Tensor
    image_s: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class TowerProgress:
    """What a slice of the tower did.

    image_s: its seconds, by id of each request that waits for one of its pictures
    error:   what it raised, if it did
    failed:  digests of the pictures that are given up because of it; none when they were several:
             each is then tried alone
    """

    image_s: dict[str, float] = field(default_factory=dict)
    error: Exception | None = None
    failed: frozenset[bytes] = frozenset()


class ModelRunner:
    """Runs one step at a time. Of a request it keeps the pictures that later steps need.

    tower_patches: of all pictures in one run of the tower
    tower_slice_patches: patches times stages of a run's part, where others wait for the step
    """

    def __init__(
        self,
        model: Model,
        caches: Sequence[KVCache],
        features: FeatureCache,
        device: Device,
        dtype: torch.dtype,
        tower_patches: int,
        tower_slice_patches: int = 1,
    ) -> None:
        self.model = model
        self.caches = caches
        self.features = features
        self.device = device
        self.dtype = dtype
        self.tower_patches = tower_patches
        self.tower_slice_patches = tower_slice_patches
        self.counters = RunnerCounters()
        # Pictures that are needed now or later: kept beside the cache, whose budget may be too
        # small for them, so that neither a later chunk nor a wait runs the tower again.
        self._held: dict[bytes, Tensor] = {}
        self._unused: set[bytes] = set()  # those held that no row has shown since their tower run
        self._suspects: set[bytes] = set()  # those whose run failed, as one of several
        self._job: TowerJob | None = None

    @property
    def ready_images(self) -> frozenset[bytes]:
        """Digests of the pictures that need no tower."""
        return frozenset(self.features.digests | self._held.keys())

    # --- a step's tokens ---

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> StepLogits:
        """Compute a step's tokens. Returns the logits of plan.sampled_rows, in order.

        Pictures of its rows that are not ready go through the tower first, all the way. They are
        held until `finish_step`, so that the step can be run again.
        """
        block_size = self.caches[0].block_size
        batch = flatten(plan, block_size, self.device.torch_device)
        # Decodes read their last block whole, and NaN that its last owner left is NaN under a mask.
        clear_blocks(self.caches, batch.opened_blocks)
        image_s = self._complete(plan)
        hidden = self.model.embed(batch.token_ids)
        for offset, part in _placed_slices(plan):
            rows = self._held[part.image.digest][part.feature_start :][: part.length]
            hidden[offset : offset + part.length] = rows
        hidden = self.model(hidden, batch.positions, batch.attention, self.caches)
        self._clear_broken_drafts(batch, hidden)
        return StepLogits(self.model.logits(hidden[batch.sampled]), image_s)

    def finish_step(self, plan: StepPlan) -> None:
        """The step is not run again: count its pictures, let go of those that are not needed."""
        self._count_hits(plan)
        self.keep(plan.open_images)

    def _clear_broken_drafts(self, batch: Batch, hidden: Tensor) -> None:
        """Take back what is not finite of tokens that may never be said.

        A draft that is refused stays in the cache until its place is written again, and decodes
        read their last block whole: under a mask, but NaN under a mask is NaN.
        hidden: [num_tokens, hidden_size]
        """
        if not len(batch.drafted):
            return
        is_broken = ~hidden[batch.drafted].isfinite().all(-1)
        if is_broken.any():
            clear_slots(self.caches, batch.attention.slots[batch.drafted[is_broken]])

    def _complete(self, plan: StepPlan) -> dict[str, float]:
        """Hold the features of every picture that the rows need. Returns tower seconds."""
        wanted = {digest: image for row in plan.rows for digest, image in row.pictures.items()}
        self._hold(plan.open_images | wanted.keys())
        missing = [image for digest, image in wanted.items() if digest not in self._held]
        image_s: dict[str, float] = {}
        for group in self._groups(missing):
            spent = self._encode(group, self._held)
            _charge(plan, group, spent, image_s)
        return image_s

    def _groups(self, missing: Sequence[ImageInput]) -> Iterator[Sequence[ImageInput]]:
        """Runs of the tower that cover these pictures; the one in progress first."""
        begun: Sequence[ImageInput] = ()
        if self._job and self._job.has_any_of([image.digest for image in missing]):
            begun = self._job.images
            yield begun
        done = {image.digest for image in begun}
        yield from groups_of([i for i in missing if i.digest not in done], self.tower_patches)

    def _count_hits(self, plan: StepPlan) -> None:
        """A tower run pays for the first use of its picture; whatever else is a first use hits."""
        parts = (part for row in plan.rows for part in row.images if part.is_first)
        first_used = {part.image.digest for part in parts}
        self.counters.feature_hits += len(first_used - self._unused)
        self._unused -= first_used

    # --- the tower ---

    def _encode(self, images: Sequence[ImageInput], ready: dict[bytes, Tensor]) -> float:
        """Run the tower over pictures together, from where it stands with them to its end.

        Returns the seconds it took.
        """
        began = time.perf_counter()
        job = TowerJob(self.model, images)
        if self._job and self._job.images == job.images:
            job, self._job = self._job, None
        self._take(job.images, job.finish(), ready)
        spent = time.perf_counter() - began
        self.counters.tower_s += spent
        return spent

    @torch.inference_mode()
    def encode_slice(self, plan: StepPlan) -> TowerProgress:
        """Take pictures that sequences wait for a bounded part further through the tower.

        What the tower raises is returned: it is not the fault of any row of the step.
        """
        self._hold(plan.open_images)
        self.keep(plan.open_images)
        job = self._job or self._next_job(plan.waits)
        if job is None:
            return TowerProgress()
        began = time.perf_counter()
        try:
            self._advance(job)
        except Exception as error:  # whatever it is, those without these pictures must go on
            return TowerProgress({}, error, self._given_up(job))
        finally:
            spent = time.perf_counter() - began
            self.counters.tower_slices += 1
            self.counters.tower_s += spent
        image_s = {w.request_id: spent for w in plan.waits if job.has_any_of(_digests(w.images))}
        return TowerProgress(image_s)

    def _advance(self, job: TowerJob) -> None:
        """Run a job's next stages; it stays the one in progress if there are more and none failed.

        What makes a part of the run small is patches times stages, so that a few small pictures are
        not drawn out over as many steps as one large one.
        """
        self._job = None
        features = job.advance(max(1, self.tower_slice_patches // job.num_patches))
        if features is None:
            self._job = job
        else:
            self._take(job.images, features, self._held)

    def _next_job(self, waits: Sequence[PictureWait]) -> TowerJob | None:
        """Pictures in the order of those who wait, together; a suspect goes alone."""
        wanted = {image.digest: image for wait in waits for image in wait.images}
        missing = [image for digest, image in wanted.items() if digest not in self._held]
        if not missing:
            return None
        if missing[0].digest in self._suspects:
            return TowerJob(self.model, missing[:1])
        sound = [image for image in missing if image.digest not in self._suspects]
        return TowerJob(self.model, next(groups_of(sound, self.tower_patches)))

    def _given_up(self, job: TowerJob) -> frozenset[bytes]:
        """A failed job's pictures, unless they can still be tried one by one."""
        digests = _digests(job.images)
        if len(digests) == 1:
            self._suspects -= digests
            return digests
        self._suspects |= digests
        return frozenset()

    def _take(
        self,
        images: Sequence[ImageInput],
        features: Sequence[Tensor],
        ready: dict[bytes, Tensor],
    ) -> None:
        """Hand on what came out of the tower, and cache it."""
        for image, rows in zip(images, features, strict=True):
            ready[image.digest] = rows
            self._unused.add(image.digest)
            self._suspects.discard(image.digest)
            if rows.isfinite().all():  # or the picture's next request would fail as well
                self.features.put(image.digest, rows)
        self.counters.tower_images += len(images)

    # --- what is held ---

    def keep(self, digests: Set[bytes]) -> None:
        """Let go of pictures, and of work on them, that are not among those still needed."""
        self._held = {d: rows for d, rows in self._held.items() if d in digests}
        self._unused &= self._held.keys()
        self._suspects &= digests
        if self._job and not self._job.has_any_of(digests):
            self._job = None

    def _hold(self, digests: Iterable[bytes]) -> None:
        """Hold what the cache has of these, before anything else can push it out."""
        for digest in digests:
            rows = self._held.get(digest)
            if rows is None:
                rows = self.features.get(digest)
            if rows is not None:
                self._held[digest] = rows


def _digests(images: Iterable[ImageInput]) -> frozenset[bytes]:
    return frozenset(image.digest for image in images)


def _charge(
    plan: StepPlan, group: Sequence[ImageInput], spent: float, image_s: dict[str, float]
) -> None:
    """Add a tower run's seconds to every request that has one of its pictures."""
    digests = _digests(group)
    for request_id in {row.request_id for row in plan.rows if digests & row.pictures.keys()}:
        image_s[request_id] = image_s.get(request_id, 0.0) + spent


def _placed_slices(plan: StepPlan) -> Iterator[tuple[int, ImageSlice]]:
    """Every picture slice with its offset in the flattened step."""
    start = 0
    for row in plan.rows:
        for part in row.images:
            yield start + part.offset, part
        start += len(row.token_ids)
