"""Recorded decoding steps on Atlas A2, over a stand-in whose graphs really record and replay."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from attention_steps import normal
from conftest import step_row
from glimt.devices.base import AttentionBatch, Device, KVCache, ModelStep
from glimt.devices.npu import Npu
from glimt.devices.npu_a2 import AtlasA2
from glimt.devices.npu_graphs import GraphRecorder, why_no_graphs
from glimt.devices.replay import ReplayedStep
from glimt.errors import ConfigError
from glimt.layers.attention import cached_attention
from glimt.quant.base import all_formats
from glimt.runner.batch import flatten
from glimt.types import StepPlan
from npu_operators import ContractBroken
from npu_stand_in import VERSIONS, Contract, contract

HEADS, DIM, BLOCK_SIZE, NUM_BLOCKS = 2, 128, 128, 12
SIZE = HEADS * DIM
# float32 on an exact chip; a product of more rows is summed in another order.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture
def a2() -> Iterator[Contract]:
    with contract("a2", is_exact=True) as opened:
        yield opened


# --- what the stand-in's graphs hold ---------------------------------------------------------


class Attending:
    """One recorded call of the fused attention, over three tokens in a cache of random values."""

    def __init__(self, opened: Contract, **options: Any) -> None:
        self.npu = opened.module.npu
        self.fused = opened.module.npu_fused_infer_attention_score
        self.query, self.cache = normal(1, HEADS, DIM), normal(2, BLOCK_SIZE, SIZE, seed=1)
        self.table = torch.ones(1, 1, dtype=torch.int32)
        self.graph = self.npu.NPUGraph()
        with self.npu.graph(self.graph, **options):
            self.doubled = self.query * 2
            self.result = self.attended(self.doubled, 3)

    def attended(self, query: Tensor, length: int) -> Tensor:
        cache = self.cache, self.cache
        lengths = {"actual_seq_lengths": [1], "actual_seq_lengths_kv": [length]}
        given = {"block_table": self.table, "block_size": BLOCK_SIZE, "num_heads": HEADS,
                 "num_key_value_heads": HEADS, "scale": 0.5, "input_layout": "TND",
                 "sparse_mode": 0}  # fmt: skip
        return self.fused(query, *cache, **lengths, **given)[0]

    def expected(self, length: int) -> Tensor:
        return self.attended(self.query * 2, length)


def test_a_recording_computes_nothing_that_is_seen(a2: Contract) -> None:
    """Catches a device that uses what a recording returns before it is replayed."""
    npu, kept = a2.module.npu, torch.zeros(2)
    with npu.graph(npu.NPUGraph()):
        kept.add_(1)
        made = kept + 1
    assert kept.tolist() == [0, 0]
    assert made.isnan().all()


def test_a_replay_computes_from_the_same_places_into_the_same_places(a2: Contract) -> None:
    """Catches a stand-in that runs Python again, or gives other memory than the first time."""
    one = Attending(a2, auto_dispatch_capture=True)
    place = one.result.data_ptr()
    for seed, length in ((5, 3), (6, 100)):
        one.query.copy_(normal(1, HEADS, DIM, seed=seed))
        one.graph.update(cpu_update_input=[{"actual_seq_lengths_kv": [length]}])
        one.graph.replay()
        assert torch.equal(one.result, one.expected(length))
    assert one.result.data_ptr() == place


def test_lengths_are_those_of_the_last_update(a2: Contract) -> None:
    """Catches an update that is forgotten: on an NPU the old lengths, or a wait for ever."""
    fixed = Attending(a2)
    fixed.graph.replay()
    assert torch.equal(fixed.result, fixed.expected(3))
    with pytest.raises(RuntimeError, match="needs auto_dispatch_capture"):
        fixed.graph.update(cpu_update_input=[{"actual_seq_lengths_kv": [4]}])
    fed = Attending(a2, auto_dispatch_capture=True)
    for _ in "ab":
        with pytest.raises(ContractBroken, match="waits for one for ever"):
            fed.graph.replay()
        fed.graph.update(cpu_update_input=[{"actual_seq_lengths_kv": [4]}])
        fed.graph.replay()
        assert torch.equal(fed.result, fed.expected(4))


def test_an_update_names_what_every_call_has(a2: Contract) -> None:
    """Catches lengths that reach no call, which an NPU does not say."""
    graph = Attending(a2, auto_dispatch_capture=True).graph
    for wrong in ({"actual_seq_kvlen": [4]}, {"actual_seq_lengths_kv": [4, 5]}):
        with pytest.raises(ContractBroken):
            graph.update(cpu_update_input=[wrong])
    with pytest.raises(RuntimeError, match="1 calls, but 2 entries"):
        graph.update(cpu_update_input=[{}, {}])
    with pytest.raises(TypeError):
        graph.update(cpu_input=[{}])
    with pytest.raises(TypeError):
        a2.module.npu.graph(graph, capture_mode="relaxed")


def scattered(opened: Contract) -> None:
    new, cache = normal(1, HEADS, DIM), torch.zeros(2, BLOCK_SIZE, HEADS, DIM)
    slots = torch.zeros(1, dtype=torch.int32)
    opened.module._npu_reshape_and_cache(new, new, cache, cache.clone(), slots)


REFUSED: dict[str, Callable[[Contract, Tensor], Any]] = {
    "a number of the device": lambda opened, x: x[0].item(),
    "a truth of the device": lambda opened, x: bool(x[0] > 0),
    "a list of the device": lambda opened, x: x.tolist(),
    "a copy to the host": lambda opened, x: x.cpu(),
    "a copy from the host": lambda opened, x: torch.tensor([1.0], device=x.device),
    "places where something holds": lambda opened, x: x.nonzero(),
    "an index by truth": lambda opened, x: x[x > 0],
    "an operator of ATB": lambda opened, x: scattered(opened),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_graph_cannot_hold_ends_its_recording(a2: Contract, name: str) -> None:
    """Catches a stand-in that records what an NPU refuses; and the same call is legal outside."""
    x, npu = torch.ones(2), a2.module.npu
    REFUSED[name](a2, x)
    graph = npu.NPUGraph()
    with torch.inference_mode(), pytest.raises(RuntimeError, match="captured"):  # noqa: SIM117
        with npu.graph(graph):
            REFUSED[name](a2, x)
    with pytest.raises(ContractBroken, match="nothing was recorded"):
        graph.replay()


def test_memory_that_was_given_back_is_not_read(a2: Contract) -> None:
    """Catches a tensor from before the recording that nobody keeps for its replays."""
    npu, passing = a2.module.npu, torch.ones(2)
    graph = npu.NPUGraph()
    with npu.graph(graph):
        kept = passing.view(1, 2) + 1
    graph.replay()
    assert kept.tolist() == [[2, 2]]
    del passing
    with pytest.raises(ContractBroken, match="was given back"):
        graph.replay()


# --- the device's recordings -----------------------------------------------------------------


class Layers:
    """Rotation, then attention over a cache, twice; the cache ends with the scratch block."""

    def __init__(self, device: Device, kv_dtype: torch.dtype = torch.float32) -> None:
        self.device = device
        shape = (NUM_BLOCKS + 1, BLOCK_SIZE, HEADS, DIM)
        self.caches = [KVCache(normal(*shape), normal(*shape, seed=1)) for _ in "ab"]
        self.weights = [normal(SIZE, 3 * SIZE, seed=seed) / SIZE**0.5 for seed in (2, 3)]
        self.angles = normal(4 * BLOCK_SIZE, DIM // 2, seed=4)

    @torch.inference_mode()
    def __call__(self, hidden: Tensor, positions: Tensor, batch: AttentionBatch) -> Tensor:
        angle = self.angles[positions[0]]
        cos, sin = angle.cos(), angle.sin()
        for weight, cache in zip(self.weights, self.caches, strict=True):
            mixed = (hidden @ weight).unflatten(-1, (3, HEADS, DIM))
            query, key = (
                self.device.rotate(x, cos, sin, "interleaved", 1) for x in mixed.unbind(1)[:2]
            )
            hidden = hidden + cached_attention(self.device, query, key, mixed[:, 2], cache, batch)
        return hidden


def step_of(starts: list[int], seed: int) -> tuple[Tensor, Tensor, AttentionBatch]:
    """A row per start, each with three blocks of its own."""
    rows = tuple(
        step_row(start=start, block_table=tuple(range(i * 3, i * 3 + start // BLOCK_SIZE + 1)))
        for i, start in enumerate(starts)
    )
    batch = flatten(StepPlan(rows), BLOCK_SIZE, torch.device("cpu"))
    return normal(len(rows), SIZE, seed=seed), batch.positions, batch.attention


# Rows cross a block's edge, come and go; the third step is run as it is in between.
STEPS = [[126, 255, 3], [127, 256, 4], [128, 257, 5, 1], [129], [130, 258], [131, 259, 6]]


def check_alike(replayed: ModelStep, twin: ModelStep, steps: list[list[int]]) -> None:
    """Run steps both ways; each must give what the twin gives."""
    for seed, starts in enumerate(steps):
        arguments = step_of(starts, seed)
        torch.testing.assert_close(replayed(*arguments), twin(*arguments), **CLOSE)


def test_replayed_steps_give_the_steps_own_values(a2: Contract) -> None:
    """Catches slots, tables or rotations that were made before a recording, or in another one.

    What is run without a recording in between must not have them either.
    """
    device = a2.device(records=True)
    layers, twin = Layers(device), Layers(Device())
    replayed = device.recorded(layers, layers.caches[0])
    for seed, starts in enumerate(STEPS):
        arguments = step_of(starts, seed)
        step = layers if seed == 2 else replayed
        with a2.watching():
            result = step(*arguments)
        torch.testing.assert_close(result, twin(*arguments), msg=str(starts), **CLOSE)
    assert [graph.num_replayed for graph in a2.module.graphs.made] == [3, 1, 1]  # 4, 1, 2 rows
    for ours, theirs in zip(layers.caches, twin.caches, strict=True):
        torch.testing.assert_close(ours.key[:-1], theirs.key[:-1], **CLOSE)
        torch.testing.assert_close(ours.value[:-1], theirs.value[:-1], **CLOSE)


def test_a_replay_launches_nothing_by_itself(a2: Contract) -> None:
    """Catches a recording of every step, and Python that runs beside the replay."""
    device = a2.device(records=True)
    layers = Layers(device)
    replayed = device.recorded(layers, layers.caches[0])
    first, second = step_of([5, 9], 0), step_of([6, 10], 1)
    replayed(*first)
    with a2.watching() as log:
        replayed(*second)
    assert log.fused == set()
    # The inputs are moved to where the graph reads them.
    moves = {"aten.copy_", "aten.fill_", "aten.lift_fresh"}
    views = {"aten.slice", "aten.view", "aten.permute", "aten.numpy_T", "aten.expand"}
    assert log.plain <= moves | views
    assert log.syncs == {}


@pytest.mark.parametrize("name", ["int8", "w8a8", "int4-a16", "int4-asym", "int4"])
def test_products_in_few_bits_are_recorded(name: str) -> None:
    """Catches a product that brings something from the host, or to it, each time."""
    with contract("a2") as opened, torch.inference_mode():
        device = opened.device()
        weight = all_formats()[name].quantise(normal(48, 160) / 12)
        held = device.prepare_weight(weight, torch.float16)
        x, bias = normal(3, 160, seed=1).half(), normal(48, seed=2).half()
        recorder = GraphRecorder(opened.module, device.torch_device, device.forget)
        result, replay = recorder(lambda: device.linear(x, held, bias))
        x.copy_(normal(3, 160, seed=3))
        replay([])
        assert torch.equal(result, device.linear(x, held, bias))


def test_recordings_share_their_memory(a2: Contract) -> None:
    """Catches a pool for each size, which adds up."""
    device = a2.device(records=True)
    layers = Layers(device)
    replayed = device.recorded(layers, layers.caches[0])
    for starts in ([5], [6, 9]):
        replayed(*step_of(starts, 0))
    first, second = a2.module.graphs.made
    assert first.pool() is second.pool()


def test_a_recording_that_fails_leaves_nothing_behind(
    a2: Contract, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a stream that stays the recording's own, and calls that are taken for its own."""
    device = a2.device(records=True)
    layers, twin = Layers(device), Layers(Device())

    def step(hidden: Tensor, positions: Tensor, batch: AttentionBatch) -> Tensor:
        result = layers(hidden, positions, batch)
        assert float(result.sum()) == float(result.sum())  # brings a number to the host
        return result

    replayed = device.recorded(step, layers.caches[0])
    check_alike(replayed, twin, STEPS)
    graphs = a2.module.graphs
    assert (len(graphs.made), graphs.current is graphs.default) == (1, True)
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith(
        "decoding steps cannot be recorded and run one by one: __float__ is not permitted"
    )


