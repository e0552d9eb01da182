"""A tower run in parts: the same features, and whatever goes wrong stays with its own pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch

from glimt.config import EngineConfig
from glimt.demo.noise import FAMILIES, write_noise_model
from glimt.devices.base import open_device
from glimt.engine import Engine
from glimt.models.base import Stages
from glimt.runner.feature_cache import FeatureCache
from glimt.runner.model_runner import ModelRunner
from glimt.runner.tower import TowerJob, groups_of
from glimt.types import ImageInput, PictureWait, StepPlan


def picture(name: str, rows: int = 1, columns: int = 1) -> ImageInput:
    return ImageInput(name.encode(), 2, (rows, columns), np.zeros((1, 1, 3), dtype=np.uint8))


# --- the real towers -------------------------------------------------------------------------


@pytest.fixture(scope="module", params=FAMILIES)
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    folder = tmp_path_factory.mktemp(request.param)
    write_noise_model(folder, request.param)
    return Engine.load(EngineConfig(model=str(folder), num_blocks=8))


def random_pictures(engine: Engine, count: int) -> list[ImageInput]:
    """Of the size that the family's tower wants."""
    from PIL import Image

    noise = np.random.default_rng(0).integers(0, 256, (count, 20, 30, 3), dtype=np.uint8)
    prepare = engine.opened.processor.prepare_image
    return [prepare(Image.fromarray(each), bytes([i])) for i, each in enumerate(noise)]


def bits(features: Sequence[torch.Tensor]) -> list[bytes]:
    return [rows.numpy().tobytes() for rows in features]


