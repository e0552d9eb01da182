"""The stand-in for torch_npu refuses what an NPU would refuse: one violation of every kind."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from conftest import shared_path
from npu_operators import Chip, ContractBroken
from npu_stand_in import SCHEMAS, VERSIONS, Contract, contract, schemas

HEAD = 128


@pytest.fixture
def a2() -> Iterator[Contract]:
    with contract("a2") as opened:
        yield opened


@pytest.fixture
def duo() -> Iterator[Contract]:
    with contract("310p") as opened, opened.watching():
        opened.module.npu.config.allow_internal_format = True
        yield opened


def half(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).half()


def fused(opened: Contract, **changed: Any) -> Tensor:
    """A legal call: sequences of 3 and 2 tokens over contexts of 130 and 2 in blocks of 128."""
    given: dict[str, Any] = {
        "query": half(5, 4, HEAD),
        "key": half(6, 128, 2 * HEAD),
        "value": half(6, 128, 2 * HEAD),
        "atten_mask": torch.ones(2048, 2048, dtype=torch.int8).triu_(1),
        "actual_seq_lengths": [3, 5],
        "actual_seq_lengths_kv": [130, 2],
        "block_table": torch.tensor([[1, 5], [2, 2]], dtype=torch.int32),
        "block_size": 128,
        "num_heads": 4,
        "num_key_value_heads": 2,
        "scale": 0.1,
        "input_layout": "TND",
        "sparse_mode": 3,
    }
    given |= changed
    positional = [given.pop(name) for name in ("query", "key", "value")]
    return opened.module.npu_fused_infer_attention_score(*positional, **given)[0]


MASK = torch.ones(2048, 2048, dtype=torch.int8).triu_(1)
FUSED_VIOLATIONS: dict[str, dict[str, Any]] = {
    "dtype": {"query": torch.zeros(5, 4, HEAD)},
    "dtypes that differ": {"query": torch.zeros(5, 4, HEAD, dtype=torch.bfloat16)},
    "contiguity": {"query": half(4, 5, HEAD).transpose(0, 1)},
    "head size": {"query": half(5, 4, 112)},
    "layout of the cache": {"key": half(6, 128, 2, HEAD), "value": half(6, 128, 2, HEAD)},
    "block size": {"key": half(6, 64, 256), "value": half(6, 64, 256), "block_size": 64},
    "block size that is not the cache's": {"block_size": 256},
    "default scale": {"scale": 1.0},
    "layout of the input": {"input_layout": "BSH"},
    "lengths that are not cumulative": {"actual_seq_lengths": [3, 2]},
    "lengths of other tokens": {"actual_seq_lengths": [3, 4]},
    "cumulative lengths of contexts": {"actual_seq_lengths_kv": [130, 132]},
    "table of 64 bits": {"block_table": torch.tensor([[1, 5], [2, 2]])},
    "block out of range": {"block_table": torch.tensor([[1, 6], [2, 2]], dtype=torch.int32)},
    "rows of the table": {"block_table": torch.tensor([[1, 5]], dtype=torch.int32)},
    "mask of another size": {"atten_mask": MASK[:1024, :1024].contiguous()},
    "mask of another type": {"atten_mask": MASK.half()},
    "mask turned round": {"atten_mask": 1 - MASK},
    "mask missing": {"atten_mask": None},
    "mask where none may be": {"sparse_mode": 0},
}


def test_the_legal_call_is_taken(a2: Contract) -> None:
    """Catches a contract that refuses everything, so that the violations prove nothing."""
    assert fused(a2).isfinite().all()
    assert a2.calls == {"npu_fused_infer_attention_score": 1}


@pytest.mark.parametrize("changed", FUSED_VIOLATIONS.values(), ids=FUSED_VIOLATIONS)
def test_fused_attention_is_refused(a2: Contract, changed: dict[str, Any]) -> None:
    """Catches a limit that nobody checks."""
    with pytest.raises(ContractBroken):
        fused(a2, **changed)


def test_a_wrong_keyword_and_an_operator_of_another_version_fail(a2: Contract) -> None:
    """Catches a call that only a mock would take."""
    with pytest.raises(RuntimeError, match="num_query_heads"):
        fused(a2, num_query_heads=4)
    with pytest.raises(AttributeError, match="npu_of_tomorrow"):
        a2.module.npu_of_tomorrow(half(2))


def test_an_operator_without_an_implementation_fails(a2: Contract) -> None:
    """Catches a call of something that the contract only knows by name."""
    with pytest.raises(NotImplementedError):
        a2.module.npu_silu(half(2, 32))


ROWS: dict[str, Callable[[Any], Any]] = {
    "gamma of another dtype": lambda npu: npu.npu_rms_norm(half(2, 32), torch.ones(32), 1e-6),
    "gamma of another length": lambda npu: npu.npu_rms_norm(half(2, 32), half(16), 1e-6),
    "rows below 32 bytes": lambda npu: npu.npu_rms_norm(half(2, 8), half(8), 1e-6),
    "a sum of two dtypes": lambda npu: npu.npu_add_rms_norm(
        half(2, 32), torch.ones(2, 32), half(32), 1e-6
    ),
    "a sum's gamma of another dtype": lambda npu: npu.npu_add_rms_norm(
        half(2, 32), half(2, 32), torch.ones(32), 1e-6
    ),
    "a sum's gamma of another length": lambda npu: npu.npu_add_rms_norm(
        half(2, 32), half(2, 32), half(16), 1e-6
    ),
    "a sum that would be broadcast": lambda npu: npu.npu_add_rms_norm(
        half(2, 32), half(1, 32), half(32), 1e-6
    ),
    "an empty sum": lambda npu: npu.npu_add_rms_norm(half(0, 32), half(0, 32), half(32), 1e-6),
    "a sum of rows that are not next to each other": lambda npu: npu.npu_add_rms_norm(
        half(32, 2).T, half(2, 32), half(32), 1e-6
    ),
    "odd halves": lambda npu: npu.npu_swiglu(half(2, 33)),
    "gelu of another form": lambda npu: npu.npu_gelu(half(2, 32), approximate="fast"),
    "tables of pairs": lambda npu: npu.npu_rotary_mul(
        half(1, 3, 2, 64), half(1, 3, 1, 32), half(1, 3, 1, 32), "half"
    ),
    "mode with a d": lambda npu: npu.npu_rotary_mul(
        half(1, 3, 2, 64), half(1, 3, 1, 64), half(1, 3, 1, 64), "interleaved"
    ),
    "interleaved on a chip that takes halves": lambda npu: npu.npu_apply_rotary_pos_emb(
        half(1, 3, 2, 64), half(1, 3, 1, 64), half(1, 3, 1, 64), half(1, 3, 1, 64),
        "BSND", "interleave",
    ),
    "int8 output by default": lambda npu: npu.npu_quant_matmul(
        torch.ones(2, 32).char(), torch.ones(32, 8).char(), torch.ones(8),
        pertoken_scale=torch.ones(2),
    ),
    "product of other sizes": lambda npu: npu.npu_weight_quant_batchmatmul(
        half(2, 16), torch.ones(32, 8).char(), half(8)
    ),
    "groups in int8": lambda npu: npu.npu_weight_quant_batchmatmul(
        half(2, 64), torch.ones(64, 8).char(), half(2, 8), antiquant_group_size=32
    ),
    "nibbles beyond 4 bits": lambda npu: npu.npu_convert_weight_to_int4pack(
        torch.full((8, 8), 8, dtype=torch.int32)
    ),
}  # fmt: skip


@pytest.mark.parametrize("call", ROWS.values(), ids=ROWS)
def test_operators_on_rows_are_refused(a2: Contract, call: Callable[[Any], Any]) -> None:
    """Catches a limit that the real shape inference does not check either."""
    with pytest.raises(ContractBroken):
        call(a2.module)


def scatter(opened: Contract, slots: list[int], dtype: torch.dtype = torch.int32) -> None:
    keys, caches = half(len(slots), 2, HEAD), (torch.zeros(4, 128, 2, HEAD).half() for _ in "kv")
    where = torch.tensor(slots, dtype=dtype)
    opened.module.npu_scatter_pa_kv_cache(keys, keys, *caches, where, cache_mode="Norm")


def test_slots_are_unique_and_in_range(a2: Contract) -> None:
    """Catches padding that is written somewhere."""
    scatter(a2, [0, 511])
    for slots in ([3, 3], [512, 0], [-1, 0]):
        with pytest.raises(ContractBroken, match="slot"):
            scatter(a2, slots)
    with pytest.raises(ContractBroken, match="int32"):
        scatter(a2, [0, 1], torch.int64)


def test_before_26_the_scatter_has_no_mode() -> None:
    """Catches the keyword on a version that has none."""
    with contract("a2", "7.3.0") as opened, pytest.raises(RuntimeError, match="cache_mode"):
        scatter(opened, [0, 1])


def test_the_default_layout_of_the_rotation_is_the_versions() -> None:
    """Catches a layout that is left out, which means BSH before 26.1.0."""
    tensors = half(1, 3, 2, 64), *(half(1, 3, 1, 64) for _ in range(3))
    for version in VERSIONS:
        with contract("a2", version) as opened:
            opened.module.npu_apply_rotary_pos_emb(*tensors, layout="BSND", rotary_mode="half")
            if version != "26.1.0":
                with pytest.raises(ContractBroken, match="layout"):
                    opened.module.npu_apply_rotary_pos_emb(*tensors)


# --- 300I DUO --------------------------------------------------------------------------------


def packed(opened: Contract, **changed: Any) -> Tensor:
    """A legal call: prompts of 10 and 3 tokens, the last one padded by 3."""
    side = 16
    added = torch.full((side, side), -65504.0).half().triu_(1)
    tiles = added.view(side, 1, 16).transpose(0, 1)[None].contiguous()
    given: dict[str, Any] = {
        "query": half(16, 4, HEAD),
        "mask": opened.module.npu_format_cast(tiles, 29),
        "lengths": torch.tensor([10, 6], dtype=torch.int32),
        "out": torch.empty(16, 4, HEAD).half(),
    } | changed
    keys, out = half(len(given["query"]), 2, HEAD), given["out"]
    opened.module._npu_flash_attention(
        given["query"], keys, keys, given["mask"], given["lengths"], 0.1, 4, 2, out
    )
    return out


DUO_VIOLATIONS: dict[str, Callable[[Contract], dict[str, Any]]] = {
    "tokens that are no multiple of 16": lambda c: {
        "query": half(13, 4, HEAD), "out": half(13, 4, HEAD),
        "lengths": torch.tensor([10, 3], dtype=torch.int32),
    },
    "bfloat16": lambda c: {"query": half(16, 4, HEAD).bfloat16()},
    "lengths on the chip": lambda c: {
        "lengths": torch.tensor([10, 6], dtype=torch.int32, device="cpu")
    },
    "lengths of 64 bits": lambda c: {"lengths": torch.tensor([10, 6])},
    "a mask that is not cast": lambda c: {"mask": half(1, 1, 16, 16)},
    "a mask that is no tiles": lambda c: {"mask": c.module.npu_format_cast(half(1, 16, 16), 29)},
    "a mask that is too small": lambda c: {"lengths": torch.tensor([16], dtype=torch.int32) + 0},
    "another shape to write": lambda c: {"out": half(16, 2, HEAD)},
}  # fmt: skip


def test_the_legal_prompts_are_taken(duo: Contract) -> None:
    """Catches a contract that refuses everything."""
    assert packed(duo).isfinite().all()


@pytest.mark.parametrize("change", DUO_VIOLATIONS.values(), ids=DUO_VIOLATIONS)
def test_packed_prompts_are_refused(
    duo: Contract, change: Callable[[Contract], dict[str, Any]]
) -> None:
    """Catches a limit of 300I DUO that nobody checks."""
    with pytest.raises((ContractBroken, RuntimeError)):
        packed(duo, **change(duo))


def paged(opened: Contract, block_size: int = 128, cast: bool = True) -> Tensor:
    """Decodes of 1 and 200 tokens of context; the last has two blocks."""
    cache = half(4, 2 * HEAD // 16, block_size, 16)
    cache = opened.module.npu_format_cast(cache, 29) if cast else cache
    table = torch.tensor([[1, 1], [3, 0]], dtype=torch.int32, device="cpu")
    out = torch.empty(2, 4, HEAD).half()
    lengths = torch.tensor([1, 200], dtype=torch.int32, device="cpu")
    query = half(2, 4, HEAD)
    opened.module._npu_paged_attention(query, cache, cache, 2, 4, 0.1, table, lengths, out)
    return out


def test_paged_attention_reads_tiles_of_legal_blocks(duo: Contract) -> None:
    """Catches a plain cache, and blocks that do not fit the chip's buffers."""
    assert paged(duo).isfinite().all()
    with pytest.raises(ContractBroken, match="not in tiles"):
        paged(duo, cast=False)
    with pytest.raises(ContractBroken, match="blocks of 256"):
        paged(duo, block_size=256)


