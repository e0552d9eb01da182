"""Small random CLIPs on disk, and open_clip's forward pass written plainly.

The pass is read from mlfoundations/open_clip `src/open_clip/model.py` and `transformer.py`:
float64, whole sequences, one head after another, no code of the engine or of transformers.
"""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

START, END = "<|startoftext|>", "<|endoftext|>"
# Of lower-case English; each line is a merge, in the order of the file.
MERGES = (
    ("a", "t</w>"), ("t", "h"), ("th", "e</w>"), ("c", "at</w>"), ("r", "e"), ("re", "d</w>"),
    ("d", "o"), ("do", "g</w>"), ("o", "n</w>"), ("Ġ", "a"), ("ä", "½"), ("ä½", "ł"),
)  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """Of a small CLIP; the widths of the heads differ, as in ViT-H-14."""

    embed: int = 24
    image: int = 28
    patch: int = 14
    vision_width: int = 40
    vision_heads: int = 2
    text_width: int = 32
    text_heads: int = 4
    layers: int = 2
    context: int = 77
    vocab: int = 2 * 256 + len(MERGES) + 2


SHAPE = Shape()


def byte_letters() -> list[str]:
    """The letters of all bytes in the vocabulary's order, printable ones first."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [chr(256 + i) for i in range(256 - len(plain))]
    return [*map(chr, plain), *rest]


def write_vocabulary(path: Path) -> Path:
    """A file like open_clip's: a comment, then merges; more lines than the model uses."""
    lines = ["#version: toy", *(" ".join(pair) for pair in MERGES), "z z</w>"]
    path.write_bytes(gzip.compress(("\n".join(lines) + "\n").encode()))
    return path


def hub_vocabulary() -> dict[str, int]:
    """The same tokens as a Hugging Face folder's vocab.json has them."""
    letters = byte_letters()
    tokens = [*letters, *(x + "</w>" for x in letters), *("".join(p) for p in MERGES), START, END]
    return {token: i for i, token in enumerate(tokens)}


def random_state(shape: Shape = SHAPE, seed: int = 0) -> dict[str, Tensor]:
    """Weights in open_clip's names and layouts, large enough that every part matters."""
    random = torch.Generator().manual_seed(seed)

    def draw(*size: int, scale: float = 0.2) -> Tensor:
        return torch.randn(*size, generator=random) * scale

    num_patches = (shape.image // shape.patch) ** 2
    state = {
        "logit_scale": torch.tensor(4.6),
        "positional_embedding": draw(shape.context, shape.text_width),
        "text_projection": draw(shape.text_width, shape.embed),
        "token_embedding.weight": draw(shape.vocab, shape.text_width),
        "visual.class_embedding": draw(shape.vision_width),
        "visual.positional_embedding": draw(num_patches + 1, shape.vision_width),
        "visual.proj": draw(shape.vision_width, shape.embed),
        "visual.conv1.weight": draw(shape.vision_width, 3, shape.patch, shape.patch, scale=0.05),
    }
    towers = (("", shape.text_width), ("visual.", shape.vision_width))
    norms = [("ln_final", shape.text_width)]
    norms += [(f"visual.ln_{name}", shape.vision_width) for name in ("pre", "post")]
    for tower, width in towers:
        for n in range(shape.layers):
            block = f"{tower}transformer.resblocks.{n}."
            state |= {
                f"{block}attn.in_proj_weight": draw(3 * width, width),
                f"{block}attn.in_proj_bias": draw(3 * width),
                f"{block}attn.out_proj.weight": draw(width, width),
                f"{block}attn.out_proj.bias": draw(width),
                f"{block}mlp.c_fc.weight": draw(4 * width, width),
                f"{block}mlp.c_fc.bias": draw(4 * width),
                f"{block}mlp.c_proj.weight": draw(width, 4 * width),
                f"{block}mlp.c_proj.bias": draw(width),
            }
            norms += [(f"{block}ln_{i}", width) for i in (1, 2)]
    for name, width in norms:
        state |= {f"{name}.weight": 1 + draw(width), f"{name}.bias": draw(width)}
    return state


def config_json(shape: Shape = SHAPE, **more: Any) -> dict[str, Any]:
    """What open_clip_config.json says of such weights."""
    vision = {
        "image_size": shape.image,
        "layers": shape.layers,
        "width": shape.vision_width,
        "head_width": shape.vision_width // shape.vision_heads,
        "patch_size": shape.patch,
    }
    text = {
        "context_length": shape.context,
        "vocab_size": shape.vocab,
        "width": shape.text_width,
        "heads": shape.text_heads,
        "layers": shape.layers,
    }
    return {"model_cfg": {"embed_dim": shape.embed, "vision_cfg": vision, "text_cfg": text, **more}}


def write_hub_folder(folder: Path, shape: Shape = SHAPE, activation: str = "quick_gelu") -> Any:
    """A CLIP folder written by transformers, with the toy vocabulary; gives the model."""
    from transformers import CLIPConfig, CLIPModel

    ids = hub_vocabulary()
    both = {"hidden_act": activation, "projection_dim": shape.embed}
    text = {
        "hidden_size": shape.text_width,
        "intermediate_size": 2 * shape.text_width,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.text_heads,
        "vocab_size": shape.vocab,
        "bos_token_id": ids[START],
        "eos_token_id": ids[END],
    }
    vision = {
        "hidden_size": shape.vision_width,
        "intermediate_size": 2 * shape.vision_width,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.vision_heads,
        "image_size": shape.image,
        "patch_size": shape.patch,
    }
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config=text | both, vision_config=vision | both, projection_dim=shape.embed
    )
    model = CLIPModel(config).eval()
    with torch.no_grad():  # the usual start is so small that everything looks alike
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps(ids), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in MERGES)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return model


