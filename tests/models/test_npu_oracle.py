"""Both families on Ascend devices, over a stand-in for torch_npu, against the originals' outputs.

The stand-in's operators check the documented limits of each chip, so whatever runs here is a legal
call. What an NPU makes of such a call (its own sums, speed, saturation) nothing here can show.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from conftest import Oracle, run_greedy
from divided import divided_engine
from glimt.devices.npu import Npu
from glimt.devices.replay import ReplayedStep
from glimt.engine import Engine
from glimt.parallel import ALONE, Group
from glimt.types import Request
from npu_graphs import NPUGraph
from npu_stand_in import Contract, Log, contract
from ranks import on_ranks

VALUES = 5e-5  # of logits in float32, whose sums are taken in another order
COSINE = 0.9995  # of logits in 16 bits with those in float32, as for the CPU's kernels

# What the devices leave to torch, by what an NPU does with it. Anything else is a new fallback.
PRODUCTS = {"aten.linear"}
ROWS = {"aten.layer_norm", "aten.add", "aten.mul", "aten.div", "aten.silu", "aten.embedding"}
PLACES = {"aten.index", "aten.index_select", "aten.index_copy_", "aten.index_fill_"}
LAYOUT = {"aten.pad", "aten.cat", "aten.stack", "aten.copy_", "aten.to", "aten._to_copy",
          "aten.contiguous", "aten.clone", "aten.repeat", "aten.repeat_interleave"}  # fmt: skip
VIEWS = {"aten.alias", "aten.detach", "aten.detach_", "aten.chunk", "aten.expand", "aten.flatten",
         "aten.movedim", "aten.numpy_T", "aten.permute", "aten.reshape", "aten.select",
         "aten.slice", "aten.split",
         "aten.split_with_sizes", "aten.transpose", "aten.unbind", "aten.unflatten",
         "aten.unsqueeze", "aten.view"}  # fmt: skip
MADE = {"aten.arange", "aten.empty", "aten.empty_like", "aten.full", "aten.lift_fresh",
        "aten.new_zeros", "aten.triu_"}  # fmt: skip
HOST = {"aten.sub"}  # of pictures' pixels, before they go to the device
ALLOWED = PRODUCTS | ROWS | PLACES | LAYOUT | VIEWS | MADE | HOST

FUSED = {
    ("a2", "glm4v_9b"): {
        "npu_rms_norm", "npu_add_rms_norm", "npu_rotary_mul", "npu_fused_infer_attention_score",
        "npu_scatter_pa_kv_cache", "npu_swiglu", "npu_gelu",
    },
    ("a2", "visualglm"): {
        "npu_rotary_mul", "npu_fused_infer_attention_score", "npu_scatter_pa_kv_cache", "npu_gelu",
    },
    ("310p", "glm4v_9b"): {
        "npu_rms_norm", "npu_apply_rotary_pos_emb", "_npu_reshape_and_cache",
        "_npu_paged_attention", "_npu_flash_attention", "_npu_flash_attention_unpad", "npu_gelu",
        "npu_format_cast",
    },
    ("310p", "visualglm"): {
        "npu_apply_rotary_pos_emb", "_npu_reshape_and_cache", "_npu_paged_attention",
        "_npu_flash_attention_unpad", "npu_prompt_flash_attention", "npu_gelu",
    },
}  # fmt: skip


@pytest.fixture(params=["glm4v_wide", "visualglm_wide"])
def wide(request: pytest.FixtureRequest) -> Oracle:
    """The small models whose head sizes are the real ones: 128, 112, 88 and 64."""
    return request.getfixturevalue(f"{request.param}_oracle")


@pytest.fixture(params=["a2", "310p"])
def exact(request: pytest.FixtureRequest) -> Iterator[Contract]:
    """A chip whose operators also take float32, so that values can be compared."""
    with contract(request.param, is_exact=True) as opened:
        yield opened


def run_case(oracle: Oracle, case: str, opened: Contract, group: Group, count: int) -> Any:
    """Greedy tokens and the last logits of one rank, over a cache that was full of NaN."""
    kept: list[torch.Tensor] = []
    with opened.watching():
        engine = divided_engine(oracle, group, opened.device(), enable_prefix_cache=False)
    model = engine.runner.model
    model.register_forward_hook(lambda module, args, out: kept.append(out))
    for tensor in (tensor for cache in engine.runner.caches for tensor in cache.tensors()):
        tensor.fill_(torch.nan)
    with opened.watching():
        ids = run_greedy(engine, oracle.request(case, max_tokens=count))
        with torch.inference_mode():
            first = model.logits(kept[0])[-1, oracle.arrays["picked_token_ids"]]
        return ids, first.float().numpy()


def test_an_npu_gives_the_originals_tokens_and_logits(wide: Oracle, exact: Contract) -> None:
    """Catches every wrong place, mask, pair and padding of an op set, with a picture and without.

    The first case fills all of its 24 tokens; of the other a few show that no picture is needed.
    """
    for case, count in zip(wide.cases, (24, 4), strict=True):
        ids, logits = run_case(wide, case, exact, ALONE, count)
        assert ids == wide.arrays[f"{case}.greedy_24"][:count].tolist()
        expected = wide.arrays[f"{case}.logits_last_picked"]
        np.testing.assert_allclose(logits, expected, atol=VALUES, rtol=0)


def test_two_npus_give_them_together(wide: Oracle, exact: Contract) -> None:
    """Catches heads and tiles that are divided otherwise than the operators are told."""
    case = wide.cases[0]
    for ids, logits in on_ranks(2, lambda group: run_case(wide, case, exact, group, 6)):
        assert ids == wide.arrays[f"{case}.greedy_24"][:6].tolist()
        expected = wide.arrays[f"{case}.logits_last_picked"]
        np.testing.assert_allclose(logits, expected, atol=VALUES, rtol=0)


def one_step(oracle: Oracle, opened: Contract, dtype: torch.dtype, **options: Any) -> Engine:
    """An engine in 16 bits, by the limits of the chip itself."""
    device = opened.device(**options)
    return divided_engine(oracle, ALONE, device, dtype, enable_prefix_cache=False)


@pytest.mark.parametrize(
    ("chip", "dtype", "options", "version"),
    [
        ("a2", torch.bfloat16, {}, "26.1.0"),
        ("a2", torch.float16, {"casts_weights": True}, "26.0.0"),
        ("a2", torch.float16, {}, "7.3.0"),
        ("310p", torch.float16, {}, "26.1.0"),
        ("310p", torch.float16, {}, "7.3.0"),
    ],
    ids=["a2-bfloat16", "a2-tiles-26.0.0", "a2-7.3.0", "310p", "310p-7.3.0"],
)
def test_16_bits_stay_close_to_float32(
    wide: Oracle, chip: str, dtype: torch.dtype, options: dict[str, Any], version: str
) -> None:
    """Catches a dtype that an operator of a version or chip does not take, and padding that leaks.

    Also which operators run, what is left to torch, and that nothing waits for the device.
    """
    case, logits = wide.cases[0], []
    with contract(chip, version) as opened, opened.watching():
        engine = one_step(wide, opened, dtype, **options)
        forward = Watched(engine, opened)
        engine.add_request(wide.request(case, max_tokens=3))
        while engine.has_work:
            engine.step()
        with torch.inference_mode():
            picked = wide.arrays["picked_token_ids"]
            logits = engine.runner.model.logits(forward.hidden[0])[-1, picked].float().numpy()
    expected = wide.arrays[f"{case}.logits_last_picked"]
    cosine = logits @ expected / np.linalg.norm(logits) / np.linalg.norm(expected)
    assert cosine >= COSINE
    forward.check(chip, wide.family.name, version)


class Watched:
    """Logs what a model's two parts, tower and language model, ask of the device."""

    def __init__(self, engine: Engine, opened: Contract) -> None:
        self.hidden: list[torch.Tensor] = []
        self.logs: list[Log] = []
        self.opened = opened
        model: Any = engine.runner.model
        self._forward, self._features = model.forward, model.image_features
        model.forward = self.forward
        model.image_features = self.image_features

    def forward(self, *args: Any) -> torch.Tensor:
        with self.opened.watching() as log:
            self.hidden.append(self._forward(*args))
        self.logs.append(log)
        return self.hidden[-1]

    def image_features(self, images: Any) -> Any:
        with self.opened.watching() as log:
            features = self._features(images)
        self.logs.append(log)
        return features

    def check(self, chip: str, family: str, version: str) -> None:
        assert len(self.logs) == 4, "a tower, a prompt and two decodes"
        assert [log.syncs for log in self.logs] == [{}] * 4
        plain = set().union(*(log.plain for log in self.logs))
        assert plain <= ALLOWED, f"a new fallback: {sorted(plain - ALLOWED)}"
        used = set().union(*(log.fused for log in self.logs))
        expected = set(FUSED[chip, family])
        if (chip, version) == ("a2", "7.3.0"):
            expected ^= {"npu_scatter_pa_kv_cache", "_npu_reshape_and_cache"}
        assert used == expected


