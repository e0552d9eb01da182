"""VisionRunner with a tower by hand: what runs when, what is held, what a failure costs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch

from glimt.layers.tower import Stages
from glimt.runner.feature_cache import FeatureCache
from glimt.runner.vision import VisionRunner
from glimt.types import ImageInput, ImageWait, StepPlan


def picture(name: str, rows: int = 1, columns: int = 1) -> ImageInput:
    return ImageInput(name.encode(), 2, (rows, columns), np.zeros((1, 1, 3), dtype=np.uint8))


class Tower:
    """As much of a model as VisionRunner needs: every stage is noted.

    broken: digests of pictures at which a stage raises; value: of the features, else the digest
    """

    def __init__(
        self, num_stages: int = 3, broken: Sequence[bytes] = (), value: float | None = None
    ) -> None:
        self.num_stages = num_stages
        self.value = value
        self.broken = broken
        self.log: list[str] = []

    def image_stages(self, images: Sequence[ImageInput]) -> Stages[list[torch.Tensor]]:
        names = "".join(image.digest.decode() for image in images)
        for stage in range(self.num_stages):
            if stage:
                yield
            self.log.append(f"{names}{stage}")
            if stage and any(image.digest in self.broken for image in images):
                raise MemoryError("no room")
        return self._features(images)

    def image_features(self, images: Sequence[ImageInput]) -> list[torch.Tensor]:
        self.log.append("whole")
        return self._features(images)

    def _features(self, images: Sequence[ImageInput]) -> list[torch.Tensor]:
        values = [float(ord(i.digest)) if self.value is None else self.value for i in images]
        return [torch.full((2, 4), value) for value in values]


def make_vision(
    tower: Tower, *, patches: int = 8, slice_patches: int = 1, capacity_tokens: int = 0
) -> VisionRunner:
    cache = FeatureCache(capacity_tokens)
    return VisionRunner(tower, cache, patches, slice_patches)  # type: ignore[arg-type]


def plan_of(**wanted: str) -> StepPlan:
    """Request name = the pictures it waits for, a letter each."""
    waits = tuple(
        ImageWait(number, name, tuple(picture(letter) for letter in letters))
        for number, (name, letters) in enumerate(wanted.items())
    )
    return StepPlan((), frozenset(i.digest for w in waits for i in w.images), waits)


def test_a_slice_is_bounded_by_patches_times_stages() -> None:
    """Catches a bound of stages alone, which would draw a small picture out over many steps."""
    for slice_patches, slices in ((1, 7), (2, 7), (4, 4), (6, 3), (14, 1), (10**9, 1)):
        tower = Tower(num_stages=7)
        vision = make_vision(tower, slice_patches=slice_patches)
        plan = plan_of(r="ab")  # two patches
        steps = 0
        while b"a" not in vision.ready_images:
            vision.encode_slice(plan)
            steps += 1
        assert steps == slices
        assert tower.log == [f"ab{stage}" for stage in range(7)]
        assert (vision.counters.tower_images, vision.counters.tower_slices) == (2, slices)


def test_who_waits_at_once_goes_through_together_and_who_comes_later_comes_next() -> None:
    """Catches pictures taken one by one, a limit that is not kept, and a job given up for more."""
    tower = Tower()
    vision = make_vision(tower, patches=3)
    vision.encode_slice(plan_of(r="a", s="ba"))
    for _ in range(2):
        vision.encode_slice(plan_of(r="a", s="ba", t="cdef"))
    assert vision.ready_images == {b"a", b"b"}
    for _ in range(3):
        vision.encode_slice(plan_of(t="cdef"))
    assert vision.ready_images == {b"c", b"d", b"e"}
    assert tower.log == ["ab0", "ab1", "ab2", "cde0", "cde1", "cde2"]


def test_time_in_the_tower_is_of_those_who_wait_for_what_is_in_it() -> None:
    """Catches a request charged for another one's pictures, or a shared run charged to one."""
    vision = make_vision(Tower(), patches=2)
    progress = vision.encode_slice(plan_of(r="a", s="ab", t="c"))
    assert progress.image_s.keys() == {"r", "s"}
    assert 0 < progress.image_s["r"] == progress.image_s["s"] == vision.counters.tower_s


def test_work_that_nobody_waits_for_is_dropped() -> None:
    """Catches an abort that leaves its picture in the tower, or takes another one's out of it."""
    tower = Tower()
    vision = make_vision(tower)
    vision.encode_slice(plan_of(r="a", s="b"))
    vision.keep(frozenset({b"b"}))
    vision.encode_slice(plan_of(s="b"))
    vision.keep(frozenset())
    vision.encode_slice(plan_of(t="b"))
    assert tower.log == ["ab0", "ab1", "b0"]
    for _ in range(2):
        vision.encode_slice(plan_of(t="b"))
    vision.keep(frozenset())
    assert vision.ready_images == frozenset()
    assert vision.counters.tower_images == 1


def test_a_picture_that_fails_is_found_among_its_neighbours() -> None:
    """Catches neighbours that fail with it, or a job that is tried for ever."""
    tower = Tower(num_stages=2, broken=[b"b"])
    vision = make_vision(tower)
    failed: set[bytes] = set()
    errors = 0
    for _ in range(9):
        done = vision.ready_images | failed
        left = [name for name in "abc" if name.encode() not in done]
        if not left:
            break
        plan = plan_of(r="".join(left))
        progress = vision.encode_slice(StepPlan((), frozenset({b"a", b"b", b"c"}), plan.waits))
        failed |= progress.failed
        errors += progress.error is not None
    assert (failed, vision.ready_images, errors) == ({b"b"}, {b"a", b"c"}, 2)
    assert tower.log == ["abc0", "abc1", "a0", "a1", "b0", "b1", "c0", "c1"]
    assert vision.counters.tower_images == 2


def test_features_that_are_not_finite_are_held_but_not_cached() -> None:
    """Would catch one failure of the tower that spoils every later request with that picture."""
    tower = Tower(num_stages=1, value=math.nan)
    vision = make_vision(tower, capacity_tokens=8)
    plan = plan_of(r="a")
    vision.encode_slice(plan)
    assert vision.ready_images == {b"a"}  # the row that shows it must fail by itself
    vision.keep(frozenset())
    assert vision.ready_images == frozenset()
    tower.value = 5.0
    vision.encode_slice(plan)
    vision.keep(frozenset())
    assert vision.ready_images == {b"a"}


@pytest.fixture(scope="module", autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield
