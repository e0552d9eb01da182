"""The engine with a picture in the tower: the others go on, and nobody's answer changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from glimt.config import EngineConfig
from glimt.demo.noise import FAMILIES
from glimt.engine import Engine
from glimt.inputs.request import RequestOptions
from glimt.scheduler.drafting import Drafter
from glimt.types import ImageInput, Request, SamplingParams, StepOutput, StepPlan

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
LONG = replace(GREEDY, max_tokens=40)
PATCHES = {"glm4v_9b": 64, "visualglm": 256}  # of the noise models' pictures
STAGES = 3  # two blocks, and what comes after them


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(family: str, folders: dict[str, Path]) -> Path:
    return folders[family]


def make_engine(folder: Path, **options: Any) -> Engine:
    """A slice is one stage of the tower, unless told otherwise."""
    settings = {"num_blocks": 64, "tower_slice_patches": 1} | options
    return Engine.load(EngineConfig(model=str(folder), **settings))


def picture(seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def prepare(
    engine: Engine, name: str, pictures: Sequence[int] = (), sampling: SamplingParams = GREEDY
) -> Request:
    parts: list[dict[str, Any]] = [{"type": "image", "image": picture(p)} for p in pictures]
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": f"{name}是什么？"}]}]
    return engine.prepare_chat(messages, sampling, RequestOptions(request_id=name))


def add(engine: Engine, name: str, pictures: Sequence[int] = (), **sampling: Any) -> None:
    engine.add_request(prepare(engine, name, pictures, replace(GREEDY, **sampling)))


class Tower:
    """What runs through an engine's tower, by the digests of each group, in order."""

    def __init__(self, engine: Engine) -> None:
        self.wholes: list[list[bytes]] = []
        self.sliced: list[list[bytes]] = []
        self._model = engine.runner.model
        self._features, self._stages = self._model.image_features, self._model.image_stages
        self._model.image_features = self._whole  # type: ignore[method-assign]
        self._model.image_stages = self._slices  # type: ignore[method-assign]

    def _whole(self, images: Sequence[ImageInput]) -> list[torch.Tensor]:
        self.wholes.append([image.digest for image in images])
        return self._features(images)

    def _slices(self, images: Sequence[ImageInput]) -> Any:
        self.sliced.append([image.digest for image in images])
        return self._stages(images)


def tokens_of(outputs: Sequence[StepOutput]) -> dict[str, tuple[int, ...]]:
    assert all(output.error is None for output in outputs)
    return {output.request_id: output.token_ids for output in outputs if output.token_ids}


def finish(engine: Engine) -> dict[str, list[int]]:
    """Run to the end; the tokens from now on, by request."""
    found: dict[str, list[int]] = {}
    while engine.has_work:
        for name, ids in tokens_of(engine.step()).items():
            found.setdefault(name, []).extend(ids)
        engine.scheduler.pool.check()
    assert engine.vision.is_idle
    return found


def alone(folder: Path, name: str, pictures: Sequence[int], **sampling: Any) -> list[int]:
    """A request's tokens in an engine of its own, whose tower is not sliced."""
    engine = make_engine(folder, enable_prefix_cache=False, feature_cache_bytes=0)
    add(engine, name, pictures, **sampling)
    return finish(engine)[name]


def with_a_running(folder: Path, **options: Any) -> Engine:
    engine = make_engine(folder, **options)
    add(engine, "text", max_tokens=40)
    engine.step()
    return engine


# --- the schedule ----------------------------------------------------------------------------


def test_a_running_answer_gets_a_token_in_every_step_of_the_tower(folder: Path) -> None:
    """Catches a step that runs the whole tower while others wait for their tokens."""
    engine = with_a_running(folder)
    add(engine, "shown", [1])
    for slices in range(1, STAGES + 1):
        assert tokens_of(engine.step()).keys() == {"text"}
        assert engine.stats().tower_slices == slices
        assert engine.stats().tower_images == (slices == STAGES)
    assert tokens_of(engine.step()).keys() == {"text", "shown"}
    assert finish(engine)["shown"] == alone(folder, "shown", [1])[1:]
    stats = engine.stats()
    assert (stats.tower_images, stats.tower_slices, stats.feature_hits) == (1, STAGES, 0)
    assert stats.failed_steps == 0