# --- recorded decodes ------------------------------------------------------------------------


class Recorded:
    """An engine on A2, recording or not, whose caches were full of NaN. logits: of each step."""

    def __init__(
        self,
        oracle: Oracle,
        opened: Contract,
        records: bool,
        dtype: torch.dtype = torch.float32,
        kv_dtype: str = "auto",
        **options: Any,
    ) -> None:
        self.opened = opened
        self.first_graph = len(opened.module.graphs.made)
        settings = {"enable_prefix_cache": False, "num_blocks": 16, "kv_dtype": kv_dtype}
        with opened.watching():
            device = opened.device(records=records, **options)
            self.engine = divided_engine(oracle, ALONE, device, dtype, **settings)
        for tensor in (tensor for cache in self.engine.runner.caches for tensor in cache.tensors()):
            if tensor.is_floating_point():
                tensor.fill_(torch.nan)
        self.logits: list[torch.Tensor] = []
        model: Any = self.engine.runner.model
        plain = model.logits
        model.logits = lambda hidden: self.heard(plain(hidden))

    def heard(self, logits: torch.Tensor) -> torch.Tensor:
        self.logits.append(logits.clone())
        return logits

    @property
    def graphs(self) -> list[NPUGraph]:
        return self.opened.module.graphs.made[self.first_graph :]

    def answers(self, requests: Sequence[Request], joins: Sequence[int]) -> dict[str, list[int]]:
        """Tokens of requests that join before the steps of those numbers, one for each."""
        ids: dict[str, list[int]] = {}
        waiting = list(zip(joins, requests, strict=True))
        step = 0
        while waiting or self.engine.has_work:
            for _, request in [one for one in waiting if one[0] == step]:
                self.engine.add_request(request)
            waiting = [one for one in waiting if one[0] > step]
            with self.opened.watching():
                outputs = self.engine.step()
            for output in outputs:
                assert output.error is None
                ids.setdefault(output.request_id, []).extend(output.token_ids)
            step += 1
        return ids


