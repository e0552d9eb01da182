"""The original VisualGLM layout, against bytes computed by hand and the formula written out."""

from __future__ import annotations

import pytest
import torch

from glimt.quant.base import all_formats, unpack_nibbles

INT8, INT4 = (all_formats()[f"visualglm-int{bits}"] for bits in (8, 4))


def original_int4(row: list[float]) -> tuple[list[int], float]:
    """One row as the original packs it: signed bytes and the scale."""
    scale = torch.tensor(max(map(abs, row)) / 7).half().item()
    q = [round(w / scale) for w in row]  # Python rounds half to even, as torch does
    packed = [((a << 4) | (b & 15)) & 255 for a, b in zip(q[::2], q[1::2], strict=True)]
    return [byte - 256 if byte > 127 else byte for byte in packed], scale


def test_four_bit_bytes_by_hand():
    """Catches the halves in the kernels' order, and unsigned nibbles: the original's are signed,
    the even column in the high half.
    """
    # q = 7, -7, 1, -1, 0, 3 with scale 0.5: bytes 0x79, 0x1F, 0x03.
    row = torch.tensor([[3.5, -3.5, 0.5, -0.5, 0.0, 1.5]])
    parts = INT4.parts(INT4.quantise(row))
    assert parts[""].tolist() == [[0x79, 0x1F, 0x03]]
    assert parts["_scale"].tolist() == [0.5]
    back = INT4.restore({"": torch.tensor([[0x79, 0x1F, 0x03]], dtype=torch.int8),
                         "_scale": torch.tensor([0.5], dtype=torch.float16)}, 1, 6)  # fmt: skip
    assert torch.equal(back.dequantise(), row)
    assert unpack_nibbles(back.values)[0, :6].tolist() == [15, 1, 9, 7, 8, 11]


def test_negative_bytes_by_hand():
    """Catches a shift that does not carry the sign of the high half."""
    byte = 0x87 - 256  # high half -8, low half 7
    parts = {
        "": torch.tensor([[byte]], dtype=torch.int8),
        "_scale": torch.tensor([2.0], dtype=torch.float16),
    }
    assert INT4.restore(parts, 1, 2).dequantise().tolist() == [[-16.0, 14.0]]


@pytest.mark.parametrize("k", [2, 96, 130, 256])
def test_four_bits_follow_the_formula(k):
    """Catches another rounding or scale than the original's, and columns lost where k is no
    multiple of the kernels' group.
    """
    exact = torch.randn(5, k, generator=torch.Generator().manual_seed(k))
    parts = INT4.parts(INT4.quantise(exact))
    for row, packed, scale in zip(exact, parts[""], parts["_scale"], strict=True):
        wanted, wanted_scale = original_int4(row.tolist())
        assert packed.tolist() == wanted
        assert scale.item() == wanted_scale


def test_eight_bits_are_the_kernels_own_form():
    """Catches scales that are left in float16, and a needless change of the values."""
    exact = torch.randn(3, 40, generator=torch.Generator().manual_seed(1))
    quantised = INT8.quantise(exact)
    scales = (exact.abs().amax(1) / 127).half()
    assert torch.equal(quantised.scales, scales.float())
    wanted = (exact / scales.float()[:, None]).round().clamp(-128, 127)
    assert torch.equal(quantised.values.float(), wanted)
    assert INT8.parts(quantised)["_scale"].dtype == torch.float16


def test_every_pair_of_nibbles_survives():
    """Catches any of the 256 bytes that reading and writing would change."""
    every = torch.arange(-128, 128).to(torch.int8).view(1, 256)
    parts = {"": every, "_scale": torch.tensor([0.25], dtype=torch.float16)}
    back = INT4.restore(parts, 1, 512)
    assert torch.equal(INT4.parts(back)[""], every)
    high = torch.div(every.int(), 16, rounding_mode="floor")
    low = (every.int() & 15) - 16 * ((every.int() & 15) > 7).int()
    signed = torch.stack((high, low), -1).flatten(1)
    assert torch.equal(back.dequantise(), signed.float() * 0.25)
