"""find_architecture: the published models by their shapes, and what a configuration says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tests.oracles import clip_oracle as oracle

from glimt.errors import ConfigError
from glimt.evaluate.clip_architectures import CONFIG, Architecture, find_architecture
from glimt.evaluate.open_clip import Shapes, shapes_of

NOWHERE = Path("/nowhere")
H14 = Shapes(1024, 1280, 32, 5120, 14, 224, 1024, 24, 4096, 49408, 77)
B32 = Shapes(512, 768, 12, 3072, 32, 224, 512, 12, 2048, 49408, 77)
L14 = Shapes(768, 1024, 24, 4096, 14, 224, 768, 12, 3072, 49408, 77)
G14 = Shapes(1280, 1664, 48, 8192, 14, 224, 1280, 32, 5120, 49408, 77)
SMALL = shapes_of(oracle.random_state(), "small")


@pytest.mark.parametrize(
    ("shapes", "found"),
    [
        (H14, Architecture("ViT-H-14", 16, 16, "gelu")),
        (B32, Architecture("ViT-B-32", 12, 8, "gelu")),
        (L14, Architecture("ViT-L-14", 16, 12, "gelu")),
        (replace(L14, image_size=336), Architecture("ViT-L-14-336", 16, 12, "gelu")),
        (G14, Architecture("ViT-bigG-14", 16, 20, "gelu")),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_published_models_are_known_by_their_shapes(shapes, found):
    """Catches ViT-H-14 with 20 heads of 64 in the place of 16 of 80."""
    assert find_architecture(shapes, None, NOWHERE) == found


def test_shapes_are_read_from_the_weights():
    """Catches blocks of one tower counted with the other's, and a grid for a side."""
    expected = Shapes(24, 40, 2, 160, 14, 28, 32, 2, 128, oracle.SHAPE.vocab, 77)
    assert expected == SMALL


def test_a_name_says_the_activation():
    """Catches OpenAI's weights judged with the wrong GELU, which no shape tells."""
    assert find_architecture(L14, "ViT-L-14-quickgelu", NOWHERE).activation == "quick_gelu"


def test_a_name_that_contradicts_the_weights_is_refused():
    """Catches heads of another model, which run and give wrong figures."""
    with pytest.raises(ConfigError, match="ViT-B-32 is given, but the weights are of width 1280"):
        find_architecture(H14, "ViT-B-32", NOWHERE)
    with pytest.raises(ConfigError, match="'vit-h' is unknown; ViT-B-32, ViT-B-16"):
        find_architecture(H14, "vit-h", NOWHERE)


def test_unknown_shapes_ask_for_a_configuration():
    """Catches a guess of the heads, which nothing would show."""
    with pytest.raises(ConfigError, match="give --architecture open_clip_config"):
        find_architecture(SMALL, None, NOWHERE)


def test_a_configuration_beside_the_weights_is_read(tmp_path):
    """Catches a file that is only looked for when it is named."""
    (tmp_path / CONFIG).write_text(json.dumps(oracle.config_json()))
    found = find_architecture(SMALL, None, tmp_path)
    assert found == Architecture(f"open_clip {CONFIG}", 2, 4, "gelu")
    named = tmp_path / "mine.json"
    named.write_text(json.dumps(oracle.config_json(quick_gelu=True)["model_cfg"]))
    assert find_architecture(SMALL, str(named), NOWHERE).activation == "quick_gelu"


def changed(section: str, **values: object) -> str:
    raw = oracle.config_json()
    raw["model_cfg"][section] |= values
    return json.dumps(raw)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (changed("vision_cfg", timm_model_name="x"), "timm_model_name is set"),
        (changed("text_cfg", pool_type="last"), "pool_type is set"),
        (changed("vision_cfg", width=64), "vision_cfg.width is 64, but the weights have 40"),
        (changed("vision_cfg", head_width=13), "no multiple"),
        (changed("vision_cfg", head_width=0), "no multiple"),
        (changed("text_cfg", heads=5), "no multiple"),
        (changed("text_cfg", heads="many"), "a number is needed"),
        ("{}", "vision_cfg is missing"),
        ("[1]", "not an object"),
        ("{", "not readable as JSON"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(tmp_path, text, said):
    """Catches a setting that is passed over, such as another pooling."""
    (tmp_path / CONFIG).write_text(text)
    with pytest.raises(ConfigError, match=said):
        find_architecture(SMALL, None, tmp_path)