@pytest.mark.parametrize("slice_stages", [1, 2, 99])
@pytest.mark.parametrize("count", [1, 3])
def test_features_in_slices_are_the_whole_runs_bit_for_bit(
    engine: Engine, count: int, slice_stages: int
) -> None:
    """Catches a stage that is left out, done twice, or not the whole run's own operations."""
    model, images = engine.opened.model, random_pictures(engine, count)
    with torch.inference_mode():
        whole = model.image_features(images)
        job, slices, features = TowerJob(model, images), 0, None
        while features is None:
            features = job.advance(slice_stages)
            slices += 1
    assert bits(features) == bits(whole)
    assert slices == -(-3 // slice_stages)  # two blocks, then what comes after them


@pytest.mark.parametrize("done", [0, 1, 2])
def test_a_run_is_finished_from_where_it_stands(engine: Engine, done: int) -> None:
    """Catches a run through to the end that begins again, or goes on from the wrong layer."""
    model, images = engine.opened.model, random_pictures(engine, 2)
    block = model.tower.blocks[0]  # type: ignore[union-attr,index]
    calls = []
    hook = block.register_forward_hook(lambda *_: calls.append(0))  # type: ignore[union-attr]
    with torch.inference_mode():
        job = TowerJob(model, images)
        assert job.advance(done) is None
        features = job.finish()
        assert len(calls) == 1
        hook.remove()
        assert bits(features) == bits(model.image_features(images))


# --- a tower by hand -------------------------------------------------------------------------


class Tower:
    """As much of a model as ModelRunner needs for pictures: every stage is noted.

    broken: digests of pictures at which a stage raises
    """

    def __init__(self, num_stages: int = 3, broken: Sequence[bytes] = ()) -> None:
        self.num_stages = num_stages
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
        return [torch.full((2, 4), float(ord(image.digest))) for image in images]

    def image_features(self, images: Sequence[ImageInput]) -> list[torch.Tensor]:
        self.log.append("whole")
        return [torch.full((2, 4), float(ord(image.digest))) for image in images]


def make_runner(tower: Tower, *, patches: int = 8, slice_patches: int = 1) -> ModelRunner:
    cache, cpu = FeatureCache(0), open_device("cpu")
    return ModelRunner(tower, [], cache, cpu, torch.float32, patches, slice_patches)  # type: ignore[arg-type]


def plan_of(**wanted: str) -> StepPlan:
    """Request name = the pictures it waits for, a letter each."""
    waits = tuple(
        PictureWait(number, name, tuple(picture(letter) for letter in letters))
        for number, (name, letters) in enumerate(wanted.items())
    )
    return StepPlan((), frozenset(i.digest for w in waits for i in w.images), waits)


def test_a_slice_is_bounded_by_patches_times_stages() -> None:
    """Catches a bound of stages alone, which would draw a small picture out over many steps."""
    for slice_patches, slices in ((1, 7), (2, 7), (4, 4), (6, 3), (14, 1), (10**9, 1)):
        tower = Tower(num_stages=7)
        runner = make_runner(tower, slice_patches=slice_patches)
        plan = plan_of(r="ab")  # two patches
        steps = 0
        while b"a" not in runner.ready_images:
            runner.encode_slice(plan)
            steps += 1
        assert steps == slices
        assert tower.log == [f"ab{stage}" for stage in range(7)]
        assert (runner.counters.tower_images, runner.counters.tower_slices) == (2, slices)


def test_who_waits_at_once_goes_through_together_and_who_comes_later_comes_next() -> None:
    """Catches pictures taken one by one, a limit that is not kept, and a job given up for more."""
    tower = Tower()
    runner = make_runner(tower, patches=3)
    runner.encode_slice(plan_of(r="a", s="ba"))
    for _ in range(2):
        runner.encode_slice(plan_of(r="a", s="ba", t="cdef"))
    assert runner.ready_images == {b"a", b"b"}
    for _ in range(3):
        runner.encode_slice(plan_of(t="cdef"))
    assert runner.ready_images == {b"c", b"d", b"e"}
    assert tower.log == ["ab0", "ab1", "ab2", "cde0", "cde1", "cde2"]


def test_time_in_the_tower_is_of_those_who_wait_for_what_is_in_it() -> None:
    """Catches a request charged for another one's pictures, or a shared run charged to one."""
    runner = make_runner(Tower(), patches=2)
    progress = runner.encode_slice(plan_of(r="a", s="ab", t="c"))
    assert progress.image_s.keys() == {"r", "s"}
    assert 0 < progress.image_s["r"] == progress.image_s["s"] == runner.counters.tower_s


def test_work_that_nobody_waits_for_is_dropped() -> None:
    """Catches an abort that leaves its picture in the tower, or takes another one's out of it."""
    tower = Tower()
    runner = make_runner(tower)
    runner.encode_slice(plan_of(r="a", s="b"))
    runner.keep(frozenset({b"b"}))
    runner.encode_slice(plan_of(s="b"))
    runner.keep(frozenset())
    runner.encode_slice(plan_of(t="b"))
    assert tower.log == ["ab0", "ab1", "b0"]
    for _ in range(2):
        runner.encode_slice(plan_of(t="b"))
    runner.keep(frozenset())
    assert runner.ready_images == frozenset()
    assert runner.counters.tower_images == 1


def test_a_picture_that_fails_is_found_among_its_neighbours() -> None:
    """Catches neighbours that fail with it, or a job that is tried for ever."""
    tower = Tower(num_stages=2, broken=[b"b"])
    runner = make_runner(tower)
    failed: set[bytes] = set()
    errors = 0
    for _ in range(9):
        done = runner.ready_images | failed
        left = [name for name in "abc" if name.encode() not in done]
        if not left:
            break
        plan = plan_of(r="".join(left))
        progress = runner.encode_slice(StepPlan((), frozenset({b"a", b"b", b"c"}), plan.waits))
        failed |= progress.failed
        errors += progress.error is not None
    assert (failed, runner.ready_images, errors) == ({b"b"}, {b"a", b"c"}, 2)
    assert tower.log == ["abc0", "abc1", "a0", "a1", "b0", "b1", "c0", "c1"]
    assert runner.counters.tower_images == 2


def test_groups_hold_the_limit_and_keep_the_order() -> None:
    """Catches a picture that is lost between two groups, or one too large that is never taken."""
    images = [picture("a", 2, 2), picture("b", 3, 3), picture("c"), picture("d"), picture("e")]
    found = [[image.digest for image in group] for group in groups_of(images, 5)]
    assert found == [[b"a"], [b"b"], [b"c", b"d", b"e"]]
    assert list(groups_of([], 5)) == []


@pytest.fixture(scope="module", autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield
