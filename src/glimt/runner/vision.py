"""VisionRunner: pictures -> features, through the tower, in bounded parts where others wait.

Owns the features that steps still need, the cache of those that may come again, and the tower's
run in progress. Of a request it knows which pictures it shows.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, field

import torch
from torch import Tensor

from glimt.devices.memory import saying_what_fits, step_too_large
from glimt.errors import RankError
from glimt.models.base import PictureEncoder
from glimt.runner.allowance import Allowance
from glimt.runner.feature_cache import FeatureCache
from glimt.runner.tower import TowerJob, groups_of
from glimt.types import ImageInput, ImageSlice, ImageWait, StepPlan


@dataclass(slots=True)
class VisionCounters:
    """Totals since start."""

    tower_images: int = 0  # pictures that went through the tower
    tower_slices: int = 0  # times that a part of the tower ran beside other sequences' tokens
    feature_hits: int = 0  # pictures whose features were cached when first needed
    tower_s: float = 0.0


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


class VisionRunner:
    """Runs the tower, and holds what came out of it for as long as a step needs it.

    tower_patches:       of all pictures in one run of the tower
    tower_slice_patches: patches times stages of a run's part, where others wait for the step
    """

    def __init__(
        self,
        encoder: PictureEncoder,
        cache: FeatureCache,
        tower_patches: int,
        tower_slice_patches: int = 1,
    ) -> None:
        self.encoder = encoder
        self.cache = cache
        self.tower_patches = tower_patches
        self.tower_slice_patches = tower_slice_patches
        self.counters = VisionCounters()
        # Pictures that are needed now or later: kept beside the cache, whose budget may be too
        # small for them, so that neither a later chunk nor a wait runs the tower again.
        self._held: dict[bytes, Tensor] = {}
        self._unused: set[bytes] = set()  # those held that no row has shown since their tower run
        self._suspects: set[bytes] = set()  # those whose run failed, as one of several
        self._job: TowerJob | None = None

    @property
    def ready_images(self) -> frozenset[bytes]:
        """Digests of the pictures that need no tower."""
        return frozenset(self.cache.digests | self._held.keys())

    @property
    def is_idle(self) -> bool:
        """Nothing is held for any step, and no run of the tower is in progress."""
        return not self._held and self._job is None

    # --- for a step's rows ---

    @torch.inference_mode()
    def complete(self, plan: StepPlan) -> dict[str, float]:
        """Hold the features of every picture that the rows need, running the tower all the way.

        They are held until `finish_step`, so that the step can be run again. Returns the tower's
        seconds by request id. Raises what the model raises.
        """
        wanted = {
            digest: image for row in plan.rows for digest, image in row.images_by_digest.items()
        }
        self._hold(plan.open_images | wanted.keys())
        missing = [image for digest, image in wanted.items() if digest not in self._held]
        image_s: dict[str, float] = {}
        for job in self._jobs(missing):
            spent = self._finish(job)
            for request_id in _shown_by(plan, _digests(job.images)):
                image_s[request_id] = image_s.get(request_id, 0.0) + spent
        return image_s

    def rows_of(self, part: ImageSlice) -> Tensor:
        """[part.length, hidden_size] of a picture that is held."""
        return self._held[part.image.digest][part.feature_start :][: part.length]

    def finish_step(self, plan: StepPlan) -> None:
        """The step is not run again: count its pictures, let go of those that are not needed.

        A tower run pays for the first use of its picture; whatever else is a first use is a hit.
        """
        parts = (part for row in plan.rows for part in row.images if part.is_first)
        first_used = {part.image.digest for part in parts}
        self.counters.feature_hits += len(first_used - self._unused)
        self._unused -= first_used
        self.keep(plan.open_images)

    def _jobs(self, missing: Sequence[ImageInput]) -> Iterator[TowerJob]:
        """Runs of the tower that cover these pictures; the one in progress first."""
        job, done = self._job, frozenset[bytes]()
        if job and job.has_any_of(_digests(missing)):
            self._job, done = None, _digests(job.images)
            yield job
        left = [image for image in missing if image.digest not in done]
        for group in groups_of(left, self.tower_patches):
            yield TowerJob(self.encoder, group)

    def _finish(self, job: TowerJob) -> float:
        """Run a job to its end. Returns the seconds it took."""
        began = time.perf_counter()
        self._take(job.images, job.finish())
        spent = time.perf_counter() - began
        self.counters.tower_s += spent
        return spent

    # --- for those who wait ---

    @torch.inference_mode()
    def encode_slice(self, plan: StepPlan, patience_s: float | None = None) -> TowerProgress:
        """Take pictures that sequences wait for a bounded part further through the tower.

        patience_s: seconds that it may take, but for one part; None: only patches bound it

        What the tower raises is returned: it is not the fault of any row of the step.
        """
        self._hold(plan.open_images)
        self.keep(plan.open_images)
        job = self._job or self._next_job(plan.waits)
        if job is None:
            return TowerProgress()
        began = time.perf_counter()
        try:
            with saying_what_fits(step_too_large):
                self._advance(job, patience_s)
        except RankError:
            raise
        except Exception as error:  # whatever it is, those without these pictures must go on
            return TowerProgress({}, error, self._given_up(job))
        finally:
            spent = time.perf_counter() - began
            self.counters.tower_slices += 1
            self.counters.tower_s += spent
        image_s = {w.request_id: spent for w in plan.waits if job.has_any_of(_digests(w.images))}
        return TowerProgress(image_s)

    def _advance(self, job: TowerJob, patience_s: float | None) -> None:
        """Run a job's next stages; it stays the one in progress if there are more and none failed.

        What makes a part of the run small is patches times stages, so that a few small pictures are
        not drawn out over as many steps as one large one.
        """
        self._job = None
        num_stages = max(1, self.tower_slice_patches // job.num_patches)
        if patience_s is None:
            features = job.advance(num_stages)
        else:
            features = job.advance(math.inf, Allowance(patience_s).is_spent)
        if features is None:
            self._job = job
        else:
            self._take(job.images, features)

    def _next_job(self, waits: Sequence[ImageWait]) -> TowerJob | None:
        """Pictures in the order of those who wait, together; a suspect goes alone."""
        wanted = {image.digest: image for wait in waits for image in wait.images}
        missing = [image for digest, image in wanted.items() if digest not in self._held]
        if not missing:
            return None
        if missing[0].digest in self._suspects:
            return TowerJob(self.encoder, missing[:1])
        sound = [image for image in missing if image.digest not in self._suspects]
        return TowerJob(self.encoder, next(groups_of(sound, self.tower_patches)))

    def _given_up(self, job: TowerJob) -> frozenset[bytes]:
        """A failed job's pictures, unless they can still be tried one by one."""
        digests = _digests(job.images)
        if len(digests) == 1:
            self._suspects -= digests
            return digests
        self._suspects |= digests
        return frozenset()

    # --- what is held ---

    def keep(self, digests: Set[bytes]) -> None:
        """Let go of pictures, and of work on them, that are not among those still needed."""
        self._held = {d: rows for d, rows in self._held.items() if d in digests}
        self._unused &= self._held.keys()
        self._suspects &= digests
        if self._job and not self._job.has_any_of(digests):
            self._job = None

    def _take(self, images: Sequence[ImageInput], features: Sequence[Tensor]) -> None:
        """Hold what came out of the tower, and cache it."""
        for image, rows in zip(images, features, strict=True):
            self._held[image.digest] = rows
            self._unused.add(image.digest)
            self._suspects.discard(image.digest)
            if rows.isfinite().all():  # or the picture's next request would fail as well
                self.cache.put(image.digest, rows)
        self.counters.tower_images += len(images)

    def _hold(self, digests: Iterable[bytes]) -> None:
        """Hold what the cache has of these, before anything else can push it out."""
        for digest in digests:
            rows = self._held.get(digest)
            if rows is None:
                rows = self.cache.get(digest)
            if rows is not None:
                self._held[digest] = rows


def _digests(images: Iterable[ImageInput]) -> frozenset[bytes]:
    return frozenset(image.digest for image in images)


def _shown_by(plan: StepPlan, digests: Set[bytes]) -> set[str]:
    """Ids of the requests whose rows need one of these pictures."""
    return {row.request_id for row in plan.rows if digests & row.images_by_digest.keys()}
