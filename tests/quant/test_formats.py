"""quant/: every format against the definition of its numbers, by hand and in float64."""

from __future__ import annotations

import pytest
import torch

from glimt.errors import ConfigError
from glimt.quant.base import (
    QuantFormat,
    QuantisedWeight,
    all_formats,
    by_rows,
    find_format,
    pack_nibbles,
    unpack_nibbles,
)
from glimt.quant.int4 import Int4

FORMATS = all_formats()
INT4 = [name for name, one in FORMATS.items() if isinstance(one, Int4)]
every_format = pytest.mark.parametrize("name", FORMATS)
# n, k: neither k is a multiple of every group; one row; k smaller than any group.
SHAPES = [(7, 96), (1, 192), (33, 130), (5, 16)]


def weight(n: int, k: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(n, k, generator=generator)
    return rows * torch.logspace(-3, 1, n)[:, None]  # rows of very different size


def plain(quantised: QuantisedWeight) -> torch.Tensor:
    """What the kernels' PlainWeight says of its fields, element by element, in float64."""
    out = torch.zeros(quantised.n, quantised.k, dtype=torch.float64)
    for row in range(quantised.n):
        for column in range(quantised.k):
            if quantised.format == "int8":
                q, scale = quantised.values[row, column].item(), quantised.scales[row].item()
                out[row, column] = q * scale
                continue
            byte = quantised.values[row, column // 2].item()
            q = byte >> 4 if column % 2 else byte & 15
            at = row, column // quantised.group
            out[row, column] = q * quantised.scales[at].item() + quantised.offsets[at].item()
    return out


@every_format
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_dequantise_is_what_the_kernels_are_told(name, n, k):
    """Catches swapped nibbles, a scale of the neighbouring group, and a cut that is off by one."""
    quantised = FORMATS[name].quantise(weight(n, k))
    assert (quantised.n, quantised.k) == (n, k)
    torch.testing.assert_close(
        quantised.dequantise().double(), plain(quantised), atol=0, rtol=2**-22
    )


def largest_step(chosen: QuantFormat, quantised: QuantisedWeight) -> torch.Tensor:
    """[n, k]: the width of a step at each weight."""
    scales = quantised.scales.abs()
    if quantised.format == "int8":
        return scales[:, None].expand(-1, quantised.k)
    return scales.repeat_interleave(quantised.group, 1)[:, : quantised.k]


@every_format
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_the_error_is_that_of_rounding(name, n, k):
    """Catches a scale of another row, truncation in place of rounding, and lost extremes."""
    exact = weight(n, k)
    quantised = FORMATS[name].quantise(exact)
    error = (quantised.dequantise() - exact).abs()
    step = largest_step(FORMATS[name], quantised)
    if name in INT4:  # a narrower scale may cut off the extremes, but only to lessen the rest
        widest = exact.abs().amax(1, keepdim=True) / 7
        assert (error.square().mean(1) <= (widest[:, 0] / 2).square()).all()
        assert (error <= step / 2 * 1.01).float().mean() > 0.9
    else:
        assert (error <= step / 2 * 1.01).all()


@pytest.mark.parametrize("name", INT4)
def test_the_scale_search_beats_the_widest_scale(name):
    """Catches a search that keeps the last scale it tried, or the worst one."""
    exact = weight(64, 256)
    chosen = FORMATS[name]
    quantised = chosen.quantise(exact)
    groups = exact.view(64, -1, quantised.group)
    if chosen.has_offsets:
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        scale = (high - low) / 15
        nearest = ((groups - low) / scale).round() * scale + low
    else:
        scale = groups.abs().amax(-1, keepdim=True) / 7
        nearest = (groups / scale).round() * scale
    ours = (quantised.dequantise() - exact).square().view_as(groups).sum(-1)
    theirs = (nearest - groups).square().sum(-1)
    # Group by group a scale that is not tried may be better by chance; over many it is not.
    assert (ours <= theirs * 1.25).all()
    assert ours.sum() < 0.95 * theirs.sum()


@every_format
def test_zeros_stay_zeros(name):
    """Catches 0 / 0 in a row, or group, of zeros."""
    exact = weight(4, 192)
    exact[1] = 0
    exact[2, :128] = 0
    back = FORMATS[name].quantise(exact).dequantise()
    assert torch.isfinite(back).all()
    assert not back[1].any()
    assert not back[2, :128].any() or FORMATS[name].quantise(exact).group == 0


@pytest.mark.parametrize("name", [name for name in INT4 if not FORMATS[name].has_offsets])
def test_padding_columns_stand_for_zero(name):
    """Catches a padded group whose unused columns hold what the kernels would add."""
    quantised = FORMATS[name].quantise(weight(3, 80))
    assert quantised.padded_k % quantised.group == 0
    whole = QuantisedWeight(
        "int4", quantised.values, quantised.scales, quantised.offsets, quantised.group,
        3, quantised.padded_k,
    )  # fmt: skip
    assert not whole.dequantise()[:, 80:].any()


@every_format
@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_files_lose_nothing(name, n, k, dtype):
    """Catches scales that are rounded on their way into a file, and parts of another shape."""
    chosen = FORMATS[name]
    quantised = chosen.quantise(weight(n, k).to(dtype))
    parts, stored = chosen.parts(quantised), chosen.stored(n, k)
    assert {e: (p.shape, p.dtype) for e, p in parts.items()} == {
        e: (s.shape, s.dtype) for e, s in stored.items()
    }
    assert sum(p.nbytes for p in parts.values()) == sum(s.nbytes for s in stored.values())
    back = chosen.restore(parts, n, k)
    assert torch.equal(back.values, quantised.values)
    assert torch.equal(back.scales, quantised.scales)
    assert torch.equal(back.dequantise(), quantised.dequantise())
    assert back.quantises_x == chosen.quantises_x == quantised.quantises_x


# Its files hold the halves of a byte in the other order.
@pytest.mark.parametrize("name", sorted(FORMATS.keys() - {"visualglm-int4"}))
def test_loaded_values_are_the_mapped_file(name):
    """Catches a loader that copies gigabytes which could have stayed in the file."""
    chosen = FORMATS[name]
    parts = chosen.parts(chosen.quantise(weight(8, 128)))
    values = next(iter(parts.values()))
    assert chosen.restore(parts, 8, 128).values.data_ptr() == values.data_ptr()


def test_nibbles_by_hand():
    """Catches the other order of the halves: the kernels read the even column in the low one."""
    steps = torch.tensor([[1, 2, 15, 0], [8, 7, 3, 12]])
    packed = pack_nibbles(steps)
    assert packed.tolist() == [[0x21, 0x0F], [0x78, 0xC3]]
    assert unpack_nibbles(packed).tolist() == steps.tolist()


def test_int8_by_hand():
    """Catches -128, truncation, and a scale over 128."""
    exact = torch.tensor([[12.7, -12.7, 6.34, 0.0]])
    quantised = FORMATS["int8"].quantise(exact)
    assert quantised.values.tolist() == [[127, -127, 63, 0]]
    assert quantised.scales.tolist() == pytest.approx([0.1])
    assert quantised.nbytes == 4 + 4


def test_int4_by_hand():
    """Catches a sign of the scale that loses the largest weight: eight steps are on its side."""
    row = torch.zeros(1, 32)
    row[0, :5] = torch.tensor([8.0, -7.0, 3.0, 1.0, -4.0])
    quantised = FORMATS["int4-g32"].quantise(row)
    assert quantised.scales.tolist() == [[-1.0]]
    assert quantised.offsets.tolist() == [[8.0]]
    assert quantised.values[0, :3].tolist() == [0xF0, 0x75, 0x8C]
    assert torch.equal(quantised.dequantise(), row)


def test_w8a8_weights_are_those_of_int8():
    """Catches a second way to round the same weights."""
    exact = weight(9, 70)
    ours, plain_int8 = FORMATS["w8a8"].quantise(exact), FORMATS["int8"].quantise(exact)
    assert torch.equal(ours.values, plain_int8.values)
    assert (ours.quantises_x, plain_int8.quantises_x) == (True, False)


def test_chunks_of_rows_are_joined_in_order(monkeypatch):
    """Catches rows lost or swapped where a large weight is quantised chunk by chunk."""
    exact = weight(10, 4)
    monkeypatch.setattr("glimt.quant.base._CHUNK_ELEMENTS", 12)
    (joined, sizes) = by_rows(exact, lambda rows: (rows * 2, torch.tensor([len(rows)])))
    assert torch.equal(joined, exact * 2)
    assert sizes.tolist() == [3, 3, 3, 1]


def test_an_unknown_format_is_named_with_the_known_ones():
    """Catches a KeyError in the face of a typo."""
    with pytest.raises(ConfigError, match=r"quant_tower: 'int5' is unknown; choose one of .*int8"):
        find_format("int5", "quant_tower")
    assert find_format("none") is None


def test_every_head_format_exists():
    """Catches a format whose head names one that was renamed."""
    assert all(chosen.head in FORMATS for chosen in FORMATS.values())
