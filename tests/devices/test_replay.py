"""Recorded steps on the CPU: a stand-in for CUDA graphs runs the recorded function again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from conftest import run_greedy, step_row
from glimt.config import EngineConfig
from glimt.demo.noise import FAMILIES, write_noise_model
from glimt.devices.base import AttentionBatch, Device, KVCache, ModelStep
from glimt.devices.cpu import CpuDevice
from glimt.devices.replay import Inputs, Replay, ReplayedStep, Size, size_for
from glimt.engine import Engine
from glimt.evaluate.stages import watching
from glimt.layers.attention import cached_attention
from glimt.runner.batch import flatten
from glimt.types import SamplingParams, StepPlan

BLOCK_SIZE, NUM_BLOCKS, HEADS, DIM = 4, 40, 4, 8
SIZE = HEADS * DIM


class StandIn:
    """Records as a device would: what a replay computes lands where the first result lies."""

    def __init__(self) -> None:
        self.num_recorded = 0
        self.num_replayed = 0
        self.context_lens: list[int] = []

    def __call__(self, function: Callable[[], Tensor]) -> tuple[Tensor, Replay]:
        self.num_recorded += 1
        function()  # a device warms up first
        result = function()

        def replay(context_lens: Sequence[int]) -> None:
            self.num_replayed += 1
            self.context_lens = [*context_lens]
            result.copy_(function())

        return result, replay


class Layers:
    """Two layers of attention over a cache, with a rotation that needs the positions."""

    def __init__(self, kv_dtype: torch.dtype = torch.float32) -> None:
        self.device = Device()
        shape = (NUM_BLOCKS + 1, BLOCK_SIZE, HEADS, DIM)
        scales = torch.zeros(shape[:-1]) if kv_dtype == torch.int8 else None
        self.caches = [
            KVCache(*(torch.zeros(shape, dtype=kv_dtype) for _ in "kv"), scales, scales)
            for _ in range(2)
        ]
        if scales is not None:
            self.caches = [
                replace(c, key_scales=scales.clone(), value_scales=scales.clone())
                for c in self.caches
            ]
        generator = torch.Generator().manual_seed(0)
        self.weights = [torch.randn(SIZE, 3 * SIZE, generator=generator) for _ in self.caches]

    def __call__(self, hidden: Tensor, positions: Tensor, batch: AttentionBatch) -> Tensor:
        for weight, cache in zip(self.weights, self.caches, strict=True):
            mixed = (hidden @ weight / 6).unflatten(-1, (3, HEADS, DIM)) * positions[0].cos()[
                :, None, None, None
            ]
            hidden = cached_attention(self.device, *mixed.unbind(1), cache, batch) + hidden
        return hidden

    def same(self) -> Layers:
        """Others that hold the same."""
        twin = Layers()
        twin.caches = [
            KVCache(*(part.clone() for part in cache.tensors())) for cache in self.caches
        ]
        return twin


def step_of(starts: list[int], seed: int) -> tuple[Tensor, Tensor, AttentionBatch]:
    """A row per start, each with blocks of its own."""
    rows = tuple(
        step_row(start=start, block_table=tuple(range(i * 5, i * 5 + 5)))
        for i, start in enumerate(starts)
    )
    batch = flatten(StepPlan(rows), BLOCK_SIZE, torch.device("cpu"))
    hidden = torch.randn(len(rows), SIZE, generator=torch.Generator().manual_seed(seed))
    return hidden, batch.positions, batch.attention


def test_sizes_are_powers_of_two():
    """Would catch a recording for every number of rows, or one that is too small for its step."""
    assert [size_for(rows, 1) for rows in (1, 2, 3, 5, 64, 65)] == [
        Size(rows, 8) for rows in (1, 2, 4, 8, 64, 128)
    ]
    assert [size_for(1, blocks) for blocks in (8, 9, 255, 257)] == [
        Size(1, blocks) for blocks in (8, 16, 256, 512)
    ]
    assert size_for(256, 1) == Size(256, 8)
    assert size_for(257, 1) is None


@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.int8], ids=str)
def test_a_replayed_step_gives_the_steps_own_values(kv_dtype):
    """Would catch inputs of an earlier step, a padded row that is seen, and a wrong width."""
    layers = Layers(kv_dtype)
    twin = layers.same()
    record = StandIn()
    replayed = ReplayedStep(layers, record, layers.caches[0])
    steps = [[1, 9, 3], [2, 10, 4], [3, 11, 5, 1], [12], [4, 12], [5, 13, 6, 2, 7], [6, 14, 7]]
    for seed, starts in enumerate(steps):
        arguments = step_of(starts, seed)
        torch.testing.assert_close(
            replayed(*arguments), twin(*arguments), rtol=1e-5, atol=1e-6, msg=str(starts)
        )
    assert (record.num_recorded, record.num_replayed) == (4, 7)  # of 4, 1, 2 and 8 rows
    assert record.context_lens == [7, 15, 8, 1]


def test_rows_that_pad_write_the_scratch_block_alone():
    """Would catch a padding row in somebody's block, where a real token is or will be."""
    layers = Layers()
    twin = layers.same()
    for cache in (*layers.caches, *twin.caches):
        cache.key[NUM_BLOCKS] = cache.value[NUM_BLOCKS] = 7.0
    replayed = ReplayedStep(layers, StandIn(), layers.caches[0])
    for seed, starts in enumerate([[1, 9, 3, 2, 7], [6], [2, 10, 4]]):
        arguments = step_of(starts, seed)
        replayed(*arguments)
        twin(*arguments)
    for ours, theirs in zip(layers.caches, twin.caches, strict=True):
        for part, same in zip(ours.tensors(), theirs.tensors(), strict=True):
            torch.testing.assert_close(part[:NUM_BLOCKS], same[:NUM_BLOCKS])
            assert not part[NUM_BLOCKS, :3].any(), "padding rows are zeros"  # of 5 rows, 8 - 5
            assert (part[NUM_BLOCKS, 3:] == 7.0).all()
            assert (same[NUM_BLOCKS] == 7.0).all()


