"""Clip: open_clip's file against its forward pass, a hub folder against the library's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from tests.oracles import clip_oracle as oracle

from glimt.errors import CheckpointError, ConfigError, MissingDependency
from glimt.evaluate.clip import Clip, load_clip
from glimt.evaluate.clip_pixels import to_pixels

TOLERANCE = 1e-5  # of a similarity: float32 here, float64 in the oracle
TEXTS = ["the cat", "A red dog on the cat!", "你好，世界", "", "the " * 90]


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    random = np.random.default_rng(0)
    sizes = [(40, 30), (28, 28), (31, 57)]
    return [
        Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))
        for width, height in sizes
    ]


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return oracle.random_state()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where an open_clip file's neighbours lie: its configuration and the vocabulary."""
    config = json.dumps(oracle.config_json())
    (tmp_path / "open_clip_config.json").write_text(config, encoding="utf-8")
    oracle.write_vocabulary(tmp_path / "bpe.txt.gz")
    return tmp_path


def saved(folder: Path, state: Any, name: str = "open_clip_pytorch_model.bin") -> Path:
    path = folder / name
    torch.save(state, path)
    return path


def load(weights: Path, architecture: str | None = None) -> Clip:
    return load_clip(weights, weights.parent / "bpe.txt.gz", architecture)


def check_against_oracle(clip: Clip, state: Any, pictures: list[Image.Image]) -> None:
    tokens = [clip.encode(text) for text in TEXTS]
    ours = clip.embed_pictures(pictures) @ clip.embed_tokens(tokens).T
    pixels = torch.stack([to_pixels(picture, clip.pixels) for picture in pictures])
    seen = F.normalize(oracle.image_features(state, pixels), dim=-1)
    read = F.normalize(oracle.text_features(state, [each.ids for each in tokens]), dim=-1)
    theirs = seen @ read.T
    assert (ours - theirs).abs().max() < TOLERANCE
    assert theirs.std() > 0.05, "a flat table would hide every mistake"


# --- open_clip's file ------------------------------------------------------------------------


def test_open_clip_weights_give_open_clips_similarities(folder, state, pictures):
    """Catches query and value exchanged, a projection not transposed, heads of the wrong width,
    the quick GELU in the place of the exact one, and pooling at the wrong token.
    """
    check_against_oracle(load(saved(folder, state)), state, pictures)


def test_safetensors_in_open_clip_names_are_read(folder, state, pictures):
    """Catches a second path that loads nothing or in another dtype."""
    path = folder / "open_clip_model.safetensors"
    save_file({name: value.contiguous() for name, value in state.items()}, path)
    check_against_oracle(load(path), state, pictures)


@pytest.mark.parametrize("wrap", ["trainer", "text module"])
def test_other_ways_of_saving_are_the_same_model(folder, state, pictures, wrap):
    """Catches a training checkpoint or a CustomTextCLIP that is refused or half read."""
    if wrap == "trainer":
        raw: Any = {"state_dict": {f"module.{name}": value for name, value in state.items()}}
    else:
        raw = {
            name if name.startswith(("visual.", "logit")) else f"text.{name}": value
            for name, value in state.items()
        }
    check_against_oracle(load(saved(folder, raw)), state, pictures)


def test_half_precision_is_judged_in_float32(folder, state, pictures):
    """Catches a model of mixed dtypes, which fails at its first product."""
    halves = {name: value.half() for name, value in state.items()}
    floats = {name: value.float() for name, value in halves.items()}
    check_against_oracle(load(saved(folder, halves)), floats, pictures)


def test_padding_changes_nothing(folder, state):
    """Catches a batch whose longest text changes the others."""
    clip = load(saved(folder, state))
    tokens = [clip.encode(text) for text in TEXTS]
    together = clip.embed_tokens(tokens)
    alone = torch.cat([clip.embed_tokens([each]) for each in tokens])
    assert (together - alone).abs().max() < 1e-6


def test_the_quick_gelu_is_another_model(folder, state, pictures):
    """Catches a configuration whose activation is read and then forgotten."""
    path = saved(folder, state)
    plain = load(path).embed_pictures(pictures)
    config = json.dumps(oracle.config_json(quick_gelu=True))
    (folder / "open_clip_config.json").write_text(config, encoding="utf-8")
    assert (load(path).embed_pictures(pictures) - plain).abs().max() > 1e-4