@pytest.fixture
def exact_a2() -> Iterator[Contract]:
    with contract("a2", is_exact=True) as opened:
        yield opened


def test_recorded_decodes_give_the_originals_tokens_and_logits(
    wide: Oracle, exact_a2: Contract
) -> None:
    """Catches a graph that reads an earlier step's lengths, slots, tables or positions.

    The logits behind 24 tokens depend on all that the replays have written.
    """
    picked = wide.arrays["picked_token_ids"]
    for case in wide.cases:
        run = Recorded(wide, exact_a2, True)
        ids = run.answers([wide.request(case, max_tokens=25)], [0])[case]
        assert ids[:24] == wide.arrays[f"{case}.greedy_24"].tolist()
        for logits, name in ((run.logits[0], "last"), (run.logits[-1], "after_24")):
            expected = wide.arrays[f"{case}.logits_{name}_picked"]
            ours = logits[-1, picked].float().numpy()
            np.testing.assert_allclose(ours, expected, atol=VALUES, rtol=0)
        (graph,) = run.graphs
        assert (graph.num_replayed, len(graph.records)) == (24, len(run.engine.runner.caches))


def test_batches_that_grow_and_shrink_are_replayed_as_they_are_run(
    wide: Oracle, exact_a2: Contract
) -> None:
    """Catches rows that pad and are seen, rows that are gone and are seen, and a size mixed up.

    One to five rows come and go, in recordings of 1, 2, 4 and 8; what the caches hold outside of
    the scratch block is what they hold without recordings.
    """
    cases = [wide.cases[i % 2] for i in range(5)]
    lengths, joins = (18, 12, 8, 6, 4), (0, 2, 4, 7, 9)
    requests = [
        replace(wide.request(case, max_tokens=count), request_id=f"{case} {i}")
        for i, (case, count) in enumerate(zip(cases, lengths, strict=True))
    ]
    replayed, plain = (Recorded(wide, exact_a2, records) for records in (True, False))
    ids = replayed.answers(requests, joins)
    for request, case in zip(requests, cases, strict=True):
        expected = wide.arrays[f"{case}.greedy_24"][: request.max_tokens].tolist()
        assert ids[request.request_id] == expected
    assert plain.answers(requests, joins) == ids
    for ours, theirs in zip(replayed.logits, plain.logits, strict=True):
        torch.testing.assert_close(ours, theirs, atol=VALUES, rtol=0)
    assert {size.rows for size in replayed.engine.runner._decode._recordings} == {1, 2, 4, 8}
    assert not isinstance(plain.engine.runner._decode, ReplayedStep)
    for cache, same in zip(replayed.engine.runner.caches, plain.engine.runner.caches, strict=True):
        for part, whole in zip(cache.tensors(), same.tensors(), strict=True):
            assert len(part) == len(whole) + 1
            torch.testing.assert_close(part[:-1], whole, atol=VALUES, rtol=0, equal_nan=True)
            assert part[-1, :3].isfinite().all(), "three rows of eight have padded"
            assert part[-1, 3:].isnan().all()