def test_what_an_earlier_step_left_in_padding_does_not_show():
    """Would catch NaN of a row that is gone, which the next step's padding would compute with."""
    layers = Layers()
    replayed = ReplayedStep(layers, StandIn(), layers.caches[0])
    hidden, positions, batch = step_of([1, 9, 3], 0)
    hidden[2] = float("nan")
    assert replayed(hidden, positions, batch).isnan().any(-1).tolist() == [False, False, True]
    recording = next(iter(replayed._recordings.values()))
    assert replayed(*step_of([1, 9, 2], 1))[2:].isnan().any(), "its cache holds NaN"
    assert replayed(*step_of([2, 10], 1)).isfinite().all()
    inputs = recording.inputs  # of four rows, one of which padded
    replayed(*step_of([2, 10, 4], 1))
    inputs.fill(*step_of([3, 11], 2))
    assert inputs.hidden[2:].tolist() == [[0.0] * SIZE] * 2
    assert inputs.decode_lens.tolist() == [4, 12, 1, 1]
    assert inputs.context_lens == [4, 12, 1, 1]
    assert inputs.slots.tolist() == [3, 31, 160, 161]
    assert inputs.block_tables.tolist() == [[0] * 8, [5, 6, 7] + [5] * 5, [40] * 8, [40] * 8]
    assert inputs.positions.tolist() == [[3, 11, 0, 0]]


def test_more_padding_rows_than_a_block_has_slots_stay_in_it():
    """Would catch a padding row in the block behind the scratch block, which is nobody's memory."""
    hidden, positions, batch = step_of([1], 0)
    many = replace(
        batch,
        context_lens=(2,) * 17,
        slots=batch.slots.repeat(17),
        block_tables=batch.block_tables.repeat(17, 1),
        decode_lens=batch.decode_lens.repeat(17),
    )
    inputs = Inputs.empty(Size(32, 8), hidden, positions, BLOCK_SIZE, NUM_BLOCKS)
    inputs.fill(hidden.repeat(17, 1), positions.repeat(1, 17), many)
    assert inputs.slots[17:].tolist() == [160, 161, 162, 163] * 3 + [160, 161, 162]