@pytest.mark.parametrize(("layers", "slices"), [(1, 3), (2, 2), (3, 1), (99, 1)])
def test_every_slice_gives_the_unsliced_answers(
    folder: Path, family: str, layers: int, slices: int
) -> None:
    """Catches features that depend on where the tower paused."""
    size = 2 * PATCHES[family]
    engine = with_a_running(
        folder, tower_slice_patches=layers * size, tower_patches=size, feature_cache_bytes=0
    )
    add(engine, "two", [1, 2])
    while "two" not in tokens_of(engine.step()):
        pass
    assert engine.stats().tower_slices == slices
    assert finish(engine)["two"] == alone(folder, "two", [1, 2])[1:]


def test_with_nothing_else_running_the_tower_runs_through_at_once(folder: Path) -> None:
    """Catches a lone request that pays steps for slices, or waits for nobody."""
    engine = make_engine(folder)
    tower = Tower(engine)
    add(engine, "a", [1])
    add(engine, "b", [2])
    assert tokens_of(engine.step()).keys() == {"a", "b"}
    assert [len(group) for group in tower.wholes] == [2]
    assert (tower.sliced, engine.stats().tower_slices) == ([], 0)
    finish(engine)


def test_when_the_others_have_finished_the_rest_of_the_tower_runs_at_once(folder: Path) -> None:
    """Catches a run that begins again, or goes on in slices for nobody's sake."""
    engine = make_engine(folder)
    tower = Tower(engine)
    add(engine, "text", max_tokens=2)
    engine.step()
    add(engine, "shown", [1])
    assert tokens_of(engine.step()).keys() == {"text"}  # its last
    assert tokens_of(engine.step()).keys() == {"shown"}
    assert (len(tower.sliced), len(tower.wholes)) == (1, 0)
    assert (engine.stats().tower_images, engine.stats().tower_slices) == (1, 1)
    assert finish(engine)["shown"] == alone(folder, "shown", [1])[1:]


def test_pictures_that_wait_at_the_same_time_go_through_together(folder: Path, family: str) -> None:
    """Catches a tower run per request, a limit that is not kept, and a picture run twice."""
    engine = with_a_running(folder, tower_patches=3 * PATCHES[family])
    tower = Tower(engine)
    shown = {"a": [1], "b": [2, 1], "c": [3, 4]}
    for name, pictures in shown.items():
        add(engine, name, pictures)
    found = finish(engine)
    assert [len(group) for group in tower.sliced] == [3, 1]
    assert engine.stats().tower_images == 4
    assert engine.stats().feature_hits == 0  # both first uses of picture 1 are in one step
    for name, pictures in shown.items():
        assert found[name] == alone(folder, name, pictures)


def test_a_text_that_comes_later_does_not_wait_for_the_tower(folder: Path) -> None:
    """Catches a queue that stands still behind a picture."""
    engine = with_a_running(folder)
    add(engine, "shown", [1])
    engine.step()
    add(engine, "later")
    assert tokens_of(engine.step()).keys() == {"text", "later"}
    finish(engine)


def test_a_picture_of_the_caches_is_not_waited_for(folder: Path) -> None:
    """Catches a wait for what is there, in the feature cache or as keys and values."""
    engine = make_engine(folder)
    add(engine, "shown", [1])
    finish(engine)
    add(engine, "text", max_tokens=20)
    engine.step()
    add(engine, "again", [1])
    assert tokens_of(engine.step()).keys() == {"text", "again"}
    assert (engine.stats().tower_images, engine.stats().feature_hits) == (1, 1)
    finish(engine)
    engine = make_engine(folder, feature_cache_bytes=0, block_size=8)
    add(engine, "shown", [1])
    finish(engine)
    add(engine, "text", max_tokens=20)
    engine.step()
    engine.add_request(replace(prepare(engine, "shown", [1]), request_id="again"))
    assert tokens_of(engine.step()).keys() == {"text", "again"}
    assert (engine.stats().tower_images, engine.stats().feature_hits) == (1, 0)
    finish(engine)


