"""What the CUDA device decides and computes without a card, and whole engines on one."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from conftest import step_row
from glimt.config import EngineConfig
from glimt.demo.noise import FAMILIES, write_noise_model
from glimt.devices import card_check, low_bits
from glimt.devices.base import Device, Seat, open_device
from glimt.devices.card_check import FUSED_ATTENTION, INTEGER_PRODUCTS, right_ways
from glimt.devices.chunks import ChunkPart, chunk_parts
from glimt.devices.cuda import CudaDevice, check_seat, driver_version, read_mode, why_no_card
from glimt.devices.fused_attention import attend_packed
from glimt.devices.low_bits import low_bit_product
from glimt.devices.memory import saying_what_fits, step_too_large
from glimt.devices.replay import ReplayedStep
from glimt.engine import Engine
from glimt.errors import ConfigError, EngineError
from glimt.models.base import BuildContext, find_family
from glimt.quant.base import all_formats
from glimt.runner.feature_cache import FeatureCache
from glimt.runner.kv_cache import allocate_kv
from glimt.runner.model_runner import ModelRunner
from glimt.runner.vision import VisionRunner
from glimt.types import ImageInput, SamplingParams, StepPlan

TORCH_WAYS = frozenset({FUSED_ATTENTION, INTEGER_PRODUCTS})


# --- attention without masks -----------------------------------------------------------------


def test_a_chunk_is_divided_where_what_it_sees_changes():
    """Would catch a bidirectional prompt computed as causal, or its last token as seeing less."""
    assert [*chunk_parts(6, 6, 0)] == [ChunkPart(0, 6, 6, True)]
    assert [*chunk_parts(7, 7, 6)] == [ChunkPart(0, 6, 6, False), ChunkPart(6, 7, 7, True)]
    assert [*chunk_parts(5, 9, 20)] == [ChunkPart(0, 5, 9, False)]
    assert [*chunk_parts(3, 11, 6)] == [ChunkPart(0, 3, 11, True)]


def test_every_chunk_sees_what_its_mask_says():
    """Would catch an edge of the division that is off by one, for any small chunk."""
    for context, shared in product(range(1, 9), range(10)):
        for chunk in range(1, context + 1):
            first = context - chunk
            seen = torch.zeros(chunk, context, dtype=torch.bool)
            for part in chunk_parts(chunk, context, shared):
                for query in range(part.start, part.stop):
                    less = part.stop - 1 - query if part.is_causal else 0
                    seen[query, : part.num_keys - less] = True
            keys, queries = torch.arange(context)[None], torch.arange(first, context)[:, None]
            assert torch.equal(seen, (keys <= queries) | (keys < shared)), (chunk, context, shared)


def test_pictures_of_one_size_are_computed_at_once(monkeypatch):
    """Would catch a call for each of 32 pictures, and sizes that only look equal."""
    calls: list[tuple[int, ...]] = []
    attention = torch.nn.functional.scaled_dot_product_attention

    def counted(query: Tensor, *rest: Any, **named: Any) -> Tensor:
        calls.append(tuple(query.shape))
        return attention(query, *rest, **named)

    monkeypatch.setattr("glimt.devices.fused_attention.F.scaled_dot_product_attention", counted)
    q, k, v = (torch.randn(12, 2, 8, generator=torch.Generator().manual_seed(s)) for s in range(3))
    for starts, shapes in (
        ([0, 4, 8, 12], [(3, 2, 4, 8)]),
        ([0, 4, 7, 12], [(2, 1, 4, 8), (2, 1, 3, 8), (2, 1, 5, 8)]),
    ):
        calls.clear()
        ours = attend_packed(q, k, v, starts, starts, 0.3)
        assert calls == shapes
        plain = Device().varlen_attention(q, k, v, starts, starts, 0.3)
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)


# --- matrices in few bits --------------------------------------------------------------------


@pytest.mark.parametrize("form", ["int8", "int4-g32", "int4-asym", "w8a8"])
def test_a_matrix_in_parts_is_the_whole_matrix(form, monkeypatch):
    """Would catch rows lost or doubled where a part ends, or a part without its bias."""
    monkeypatch.setattr(low_bits, "_PART_ELEMENTS", 7 * 80)
    weight = all_formats()[form].quantise(torch.randn(45, 80) / 9)
    x, bias = torch.randn(5, 80), torch.randn(45)
    expected = Device().linear(x, weight, bias)
    torch.testing.assert_close(low_bit_product(x, weight, bias, False), expected)


@pytest.mark.parametrize("num_rows", [1, 16, 70])
def test_an_integer_product_is_the_rounded_one(num_rows, monkeypatch):
    """Would catch a row's step on another row, and rows that pad left in the result."""
    whole: list[tuple[int, ...]] = []
    multiply = torch._int_mm

    def noted(a: Tensor, b: Tensor) -> Tensor:
        whole.append((tuple(a.shape), a.dtype, tuple(b.shape)))
        return multiply(a, b)

    monkeypatch.setattr(torch, "_int_mm", noted)
    weight = all_formats()["w8a8"].quantise(torch.randn(48, 80) / 9)
    x, bias = torch.randn(num_rows, 80), torch.randn(48)
    result = low_bit_product(x, weight, bias, True)
    assert whole == [((max(32, num_rows), 80), torch.int8, (80, 48))]
    torch.testing.assert_close(result, Device().linear(x, weight, bias), rtol=1e-4, atol=1e-4)


