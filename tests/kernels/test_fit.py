"""Rounding to four bits: every instruction set against plain torch, and against each other."""

import pytest
import torch

from glimt.kernels.choose import usable_isas
from glimt.kernels.native import Native, fit_groups
from glimt.quant.base import unpack_nibbles
from glimt.quant.int4 import plain_fit

every_kind = pytest.mark.parametrize("has_offsets", [False, True], ids=["symmetric", "asymmetric"])
every_group = pytest.mark.parametrize("group", [32, 64, 128])


def groups_of(group: int) -> torch.Tensor:
    """Of every size and shape: even, with an outlier, of one sign, with few values, zero."""
    rows = torch.randn(301, group, generator=torch.Generator().manual_seed(group))
    rows *= torch.logspace(-6, 4, 301)[:, None]
    rows[7, 3] *= 50
    rows[8] = rows[8].abs()
    rows[9] = rows[9].sign() * 0.5
    rows[10] = 0
    rows[11] = 0.25
    return rows


def squared_error(groups: torch.Tensor, fitted: tuple[torch.Tensor, ...]) -> torch.Tensor:
    values, scales, offsets = fitted
    steps = unpack_nibbles(values).double()
    made = steps * scales[:, None].double() + offsets[:, None].double()
    return (made - groups).square().sum(1)


@every_kind
@every_group
def test_a_group_is_fitted_as_well_as_plain_torch_does(native, group, has_offsets):
    """Catches a trial left out, a sign lost, and steps that are not the scale's nearest."""
    groups = groups_of(group)
    ours, plain = fit_groups(groups, has_offsets), plain_fit(groups, has_offsets)
    assert ours is not None
    wanted = squared_error(groups, plain)
    # Sums in another order decide between two all but equally good scales.
    assert (squared_error(groups, ours) <= wanted * 1.001 + 1e-30).all()
    same = (ours[1] == plain[1]) & (ours[2] == plain[2])
    assert same.double().mean() > 0.99
    assert torch.equal(ours[0][same], plain[0][same])


@every_kind
def test_scales_and_offsets_are_exact_in_bfloat16(native, has_offsets):
    """Catches a file that holds other numbers than the weights were rounded for."""
    fitted = fit_groups(groups_of(64), has_offsets)
    for part in fitted[1:]:
        assert torch.equal(part, part.bfloat16().float())
    if not has_offsets:
        assert torch.equal(fitted[2], -8 * fitted[1])


@every_kind
@every_group
def test_every_instruction_set_gives_the_same_bits(library, group, has_offsets):
    """Catches a checkpoint that depends on the machine it was quantised on."""
    groups = groups_of(group)
    found = []
    for isa in usable_isas():
        for threads in (1, 3):
            Native(library, isa, threads)
            found.append(fit_groups(groups, has_offsets))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_no_groups_are_no_work(native):
    """Catches a call on an empty matrix that never returns."""
    values, scales, offsets = fit_groups(torch.empty(0, 64), has_offsets=False)
    assert (values.shape, scales.shape, offsets.shape) == ((0, 32), (0,), (0,))