def test_pictures_larger_than_the_cache_together_do_not_push_each_other_out(folder: Path) -> None:
    """Catches two pictures of one prompt, each computed again whenever the other one is ready."""
    row_bytes = make_engine(folder).runner.model.embed(torch.zeros(1, dtype=torch.int64)).nbytes
    engine = make_engine(folder)
    tokens = prepare(engine, "x", [1]).images[0].num_tokens
    engine = with_a_running(folder, feature_cache_bytes=tokens * row_bytes, tower_patches=1)
    add(engine, "one", [1], max_tokens=1)
    while "one" not in tokens_of(engine.step()):
        pass
    add(engine, "two", [2, 1])
    assert finish(engine)["two"] == alone(folder, "two", [2, 1])
    assert engine.stats().tower_images == 2


def test_times_and_counts_are_those_of_the_tower(folder: Path) -> None:
    """Catches a request whose tower time is lost, or taken for its prefill."""
    engine = with_a_running(folder)
    add(engine, "a", [1])
    add(engine, "b", [1])
    last = {}
    while engine.has_work:
        last |= {output.request_id: output for output in engine.step() if output.timings}
    for name in "ab":
        assert last[name].timings.image_s == engine.stats().tower_s > 0
        assert last[name].timings.prefill_s > 0
    assert last["text"].timings.image_s == 0
    assert engine.stats().tower_images == 1


# --- what goes wrong -------------------------------------------------------------------------


@pytest.mark.parametrize("slices", [1, 2, 3])
def test_an_abort_takes_its_picture_out_of_the_tower(folder: Path, slices: int) -> None:
    """Catches a tower that goes on for nobody, and features that are kept for ever."""
    engine = with_a_running(folder, feature_cache_bytes=0)
    add(engine, "shown", [1])
    for _ in range(slices):
        engine.step()
    (output,) = engine.abort("shown")
    assert output.finish_reason == "abort"
    assert engine.vision.is_idle
    finish(engine)
    assert engine.stats().tower_slices == slices


def test_an_abort_leaves_a_picture_that_another_one_waits_for(folder: Path) -> None:
    """Catches a picture that begins again because the first who asked has gone."""
    engine = with_a_running(folder)
    tower = Tower(engine)
    add(engine, "a", [1])
    add(engine, "b", [1])
    engine.step()
    engine.abort("a")
    assert finish(engine)["b"] == alone(folder, "b", [1])
    assert len(tower.sliced) == engine.stats().tower_images == 1


def test_a_picture_that_fails_in_the_tower_fails_its_own_requests(folder: Path) -> None:
    """Catches an error that reaches the running rows, the pictures beside it, or nobody."""
    engine = with_a_running(folder)
    bad = prepare(engine, "bad", [99])
    stages = engine.runner.model.image_stages

    def failing(images: Sequence[ImageInput]) -> Any:
        yield
        if any(image.digest == bad.images[0].digest for image in images):
            raise MemoryError("no room for this picture")
        return (yield from stages(images))

    engine.runner.model.image_stages = failing  # type: ignore[method-assign]
    add(engine, "good", [1])
    engine.add_request(bad)
    add(engine, "both", [1, 99])
    add(engine, "also", [2])
    found: dict[str, list[int]] = {}
    errors = {}
    while engine.has_work:
        for output in engine.step():
            found.setdefault(output.request_id, []).extend(output.token_ids)
            if output.finish_reason == "error":
                errors[output.request_id] = output.error or ""
        engine.scheduler.pool.check()
    assert errors.keys() == {"bad", "both"}
    assert all("no room for this picture" in error for error in errors.values())
    assert found["good"] == alone(folder, "good", [1])
    assert found["also"] == alone(folder, "also", [2])
    assert len(found["text"]) == 39
    stats = engine.stats()
    assert (stats.failed_steps, stats.num_free_blocks) == (2, stats.num_blocks)
    assert engine.vision.is_idle


def test_features_that_are_not_finite_end_who_shows_them_and_nobody_else(folder: Path) -> None:
    """Catches NaN that is cached because it came out of a slice."""
    engine = with_a_running(folder)
    stages = engine.runner.model.image_stages

    def poisoned(images: Sequence[ImageInput]) -> Any:
        features = yield from stages(images)
        return [rows * float("nan") for rows in features]

    engine.runner.model.image_stages = poisoned  # type: ignore[method-assign]
    add(engine, "bad", [1])
    reasons = {}
    while engine.has_work:
        for output in engine.step():
            reasons |= {output.request_id: output.finish_reason} if output.finish_reason else {}
    assert reasons == {"text": "length", "bad": "error"}
    add(engine, "mended", [1])
    assert finish(engine)["mended"] == alone(folder, "mended", [1])


