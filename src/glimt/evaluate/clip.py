"""A CLIP: pictures and texts -> vectors of length 1, whose product is their similarity.

The one file that imports transformers: its CLIPModel does the arithmetic, because open_clip's own
package needs torchvision. Weights come as open_clip's file or as a Hugging Face folder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from glimt.checkpoint import open_checkpoint, open_reader, read_pickle, refuse_stand_in
from glimt.errors import CheckpointError, ConfigError, MissingDependency
from glimt.evaluate import clip_pixels, clip_tokenizer
from glimt.evaluate.clip_architectures import Architecture, find_architecture
from glimt.evaluate.clip_pixels import PixelSettings, to_pixels
from glimt.evaluate.clip_tokenizer import ClipTokenizer, Tokens
from glimt.evaluate.open_clip import Shapes, plain_state, shapes_of, to_hub
from glimt.models.config_reader import read_json


@dataclass(frozen=True, slots=True, eq=False)
class Clip:
    """A loaded model.

    name:  what figures are labelled with
    files: the weights
    """

    name: str
    files: tuple[Path, ...]
    model: Any
    tokenizer: ClipTokenizer
    pixels: PixelSettings
    context: int

    @torch.inference_mode()
    def embed_pictures(self, pictures: Sequence[Image.Image]) -> Tensor:
        """RGB pictures -> [num_pictures, embed_dim], each of length 1."""
        pixels = torch.stack([to_pixels(picture, self.pixels) for picture in pictures])
        return F.normalize(_features(self.model.get_image_features(pixel_values=pixels)), dim=-1)

    @torch.inference_mode()
    def embed_tokens(self, tokens: Sequence[Tokens]) -> Tensor:
        """Encoded texts -> [num_texts, embed_dim], each of length 1.

        What follows the end of text is padding, which a causal tower's end of text does not see.
        """
        longest = max(len(each.ids) for each in tokens)
        rows = [[*each.ids, *[0] * (longest - len(each.ids))] for each in tokens]
        return F.normalize(
            _features(self.model.get_text_features(input_ids=torch.tensor(rows))), dim=-1
        )

    def encode(self, text: str) -> Tokens:
        """A text's tokens, cut at the context's end."""
        return self.tokenizer.encode(text, self.context)


def _features(output: Any) -> Tensor:
    """Releases of transformers before 5 give the features, later ones an object with them."""
    return output if isinstance(output, Tensor) else output.pooler_output


def load_clip(weights: Path, tokenizer: Path | None, architecture: str | None) -> Clip:
    """Load a Hugging Face CLIP folder, or an open_clip file (.bin, .pt, .safetensors).

    Raises ConfigError or CheckpointError for files that are not what they should be, and
    MissingDependency without transformers.
    """
    if weights.is_dir():
        for name, value in (("tokenizer", tokenizer), ("architecture", architecture)):
            if value is not None:
                said = f"belongs to an open_clip file; {weights} is a folder and brings its own"
                raise ConfigError(name, [said])
        return _load_folder(weights)
    if not weights.exists():
        said = f"{weights} does not exist; name an open_clip file or a CLIP folder"
        raise ConfigError("weights", [said])
    if tokenizer is None:
        said = "is needed with an open_clip file: bpe_simple_vocab_16e6.txt.gz of open_clip's wheel"
        raise ConfigError("tokenizer", [said])
    return _load_file(weights, tokenizer, architecture)


# --- open_clip's file ------------------------------------------------------------------------


def _load_file(weights: Path, tokenizer: Path, given: str | None) -> Clip:
    state = plain_state(_read(weights), weights.name)
    shapes = shapes_of(state, weights.name)
    kind = find_architecture(shapes, given, weights.parent)
    words = clip_tokenizer.of_open_clip(tokenizer, shapes.vocab_size)
    model = _build(_config(shapes, kind, words), to_hub(state, weights.name), weights.name)
    pixels = PixelSettings(shapes.image_size, shapes.image_size)
    return Clip(f"{kind.name} ({weights.name})", (weights,), model, words, pixels, shapes.context)


def _read(weights: Path) -> Any:
    """A state dict; a pickle goes through torch's restricted unpickler."""
    try:
        refuse_stand_in(weights)
        if weights.suffix != ".safetensors":
            return read_pickle(weights)
        with open_reader(weights) as read:
            return {name: read(name) for name in _names(weights)}
    except OSError as error:
        said = f"{weights} cannot be read: {error.strerror or error}"
        raise ConfigError(
            "weights", [f"{said}; name an open_clip file or a CLIP folder"]
        ) from error


