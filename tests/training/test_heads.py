"""The heads that are thrown away, and the optimizer: what they learn from is what is there."""

from __future__ import annotations

import torch
from training.data.layout import (
    COLOUR_NAMES,
    GROUND_NAMES,
    NUM_OBJECT_KINDS,
    SHAPE_NAMES,
    character_kind,
    ground_kind,
    object_kind,
)
from training.data.scene import Object
from training.data.texts import CHARACTERS
from training.heads import KindHeads, Painter, parts_of
from training.initial import places
from training.optimizers import Muon, orthogonalised


def thing(shape: str, colour: str, is_large: bool) -> Object:
    return Object(shape, colour, is_large, 0.5, 0.5, 0.2, 0.0)


def test_a_kind_is_taken_apart_into_what_it_was_made_of() -> None:
    """Catches a colour taught as a size, or a character taught as a shape."""
    kinds = [
        object_kind(thing(s, c, bool(z))) for s in SHAPE_NAMES for c in COLOUR_NAMES for z in (0, 1)
    ]
    assert kinds == list(range(1, NUM_OBJECT_KINDS + 1))
    parts = parts_of(torch.tensor(kinds))
    expected = [
        (1 + i, j, size)
        for i in range(len(SHAPE_NAMES))
        for j in range(len(COLOUR_NAMES))
        for size in (0, 1)
    ]
    found = zip(parts.thing.tolist(), parts.colour.tolist(), parts.size.tolist(), strict=True)
    assert list(found) == expected
    assert set(parts.ground.tolist()) == {-1}


def test_what_is_not_there_teaches_nothing() -> None:
    """Catches a background or a character that counts as an object, and unknown as nothing."""
    last = len(CHARACTERS) - 1
    kinds = [-1, 0, ground_kind("white"), ground_kind(GROUND_NAMES[-1]), character_kind(0),
             character_kind(last)]  # fmt: skip
    parts = parts_of(torch.tensor(kinds))
    first = 1 + len(SHAPE_NAMES)
    assert parts.thing.tolist() == [-1, 0, 0, 0, first, first + last]
    assert parts.ground.tolist() == [-1, -1, 0, len(GROUND_NAMES) - 1, -1, -1]
    assert set(parts.colour.tolist()) == set(parts.size.tolist()) == {-1}


def test_pictures_of_unknown_layout_have_no_loss_and_no_gradient() -> None:
    """Catches a garment whose patches are taught to show nothing."""
    torch.manual_seed(0)
    heads = KindHeads(8)
    states = torch.randn(2, 4, 8, requires_grad=True)
    unknown = torch.full((2, 4), -1)
    loss, share = heads(states, unknown, unknown)
    loss.backward()
    assert loss.item() == share.item() == 0
    assert states.grad is not None
    assert not states.grad.any()


def test_the_middle_of_an_object_is_taught_where_it_is() -> None:
    """Catches middles of another picture or place, and a loss that the head's scores ignore."""
    heads = KindHeads(2)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.zero_()
        heads.middle.weight[1, 0] = 5.0  # says "middle" of what is large in its first number
    states = torch.tensor([[[1.0, -1.0], [-1.0, 1.0], [-1.0, 1.0]]])
    nothing_known = torch.full((1, 3), -1)

    def loss(middles: list[int]) -> float:
        return heads(states, nothing_known, torch.tensor([middles]))[0].item()

    assert loss([1, 0, 0]) < 0.1 < 1 < loss([0, 1, 0])
    assert loss([1, 0, -1]) < loss([1, 0, 1])


def test_the_painter_gives_every_place_its_own_answer_whatever_the_order_of_the_features() -> None:
    """Catches a head that could cheat: features are a set, and only the place is asked with."""
    torch.manual_seed(0)
    painter = Painter(12, 9)
    features = torch.randn(2, 5, 12)
    painted = painter(features)
    assert painted.shape[:2] == (2, 9)
    assert torch.allclose(painted, painter(features[:, [3, 0, 4, 1, 2]]), atol=1e-5)
    assert not torch.allclose(painted[:, 0], painted[:, 1], atol=1e-3)


def test_no_two_places_are_alike() -> None:
    """Catches rows mistaken for columns in the first positions of a tower."""
    grid = places(17, 16)
    assert grid.shape == (17, 16)
    assert not grid[0].any()
    distance = torch.cdist(grid, grid) + torch.eye(17)
    assert float(distance.min()) > 0.1
    across, down = grid[2] - grid[1], grid[5] - grid[1]
    assert across[:8].any()
    assert not across[8:].any()
    assert down[8:].any()
    assert not down[:8].any()


def test_orthogonalised_matrices_keep_their_directions_and_lose_their_sizes() -> None:
    """Catches a transposed product: singular vectors stay, singular values come near 1."""
    torch.manual_seed(0)
    for shape in ((3, 6, 10), (3, 10, 6)):
        matrices = torch.randn(shape)
        u, _, v = torch.linalg.svd(matrices, full_matrices=False)
        inner = u.mT @ orthogonalised(matrices) @ v.mT
        values = torch.diagonal(inner, dim1=-2, dim2=-1)
        assert ((values > 0.5) & (values < 1.4)).all()
        assert (inner - torch.diag_embed(values)).abs().max() < 0.1  # bfloat16 products


def test_muon_treats_matrices_of_one_shape_each_by_itself() -> None:
    """Catches a batch in which one matrix's gradient moves another."""
    torch.manual_seed(0)
    values, gradients = torch.randn(2, 4, 6), torch.randn(2, 4, 6)

    def moved(chosen: list[int]) -> list[torch.Tensor]:
        matrices = [torch.nn.Parameter(values[i].clone()) for i in chosen]
        optimizer = Muon([{"params": matrices, "lr": 0.1, "scale": 1.0}], weight_decay=0.1)
        for _ in range(2):
            for matrix, i in zip(matrices, chosen, strict=True):
                matrix.grad = gradients[i].clone()
            optimizer.step()
        return [matrix.detach() for matrix in matrices]

    together = moved([0, 1])
    for i in (0, 1):
        torch.testing.assert_close(together[i], moved([i])[0], atol=1e-3, rtol=0)
        assert not torch.allclose(together[i], values[i], atol=1e-2)