def test_a_step_repeated_without_drafts_runs_no_picture_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches features that are let go before the step stands, and their first use counted twice.

    A draft that is not finite makes the engine repeat the step in which the picture is first shown.
    """
    engine = with_a_running(folder, feature_cache_bytes=0, num_draft_tokens=2)
    tower = Tower(engine)
    add(engine, "shown", [1])
    wrong, embed, compute = 99, engine.runner.model.embed, engine.runner.run
    plans: list[StepPlan] = []

    def spoilt(token_ids: torch.Tensor) -> torch.Tensor:
        return embed(token_ids).masked_fill((token_ids == wrong)[:, None], float("nan"))

    def noted(plan: StepPlan) -> Any:
        plans.append(plan)
        return compute(plan)

    engine.runner.model.embed = spoilt  # type: ignore[method-assign]
    engine.runner.run = noted  # type: ignore[method-assign]
    monkeypatch.setattr(Drafter, "draft", lambda self, output_ids, count: (wrong,) * min(count, 1))
    found = finish(engine)
    assert found["shown"] == alone(folder, "shown", [1])
    assert found["text"] == alone(folder, "text", [], max_tokens=40)[1:]
    assert [len(plan.rows[-1].images) for plan in plans].count(1) == 2
    assert (len(tower.sliced), len(tower.wholes)) == (1, 0)
    stats = engine.stats()
    assert (stats.tower_images, stats.feature_hits, stats.drafted_tokens) == (1, 0, 0)


# --- any crowd -------------------------------------------------------------------------------


CROWD = st.lists(
    st.tuples(
        st.lists(st.integers(0, 3), max_size=2),  # its pictures
        st.integers(1, 9),  # tokens it wants
        st.integers(0, 12),  # step in which it comes
        st.sampled_from([None, None, None, 1, 4]),  # steps later it is aborted
    ),
    min_size=2,
    max_size=6,
)
OPTIONS = st.fixed_dictionaries(
    {
        "tower_slice_patches": st.sampled_from([1, 128, 512, 10**6]),
        "tower_patches": st.sampled_from([1, 512, 8192]),
        "feature_cache_bytes": st.sampled_from([0, 20_000, 2**20]),
        "enable_prefix_cache": st.booleans(),
        "max_num_batched_tokens": st.sampled_from([9, 64, 2048]),
        "max_num_seqs": st.sampled_from([2, 8]),
        "num_draft_tokens": st.sampled_from([0, 3]),
        "num_blocks": st.sampled_from([18, 64]),
        "block_size": st.sampled_from([8]),
    }
)
_answers: dict[tuple[Path, str, tuple[int, ...]], list[int]] = {}
_opened: dict[Path, Engine] = {}


@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(CROWD, OPTIONS)
def test_any_crowd_gets_what_each_request_gets_alone(
    folder: Path, crowd: list[Any], options: dict[str, Any]
) -> None:
    """Catches any effect of slices, waits, batches of pictures and aborts on an answer."""
    if folder not in _opened:
        _opened[folder] = make_engine(folder)
    config = EngineConfig(model=str(folder), **options)
    engine = Engine(_opened[folder].opened, config)
    found: dict[str, list[int]] = {}
    step = 0
    while engine.has_work or step <= 12:
        for number, (pictures, max_tokens, arrival, abort) in enumerate(crowd):
            if step == arrival:
                add(engine, f"r{number}", pictures, max_tokens=max_tokens)
            if abort is not None and step == arrival + abort:
                engine.abort(f"r{number}")
        for name, ids in tokens_of(engine.step()).items():
            found.setdefault(name, []).extend(ids)
        engine.scheduler.pool.check()
        step += 1
        assert step < 2000, "the engine goes round in circles"
    assert engine.vision.is_idle
    assert engine.stats().failed_steps == 0
    for number, (pictures, max_tokens, _, abort) in enumerate(crowd):
        key = folder, f"r{number}", tuple(pictures)
        if key not in _answers:
            _answers[key] = alone(folder, f"r{number}", pictures, max_tokens=9)
        got = found.get(f"r{number}", [])
        assert got == _answers[key][: len(got)]
        assert abort is not None or len(got) == max_tokens
