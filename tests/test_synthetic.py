"""Synthetic models: names, weights, and that they run like any other."""

import pytest
import torch
from PIL import Image

import glimt
from glimt.config import EngineConfig
from glimt.demo.noise import write_noise_model
from glimt.errors import ConfigError
from glimt.loader import open_model
from glimt.synthetic import PUBLISHED, SyntheticName, draw, parse_name, published_config


@pytest.fixture(scope="module", params=["glm4v_9b", "visualglm"])
def folder(request, tmp_path_factory):
    """Tiny widths: only the config.json of this folder is read."""
    made = tmp_path_factory.mktemp(request.param)
    write_noise_model(made, request.param)
    (made / "model.safetensors").unlink()
    return made


# --- names -----------------------------------------------------------------------------------


def test_a_name_says_layers_and_seed():
    """Catches an option lost between the text and the model, or on the way back."""
    name = parse_name("synthetic:glm-4v-9b,vision-layers=2,layers=3,seed=9")
    assert name == SyntheticName("glm-4v-9b", 3, 2, 9)
    assert parse_name(str(name)) == name
    assert str(SyntheticName("visualglm-6b")) == "synthetic:visualglm-6b"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("synthetic:glm-5", "'glm-5' is neither a folder nor one of glm-4v-9b, visualglm-6b"),
        ("synthetic:glm-4v-9b,layers=0", "layers is '0'; a whole number >= 1 is needed"),
        ("synthetic:glm-4v-9b,layers", "layers is ''"),
        ("synthetic:glm-4v-9b,depth=3", "'depth=3' is unknown; there are layers"),
        ("synthetic:glm-4v-9b,layers=41", "layers is 41, but the published model has 40"),
        ("synthetic:visualglm-6b,vision-layers=40", "vision-layers is 40, but the published"),
    ],
)
def test_a_name_that_means_nothing_is_refused(name, said):
    """Catches a typing error that runs another model than the one asked for."""
    with pytest.raises(ConfigError) as refused:
        open_model(EngineConfig(model=name))
    assert said in str(refused.value)


def test_only_the_layers_are_cut():
    """Catches a cut that reaches the published configuration itself, or another key."""
    name = parse_name("synthetic:visualglm-6b,layers=2,vision-layers=3")
    raw = published_config(name)
    whole = PUBLISHED["visualglm-6b"]
    assert (raw["num_layers"], raw["eva_config"]["num_layers"]) == (2, 3)
    assert (whole["num_layers"], whole["eva_config"]["num_layers"]) == (28, 39)
    assert {**raw, "num_layers": 28, "eva_config": whole["eva_config"]} == whole


def test_published_models_have_their_published_sizes():
    """Catches a wrong width: the sum is the number that the original programs print."""
    for name, count in (("glm-4v-9b", 13_906_320_896), ("visualglm-6b", 7_802_193_408)):
        model = open_model(EngineConfig(model=f"synthetic:{name}")).model
        assert sum(value.numel() for value in model.parameters()) == count


# --- weights ---------------------------------------------------------------------------------


def test_a_matrix_keeps_the_size_of_what_goes_through_it():
    """Catches activations that grow to infinity, or rows that repeat after a tile of noise."""
    noise = torch.randn(1009, generator=torch.Generator().manual_seed(0))
    matrix = draw("layers.0.dense.weight", (64, 256), noise, torch.float32)
    assert matrix.std().item() == pytest.approx(1 / 16, rel=0.05)
    assert len({tuple(row.tolist()) for row in matrix}) == 64
    gain = draw("layers.0.input_layernorm.weight", (256,), noise, torch.float32)
    assert gain.mean().item() == pytest.approx(1, abs=0.05)
    assert draw("a.weight", (3, 5), noise, torch.bfloat16).dtype == torch.bfloat16


def weights(folder, seed: int) -> dict[str, torch.Tensor]:
    opened = open_model(EngineConfig(model=f"synthetic:{folder},seed={seed}", dtype="bfloat16"))
    opened.load()
    return dict(opened.model.named_parameters())


def test_the_same_seed_gives_the_same_weights_in_the_final_dtype(folder, monkeypatch):
    """Catches figures that cannot be taken again, and a detour through float32."""
    monkeypatch.setenv("GLIMT_ISA", "none")  # packed weights cannot be looked at
    first, again, other = weights(folder, 1), weights(folder, 1), weights(folder, 2)
    assert all(value.dtype == torch.bfloat16 for value in first.values())
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])


# --- running ---------------------------------------------------------------------------------


def test_any_command_can_run_one(folder):
    """Catches a tokenizer that lacks a special token, and values that are not finite."""
    llm = glimt.LLM(f"synthetic:{folder},layers=1,vision-layers=1", num_blocks=64)
    sampling = glimt.SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    picture = {"type": "image", "image": Image.new("RGB", (20, 30))}
    messages = [{"role": "user", "content": [picture, {"type": "text", "text": "说\n什么?"}]}]
    output = llm.chat(messages, sampling)
    assert output.finish_reason == "length"
    assert output.usage.completion_tokens == 5
    assert output.usage.image_tokens > 1
    assert llm.chat(messages, sampling).token_ids == output.token_ids
