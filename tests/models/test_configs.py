"""config.json of both families: what is required, what is told, what is ignored."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from glimt.devices.base import open_device
from glimt.errors import ConfigError
from glimt.layers.norm import LayerNorm, RMSNorm
from glimt.models.base import BuildContext, find_family

GOLDEN = Path(__file__).parents[1] / "golden"
FILES = {"glm4v_9b": "glm-4v-tiny.spec.json", "visualglm": "visualglm-tiny.spec.json"}


def raw_config(family: str) -> dict[str, Any]:
    return json.loads((GOLDEN / FILES[family]).read_text(encoding="utf-8"))["config"]


def parse(raw: dict[str, Any]) -> Any:
    return find_family(raw, "config.json").config.from_json(raw, "config.json")


REQUIRED = {
    "glm4v_9b": [
        "num_layers", "hidden_size", "num_attention_heads", "multi_query_group_num",
        "kv_channels", "ffn_hidden_size", "padded_vocab_size", "layernorm_epsilon",
        "add_qkv_bias", "add_bias_linear", "seq_length", "boi_token_id", "eoi_token_id",
        "multi_query_attention", "original_rope", "rmsnorm", "post_layer_norm",
        "apply_residual_connection_post_layernorm", "fp32_residual_connection",
        "tie_word_embeddings", "torch_dtype", "eos_token_id",
        "vision_config.hidden_act", "vision_config.in_channels",
        "vision_config.num_hidden_layers", "vision_config.hidden_size", "vision_config.num_heads",
        "vision_config.intermediate_size", "vision_config.patch_size", "vision_config.image_size",
        "vision_config.num_positions", "vision_config.layer_norm_eps",
        "vision_config.scaling_factor",
    ],
    "visualglm": [
        "num_layers", "hidden_size", "num_attention_heads", "inner_hidden_size", "vocab_size",
        "layernorm_epsilon", "max_sequence_length", "bos_token_id", "eos_token_id",
        "gmask_token_id", "image_length", "position_encoding_2d", "torch_dtype",
        "eva_config", "eva_config.vocab_size", "eva_config.layernorm_order",
        "eva_config.use_final_layernorm", "eva_config.pre_len", "eva_config.post_len",
        "eva_config.in_channels", "qformer_config", "qformer_config.layernorm_order",
        "eva_config.num_layers", "eva_config.hidden_size", "eva_config.num_attention_heads",
        "eva_config.inner_hidden_size", "eva_config.layernorm_epsilon", "eva_config.image_size",
        "eva_config.patch_size", "eva_config.max_sequence_length",
        "qformer_config.num_layers", "qformer_config.hidden_size",
        "qformer_config.num_attention_heads", "qformer_config.vocab_size",
        "qformer_config.layernorm_epsilon", "qformer_config.cross_attn_hidden_size",
        "qformer_config.is_decoder",
    ],
}  # fmt: skip


def without(raw: dict[str, Any], path: str) -> dict[str, Any]:
    raw = copy.deepcopy(raw)
    *parents, key = path.split(".")
    holder = raw
    for parent in parents:
        holder = holder[parent]
    del holder[key]
    return raw


@pytest.mark.parametrize(
    ("family", "path"), [(family, path) for family, paths in REQUIRED.items() for path in paths]
)
def test_a_missing_value_is_an_error_that_names_it(family: str, path: str) -> None:
    """Catches a silent default: the class defaults of the originals are other models' values."""
    with pytest.raises(ConfigError) as caught:
        parse(without(raw_config(family), path))
    # Alone: nothing is said of a value that stands in for it.
    assert caught.value.problems == (f"{path} is missing",)


# What no arithmetic depends on, and what the specifications let files leave out.
OPTIONAL = {
    "glm4v_9b": {
        "architectures", "vision_config", "rope_ratio", "pad_token_id", "use_cache",
        "attention_dropout", "hidden_dropout", "bias_dropout_fusion",
        "apply_query_key_layer_scaling", "attention_softmax_in_fp32", "vision_config.dropout_prob",
    },
    "visualglm": {
        "architectures", "auto_map", "auto_map.AutoConfig", "auto_map.AutoModel", "use_cache",
        "mask_token_id", "pad_token_id", "quantization_bit", "eva_config.model_parallel_size",
        "eva_config.num_classes", "qformer_config.model_parallel_size",
        "qformer_config.max_sequence_length",
    },
}  # fmt: skip


def paths_of(raw: dict[str, Any], prefix: str = "") -> list[str]:
    inner = [paths_of(value, f"{key}.") for key, value in raw.items() if isinstance(value, dict)]
    return [prefix + key for key in raw] + [path for paths in inner for path in paths]


