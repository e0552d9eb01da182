"""Ascend devices over a stand-in for torch_npu: what they call, what they leave, what they refuse.

That each operation equals the base's is in test_base_device.py; attention over heads of 128 dims
and blocks of 128 tokens, which its steps do not have, is here.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import glimt.devices.npu
import glimt.devices.npu_310p
from attention_steps import Step, normal
from glimt.devices import npu_runtime
from glimt.devices.base import Device, KVCache, Seat
from glimt.devices.npu import Npu
from glimt.devices.npu_310p import Atlas310P, TiledCache
from glimt.devices.npu_a2 import AtlasA2
from glimt.errors import ConfigError
from glimt.quant.base import all_formats
from npu_operators import Chip
from npu_stand_in import VERSIONS, Contract, StandIn, contract

# float16 keeps 11 bits of values of about 1; sums are taken in another order.
HALF = {"rtol": 2e-3, "atol": 2e-3}
CHIPS = ("a2", "310p")


@pytest.fixture(params=CHIPS)
def opened(request: pytest.FixtureRequest) -> Iterator[Contract]:
    with contract(request.param) as made, made.watching():
        yield made


# (start, count, bidirectional_len) of each row; decodes first.
STEPS = {
    "prompts": [(0, 20, 0), (0, 1, 0), (0, 7, 0)],
    "decodes over a block's edge": [(127, 1, 0), (128, 1, 0), (3, 1, 0)],
    "decodes beside a prompt": [(140, 1, 0), (0, 17, 0)],
    "a chunk on a cached context": [(130, 5, 0)],
    "bidirectional prompts": [(0, 9, 8), (0, 33, 32)],
    "a bidirectional prompt partly cached": [(4, 5, 8)],
    "a recomputed bidirectional sequence": [(0, 10, 6)],
    "everything at once": [(6, 1, 5), (130, 1, 0), (0, 5, 0), (4, 7, 0), (0, 9, 8), (4, 5, 8)],
}


@pytest.mark.parametrize("rows", STEPS.values(), ids=STEPS)
@pytest.mark.parametrize("heads", [(16, 1), (3, 3)], ids=["16:1", "1:1"])
def test_paged_attention_equals_the_bases(opened: Contract, heads: Any, rows: Any) -> None:
    """Catches a token that sees one too many, another row's blocks, and tiles laid out wrongly.

    Whatever no token has written is NaN.
    """
    shape = {"heads": heads, "dim": 128, "dtype": torch.float16, "block_size": 128}
    littered = Step(rows, filler=float("nan"), **shape).run(opened.device())
    torch.testing.assert_close(littered, Step(rows, **shape).run(Device()), **HALF)
    attention = {"npu_fused_infer_attention_score", "_npu_paged_attention", "_npu_flash_attention",
                 "_npu_flash_attention_unpad"}  # fmt: skip
    assert attention & set(opened.calls), "the base has done it"


def test_tokens_that_see_alike_share_a_call(opened: Contract) -> None:
    """Catches a call for each row, and decodes apart from prompts where one call does both."""
    shape: dict[str, Any] = {"dim": 128, "dtype": torch.float16, "block_size": 128}
    Step([(5, 1, 0), (9, 1, 0), (0, 4, 0), (0, 5, 0)], **shape).run(opened.device())
    plain = dict(opened.calls)
    opened.calls.clear()
    Step([(5, 1, 3), (0, 6, 5), (0, 7, 6)], **shape).run(opened.device())
    if opened.chip.kind == "a2":
        assert plain["npu_fused_infer_attention_score"] == 1
        assert opened.calls["npu_fused_infer_attention_score"] == 2  # without a mask, and with one
    else:
        assert (plain["_npu_paged_attention"], plain["_npu_flash_attention"]) == (1, 1)
        assert opened.calls["_npu_flash_attention_unpad"] == 1
        assert opened.calls["_npu_paged_attention"] == 1  # the decode, and each <sop>


def test_many_rows_are_several_calls_of_the_paged_attention(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Catches a chunk beyond the rows that one call takes on 300I DUO: 2,048, here 8."""
    monkeypatch.setattr(glimt.devices.npu_310p, "_MOST_ROWS", 8)
    with contract("310p") as duo, duo.watching():
        shape: dict[str, Any] = {"dim": 128, "dtype": torch.float16, "block_size": 128}
        step = Step([(125, 20, 0)], **shape)
        ours, base = step.run(duo.device()), step.run(Device())
        assert duo.calls["_npu_paged_attention"] == 3
        torch.testing.assert_close(ours, base, **HALF)