def _names(weights: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(weights, framework="pt") as opened:
        return list(opened.keys())


def _config(shapes: Shapes, kind: Architecture, words: ClipTokenizer) -> dict[str, Any]:
    """The same architecture as transformers' config.json says it."""
    text = {
        "hidden_size": shapes.text_width,
        "intermediate_size": shapes.text_mlp,
        "num_hidden_layers": shapes.text_layers,
        "num_attention_heads": kind.text_heads,
        "vocab_size": shapes.vocab_size,
        "max_position_embeddings": shapes.context,
        "bos_token_id": words.start_id,
        "eos_token_id": words.end_id,
    }
    vision = {
        "hidden_size": shapes.vision_width,
        "intermediate_size": shapes.vision_mlp,
        "num_hidden_layers": shapes.vision_layers,
        "num_attention_heads": kind.vision_heads,
        "image_size": shapes.image_size,
        "patch_size": shapes.patch,
    }
    both = {"hidden_act": kind.activation, "projection_dim": shapes.embed_dim}
    return {
        "text_config": {**text, **both},
        "vision_config": {**vision, **both},
        "projection_dim": shapes.embed_dim,
    }


# --- a folder of the hub ---------------------------------------------------------------------

_BUFFER = "position_ids"  # old checkpoints hold it; it is 0, 1, 2 …


def _load_folder(folder: Path) -> Clip:
    raw = read_json(folder / "config.json")
    if raw.get("model_type") != "clip":
        said = f"model_type is {raw.get('model_type')!r}; a CLIP folder says 'clip'"
        raise ConfigError(str(folder / "config.json"), [said])
    words = clip_tokenizer.of_hub_folder(folder)
    checkpoint = open_checkpoint(folder)
    state: dict[str, Tensor] = {}
    for file in checkpoint.files:
        own = [name for name, info in checkpoint.tensors.items() if info.file == file]
        with open_reader(file) as read:
            state |= {name: read(name).float() for name in own if not name.endswith(_BUFFER)}
    model = _build(raw, state, folder.name)
    vision, text = model.config.vision_config, model.config.text_config
    pixels = clip_pixels.of_hub_folder(folder, vision.image_size)
    return Clip(folder.name, checkpoint.files, model, words, pixels, text.max_position_embeddings)


# --- the model -------------------------------------------------------------------------------


def _build(config: Mapping[str, Any], state: Mapping[str, Tensor], name: str) -> Any:
    """transformers' CLIPModel around the weights, which are not copied."""
    try:
        from transformers import CLIPConfig, CLIPModel
    except ImportError as error:
        raise MissingDependency("transformers", "judge") from error
    try:
        with torch.device("meta"):
            model = CLIPModel(CLIPConfig.from_dict(dict(config))).train(False)
        found = model.load_state_dict(dict(state), strict=False, assign=True)
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        said = " ".join(str(error).split())[:400]
        raise CheckpointError(name, [f"does not fit its own configuration: {said}"]) from error
    problems = [f"{key} is missing" for key in found.missing_keys]
    problems += [f"{key} is not a CLIP's" for key in found.unexpected_keys]
    if problems:
        raise CheckpointError(name, problems[:8])
    _fill_positions(model)
    return model


def _fill_positions(model: Any) -> None:
    """Make the buffers that no checkpoint holds: they have no data on the meta device."""
    for module in model.modules():
        if _BUFFER in module._buffers:
            count = module.position_embedding.weight.shape[0]
            module._buffers[_BUFFER] = torch.arange(count)[None]