@pytest.mark.parametrize("family", FILES)
def test_every_key_is_either_required_or_known_to_be_free(family: str) -> None:
    """Catches a constant that is read with a default: its absence would pass in silence."""
    paths = set(paths_of(raw_config(family))) - {"model_type"}
    assert paths == {*REQUIRED[family], *OPTIONAL[family]}
    for path in OPTIONAL[family]:
        parse(without(raw_config(family), path))


def test_a_file_without_model_type_is_told_so() -> None:
    """Catches an error that names everything but the key that is missing."""
    with pytest.raises(ConfigError, match="model_type is missing"):
        parse(without(raw_config("glm4v_9b"), "model_type"))


def test_a_text_model_without_its_vocabulary_size_is_told_so() -> None:
    """Catches a required key that is also what tells the family, and so cannot be named."""
    raw = raw_config("glm4v_9b")
    del raw["vision_config"], raw["padded_vocab_size"]
    with pytest.raises(ConfigError, match=r"padded_vocab_size is missing"):
        parse(raw)


def test_without_vision_config_it_is_a_text_model() -> None:
    """Catches asking a text model for the ids of a picture's ends, or refusing what it has."""
    raw = without(raw_config("glm4v_9b"), "vision_config")
    assert parse(raw).vision is None
    assert parse(without(without(raw, "boi_token_id"), "eoi_token_id")).vision is None
    assert parse(raw | {"vision_config": None}).vision is None


@pytest.mark.parametrize("family", FILES)
def test_null_is_as_good_as_absent(family: str) -> None:
    """Catches null as a value of its own: some writers keep every key."""
    for path in REQUIRED[family]:
        raw = copy.deepcopy(raw_config(family))
        holder = raw
        *parents, key = path.split(".")
        for parent in parents:
            holder = holder[parent]
        holder[key] = None
        with pytest.raises(ConfigError) as caught:
            parse(raw)
        assert caught.value.problems == (f"{path} is missing",)


@pytest.mark.parametrize("family", FILES)
def test_every_problem_is_told_at_once(family: str) -> None:
    """Catches a reader that stops at the first problem."""
    raw = raw_config(family)
    for path in REQUIRED[family][:5]:
        raw = without(raw, path)
    with pytest.raises(ConfigError) as caught:
        parse(raw)
    assert len(caught.value.problems) >= 5


@pytest.mark.parametrize("family", FILES)
@pytest.mark.parametrize("value", ["3", -1, 0, 2.5, True, [], {}])
def test_a_value_of_the_wrong_kind_is_named(family: str, value: Any) -> None:
    """Catches a string or a bool that slips through as a number."""
    with pytest.raises(ConfigError, match="num_layers is "):
        parse(raw_config(family) | {"num_layers": value})


@pytest.mark.parametrize("family", FILES)
def test_unknown_keys_are_ignored(family: str) -> None:
    """Catches a reader that refuses a checkpoint for a key of another tool."""
    raw = raw_config(family)
    assert parse(raw | {"transformers_version": "4.44", "new_key": {"a": 1}}) == parse(raw)


def test_an_absent_rope_ratio_is_one() -> None:
    """Catches a text model's 500 used for the vision model."""
    raw = raw_config("glm4v_9b")
    assert parse(without(raw, "rope_ratio")).rope_ratio == 1.0
    assert parse(raw | {"rope_ratio": 500}).rope_ratio == 500.0


@pytest.mark.parametrize(
    ("family", "change", "said"),
    [
        ("glm4v_9b", {"rmsnorm": False}, "rmsnorm is False; only True is supported"),
        ("glm4v_9b", {"layernorm_epsilon": 0}, "layernorm_epsilon is 0; a number above 0"),
        ("glm4v_9b", {"multi_query_group_num": 3}, "num_attention_heads is 4"),
        ("glm4v_9b", {"torch_dtype": "int8"}, "torch_dtype is 'int8'"),
        ("glm4v_9b", {"eos_token_id": ["x", None]}, "eos_token_id is ['x', None]"),
        ("glm4v_9b", {"eos_token_id": True}, "eos_token_id is True"),
        ("visualglm", {"quantization_bit": 2}, "quantization_bit is 2; 0, 4 or 8 is needed"),
        ("visualglm", {"image_length": 16}, "image_length is 16, but qformer_config.vocab_size"),
        ("visualglm", {"position_encoding_2d": False}, "position_encoding_2d is False"),
    ],
)
def test_what_is_not_computed_is_refused(family: str, change: dict[str, Any], said: str) -> None:
    """Catches a setting that is read and then not obeyed."""
    with pytest.raises(ConfigError) as caught:
        parse(raw_config(family) | change)
    assert any(problem.startswith(said) for problem in caught.value.problems)