@pytest.mark.parametrize("version", VERSIONS)
def test_each_version_writes_the_plain_cache_with_what_it_has(version: str) -> None:
    """Catches a scatter that writes tiles into a plain cache, as it does before 26.0.0."""
    with contract("a2", version) as a2, a2.watching():
        shape: dict[str, Any] = {"dim": 128, "dtype": torch.float16, "block_size": 128}
        step = Step([(5, 1, 0), (0, 3, 0)], **shape)
        torch.testing.assert_close(step.run(a2.device()), step.run(Device()), **HALF)
        used = "_npu_reshape_and_cache" if version == "7.3.0" else "npu_scatter_pa_kv_cache"
        assert a2.calls[used] == 1
        assert npu_runtime.needs_atb("a2") == (version == "7.3.0")


def test_a_tiled_cache_is_cleared_and_read_as_any_other() -> None:
    """Catches blocks that stay dirty, or a neighbour's that are wiped, in another layout."""
    with contract("310p") as duo:
        device = duo.device()
        plain = KVCache(*(torch.zeros(3, 32, 2, 128).half() for _ in "kv"))
        tiled = device.lay_out_cache(plain)
        assert isinstance(tiled, TiledCache)
        assert tiled.key.shape == (3, 16, 32, 16)
        assert (tiled.block_size, tiled.num_kv_heads) == (32, 2)
        new, slots = normal(96, 2, 128).half(), torch.arange(96)
        device.write_kv(new, 2 * new, tiled, slots)
        tiled.clear_blocks(torch.tensor([1]))
        tiled.clear_slots(torch.tensor([70]))
        expected = new.clone()
        expected[32:64] = expected[70] = 0
        blocks = torch.tensor([2, 0, 1])
        key, value = tiled.read(blocks, torch.float16)
        assert torch.equal(key, expected.view(3, 32, 2, 128)[blocks])
        assert torch.equal(value, 2 * key)


@pytest.mark.parametrize("style", ["interleaved", "half"])
def test_rotations_of_the_real_models_use_the_operator(opened: Contract, style: Any) -> None:
    """Catches pairs that are turned in another order, and the untouched half of a head."""
    x, angle = normal(5, 3, 128).half(), normal(5, 64, seed=1)
    cos, sin = angle.cos().half(), angle.sin().half()
    args = (cos[:, :32], sin[:, :32], style, 1) if style == "interleaved" else (cos, sin, style, 2)
    before = x.clone()
    result = opened.device().rotate(x, *args)
    torch.testing.assert_close(result, Device().rotate(x, *args), **HALF)
    assert torch.equal(x, before), "the operator writes into what it is given"
    name = "npu_rotary_mul" if opened.chip.kind == "a2" else "npu_apply_rotary_pos_emb"
    assert opened.calls[name] == (1 if style == "interleaved" else 2)


def test_tables_are_widened_once_for_all_layers(opened: Contract) -> None:
    """Catches eight small operations for every layer, and tables of the step before."""
    device, x = opened.device(), normal(4, 2, 128).half()
    steps = [(a.cos().half(), a.sin().half()) for a in (normal(4, 32), normal(4, 32, seed=1))]
    with torch.inference_mode(), opened.watching() as log:
        results = [device.rotate(x, *t, "interleaved", 1) for t in (steps[0], steps[0], steps[1])]
    assert log.seen["aten.chunk"] == 4
    assert torch.equal(results[0], results[1])
    torch.testing.assert_close(results[2], Device().rotate(x, *steps[1], "interleaved", 1), **HALF)


def test_heads_of_the_towers_are_padded_to_128(opened: Contract) -> None:
    """Catches the padding in the result, and a scale of the padded size."""
    for dim in (64, 88, 112):
        q, k, v = (normal(9, 2, dim, seed=s).half() for s in range(3))
        for keys in ([0, 4, 9], [0, 2, 9]):
            args = q, k, v, [0, 4, 9], keys, dim**-0.5
            result = opened.device().varlen_attention(*args)
            torch.testing.assert_close(result, Device().varlen_attention(*args), **HALF)


def test_a_sum_and_its_norm_are_one_operator_where_that_is_served(opened: Contract) -> None:
    """Catches an addition beside the norm on A2, results in another order, and rstd in their place.

    On 300I DUO the sum stays torch's: nobody is known to have called the operator there.
    """
    x, residual, gain = normal(5, 64).half(), normal(5, 64, seed=1).half(), normal(64).half()
    device = opened.device()
    normed, total = device.add_rms_norm(x, residual, gain, 1e-5)
    plain, their_total = Device().add_rms_norm(x, residual, gain, 1e-5)
    torch.testing.assert_close(normed, plain, **HALF)
    torch.testing.assert_close(total, their_total, **HALF)
    a2 = opened.chip.kind == "a2"
    assert opened.calls == {"npu_add_rms_norm" if a2 else "npu_rms_norm": 1}
    assert device.adds_with_norm == a2