def test_a_step_of_too_many_rows_is_run_as_it_is():
    """Would catch a recording for a size that is used once."""
    record = StandIn()
    layers = Layers()
    replayed = ReplayedStep(layers, record, layers.caches[0])
    hidden, positions, batch = step_of([1], 0)
    many = replace(
        batch,
        num_decodes=257,
        query_starts=tuple(range(258)),
        context_lens=batch.context_lens * 257,
        num_shared=(0,) * 257,
        slots=batch.slots.repeat(257),
        block_tables=batch.block_tables.repeat(257, 1),
        decode_lens=batch.decode_lens.repeat(257),
        masks={},
    )
    result = replayed(hidden.repeat(257, 1), positions.repeat(1, 257), many)
    assert (result.shape, record.num_recorded) == ((257, SIZE), 0)


def test_a_device_that_cannot_record_is_asked_once(caplog):
    """Would catch a step that fails because it cannot be recorded, or one warning per token."""
    asked: list[int] = []

    def refuse(function: Callable[[], Tensor]) -> tuple[Tensor, Replay]:
        asked.append(1)
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    layers = Layers()
    twin = layers.same()
    replayed = ReplayedStep(layers, refuse, layers.caches[0])
    for seed, starts in enumerate([[1, 9], [2, 10, 3]]):
        arguments = step_of(starts, seed)
        torch.testing.assert_close(replayed(*arguments), twin(*arguments))
    assert asked == [1]
    assert [record.getMessage() for record in caplog.records] == [
        "decoding steps cannot be recorded and run one by one: "
        "operation not permitted when stream is capturing"
    ]


def test_what_was_recorded_before_a_failure_is_still_replayed():
    """Would catch recordings that keep their memory, and are of no use any more."""
    layers = Layers()
    twin = layers.same()
    record = StandIn()

    def twice(function: Callable[[], Tensor]) -> tuple[Tensor, Replay]:
        if record.num_recorded == 2:
            raise RuntimeError("out of memory")
        return record(function)

    replayed = ReplayedStep(layers, twice, layers.caches[0])
    for seed, starts in enumerate([[1], [2, 9], [3, 10, 4], [4], [5, 11], [6, 12, 5]]):
        arguments = step_of(starts, seed)
        torch.testing.assert_close(
            replayed(*arguments), twin(*arguments), rtol=1e-5, atol=1e-6, msg=str(starts)
        )
    assert (record.num_recorded, record.num_replayed) == (2, 4)


OUT_OF_MEMORY = "CUDA out of memory. Tried to allocate 2.00 GiB"


def end_of_memory() -> None:
    raise torch.OutOfMemoryError(OUT_OF_MEMORY)


def end_that_fails_too() -> None:
    """As of a recording that is ended after the lack of memory, which is then what is raised."""
    try:
        end_of_memory()
    finally:
        raise RuntimeError("operation failed due to a previous error during capture")


@pytest.mark.parametrize("fail", [end_of_memory, end_that_fails_too])
def test_without_memory_for_one_size_smaller_ones_are_recorded(caplog, fail):
    """Would catch a card that is slow in small batches since a large one came once, and a warning
    for each size.
    """
    layers = Layers()
    twin = layers.same()
    record = StandIn()
    asked: list[int] = []

    def scarce(function: Callable[[], Tensor]) -> tuple[Tensor, Replay]:
        asked.append(len(inputs[0]))
        if len(inputs[0]) > 2:
            fail()
        return record(function)

    replayed = ReplayedStep(layers, scarce, layers.caches[0])
    starts = [[1, 9, 3], [2, 10, 4, 5], [1, 2, 3, 4, 5], [3], [4, 11], [4], [5, 12], [3, 11, 5]]
    for seed, each in enumerate(starts):
        inputs = step_of(each, seed)
        torch.testing.assert_close(replayed(*inputs), twin(*inputs), rtol=1e-5, atol=1e-6)
    assert asked == [3, 1, 2], "sizes of 4 and 8 rows are not asked for again"
    assert (record.num_recorded, record.num_replayed) == (2, 4)
    (said,) = [one.getMessage() for one in caplog.records if one.levelname == "WARNING"]
    assert said.startswith(
        "no memory to record decoding steps of 4 rows and 8 blocks; such ones, and larger ones, "
        "run one by one: "
    )


