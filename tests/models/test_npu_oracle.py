"""Both families on Ascend devices, over a stand-in for torch_npu, against the originals' outputs.

The stand-in's operators check the documented limits of each chip, so whatever runs here is a legal
call. What an NPU makes of such a call (its own sums, speed, saturation) nothing here can show.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from conftest import Oracle, run_greedy
from divided import divided_engine
from glimt.devices.npu import Npu
from glimt.engine import Engine
from glimt.parallel import ALONE, Group
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
        "npu_rms_norm", "npu_rotary_mul", "npu_fused_infer_attention_score",
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