def test_operators_of_the_other_chip_are_refused(duo: Contract) -> None:
    """Catches an op set that calls what its chip has not."""
    with pytest.raises(ContractBroken, match="not on 310p"):
        fused(duo)
    with pytest.raises(ContractBroken, match="not on 310p"):
        duo.module.npu_swiglu(half(2, 32))


def test_tiled_caches_are_not_read_on_a2(a2: Contract) -> None:
    """Catches the other direction."""
    with a2.watching(), pytest.raises(ContractBroken, match="not on a2"):
        paged(a2)


# --- what surrounds the operators ------------------------------------------------------------


def test_tiles_are_not_made_before_they_are_allowed_on_a2(a2: Contract) -> None:
    """Catches a cast that silently gives back the plain matrix."""
    plain = a2.module.npu_format_cast(half(16, 16), 29)
    assert a2.module.get_npu_format(plain) == 2
    a2.module.npu.config.allow_internal_format = True
    assert a2.module.get_npu_format(a2.module.npu_format_cast(half(16, 16), 29)) == 29
    with pytest.raises(ContractBroken, match="float32"):
        a2.module.npu_format_cast(torch.ones(16, 16), 29)


def test_torch_does_not_index_what_lies_in_tiles(duo: Contract) -> None:
    """Catches a view of tiles, which an NPU would first lay out anew, the whole cache of it."""
    tiles = duo.module.npu_format_cast(half(16, 16), 29)
    assert torch.nn.functional.linear(half(2, 16), tiles).shape == (2, 16)
    with pytest.raises(ContractBroken, match="in tiles"):
        tiles.index_fill_(0, torch.tensor([0]), 0)