# --- the forward pass ------------------------------------------------------------------------


def image_features(state: Mapping[str, Tensor], pixels: Tensor, shape: Shape = SHAPE) -> Tensor:
    """[num_pictures, embed] of [num_pictures, 3, image, image]."""
    weights = {name: value.double() for name, value in state.items()}
    return torch.stack([_one_picture(weights, each.double(), shape) for each in pixels])


def text_features(
    state: Mapping[str, Tensor], ids: Sequence[Sequence[int]], shape: Shape = SHAPE
) -> Tensor:
    """[num_texts, embed] of token ids with both ends, padded with 0 to the whole context."""
    weights = {name: value.double() for name, value in state.items()}
    return torch.stack([_one_text(weights, each, shape) for each in ids])


def _one_picture(w: Mapping[str, Tensor], pixels: Tensor, shape: Shape) -> Tensor:
    side, patch = shape.image // shape.patch, shape.patch
    kernel = w["visual.conv1.weight"].reshape(shape.vision_width, -1)
    rows = [w["visual.class_embedding"]]
    for y in range(side):
        for x in range(side):
            cut = pixels[:, y * patch : (y + 1) * patch, x * patch : (x + 1) * patch]
            rows.append(kernel @ cut.reshape(-1))
    hidden = torch.stack(rows) + w["visual.positional_embedding"]
    hidden = _norm(w, "visual.ln_pre", hidden)
    hidden = _blocks(w, "visual.", hidden, shape.vision_heads, shape.layers, is_causal=False)
    return _norm(w, "visual.ln_post", hidden[0]) @ w["visual.proj"]


def _one_text(w: Mapping[str, Tensor], ids: Sequence[int], shape: Shape) -> Tensor:
    padded = torch.tensor([*ids, *[0] * (shape.context - len(ids))])
    hidden = w["token_embedding.weight"][padded] + w["positional_embedding"]
    hidden = _blocks(w, "", hidden, shape.text_heads, shape.layers, is_causal=True)
    end = int(padded.argmax())  # the end of text has the largest id
    return _norm(w, "ln_final", hidden[end]) @ w["text_projection"]


def _blocks(
    w: Mapping[str, Tensor], tower: str, hidden: Tensor, heads: int, layers: int, is_causal: bool
) -> Tensor:
    for n in range(layers):
        block = f"{tower}transformer.resblocks.{n}."
        normed = _norm(w, f"{block}ln_1", hidden)
        hidden = hidden + _attention(w, f"{block}attn.", normed, heads, is_causal)
        middle = _linear(w, f"{block}mlp.c_fc.", _norm(w, f"{block}ln_2", hidden))
        gelu = middle * 0.5 * (1 + torch.erf(middle / math.sqrt(2)))
        hidden = hidden + _linear(w, f"{block}mlp.c_proj.", gelu)
    return hidden


def _attention(
    w: Mapping[str, Tensor], name: str, hidden: Tensor, heads: int, is_causal: bool
) -> Tensor:
    width = hidden.shape[1]
    size = width // heads
    fused = hidden @ w[f"{name}in_proj_weight"].T + w[f"{name}in_proj_bias"]
    query, key, value = fused[:, :width], fused[:, width : 2 * width], fused[:, 2 * width :]
    parts = []
    for head in range(heads):
        own = slice(head * size, (head + 1) * size)
        scores = query[:, own] @ key[:, own].T / math.sqrt(size)
        if is_causal:
            later = torch.ones_like(scores, dtype=torch.bool).triu(1)
            scores = scores.masked_fill(later, -math.inf)
        parts.append(scores.softmax(-1) @ value[:, own])
    return _linear(w, f"{name}out_proj.", torch.cat(parts, dim=1))


def _linear(w: Mapping[str, Tensor], name: str, hidden: Tensor) -> Tensor:
    return hidden @ w[f"{name}weight"].T + w[f"{name}bias"]


def _norm(w: Mapping[str, Tensor], name: str, hidden: Tensor) -> Tensor:
    centred = hidden - hidden.mean(-1, keepdim=True)
    scale = (centred.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    return centred * scale * w[f"{name}.weight"] + w[f"{name}.bias"]
