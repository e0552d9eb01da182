"""open_clip's weights -> the shapes of a CLIP and transformers' names for its weights.

    visual.conv1, visual.transformer.resblocks.N.attn.in_proj_weight …   the picture's tower
    token_embedding, transformer.resblocks.N …, text_projection          the text's tower

Source: mlfoundations/open_clip `src/open_clip/model.py` and `model_configs/`. Knows neither files
nor transformers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from glimt.errors import CheckpointError

State = Mapping[str, Tensor]
_BLOCK = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)")
_IN_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_OUTSIDE = {
    "logit_scale": "logit_scale",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",  # spelt so there
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
}
# Kept as [width, embed_dim] and multiplied from the right; a Linear of transformers is transposed.
_TRANSPOSED = {
    "text_projection": "text_projection.weight",
    "visual.proj": "visual_projection.weight",
}
_IGNORED = ("attn_mask",)  # the causal mask, which old checkpoints hold


@dataclass(frozen=True, slots=True)
class Shapes:
    """What the weights' shapes tell. widths: of the hidden states; mlp: of the blocks' middle."""

    embed_dim: int
    vision_width: int
    vision_layers: int
    vision_mlp: int
    patch: int
    image_size: int
    text_width: int
    text_layers: int
    text_mlp: int
    vocab_size: int
    context: int


def plain_state(raw: Any, name: str) -> dict[str, Tensor]:
    """The named tensors of a checkpoint, whether saved alone, by a trainer, or with a text module.

    Each keeps its shape and dtype: [width], [out, in], or as open_clip has it.

    Raises CheckpointError, naming the file, if it holds no open_clip model.
    """
    state = raw.get("state_dict", raw) if isinstance(raw, Mapping) else raw
    if not isinstance(state, Mapping) or not state:
        raise CheckpointError(name, [f"holds a {type(state).__name__}, not named tensors"])
    plain = {
        str(key).removeprefix("module.").removeprefix("text."): value
        for key, value in state.items()
    }
    missing = [key for key in (*_OUTSIDE, *_TRANSPOSED) if key not in plain]
    if missing:
        said = f"is no CLIP as open_clip writes ViTs: {', '.join(missing[:4])}"
        more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
        raise CheckpointError(name, [f"{said}{more} missing"])
    wrong = [key for key, value in plain.items() if not isinstance(value, Tensor)]
    if wrong:
        raise CheckpointError(name, [f"holds {wrong[0]!r}, which is no tensor"])
    return plain


def shapes_of(state: State, name: str) -> Shapes:
    """Raises CheckpointError if they contradict each other."""
    try:
        return _shapes(state)
    except (KeyError, ValueError, IndexError) as error:
        raise CheckpointError(
            name, [f"has weights of shapes that no CLIP has ({error})"]
        ) from error


def _shapes(state: State) -> Shapes:
    vision_width, embed_dim = state["visual.proj"].shape
    patch = state["visual.conv1.weight"].shape[-1]
    num_patches = state["visual.positional_embedding"].shape[0] - 1
    side = math.isqrt(num_patches)
    if side * side != num_patches:
        raise ValueError(f"{num_patches} patches are no square")
    vocab_size, text_width = state["token_embedding.weight"].shape
    return Shapes(
        embed_dim=embed_dim,
        vision_width=vision_width,
        vision_layers=_num_blocks(state, "visual."),
        vision_mlp=state["visual.transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
        patch=patch,
        image_size=side * patch,
        text_width=text_width,
        text_layers=_num_blocks(state, None),
        text_mlp=state["transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
        vocab_size=vocab_size,
        context=state["positional_embedding"].shape[0],
    )


def _num_blocks(state: State, tower: str | None) -> int:
    matches = [_BLOCK.fullmatch(key) for key in state]
    return len({match[2] for match in matches if match and match[1] == tower})


# --- names -----------------------------------------------------------------------------------


def to_hub(state: State, name: str) -> dict[str, Tensor]:
    """The same weights under transformers' names, in float32.

    A fused [3 * width, width] becomes three of [width, width]; a projection [width, embed_dim] is
    transposed.

    Raises CheckpointError for a weight that a CLIP of this kind does not have.
    """
    renamed: dict[str, Tensor] = {}
    strange = []
    for key, value in state.items():
        if key in _IGNORED:
            continue
        new = dict(_renamed(key, value))
        renamed.update({each: part.float().contiguous() for each, part in new.items()})
        if not new:
            strange.append(key)
    if strange:
        more = f" and {len(strange) - 4} more" if len(strange) > 4 else ""
        said = f"holds weights that a plain ViT CLIP has not: {', '.join(strange[:4])}{more}"
        raise CheckpointError(name, [said])
    return renamed


def _renamed(key: str, value: Tensor) -> Iterator[tuple[str, Tensor]]:
    """One weight's new names; three for a fused one; none if it is not known."""
    if key in _OUTSIDE:
        yield _OUTSIDE[key], value
    elif key in _TRANSPOSED:
        yield _TRANSPOSED[key], value.T
    elif match := _BLOCK.fullmatch(key):
        tower = "vision_model" if match[1] else "text_model"
        yield from _in_block(f"{tower}.encoder.layers.{match[2]}", match[3], value)


def _in_block(block: str, key: str, value: Tensor) -> Iterator[tuple[str, Tensor]]:
    module, _, kind = key.rpartition(".")
    if module in _IN_BLOCK:
        yield f"{block}.{_IN_BLOCK[module]}.{kind}", value
    elif key in ("attn.in_proj_weight", "attn.in_proj_bias"):
        for letter, part in zip("qkv", value.chunk(3), strict=True):
            yield f"{block}.self_attn.{letter}_proj.{key.rpartition('_')[2]}", part
