"""A tower run in parts: the same features, and whatever goes wrong stays with its own pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from glimt.config import EngineConfig
from glimt.engine import Engine
from glimt.layers.tower import TowerBlock
from glimt.runner.tower import TowerJob, groups_of
from glimt.types import ImageInput


def picture(name: str, rows: int = 1, columns: int = 1) -> ImageInput:
    return ImageInput(name.encode(), 2, (rows, columns), np.zeros((1, 1, 3), dtype=np.uint8))


# --- the real towers -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
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
    hook = block.mlp.register_forward_hook(lambda *_: calls.append(0))  # type: ignore[union-attr]
    with torch.inference_mode():
        job = TowerJob(model, images)
        assert job.advance(done) is None
        features = job.finish()
        assert len(calls) == 1
        hook.remove()
        assert bits(features) == bits(model.image_features(images))


# --- groups -----------------------------------------------------------------------------------


def test_groups_hold_the_limit_and_keep_the_order() -> None:
    """Catches a picture that is lost between two groups, or one too large that is never taken."""
    images = [picture("a", 2, 2), picture("b", 3, 3), picture("c"), picture("d"), picture("e")]
    found = [[image.digest for image in group] for group in groups_of(images, 5)]
    assert found == [[b"a"], [b"b"], [b"c", b"d", b"e"]]
    full = list(groups_of(images[2:], 3))
    assert [len(group) for group in full] == [3], "what fills a run exactly goes into it"
    assert list(groups_of([], 5)) == []


@pytest.fixture(scope="module", autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


# --- large pictures ----------------------------------------------------------------------------


def test_parts_of_a_large_picture_give_its_features(engine, monkeypatch):
    """Catches a part that attends to its own rows alone, and rows that come back in other order."""
    model, images = engine.opened.model, random_pictures(engine, 2)
    with torch.inference_mode():
        whole = model.image_features(images)
        monkeypatch.setattr(TowerBlock, "part_rows", 5)
        in_parts = model.image_features(images)
        job = TowerJob(model, images)
        while (paused := job.advance(0.01)) is None:
            pass
    assert bits(paused) == bits(in_parts)
    for one, other in zip(in_parts, whole, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-5)


def test_a_large_pictures_blocks_pause_inside(engine, monkeypatch):
    """Catches a slice that is a whole block, which is seconds of a GLM-4v picture."""
    monkeypatch.setattr(TowerBlock, "part_rows", 5)
    job = TowerJob(engine.opened.model, random_pictures(engine, 1))
    shares = []
    with torch.inference_mode():
        assert job.advance(1.0, lambda: shares.append(0) is None and len(shares) == 3) is None
        assert len(shares) == 3  # it was enough after three parts, and no block was done
        for share in job._stages or ():
            shares.append(share)
    assert len(shares) > 2 * 3 * 3