def test_a_lack_of_memory_that_spreads_is_told_once(caplog):
    """Would catch a warning for each smaller size, and a size that is tried at every step."""
    layers = Layers()
    asked: list[int] = []

    def empty(function: Callable[[], Tensor]) -> tuple[Tensor, Replay]:
        asked.append(1)
        end_of_memory()
        raise AssertionError

    replayed = ReplayedStep(layers, empty, layers.caches[0])
    for seed, starts in enumerate([[1, 2, 3], [1, 2], [1], [2, 3], [4], [1, 2, 3, 4]]):
        replayed(*step_of(starts, seed))
    assert len(asked) == 3
    assert len([one for one in caplog.records if one.levelname == "WARNING"]) == 1


def test_a_size_is_larger_if_it_is_so_in_both():
    """Would catch few rows of a long context that are never recorded after many of a short one."""
    large = Size(8, 16)
    assert [Size(8, 16), Size(16, 32), Size(8, 32)] == [
        size
        for size in (Size(8, 16), Size(16, 32), Size(8, 32), Size(4, 32), Size(16, 8), Size(4, 8))
        if size.is_at_least(large)
    ]


# --- in an engine ----------------------------------------------------------------------------


class RecordingCpu(CpuDevice):
    """The CPU, with the stand-in's recordings."""

    num_scratch_blocks = 1

    def __init__(self) -> None:
        super().__init__()
        self.record = StandIn()

    def recorded(self, step: ModelStep, cache: KVCache) -> ModelStep:
        return ReplayedStep(step, self.record, cache)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_engine_that_replays_says_what_it_says_without(family, tmp_path, monkeypatch):
    """Would catch a decode that bypasses the recordings, or a prompt that goes through them."""
    write_noise_model(tmp_path, family)
    config = EngineConfig(model=str(tmp_path), dtype="float32", kv_bytes=2**20, block_size=4)

    def answers(device: Device) -> tuple[list[list[int]], int]:
        monkeypatch.setattr("glimt.loader.open_device", lambda *rest: device)
        engine = Engine.load(config)
        texts = ("hello", "a longer text that fills blocks")
        sampling = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
        found = [run_greedy(engine, engine.prepare_text(text, replace(sampling))) for text in texts]
        return found, len(engine.runner.caches[0].key) - engine.scheduler.pool.num_blocks

    recording = RecordingCpu()
    plain, none = answers(CpuDevice())
    replayed, one = answers(recording)
    assert replayed == plain
    assert [len(tokens) for tokens in plain] == [12, 12]
    assert (none, one) == (0, 1)
    assert recording.record.num_replayed == 22  # all tokens but each answer's first


def test_a_watched_model_is_not_replayed(tmp_path, monkeypatch):
    """Would catch `glimt precision` that compares nothing: a recording calls no hook."""
    write_noise_model(tmp_path, "glm4v_9b")
    recording = RecordingCpu()
    monkeypatch.setattr("glimt.loader.open_device", lambda *rest: recording)
    config = EngineConfig(model=str(tmp_path), dtype="float32", kv_bytes=2**20)
    engine = Engine.load(config)
    request = engine.prepare_text("hello", SamplingParams(temperature=0, max_tokens=4))
    prompt_tokens = len(request.prompt.token_ids)
    with watching(engine.opened.model) as rows:
        tokens = run_greedy(engine, request)
    assert recording.record.num_recorded == 0
    assert len(rows["blocks.1"]) == prompt_tokens + len(tokens) - 1
    run_greedy(engine, engine.prepare_text("again", SamplingParams(temperature=0, max_tokens=4)))
    assert recording.record.num_recorded == 1