def test_what_operators_do_not_take_goes_the_bases_way(opened: Contract) -> None:
    """Catches an operator that is called in float32, with large heads, or over int8."""
    device = opened.device()
    device.rms_norm(normal(2, 32), normal(32), 1e-5)
    device.add_rms_norm(normal(2, 32), normal(2, 32), normal(32), 1e-5)
    device.add_rms_norm(*(normal(0, 32).half() for _ in "xr"), normal(32).half(), 1e-5)
    device.rotate(normal(2, 1, 64), normal(2, 32), normal(2, 32), "half", 1)
    device.varlen_attention(*(normal(3, 1, 160).half() for _ in "qkv"), [0, 3], [0, 3], 0.1)
    device.linear(normal(2, 32), device.prepare_weight(normal(8, 32), torch.float32), None)
    step = Step([(5, 1, 0), (0, 3, 0)], dim=128, dtype=torch.float16, block_size=128)
    step.rounded().run(device)
    assert not opened.calls


def test_matrices_lie_in_tiles_where_that_is_wanted() -> None:
    """Catches a cast that is forgotten on 300I DUO, or made on A2 without being asked for."""
    weight = normal(32, 48).half()
    for chip, options, in_tiles in (("310p", {}, 29), ("a2", {}, 2),
                                    ("a2", {"casts_weights": True}, 29)):  # fmt: skip
        with contract(chip) as opened:
            held = opened.device(**options).prepare_weight(weight, torch.float16)
            assert opened.module.get_npu_format(held) == in_tiles


def test_a_cast_that_does_nothing_is_an_error() -> None:
    """Catches a cache in the plain layout that ATB would read as tiles."""
    with contract("310p") as duo:
        device = duo.device()
        duo.chip.allows_tiles = False
        with pytest.raises(ConfigError, match="did not cast a matrix to FRACTAL_NZ"):
            device.prepare_weight(normal(32, 48).half(), torch.float16)


# --- few bits --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["int8", "w8a8", "int4-a16", "int4-asym", "int4"])
def test_few_bits_are_multiplied_as_they_are(name: str, dtype: torch.dtype) -> None:
    """Catches a matrix that is widened for each product, and offsets or groups misread."""
    with contract("a2") as a2, a2.watching():
        device, weight = a2.device(), all_formats()[name].quantise(normal(48, 160) / 12)
        held = device.prepare_weight(weight, dtype)
        x, bias = normal(3, 160, seed=1).to(dtype), normal(48, seed=2).to(dtype)
        result = device.linear(x, held, bias)
        expected = x.float() @ weight.dequantise().T + bias.float()
        # w8a8 rounds x to 127 steps as well, and bfloat16 keeps 8 bits of offsets.
        torch.testing.assert_close(result.float(), expected, rtol=2e-2, atol=3e-2)
        assert result.dtype == dtype
        assert held.nbytes < weight.n * weight.k * 1.4
        used = {"int8": "npu_weight_quant_batchmatmul", "w8a8": "npu_quant_matmul"}
        assert a2.calls[used.get(name, "npu_weight_quant_batchmatmul")] == 1


def test_a_group_without_a_scale_is_its_offset() -> None:
    """Catches 0 / 0 where a group of weights is constant."""
    weight = all_formats()["int4-asym"].quantise(torch.full((8, 256), 0.5))
    object.__setattr__(weight, "scales", torch.zeros_like(weight.scales))
    object.__setattr__(weight, "offsets", torch.full_like(weight.offsets, 0.5))
    with contract("a2") as a2:
        held = a2.device().prepare_weight(weight, torch.float16)
        result = a2.device().linear(torch.ones(1, 256).half(), held, None)
    assert result.tolist() == [[128.0] * 8]


def test_a_matrix_whose_sizes_no_operator_takes_is_left_as_it_is() -> None:
    """Catches an odd number of outputs that is packed eight by eight."""
    weight = all_formats()["int4"].quantise(normal(9, 256))
    with contract("a2") as a2:
        assert a2.device().prepare_weight(weight, torch.float16) is weight


def test_300i_duo_says_what_it_does_not_do() -> None:
    """Catches a failure in the midst of a request instead of words at the start."""
    with contract("310p") as duo:
        device = duo.device()
        assert device.preferred_dtype(torch.bfloat16) == torch.float16
        for name, said in (("int4", "weights in int4"), ("w8a8", "activations in int8")):
            with pytest.raises(ConfigError, match=f"no operator for {said}; use int8"):
                device.prepare_weight(all_formats()[name].quantise(normal(8, 256)), torch.float16)
        with pytest.raises(ConfigError, match="does not compute in bfloat16; use float16"):
            device.prepare_weight(normal(8, 32), torch.bfloat16)