def test_families_are_told_apart_though_both_say_chatglm() -> None:
    """Catches a family chosen by model_type or by architectures."""
    glm, visual = raw_config("glm4v_9b"), raw_config("visualglm")
    assert find_family(glm, "").name == "glm4v_9b"
    assert find_family(visual, "").name == "visualglm"
    del visual["auto_map"]
    assert find_family(visual, "").name == "visualglm"
    text = {"model_type": "chatglm", "padded_vocab_size": 151552}
    assert find_family(text, "").name == "glm4v_9b"


@pytest.mark.parametrize(
    "raw",
    [
        {"model_type": "chatglm", "padded_vocab_size": 65024},  # ChatGLM3-6B
        {"model_type": "chatglm", "vocab_size": 130528},  # ChatGLM-6B
        {"model_type": "glm4v", "vision_config": {}},  # GLM-4.1V
        {},
    ],
)
def test_other_models_are_refused_by_name(raw: dict[str, Any]) -> None:
    """Catches a neighbour of the family that is loaded and answers nonsense."""
    with pytest.raises(ConfigError, match="no model family claims this checkpoint"):
        find_family(raw, "config.json")


def build(raw: dict[str, Any]) -> Any:
    """The model of a config, without weights."""
    family, config = find_family(raw, ""), parse(raw)
    return family.build(config, BuildContext(open_device("cpu"), torch.float32, 16))


def test_the_residual_factor_follows_the_depth() -> None:
    """Catches the hub code's constant sqrt(56), which is right for 28 layers only."""
    model = build(raw_config("visualglm") | {"num_layers": 7})
    assert model.blocks[0].alpha == pytest.approx(14**0.5)


def test_each_norm_has_its_own_epsilon() -> None:
    """Catches one part's epsilon in another: values of ordinary size do not show which it is."""
    glm, visual = raw_config("glm4v_9b"), raw_config("visualglm")
    glm["layernorm_epsilon"], glm["vision_config"]["layer_norm_eps"] = 0.25, 0.5
    visual["layernorm_epsilon"], visual["eva_config"]["layernorm_epsilon"] = 0.25, 0.5
    visual["qformer_config"]["layernorm_epsilon"] = 0.75
    expected = {"tower": {0.5}, "adapter": {1e-5}, "blocks": {0.25}, "final_norm": {0.25}}
    assert epsilons(build(glm)) == expected
    expected = {"tower": {0.5, 1e-5}, "qformer": {0.75}, "blocks": {0.25}, "final_norm": {0.25}}
    assert epsilons(build(visual)) == expected
    assert build(visual).tower.norm.eps == 1e-5


def epsilons(model: Any) -> dict[str, set[float]]:
    found: dict[str, set[float]] = {}
    for name, module in model.named_modules():
        if isinstance(module, (LayerNorm, RMSNorm)):
            found.setdefault(name.partition(".")[0], set()).add(module.eps)
    return found


def test_rope_ratio_multiplies_the_base() -> None:
    """Catches a ratio that is read and dropped: the published picture model has 1."""
    model = build(raw_config("glm4v_9b") | {"rope_ratio": 500})
    cos, _ = model.rotary.at(torch.tensor([[7]]))
    width = raw_config("glm4v_9b")["kv_channels"] // 2
    angles = [7 * (10000.0 * 500) ** (-2 * i / width) for i in range(width // 2)]
    torch.testing.assert_close(cos[0], torch.tensor(angles).cos())


def test_a_picture_is_squashed_to_height_and_width_as_the_file_says(tmp_path: Path) -> None:
    """Catches height and width that change places, which a square does not show."""
    raw = raw_config("visualglm")
    raw["eva_config"] |= {"image_size": [28, 42], "max_sequence_length": 7}
    names = {"gmask_token_id": "[gMASK]", "bos_token_id": "<sop>", "eos_token_id": "<eop>"}
    ids = {"<unk>": 0} | {special: raw[name] for name, special in names.items()}
    processor = find_family(raw, "").processor(
        tmp_path, parse(raw), SimpleNamespace(special_ids=ids)
    )
    image = processor.prepare_image(Image.new("RGB", (300, 100)), b"")
    assert image.pixels.shape == (28, 42, 3)
    assert image.grid == (2, 3)