def test_what_nobody_has_written_is_nan(duo: Contract) -> None:
    """Catches a test in which unwritten memory happens to be zero."""
    assert torch.empty_like(half(3)).isnan().all()
    assert torch.empty(3).isnan().all()


def test_every_schema_can_be_defined() -> None:
    """Catches a text that torch does not parse, and two of one name in a version."""
    counts = {version: len(schemas(version)) for version in VERSIONS}
    assert counts == {"26.1.0": 78, "26.0.0": 74, "7.3.0": 70}
    for version in VERSIONS:
        with contract("a2", version):
            assert hasattr(torch.ops.npu, "npu_rms_norm")
            has_mode = "cache_mode" in str(torch.ops.npu.npu_scatter_pa_kv_cache.default._schema)
            assert has_mode == (version != "7.3.0"), "another version is left behind"


def test_schemas_are_those_of_the_fact_sheet() -> None:
    """Catches a schema that was mended here by hand. Needs the folder shared/."""
    sheet = yaml.safe_load(shared_path("specs/npu_op_schemas.yaml").read_text(encoding="utf-8"))
    known = {(one["op"].split("::")[0], variant["schema"])
             for one in sheet["ops"] for variant in (one.get("variants") or [one])}  # fmt: skip
    ours = json.loads(SCHEMAS.read_text(encoding="utf-8"))
    assert {(one["ns"], one["schema"]) for one in ours} <= known


def test_the_reference_rotation_is_that_of_complex_numbers() -> None:
    """Catches a contract whose own arithmetic is wrong: pairs as complex numbers, in float64."""
    chip = Chip("a2", is_exact=True)
    x, angle = torch.randn(1, 3, 2, 8), torch.randn(1, 3, 1, 4)
    pairs = torch.view_as_complex(x.double().unflatten(-1, (4, 2)))
    expected = torch.view_as_real(
        pairs * torch.polar(torch.ones_like(angle), angle).to(pairs.dtype)
    )
    tables = (t.repeat_interleave(2, -1) for t in (angle.cos(), angle.sin()))
    result = chip.npu_rotary_mul(x, *tables, "interleave")
    torch.testing.assert_close(result.double(), expected.flatten(-2), atol=1e-5, rtol=1e-5)