@pytest.mark.parametrize(
    ("name", "dtype", "options", "version"),
    [
        ("glm4v", torch.bfloat16, {}, "26.1.0"),
        ("visualglm", torch.float16, {"casts_weights": True}, "26.0.0"),
    ],
    ids=["glm4v-bfloat16", "visualglm-tiles-26.0.0"],
)
def test_16_bits_are_recorded_and_replayed_exactly(
    request: pytest.FixtureRequest,
    name: str,
    dtype: torch.dtype,
    options: dict[str, Any],
    version: str,
) -> None:
    """Catches an operation of 16 bits that a graph cannot hold, or that is not replayed."""
    wide: Oracle = request.getfixturevalue(f"{name}_wide_oracle")
    with contract("a2", version) as opened:
        runs = [Recorded(wide, opened, records, dtype, **options) for records in (True, False)]
        asked = wide.request(wide.cases[0], max_tokens=5)
        ids = [run.answers([asked], [0]) for run in runs]
        assert ids[0] == ids[1]
        assert torch.equal(torch.cat(runs[0].logits), torch.cat(runs[1].logits))
        assert [graph.num_replayed for graph in runs[0].graphs] == [4]


def test_a_cache_in_int8_is_recorded_too(glm4v_wide_oracle: Oracle, exact_a2: Contract) -> None:
    """Catches plain torch that is recorded with the lengths that a step had on the host."""
    oracle, case = glm4v_wide_oracle, "text_a"
    runs = [Recorded(oracle, exact_a2, records, kv_dtype="int8") for records in (True, False)]
    ids = [run.answers([oracle.request(case, max_tokens=12)], [0]) for run in runs]
    assert ids[0] == ids[1]
    (graph,) = runs[0].graphs
    assert (graph.num_replayed, graph.records) == (11, [])
    torch.testing.assert_close(runs[0].logits[-1], runs[1].logits[-1], atol=VALUES, rtol=0)


@pytest.mark.npu
def test_a_real_npu_stays_close_to_float32(wide: Oracle) -> None:
    """Catches what no stand-in shows: a kernel that reads a layout or rounds otherwise."""
    if reason := Npu.unavailable_reason():
        pytest.skip(reason)
    device = Npu.open()
    engine = divided_engine(wide, ALONE, device, torch.float16, enable_prefix_cache=False)
    kept: list[torch.Tensor] = []
    engine.runner.model.register_forward_hook(lambda module, args, out: kept.append(out))
    for case in wide.cases:
        kept.clear()
        run_greedy(engine, wide.request(case, max_tokens=8))
        with torch.inference_mode():
            logits = engine.runner.model.logits(kept[0])[-1].float().cpu().numpy()
        ours = logits[wide.arrays["picked_token_ids"]]
        theirs = wide.arrays[f"{case}.logits_last_picked"]
        assert ours @ theirs / np.linalg.norm(ours) / np.linalg.norm(theirs) >= COSINE


@pytest.mark.npu
def test_a_real_npu_replays_what_it_runs(wide: Oracle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches what no stand-in shows: an operation that a real graph refuses or replays wrongly."""
    if reason := Npu.unavailable_reason():
        pytest.skip(reason)
    monkeypatch.setenv("GLIMT_NPU_GRAPHS", "1")
    if missing := Npu.missing():
        pytest.skip(missing[0][0])
    answers = []
    for setting in "01":
        monkeypatch.setenv("GLIMT_NPU_GRAPHS", setting)
        device = Npu.open()
        engine = divided_engine(wide, ALONE, device, torch.float16, enable_prefix_cache=False)
        requests = [wide.request(case, max_tokens=24) for case in wide.cases]
        answers.append([run_greedy(engine, request) for request in requests])
    assert answers[0] == answers[1]
    decode = engine.runner._decode
    assert isinstance(decode, ReplayedStep)
    assert {size.rows for size in decode._recordings} == {1}, "recorded, and not given up"