def test_only_what_the_card_multiplies_goes_by_integers(monkeypatch):
    """Would catch x rounded that must not be, and a size that cuBLAS refuses."""
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: pytest.fail("multiplied in integers"))
    for form, n, k in (("int8", 48, 80), ("int4", 48, 64), ("w8a8", 45, 80), ("w8a8", 48, 84)):
        weight = all_formats()[form].quantise(torch.randn(n, k) / 9)
        x = torch.randn(3, k)
        expected = Device().linear(x, weight, None)
        torch.testing.assert_close(low_bit_product(x, weight, None, True), expected)


def test_a_row_that_is_not_finite_stays_so_in_integers():
    """Would catch NaN that turns into an ordinary number when it is cast to int8."""
    weight = all_formats()["w8a8"].quantise(torch.randn(48, 80) / 9)
    x = torch.randn(4, 80)
    x[1, 3], x[2, 5] = float("nan"), float("inf")
    result = low_bit_product(x, weight, None, True)
    assert result.isnan().all(-1).tolist() == [False, True, True, False]
    assert result[[0, 3]].isfinite().all()


# --- everything stays on the card ------------------------------------------------------------


@pytest.fixture(params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    write_noise_model(tmp_path, request.param)
    return tmp_path


def fake_model(folder: Path) -> Any:
    """A noise model whose tensors pretend to be on a card, in bfloat16, and its device."""
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    family = find_family(raw, "")
    config = family.config.from_json(raw, "")
    device = CudaDevice("meta", TORCH_WAYS)
    context = BuildContext(device, torch.bfloat16, config.max_positions)
    model = family.build(config, context)
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            on_card = torch.empty(weight.shape, dtype=weight.dtype, device="meta")
            setattr(module, name, torch.nn.Parameter(on_card, requires_grad=False))
    return model, device


@pytest.mark.filterwarnings("ignore")  # a pretended card has no kernel to choose
def test_a_step_takes_nothing_from_the_host(folder):
    """Would catch a tensor made on the CPU in the midst of a model: torch refuses to mix devices.

    The tensors have shapes and devices alone, so this needs no card.
    """

    def row(start: int, count: int, shared: int, block: int) -> Any:
        positions = torch.arange(start, start + count).repeat(2, 1).numpy()
        given = {"token_ids": (1,) * count, "positions": positions, "start": start}
        table = tuple(range(block, block + 4))
        return step_row(**given, block_table=table, bidirectional_len=shared)

    mixed = row(5, 1, 0, 0), row(7, 1, 5, 4), row(0, 6, 5, 8), row(4, 3, 0, 12)
    with torch.inference_mode():
        model, device = fake_model(folder)
        caches = allocate_kv(model, 16, 4, torch.bfloat16, device)
        vision = VisionRunner(model, FeatureCache(0), 1)
        runner = ModelRunner(model, caches, vision, device)
        for rows in (mixed, mixed[:2]):
            logits = runner.run(StepPlan(rows)).logits
            assert logits.device.type == "meta"
            assert logits.shape[0] == len(rows)


@pytest.mark.filterwarnings("ignore")
def test_a_tower_takes_nothing_from_the_host(folder):
    """Would catch the same in a tower, whose pixels come from the host."""
    with torch.inference_mode():
        model, _ = fake_model(folder)
        side = model.eva.image_size[0] if hasattr(model, "eva") else 112
        grid = (side // 14, side // 14)
        pixels = np.zeros((side, side, 3), dtype=np.uint8)
        features = model.image_features([ImageInput(b"", 6, grid, pixels)] * 2)
        assert [rows.device.type for rows in features] == ["meta", "meta"]


# --- what it is told -------------------------------------------------------------------------


def test_modes_are_those_that_are_known():
    """Would catch a misspelled switch that is silently the default."""
    assert [read_mode(said) for said in ("", "no-graphs", "plain")] == ["", "no-graphs", "plain"]
    with pytest.raises(ConfigError, match="GLIMT_CUDA: 'off' is unknown; choose one of no-graphs"):
        read_mode("off")


def test_every_rank_has_a_card():
    """Would catch two ranks on one card, or torch's own error for an index that is not there."""
    check_seat(Seat(3, 4), 4)
    with pytest.raises(ConfigError, match="of 4 ranks here the one of index 3 has no card: 3 can"):
        check_seat(Seat(3, 4), 3)


def test_why_there_is_no_card(tmp_path):
    """Would catch advice to install a driver that is there, or silence about a hidden card."""
    assert why_no_card(tmp_path, None, []).startswith("no NVIDIA driver is loaded; install it")
    version = tmp_path / "driver" / "nvidia" / "version"
    version.parent.mkdir(parents=True)
    version.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.124.06  Wed Feb 26\n")
    assert driver_version(tmp_path) == "570.124.06"
    assert "CUDA_VISIBLE_DEVICES is '7', which leaves no card" in why_no_card(tmp_path, "7", [])
    told = why_no_card(tmp_path, None, ["the driver is too old"])
    assert told.startswith("no card can be used (torch says: the driver is too old); see whether")


def test_without_cuda_in_torch_the_reason_says_what_to_install(monkeypatch):
    """Would catch "no driver" on a machine whose torch is the CPU build."""
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch, "__version__", "2.13.0+cpu")
    reason = CudaDevice.unavailable_reason()
    assert reason is not None
    assert reason.startswith(
        "torch 2.13.0+cpu is not built for CUDA; pip install --force-reinstall"
    )
    assert "torch==2.13.0 " in reason
    assert (CudaDevice.cards(), CudaDevice.missing()) == ((), ())


def test_sixteen_bits_are_those_that_the_card_multiplies(monkeypatch):
    """Would catch bfloat16 on Turing, which emulates it, and float16 where it could overflow."""
    preferred = {}
    for capability in ((7, 5), (8, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda card, c=capability: c)
        dtypes = (torch.float32, torch.float16, torch.bfloat16)
        preferred[capability] = [CudaDevice().preferred_dtype(dtype) for dtype in dtypes]
    assert preferred[7, 5] == [torch.float32, torch.float16, torch.float16]
    assert preferred[8, 0] == [torch.float32, torch.bfloat16, torch.bfloat16]


# --- which ways are right --------------------------------------------------------------------


@pytest.fixture
def fresh_ways(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No outcome of an earlier test is remembered, and triton is not installed."""
    monkeypatch.setattr(card_check, "has_triton", lambda: False)
    right_ways.cache_clear()
    yield monkeypatch
    right_ways.cache_clear()


@pytest.mark.filterwarnings("ignore")
def test_torchs_own_ways_are_right_on_the_cpu(fresh_ways):
    """Would catch a self-test that nothing passes: every card would go the plain way."""
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    assert right_ways(torch.device("cpu"), dtypes) == TORCH_WAYS


@pytest.mark.filterwarnings("ignore")
def test_a_way_that_is_wrong_or_fails_is_left_out_and_said(fresh_ways, caplog):
    """Would catch a kernel that computes nonsense on a new card, or ends the start there."""

    def broken(torch_device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        raise RuntimeError("no kernel image is available\nfor execution")

    def wrong(torch_device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return torch.full((3,), 1.05), torch.ones(3)

    checks = {"broken": broken, "wrong": wrong, FUSED_ATTENTION: card_check._fused_attention}
    fresh_ways.setattr(card_check, "_checks", lambda: checks)
    assert right_ways(torch.device("cpu"), (torch.float32,)) == {FUSED_ATTENTION}
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        "broken: not used on cpu (RuntimeError: no kernel image is available); "
        "torch's own is slower",
        "wrong: not used on cpu (wrong values in torch.float32); torch's own is slower",
    ]


def test_values_agree_within_two_roundings():
    """Would catch NaN that agrees, another dtype or shape, and a tolerance of everything."""
    ones = torch.ones(3)
    assert card_check._agree(ones * 1.01, ones)
    for other in (ones * 1.03, ones * float("nan"), ones.half(), torch.ones(4)):
        assert not card_check._agree(other, ones)


# --- no room ---------------------------------------------------------------------------------

SAID = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 15.77 GiB of "
    "which 1.02 GiB is free. Including non-PyTorch memory, this process has 14.7 GiB in use. "
    "See documentation for Memory Management"
)


def test_a_step_without_room_says_what_to_lower():
    """Would catch a user who is told of PYTORCH_CUDA_ALLOC_CONF instead of --tower-patches."""
    with pytest.raises(EngineError) as caught, saying_what_fits(step_too_large):
        raise torch.OutOfMemoryError(SAID)
    assert str(caught.value) == (
        "a step does not fit: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total "
        "capacity of 15.77 GiB of which 1.02 GiB is free; start again and lower "
        "--max-num-batched-tokens, --tower-patches, --max-num-seqs or --kv-bytes"
    )
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)


def test_other_errors_are_passed_on():
    """Would catch a bug that is told as a lack of memory."""
    with pytest.raises(RuntimeError, match=r"^a bug$"), saying_what_fits(step_too_large):
        raise RuntimeError("a bug")


# --- on a card -------------------------------------------------------------------------------


@pytest.fixture
def card() -> None:
    """Skips the test, with the reason, where there is no card."""
    if reason := CudaDevice.unavailable_reason():
        pytest.skip(reason)


def greedy(folder: Path, device: str, **settings: Any) -> tuple[list[list[int]], Engine]:
    """Two answers of 24 tokens, running together, and the engine that gave them."""
    config = EngineConfig(
        model=str(folder), device=device, dtype="float32", kv_bytes=2**22, **settings
    )
    engine = Engine.load(config)
    sampling = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    found: dict[str, list[int]] = {}
    for text in ("hello", "a longer text that fills more than one block of the cache"):
        request = engine.prepare_text(text, sampling)
        found[request.request_id] = []
        engine.add_request(request)
    while engine.has_work:
        for output in engine.step():
            found[output.request_id] += output.token_ids
    return [*found.values()], engine


@pytest.mark.cuda
@pytest.mark.parametrize("mode", ["", "no-graphs", "plain"])
@pytest.mark.parametrize("settings", [{}, {"kv_dtype": "int8"}, {"quant": "w8a8"}], ids=str)
def test_a_card_says_what_the_cpu_says(card, folder, mode, settings, monkeypatch):
    """Would catch a kernel, a recording or a cache in int8 that changes an answer."""
    expected, _ = greedy(folder, "cpu", **settings)
    monkeypatch.setenv("GLIMT_CUDA", mode)
    answers, engine = greedy(folder, "cuda", **settings)
    assert answers == expected
    decode = engine.runner._decode
    assert isinstance(decode, ReplayedStep) == (not mode)
    if isinstance(decode, ReplayedStep):
        assert {size.rows for size in decode._recordings} == {2}, "recorded, and not given up"


@pytest.mark.cuda
def test_every_way_is_right_on_this_card(card):
    """Would catch a fast way that this card silently does without."""
    missing = {*TORCH_WAYS, *card_check.NEED_TRITON} - open_device("cuda").fast
    assert not missing


@pytest.mark.cuda
def test_a_card_tells_what_it_is(card):
    """Would catch memory in the wrong unit, or a peak that is never counted."""
    (first, *_) = CudaDevice.cards()
    device = open_device("cuda")
    torch.empty(2**26, dtype=torch.uint8, device=device.torch_device)
    assert 2**30 < first.memory_bytes < 2**40
    assert 0 < device.free_bytes() <= first.memory_bytes
    assert 2**26 <= device.peak_bytes() <= first.memory_bytes


@pytest.mark.cuda
def test_a_full_card_says_what_to_lower(card, folder):
    """Would catch torch's own error at start, which names no option."""
    config = EngineConfig(model=str(folder), device="cuda", num_blocks=2**10, block_size=2**22)
    with pytest.raises(ConfigError, match="the KV cache does not fit: CUDA out of memory"):
        Engine.load(config)
