"""glimt against the published code's own way of computing, on plain torch.

usage: python -m benchmarks.peers.original glm-4v-9b --layers 4 --vision-layers 4 [--quant w8a8]

An engine and the original's computation (original_glm4v.py, original_visualglm.py) with the same
random weights in one process. They answer the same request by turns, each time with a picture
nobody has seen. Printed: median seconds and, of each pair of neighbours, the ratio; then one JSON
line. The original has no quantisation here: what is compared is a choice that a user has. It gets
glimt's setting that freed memory is kept, which helps it, and its answer is argmax alone, without
the sampling that `generate` does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image
from torch import Tensor

from benchmarks.peers import by_turns
from benchmarks.peers.by_turns import FIGURES, Seconds
from benchmarks.peers.original_glm4v import OriginalGlm4v
from benchmarks.peers.original_visualglm import OriginalVisualGlm
from glimt.checkpoint import Checkpoint, open_reader
from glimt.models.pixels import CLIP_MEAN, CLIP_STD

Original = OriginalGlm4v | OriginalVisualGlm

MODELS: Mapping[str, Callable[[Any], Original]] = {  # by family
    "glm4v_9b": OriginalGlm4v,
    "visualglm": OriginalVisualGlm,
}


def load(family: str, config: Any, checkpoint: Checkpoint, dtype: torch.dtype) -> Original:
    """The family's original with a checkpoint's weights, all in one dtype."""
    with torch.device("meta"):
        model = MODELS[family](config)
    wanted = model.state_dict().keys()
    weights: dict[str, Tensor] = {}
    for file in checkpoint.files:
        names = [n for n, info in checkpoint.tensors.items() if info.file == file and n in wanted]
        with (checkpoint.open_reader or open_reader)(file) as read:
            weights |= {name: read(name).to(dtype) for name in names}
    model.load_state_dict(weights, assign=True)
    return model.eval().requires_grad_(False)


def pixels_of(picture: Image.Image, side: int, dtype: torch.dtype) -> Tensor:
    """Resized, scaled and normalised as torchvision's transforms do: [1, 3, side, side]."""
    resized = picture.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
    x = torch.from_numpy(np.array(resized)).permute(2, 0, 1).contiguous().float().div(255)
    x = x.sub_(torch.tensor(CLIP_MEAN)[:, None, None]).div_(torch.tensor(CLIP_STD)[:, None, None])
    return x.unsqueeze(0).to(dtype)


@torch.inference_mode()
def answer(
    model: Original, ids: Sequence[int], picture: Image.Image, num_tokens: int, dtype: torch.dtype
) -> tuple[list[int], Seconds]:
    """The likeliest tokens after a prompt, and what they cost.

    ids: the prompt as the original writes it
    """
    began = time.perf_counter()
    pixels = pixels_of(picture, model.side, dtype)
    ready = time.perf_counter()
    features = model.image_features(pixels)
    seen = time.perf_counter()
    logits, past = model.prefill(ids, features)
    chosen = [int(logits[0, -1].argmax())]
    first = time.perf_counter()
    for i in range(num_tokens - 1):
        logits, past = model.decode(chosen[-1], i, ids, past)
        chosen.append(int(logits[0, -1].argmax()))
    per_token = (time.perf_counter() - first) / (num_tokens - 1)
    values = (seen - ready, first - seen, first - began, per_token)
    return chosen, dict(zip(FIGURES, values, strict=True))


def main(
    model: Annotated[str, typer.Argument(help="glm-4v-9b or visualglm-6b.")] = "glm-4v-9b",
    layers: by_turns.Layers = 4,
    vision_layers: by_turns.VisionLayers = 4,
    quant: by_turns.Quant = "none",
    quant_tower: by_turns.QuantTower = "none",
    repeats: by_turns.Repeats = 4,
    tokens: by_turns.Tokens = 12,
) -> None:
    """Measure by turns, print a table and one JSON line."""
    name = f"synthetic:{model},layers={layers},vision-layers={vision_layers}"
    llm = by_turns.open_glimt(name, quant, quant_tower)
    opened = llm.engine.opened
    original = load(opened.family.name, opened.config, opened.checkpoint, opened.dtype)

    def ask_original(turn: int) -> Seconds:
        picture = by_turns.noise_picture(turn)
        ids = by_turns.prompt_ids(llm, picture, tokens)
        return answer(original, ids, picture, tokens, opened.dtype)[1]

    by_turns.compare(
        [lambda i: by_turns.ask(llm, i, tokens), ask_original],
        ("glimt", "original"),
        ("glimt", "original"),
        repeats,
        {"quant": quant, "quant_tower": quant_tower},
    )


if __name__ == "__main__":
    typer.run(main)