class Evil:
    def __reduce__(self) -> Any:
        return (print, ("this must not run",))


def test_a_file_that_would_run_code_is_refused(folder, capsys):
    """Catches an ordinary unpickler on a downloaded file."""
    with pytest.raises(CheckpointError, match="could run code"):
        load(saved(folder, {"visual.proj": Evil()}))
    assert capsys.readouterr().out == ""


def without(state: Any, name: str) -> Any:
    return {key: value for key, value in state.items() if key != name}


BAD_STATES = [
    (lambda s: without(s, "visual.proj"), "visual.proj missing"),
    (lambda s: without(s, "visual.ln_pre.bias"), "visual.ln_pre.bias missing"),
    (lambda s: s | {"visual.attn_pool.query": torch.zeros(1)}, "visual.attn_pool.query"),
    (lambda s: without(s, "transformer.resblocks.1.ln_2.bias"), "layer_norm2.bias is missing"),
    (lambda s: s | {"ln_final.bias": torch.zeros(3)}, "size mismatch"),
    (lambda s: s | {"visual.positional_embedding": torch.zeros(4, 40)}, "no square"),
    (lambda s: [1, 2], "holds a list"),
    (lambda s: {}, "not named tensors"),
]


@pytest.mark.parametrize(("change", "said"), BAD_STATES, ids=[said for _, said in BAD_STATES])
def test_weights_of_another_model_are_told(folder, state, change, said):
    """Catches a KeyError, and a model that runs with random weights in some place."""
    with pytest.raises(CheckpointError, match=said):
        load(saved(folder, change(state)))


# --- a hub folder ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("hub")
    return folder, oracle.write_hub_folder(folder)


def test_a_hub_folder_gives_the_librarys_own_similarities(hub, pictures):
    """Catches a weight that is lost or doubled on the way, and features that are not the ones
    which the library compares.
    """
    folder, model = hub
    clip = load_clip(folder, None, None)
    tokens = [clip.encode(text) for text in TEXTS]
    pixels = torch.stack([to_pixels(picture, clip.pixels) for picture in pictures])
    longest = max(len(each.ids) for each in tokens)
    ids = torch.tensor([[*t.ids, *[t.ids[-1]] * (longest - len(t.ids))] for t in tokens])
    with torch.inference_mode():
        logits = model(input_ids=ids, pixel_values=pixels).logits_per_image
        theirs = logits / model.logit_scale.exp()
    ours = clip.embed_pictures(pictures) @ clip.embed_tokens(tokens).T
    assert (ours - theirs).abs().max() < TOLERANCE
    assert theirs.std() > 0.01


def test_the_name_and_files_are_those_that_were_given(hub, folder, state):
    """Catches a label that does not say which model judged."""
    assert load_clip(hub[0], None, None).name == hub[0].name
    clip = load(saved(folder, state))
    assert clip.name == "open_clip open_clip_config.json (open_clip_pytorch_model.bin)"
    assert [file.name for file in clip.files] == ["open_clip_pytorch_model.bin"]


def test_a_folder_of_another_model_is_refused(hub, tmp_path):
    """Catches SigLIP or Chinese-CLIP, whose weights would partly fit."""
    (tmp_path / "config.json").write_text('{"model_type": "siglip"}', encoding="utf-8")
    with pytest.raises(ConfigError, match="model_type is 'siglip'"):
        load_clip(tmp_path, None, None)


def test_options_of_the_other_form_are_refused(hub, folder, state):
    """Catches an option that is accepted and does nothing."""
    with pytest.raises(ConfigError, match="tokenizer: belongs to an open_clip file"):
        load_clip(hub[0], folder / "bpe.txt.gz", None)
    with pytest.raises(ConfigError, match="architecture: belongs to an open_clip file"):
        load_clip(hub[0], None, "ViT-H-14")
    with pytest.raises(ConfigError, match="tokenizer: is needed"):
        load_clip(saved(folder, state), None, None)
    with pytest.raises(ConfigError, match=r"nowhere\.bin does not exist"):
        load(folder / "nowhere.bin")


def test_without_transformers_the_install_command_is_told(folder, state, monkeypatch):
    """Catches a ModuleNotFoundError in the place of the extra's name."""
    import sys

    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingDependency, match=r"pip install 'glimt\[judge\]'"):
        load(saved(folder, state))