def test_a_recording_without_memory_leaves_smaller_ones_to_be_made(
    a2: Contract, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a lack of memory that cannot be told from what no graph can hold."""
    device = a2.device(records=True)
    layers, twin = Layers(device), Layers(Device())

    def step(hidden: Tensor, positions: Tensor, batch: AttentionBatch) -> Tensor:
        if a2.module.graphs.recording is not None and len(hidden) > 1:
            raise torch.OutOfMemoryError("NPU out of memory. Tried to allocate 2.00 GiB")
        return layers(hidden, positions, batch)

    replayed = device.recorded(step, layers.caches[0])
    check_alike(replayed, twin, [[5, 9], [6], [7], [6, 10]])
    assert {size.rows for size in replayed._recordings} == {1}
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("no memory to record decoding steps of 2 rows and 8 blocks")
    assert said.endswith("NPU out of memory. Tried to allocate 2.00 GiB")


def test_only_what_records_has_a_scratch_block(a2: Contract) -> None:
    """Catches a block of memory that nobody uses, or padding rows in somebody's block."""
    assert isinstance(a2.device(records=True), AtlasA2)
    assert [a2.device(records=records).num_scratch_blocks for records in (True, False)] == [1, 0]
    step = Layers(Device())
    assert a2.device().recorded(step, step.caches[0]) is step
    recorded = a2.device(records=True).recorded(step, step.caches[0])
    assert isinstance(recorded, ReplayedStep)


# --- the switch ------------------------------------------------------------------------------


def opened_by(setting: str, opened: Contract, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setitem(sys.modules, "torch_npu", opened.module)
    monkeypatch.setenv("GLIMT_NPU_GRAPHS", setting)
    made: list[Any] = []
    for name in ("AtlasA2", "Atlas310P"):
        record = lambda *given, **options: made.append(options)  # noqa: E731
        monkeypatch.setattr(f"glimt.devices.npu.{name}", record)
    Npu.open()
    return made[0].get("records")


def test_nothing_is_recorded_unless_it_is_asked_for(
    a2: Contract, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a default that no hardware has seen, and a typing error that is taken for yes."""
    asked = [opened_by(setting, a2, monkeypatch) for setting in ("", "0", "1")]
    assert asked == [False, False, True]
    with pytest.raises(ConfigError, match="GLIMT_NPU_GRAPHS: 'yes' is unknown; 1 records"):
        opened_by("yes", a2, monkeypatch)
    monkeypatch.setattr("glimt.devices.npu.unavailable_reason", lambda: "no NPU")
    assert [said for said, _ in Npu.missing()] == [
        "GLIMT_NPU_GRAPHS: 'yes' is unknown; 1 records decoding steps, 0 does not"
    ]


@pytest.mark.parametrize(
    ("kind", "version", "said"),
    [
        ("310p", "26.1.0", "only Atlas A2 and A3 record"),
        ("a2", "7.3.0", "writes the cache by ATB, which a graph cannot hold; install one of"),
    ],
)
def test_what_cannot_record_says_so(
    kind: str, version: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a switch that does nothing in silence, and a doctor that does not see it."""
    with contract(kind, version) as opened:
        with pytest.raises(ConfigError, match=f"GLIMT_NPU_GRAPHS: .*{said}"):
            opened_by("1", opened, monkeypatch)
        monkeypatch.setattr("glimt.devices.npu.unavailable_reason", lambda: None)
        ((what, advice),) = Npu.missing()
        assert said.partition(";")[0] in what
        assert "unset GLIMT_NPU_GRAPHS" in advice
        monkeypatch.setenv("GLIMT_NPU_GRAPHS", "0")
        assert Npu.missing() == ()


def test_lengths_must_be_updatable(a2: Contract, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a torch-npu of before auto_dispatch_capture, whose graphs keep their lengths."""
    assert why_no_graphs(a2.module) is None
    graph = a2.module.npu.graph

    def older(npu_graph: Any, pool: Any = None, stream: Any = None) -> Any:
        return graph(npu_graph, pool, stream)

    for changed in (older, None):
        monkeypatch.setattr(a2.module.npu, "graph", changed)
        said, _ = why_no_graphs(a2.module) or ("", "")
        assert "has no auto_dispatch_capture" in said


def test_a_version_that_writes_by_atb_runs_its_steps_one_by_one(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Catches an answer that ends by an error where a recording was tried all the same."""
    assert "7.3.0" in VERSIONS
    with contract("a2", "7.3.0", is_exact=True) as old:
        device = old.device(records=True)
        layers, twin = Layers(device), Layers(Device())
        replayed = device.recorded(layers, layers.caches[0])
        check_alike(replayed, twin, STEPS[:2])
    (said,) = [record.getMessage() for record in caplog.records]
    assert "one by one: atb._npu_reshape_and_cache, an operator of ATB, is not permitted" in said
