"""What every stage of a model makes of one request: pixels, tower, features, layers, logits.

Watches a model from outside, by hooks; a family that is built of the parts that models/base.py
names needs to do nothing for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from glimt.models.base import VISION_MODULES, Model
from glimt.types import ImageInput

ROWS = 64  # kept of a stage's output in one call, evenly spread over it
PIXELS, PATCHES, EMBEDDINGS, ROTARY = "pixels", "patches", "embeddings", "rotary"

StageRows: TypeAlias = dict[str, Tensor]  # [num_rows, width] float32 on the CPU, in order of use


@contextmanager
def watching(model: Model) -> Iterator[StageRows]:
    """Keep what comes out of every part of the model, while inside; complete at the end."""
    pieces: dict[str, list[Tensor]] = {}
    rows: StageRows = {}
    with ExitStack() as hooks:
        hooks.callback(setattr, model, "is_repeatable", model.is_repeatable)
        model.is_repeatable = False  # a recording that a device replays calls no hook
        for handle in _hooks(model, pieces):
            hooks.callback(handle.remove)
        yield rows
    rows |= {name: torch.cat(parts) for name, parts in pieces.items()}


def pixel_rows(images: Sequence[ImageInput]) -> StageRows:
    """The stage before the model: some lines of each resized picture, [num_pixels, 3], 0 to 255."""
    lines = [picked(torch.tensor(image.pixels).flatten(1)) for image in images]
    return {PIXELS: torch.cat([line.reshape(-1, 3) for line in lines])} if lines else {}


def picked(output: Tensor) -> Tensor:
    """At most ROWS rows of [..., width], evenly spread, as float32 on the CPU."""
    rows = output.detach().reshape(-1, output.shape[-1])
    if len(rows) > ROWS:
        rows = rows[torch.linspace(0, len(rows) - 1, ROWS).long().to(rows.device)]
    return rows.to("cpu", torch.float32, copy=True)


# --- hooks -----------------------------------------------------------------------------------


def _hooks(model: Model, pieces: dict[str, list[Tensor]]) -> Iterator[Any]:
    def keep(name: str) -> Callable[[Tensor], None]:
        return lambda output: pieces.setdefault(name, []).append(picked(output))

    for name, module in _vision_stages(model):
        if name == PATCHES:
            yield _before(module, 0, keep(name))
        else:
            yield _after(module, keep(name))
    yield _before(model.blocks[0], 0, keep(EMBEDDINGS))
    yield _before(model.blocks[0], 1, keep(ROTARY))
    for i, block in enumerate(model.blocks):
        yield _after(block, keep(f"blocks.{i}"))
    yield _after(model.final_norm, keep("final_norm"))
    yield _after(model.head, keep("logits"))


def _vision_stages(model: Model) -> Iterator[tuple[str, nn.Module]]:
    """The tower's parts, then whatever else only pictures pass through."""
    parts = dict(model.named_children())
    if tower := parts.get("tower"):
        if embed := getattr(tower, "embed", None):
            yield PATCHES, embed
            yield "tower.embed", embed
        for i, block in enumerate(getattr(tower, "blocks", ())):
            yield f"tower.blocks.{i}", block
    for name, module in parts.items():
        if name in VISION_MODULES and name != "tower":
            yield name, module


def _after(module: nn.Module, keep: Callable[[Tensor], None]) -> Any:
    def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
        keep(output)

    return module.register_forward_hook(hook)


def _before(module: nn.Module, place: int, keep: Callable[[Tensor], None]) -> Any:
    """Keep an argument; cosines and sines come as a pair and are kept side by side."""

    def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        given = inputs[place]
        keep(given if isinstance(given, Tensor) else torch.cat([*given], dim=-1))

    return module.register_forward_pre_hook(hook)