def test_blocks_are_those_that_attention_reads(opened: Contract) -> None:
    """Catches blocks of 32, which suit a CPU, and a refusal that does not say what to do."""
    device = opened.device()
    assert device.block_size(0) == device.block_size(128) == 128
    assert Device().block_size(0) == 32
    with pytest.raises(ConfigError, match=r"block_size.* is 200, but .*leave it out for 128"):
        device.block_size(200)
    with pytest.raises(ConfigError):
        device.block_size(1024)


def test_memory_is_the_npus(opened: Contract) -> None:
    """Catches a cache that is sized by the host's memory."""
    device = opened.device()
    assert (device.free_bytes(), device.peak_bytes()) == (3 * 2**30, 2**30)
    assert device.collectives == "hccl"


# --- finding torch_npu -----------------------------------------------------------------------


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """torch_npu as if it were installed, on A2 with two NPUs."""
    stand_in = StandIn(Chip("a2"))
    monkeypatch.setitem(sys.modules, "torch_npu", stand_in)
    return stand_in


def reason(atb: str = "") -> str | None:
    def load(name: str) -> object:
        if atb:
            raise OSError(atb)
        return name

    return npu_runtime.unavailable_reason(load)


def test_without_torch_npu_it_is_said_what_to_install() -> None:
    """Catches a traceback where nothing is installed."""
    assert "torch_npu" not in sys.modules
    said = Npu.unavailable_reason() or ""
    release = ".".join(torch.__version__.split(".")[:2])
    assert said.startswith("torch-npu is not installed: install CANN")
    assert f"pip install 'torch-npu=={release}.*'" in said


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ImportError("libhccl.so: cannot open shared object file"), "source set_env.sh"),
        (
            RuntimeError("ERR00007 another accelerator\nmore"),
            "cannot be imported: ERR00007 another",
        ),
    ],
)
def test_an_import_that_fails_is_explained(
    error: Exception, said: str, module: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches CANN's absence told as an unknown library."""

    def fail() -> None:
        raise error

    monkeypatch.setattr(npu_runtime, "load_torch_npu", fail)
    assert said in (reason() or "")
    assert "\n" not in (reason() or "")


def test_versions_chips_and_libraries_must_agree(
    module: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a start that fails at the first request: no NNAL, another torch, another chip."""
    with contract("a2"):
        assert reason() is None
        assert reason(atb="libatb.so: not found") is None, "26.1.0 on A2 does without ATB"
        monkeypatch.setattr(module.npu, "get_soc_version", lambda: 202)
        assert reason() is None
        assert "install NNAL" in (reason(atb="libatb.so: not found") or "")
        monkeypatch.setattr(module.npu, "get_soc_version", lambda: 102)
        assert (reason() or "").startswith("the first-generation Ascend 910 is not served")
        monkeypatch.setattr(module.npu, "get_soc_version", lambda: 150)
        assert (reason() or "").startswith("chip number 150 is not served")
        monkeypatch.setattr(module.npu, "device_count", lambda: 0)
        assert "ASCEND_RT_VISIBLE_DEVICES" in (reason() or "")
        monkeypatch.setattr(StandIn, "__version__", "2.1.0.post12")
        assert "made for torch 2.1, but torch" in (reason() or "")


def test_each_seat_takes_its_own_npu(module: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches ranks that share a card, and an op set of another chip."""
    made: list[Any] = []
    for name in ("AtlasA2", "Atlas310P"):
        record = lambda *given, name=name, **options: made.append((name, given[1], options))  # noqa: E731
        monkeypatch.setattr(glimt.devices.npu, name, record)
    Npu.open(seat=Seat(1, 2))
    monkeypatch.setenv("GLIMT_NPU_NZ", "1")
    Npu.open()
    monkeypatch.setattr(module.npu, "get_soc_version", lambda: 203)
    Npu.open(seat=Seat(1, 2))
    assert made == [
        ("AtlasA2", "npu:1", {"casts_weights": False, "records": False}),
        ("AtlasA2", "npu:0", {"casts_weights": True, "records": False}),
        ("Atlas310P", "npu:1", {}),
    ]
    assert module.chosen == [1, 0, 1]
    with pytest.raises(ConfigError, match="4 ranks need 4 NPUs, but 2 can be seen"):
        Npu.open(seat=Seat(3, 4))


def test_300i_duo_does_not_compile_for_every_length() -> None:
    """Catches seconds of compilation at each new prompt length."""
    with contract("310p") as duo:
        assert isinstance(duo.device(), Atlas310P)
        assert duo.module.chosen == [("jit_compile", False)]
    with contract("a2") as a2:
        assert isinstance(a2.device(), AtlasA2)
        assert a2.module.chosen == []
