"""The attention kernels of every instruction set against softmax attention in float64."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from glimt.devices.base import rounded_heads
from glimt.kernels.native import Native

# A weight that is rounded to bfloat16 is off by 2^-8 of itself at most (2^-9 when rounded to the
# nearest), and the result is rounded once more. Scores are summed in float32 and turned into powers
# of two: what they are off by, in parts of the largest, the weights are off by relative to theirs.
# With AMX the power's exponent is rounded to bfloat16's fraction too, before the weight is.
WEIGHT_ERROR, OUT_ERROR, SCORE_ERROR = 2**-8, 2**-8, 2**-21
WEIGHT_ERRORS = {"amx": 2**-7}
# Keys and values in int8 may be rounded to bfloat16 once they are widened.
WIDENED_ERROR = 2**-9


def random(*shape: int, seed: int = 0) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return values.to(torch.bfloat16)


def expected(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    first_position: int,
    num_shared: int,
    isa: str = "",
) -> tuple[Tensor, Tensor]:
    """What attention gives in float64, and how far a kernel may be off, element by element."""
    group = query.shape[1] // key.shape[1]
    q = query.double().transpose(0, 1)
    k, v = (x.double().repeat_interleave(group, 1).transpose(0, 1) for x in (key, value))
    seen = torch.arange(key.shape[0]) <= first_position + torch.arange(query.shape[0])[:, None]
    seen |= torch.arange(key.shape[0]) < num_shared
    scores = (q @ k.transpose(1, 2)) * scale
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    out = weights @ v
    weight_error = WEIGHT_ERRORS.get(isa, WEIGHT_ERROR)
    weight_error = weight_error + SCORE_ERROR * scores.abs().amax(-1, keepdim=True)
    allowed = weight_error * (weights @ v.abs()) + OUT_ERROR * out.abs() + 1e-6
    return out.transpose(0, 1), allowed.transpose(0, 1)


def check(
    native: Native,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    first_position: int | None = None,
    num_shared: int = 0,
    scale: float | None = None,
) -> None:
    """first_position: None lets every query see all keys."""
    num_keys = key.shape[0]
    first = num_keys if first_position is None else first_position
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    out = native.attention(
        query, key, value, scale, num_keys=num_keys, first_position=first, num_shared=num_shared
    )
    assert out is not None
    assert_close(out, *expected(query, key, value, scale, first, num_shared, native.isa))


def assert_close(out: Tensor, right: Tensor, allowed: Tensor) -> None:
    excess = (out.double() - right).abs() / allowed
    assert not excess.isnan().any()
    assert excess.max() <= 1, f"{excess.max():.2f} times the allowed error"


def laid_out(
    rows: Sequence[Tensor], tables: Tensor, num_blocks: int, block_size: int, filler: float
) -> Tensor:
    """Each row's tokens [n, …] in the blocks of its table; every other slot holds the filler."""
    cache = torch.full((num_blocks, block_size, *rows[0].shape[1:]), filler, dtype=rows[0].dtype)
    for tokens, table in zip(rows, tables, strict=True):
        at = torch.arange(len(tokens))
        cache[table[at // block_size], at % block_size] = tokens
    return cache


def paged(tokens: Tensor, table: Tensor, block_size: int) -> Tensor:
    """The cache of one sequence, as many blocks as its table has."""
    return laid_out([tokens], table[None], len(table), block_size, torch.nan)


@pytest.mark.parametrize("dim", [16, 32, 64, 80, 88, 112, 128])
@pytest.mark.parametrize("num_keys", [1, 31, 257, 300])
def test_every_query_sees_every_key(native: Native, dim: int, num_keys: int) -> None:
    """Would catch padding of head dims or keys that enters a result."""
    query = random(33, 2, dim)
    check(native, query, random(num_keys, 2, dim, seed=1), random(num_keys, 2, dim, seed=2))


@pytest.mark.parametrize("dim", [20, 100, 127])
def test_head_dims_that_fit_no_vector(native: Native, dim: int) -> None:
    """Would catch reads or writes of whole vectors where a head ends inside one."""
    check(native, random(5, 3, dim), random(40, 3, dim, seed=1), random(40, 3, dim, seed=2))


@pytest.mark.parametrize("num_queries", [*range(1, 71, 3), 16, 32, 48, 64, 65])
def test_any_number_of_queries_over_as_many_keys(native: Native, num_queries: int) -> None:
    """Would catch an edge of a tile or block where the causal limit is off by one."""
    query, key, value = (random(num_queries, 1, 32, seed=i) for i in range(3))
    check(native, query, key, value, first_position=0)


@pytest.mark.parametrize("num_keys", [2, 15, 16, 17, 32, 33, 63, 64, 65, 127, 128, 129])
@pytest.mark.parametrize("more", [0, 256, 512])
def test_edges_of_key_blocks(native: Native, num_keys: int, more: int) -> None:
    """Would catch a key lost or seen twice where blocks of 16, 32, 64, 128 or 256 meet."""
    key, value = random(num_keys + more, 1, 16, seed=1), random(num_keys + more, 1, 16, seed=2)
    check(native, random(3, 1, 16), key, value)


@pytest.mark.parametrize(
    ("num_queries", "before"), [(1, 0), (7, 290), (70, 13), (300, 100), (40, 517)]
)
def test_a_chunk_sees_what_came_before(native: Native, num_queries: int, before: int) -> None:
    """Would catch first_position being ignored, or whole blocks of keys skipped wrongly."""
    query = random(num_queries, 4, 64)
    key, value = (random(num_queries + before, 2, 64, seed=i) for i in (1, 2))
    check(native, query, key, value, first_position=before)


@pytest.mark.parametrize("num_shared", [0, 1, 30, 64, 100, 290, 300])
def test_a_shared_prefix_is_seen_by_all(native: Native, num_shared: int) -> None:
    """Would catch a bidirectional prompt that is cut causally, or a tail that is not."""
    query, key, value = (random(300, 2, 32, seed=i) for i in range(3))
    check(native, query, key, value, first_position=0, num_shared=num_shared)


@pytest.mark.parametrize("group", [1, 2, 16])
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_query_heads_read_their_kv_head(native: Native, group: int, kv_heads: int) -> None:
    """Would catch a mix-up of heads when several share keys."""
    query = random(37, group * kv_heads, 128)
    check(
        native,
        query,
        random(37, kv_heads, 128, seed=1),
        random(37, kv_heads, 128, seed=2),
        first_position=0,
    )


def test_views_of_a_fused_projection(native: Native) -> None:
    """Would catch strides of queries taken for those of keys, or heads taken as adjacent."""
    fused = random(70, 3 * 4 * 88 + 8)[:, : 3 * 4 * 88]
    query, key, value = (x.unflatten(-1, (4, 88)) for x in fused.split(4 * 88, dim=1))
    check(native, query, key, value)
    by_head = random(70, 4, 3, 88)
    check(native, by_head[:, :, 0], by_head[:, :, 1], by_head[:, :, 2], first_position=0)


@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize("num_tokens", [1, 45, 300])
def test_paged_keys_in_any_order(native: Native, block_size: int, num_tokens: int) -> None:
    """Would catch a block table read wrongly, and NaN in unused slots that leaks out."""
    key, value = random(num_tokens, 2, 128, seed=1), random(num_tokens, 2, 128, seed=2)
    table = torch.randperm(24, generator=torch.Generator().manual_seed(3))
    num_queries = min(num_tokens, 40)
    query, before = random(num_queries, 8, 128), num_tokens - num_queries
    out = native.attention(
        query,
        paged(key, table, block_size),
        paged(value, table, block_size),
        0.1,
        num_keys=num_tokens,
        first_position=before,
        num_shared=0,
        block_table=table,
    )
    assert out is not None
    assert_close(out, *expected(query, key, value, 0.1, before, 0, native.isa))


def test_rows_beyond_the_keys_are_not_read(native: Native) -> None:
    """Would catch whole tiles loaded past num_keys: NaN there must not reach a result."""
    query, key, value = (random(50, 2, 64, seed=i) for i in range(3))
    right = expected(query, key, value, 0.1, 50, 0, native.isa)
    key, value = (
        torch.cat((x, torch.full((46, 2, 64), torch.nan).bfloat16())) for x in (key, value)
    )
    out = native.attention(query, key, value, 0.1, num_keys=50, first_position=50, num_shared=0)
    assert out is not None
    assert_close(out, *right)


@pytest.mark.parametrize("first", [1, 16, 33, 250, 300])
@pytest.mark.parametrize("growth", [0, 60])
def test_chunks_give_the_bits_of_the_whole(native: Native, first: int, growth: int) -> None:
    """Would catch a query whose maximum, and so its rounding, hangs on those beside it."""
    query, key, value = (random(333, 2, 80, seed=i) for i in range(3))
    key += torch.linspace(-growth, growth, 333)[:, None, None]
    query = query.abs() * torch.rand(333, 1, 1, generator=torch.Generator().manual_seed(4))
    query = query.bfloat16()

    def attend(start: int, end: int) -> Tensor:
        out = native.attention(
            query[start:end],
            key[:end],
            value[:end],
            0.1,
            num_keys=end,
            first_position=start,
            num_shared=0,
        )
        assert out is not None
        return out

    assert torch.equal(torch.cat((attend(0, first), attend(first, 333))), attend(0, 333))


@pytest.mark.parametrize("group", [2, 5, 16])
@pytest.mark.parametrize("num_queries", [1, 2, 3, 7])
def test_few_queries_of_many_heads(native: Native, num_queries: int, group: int) -> None:
    """Would catch heads that share the lanes with other queries and read or write their places."""
    fused = random(num_queries, group * 2 + 4, 88)
    key, value = random(290, 2, 88, seed=1), random(290, 2, 88, seed=2)
    check(native, fused[:, : group * 2], key, value, first_position=290 - num_queries)


@pytest.mark.parametrize("sign", [1, -1])
def test_scores_that_keep_growing(native: Native, sign: int) -> None:
    """Would catch a maximum that lags behind: overflow, or weights that all vanish."""
    growth = torch.linspace(-40, 40, 600)[:, None, None] * sign
    key = (random(600, 1, 32, seed=1) * 0.1 + growth).bfloat16()
    query = (random(40, 1, 32) * 0.1 + 1).bfloat16()
    check(native, query, key, random(600, 1, 32, seed=2), scale=1.0)


@pytest.mark.parametrize("factor", [0.0, 1e-30, 100.0, 1e4])
def test_scores_of_any_size(native: Native, factor: float) -> None:
    """Would catch overflow of the exponential: sharp scores pick one key, equal ones the mean."""
    query, key, value = (random(35, 2, 64, seed=i) for i in range(3))
    # Powers of two and few terms: such scores are exact in float32, however large.
    query = (query.sign() * factor).bfloat16()
    key = key.sign() * torch.tensor([2.0**i for i in range(5)] * 7)[:, None, None]
    check(native, query, key.bfloat16(), value, scale=0.125)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_number_of_threads(library: str, form: str, threads: int) -> None:
    """Would catch parts of the work that nobody, or that two workers do."""
    native = Native(library, form, threads)
    query, key, value = (random(333, 5, 48, seed=i) for i in range(3))
    check(native, query, key, value, first_position=0)
    check(native, query, key, value)
    check_decode(native, [1, 700, 33], group=16, kv_heads=2, dim=64)


def tables_for(lengths: Sequence[int], block_size: int) -> tuple[Tensor, int]:
    """Tables [num_rows, width] of shuffled blocks, and how many blocks the cache has: 3 more."""
    width = -(-max(lengths) // block_size)
    num_blocks = width * len(lengths) + 3
    blocks = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(5))
    return blocks[:-3].view(len(lengths), width), num_blocks


def check_decode(
    native: Native,
    lengths: Sequence[int],
    *,
    group: int,
    kv_heads: int,
    dim: int,
    block_size: int = 16,
) -> None:
    tables, num_blocks = tables_for(lengths, block_size)
    keys, values = (
        [random(n, kv_heads, dim, seed=2 * i + s) for i, n in enumerate(lengths)] for s in (1, 2)
    )
    query = random(len(lengths), group * kv_heads, dim)
    out = native.decode(
        query,
        laid_out(keys, tables, num_blocks, block_size, torch.nan),
        laid_out(values, tables, num_blocks, block_size, torch.nan),
        tables,
        torch.tensor(lengths),
        0.2,
    )
    assert out is not None
    for i, length in enumerate(lengths):
        right, allowed = expected(query[i : i + 1], keys[i], values[i], 0.2, length, 0, native.isa)
        assert_close(out[i : i + 1], right, allowed)


@pytest.mark.parametrize("block_size", [16, 32, 128])
@pytest.mark.parametrize(("group", "kv_heads"), [(16, 2), (1, 4), (2, 2), (5, 2), (32, 1), (40, 1)])
def test_decode_over_contexts_of_many_lengths(
    native: Native, group: int, kv_heads: int, block_size: int
) -> None:
    """Would catch a row that reads another's blocks, or NaN beyond the context that leaks in."""
    lengths = [1, 2, 15, 16, 17, 31, 33, 63, 65, 250, 511, 512, 513, 700]
    check_decode(native, lengths, group=group, kv_heads=kv_heads, dim=128, block_size=block_size)


@pytest.mark.parametrize("dim", [16, 64, 88, 100, 112])
@pytest.mark.parametrize("group", [1, 16])
def test_decode_of_any_head_dim(native: Native, group: int, dim: int) -> None:
    """Would catch padding of head dims that enters a result."""
    check_decode(native, [70, 5], group=group, kv_heads=2, dim=dim)


@pytest.mark.parametrize("group", [1, 16])
def test_decode_merges_the_chunks_of_a_long_context(native: Native, group: int) -> None:
    """Would catch chunks merged without regard to their maxima, or lost at the end."""
    check_decode(native, [2050, 3], group=group, kv_heads=1, dim=32)


def three_rows(group: int, kv_heads: int) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
    """A query, caches, tables and lengths: one short row between two long ones."""
    caches = [random(230 * 16, kv_heads, 128, seed=i).unflatten(0, (230, 16)) for i in (1, 2)]
    tables = torch.randperm(230, generator=torch.Generator().manual_seed(3))[:198].view(3, 66)
    tables = torch.cat((tables, tables), dim=1)
    return random(3, group * kv_heads, 128), caches, tables, torch.tensor([1500, 3, 2100])


@pytest.mark.parametrize(("group", "kv_heads"), [(16, 2), (1, 4)])
def test_a_row_decodes_alike_beside_others(native: Native, group: int, kv_heads: int) -> None:
    """Would catch chunks that hang on other rows: a text would change with its neighbours."""
    if native.isa == "amx":
        pytest.skip("its chunks are of all rows together: see docs/adr/0005")
    query, caches, tables, lengths = three_rows(group, kv_heads)
    together = native.decode(query, *caches, tables, lengths, 0.1)
    assert together is not None
    for i in range(3):
        one = slice(i, i + 1)
        alone = native.decode(query[one], *caches, tables[one], lengths[one], 0.1)
        assert alone is not None
        assert torch.equal(alone, together[one])


@pytest.mark.parametrize(("group", "kv_heads"), [(16, 2), (1, 4)])
def test_a_row_decodes_alike_whatever_others_of_their_lengths_hold(
    native: Native, group: int, kv_heads: int
) -> None:
    """Would catch a row that hangs on its neighbours' values or on its place among them.

    With tiles too, where it may hang on how many tokens they have together.
    """
    query, caches, tables, lengths = three_rows(group, kv_heads)
    before = native.decode(query, *caches, tables, lengths, 0.1)
    assert before is not None
    for i in range(3):
        others = random(3, group * kv_heads, 128, seed=i + 7) * 5
        others[i] = query[i]
        order = torch.tensor([2, 0, 1])
        after = native.decode(others[order], *caches, tables[order], lengths[order], 0.1)
        assert after is not None
        assert torch.equal(after[order == i], before[i : i + 1])


@pytest.mark.parametrize(("dim", "block_size"), [(32, 16), (96, 8), (128, 24), (128, 12)])
@pytest.mark.parametrize("group", [1, 7, 16, 33])
def test_decode_of_any_block_size(native: Native, group: int, dim: int, block_size: int) -> None:
    """Would catch tokens taken to lie together where a block ends between them."""
    lengths = [1, 9, 63, 65, 250]
    check_decode(native, lengths, group=group, kv_heads=3, dim=dim, block_size=block_size)


@pytest.mark.parametrize("group", [1, 16])
def test_decode_of_scores_that_keep_growing(native: Native, group: int) -> None:
    """Would catch a maximum that lags behind, within a chunk or between chunks."""
    num_tokens, dim = 1100, 32
    growth = torch.linspace(-40, 40, num_tokens)[:, None, None]
    key = (random(num_tokens, 1, dim, seed=1) * 0.1 + growth).bfloat16()
    value = random(num_tokens, 1, dim, seed=2)
    query = (random(1, group, dim) * 0.1 + 1).bfloat16()
    table = torch.arange(-(-num_tokens // 16))
    caches = (paged(x, table, 16) for x in (key, value))
    out = native.decode(query, *caches, table[None], torch.tensor([num_tokens]), 1.0)
    assert out is not None
    assert_close(out, *expected(query, key, value, 1.0, num_tokens, 0, native.isa))


# --- a cache in int8 ---


class Rounded:
    """Keys or values of one sequence in int8, and what they are once widened: float64."""

    def __init__(self, num_tokens: int, kv_heads: int, dim: int, seed: int) -> None:
        tokens = random(num_tokens, kv_heads, dim, seed=seed).float()
        sizes = torch.logspace(-1, 1, kv_heads)[:, None]  # each head has its own scale
        self.values, self.scales = rounded_heads((tokens * sizes / sizes.mean()).bfloat16())
        self.wide = self.values.double() * self.scales[..., None].double()

    def paged(self, table: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
        """As `paged` above."""
        return rounded_caches([self], table[None], len(table), block_size)


def rounded_caches(
    rows: Sequence[Rounded], tables: Tensor, num_blocks: int, block_size: int
) -> tuple[Tensor, Tensor]:
    """Values and scales as `laid_out`; every other slot is as far off as can be."""
    place = tables, num_blocks, block_size
    return (
        laid_out([row.values for row in rows], *place, filler=127),
        laid_out([row.scales for row in rows], *place, filler=torch.nan),
    )


def expected_of_rounded(
    query: Tensor, key: Tensor, value: Tensor, scale: float, first: int, num_shared: int
) -> tuple[Tensor, Tensor]:
    """As `expected`, of float64 keys and values that a kernel may round to bfloat16."""
    out, allowed = expected(query, key, value, scale, first, num_shared)
    group = query.shape[1] // key.shape[1]
    k, v = (x.repeat_interleave(group, 1).transpose(0, 1).abs() for x in (key, value))
    # A score that is off by e makes its weight, and the total, wrong by e in parts of themselves.
    scores = (query.double().abs().transpose(0, 1) @ k.transpose(1, 2)).amax(-1) * scale
    error = WIDENED_ERROR * (1 + 2 * scores.transpose(0, 1)[..., None])
    return out, allowed + error * v.amax(1)


def check_rounded(
    native: Native,
    num_queries: int,
    before: int,
    *,
    num_shared: int = 0,
    group: int = 1,
    kv_heads: int = 2,
    dim: int = 128,
    block_size: int = 16,
) -> None:
    num_keys = num_queries + before
    key, value = (Rounded(num_keys, kv_heads, dim, seed) for seed in (1, 2))
    count = -(-num_keys // block_size) + 3
    table = torch.randperm(count, generator=torch.Generator().manual_seed(3))
    keys, values = (part.paged(table, block_size) for part in (key, value))
    query = random(num_queries, group * kv_heads, dim)
    out = native.attention(
        query,
        keys[0],
        values[0],
        dim**-0.5,
        num_keys=num_keys,
        first_position=before,
        num_shared=num_shared,
        block_table=table,
        scales=(keys[1], values[1]),
    )
    assert out is not None
    right = expected_of_rounded(query, key.wide, value.wide, dim**-0.5, before, num_shared)
    assert_close(out, *right)


@pytest.mark.parametrize("block_size", [16, 32, 24])
@pytest.mark.parametrize(("num_queries", "before"), [(1, 0), (16, 0), (17, 300), (45, 3), (70, 26)])
def test_int8_keys_in_any_order(
    native: Native, num_queries: int, before: int, block_size: int
) -> None:
    """Would catch a scale of another token, and what lies in unused slots leaking out."""
    check_rounded(native, num_queries, before, block_size=block_size)


@pytest.mark.parametrize("dim", [16, 20, 88, 100, 112, 127, 128])
@pytest.mark.parametrize("group", [1, 16])
def test_int8_keys_of_any_head_dim(native: Native, group: int, dim: int) -> None:
    """Would catch bytes read beyond a head, which are its neighbour's, or one scale for all."""
    check_rounded(native, 19, 20, group=group, dim=dim)


@pytest.mark.parametrize("num_shared", [1, 31, 64])
def test_int8_keys_of_a_shared_prefix(native: Native, num_shared: int) -> None:
    """Would catch a bidirectional prompt that is cut causally where the cache is int8."""
    check_rounded(native, 64, 0, num_shared=num_shared, kv_heads=3, dim=88)


@pytest.mark.parametrize("first", [1, 16, 33, 250])
def test_int8_chunks_give_the_bits_of_the_whole(native: Native, first: int) -> None:
    """Would catch widening that hangs on how many keys a call has."""
    key, value = (Rounded(300, 2, 80, seed) for seed in (1, 2))
    table = torch.arange(300 // 16 + 1)
    keys, values = (part.paged(table, 16) for part in (key, value))
    query = random(300, 4, 80)

    def attend(start: int, end: int) -> Tensor:
        out = native.attention(
            query[start:end],
            keys[0],
            values[0],
            0.1,
            num_keys=end,
            first_position=start,
            num_shared=0,
            block_table=table,
            scales=(keys[1], values[1]),
        )
        assert out is not None
        return out

    assert torch.equal(torch.cat((attend(0, first), attend(first, 300))), attend(0, 300))


def check_decode_rounded(
    native: Native,
    lengths: Sequence[int],
    *,
    group: int,
    kv_heads: int,
    dim: int,
    block_size: int = 16,
) -> None:
    tables, num_blocks = tables_for(lengths, block_size)
    keys, values = (
        [Rounded(n, kv_heads, dim, 2 * i + s) for i, n in enumerate(lengths)] for s in (1, 2)
    )
    (key_cache, key_scales), (value_cache, value_scales) = (
        rounded_caches(rows, tables, num_blocks, block_size) for rows in (keys, values)
    )
    query = random(len(lengths), group * kv_heads, dim)
    scales = key_scales, value_scales
    out = native.decode(query, key_cache, value_cache, tables, torch.tensor(lengths), 0.1, scales)
    assert out is not None
    for i, length in enumerate(lengths):
        one = slice(i, i + 1)
        right = expected_of_rounded(query[one], keys[i].wide, values[i].wide, 0.1, length, 0)
        assert_close(out[one], *right)


@pytest.mark.parametrize("block_size", [24, 32])
@pytest.mark.parametrize(("group", "kv_heads"), [(16, 2), (1, 11), (2, 2), (5, 2), (40, 1)])
def test_decode_over_int8_contexts_of_many_lengths(
    native: Native, group: int, kv_heads: int, block_size: int
) -> None:
    """Would catch a scale of another token or head, or one beyond the context, which is NaN."""
    lengths = [1, 2, 7, 8, 9, 16, 17, 33, 250, 512, 513]
    check_decode_rounded(
        native, lengths, group=group, kv_heads=kv_heads, dim=128, block_size=block_size
    )


@pytest.mark.parametrize("dim", [16, 32, 64, 88, 100, 112])
@pytest.mark.parametrize("group", [1, 3, 16])
def test_int8_decode_of_any_head_dim(native: Native, group: int, dim: int) -> None:
    """Would catch padding of head dims that enters a result."""
    check_decode_rounded(native, [70, 5], group=group, kv_heads=2, dim=dim)


@pytest.mark.parametrize("group", [1, 16])
def test_int8_decode_merges_the_chunks_of_a_long_context(native: Native, group: int) -> None:
    """Would catch chunks merged without regard to their maxima, or lost at the end."""
    check_decode_rounded(native, [2050, 3], group=group, kv_heads=1, dim=32)
