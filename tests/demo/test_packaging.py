"""The two demo models are complete, small, of the published form, and part of the wheel."""

from __future__ import annotations

import json
import sys
from fnmatch import fnmatch
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from glimt.config import EngineConfig
from glimt.loader import BUILT_IN, open_model

if sys.version_info >= (3, 11):
    import tomllib
else:  # pytest needs it there
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
PACKAGED = Path(str(resources.files("glimt.demo")))
TOKENIZERS = {"demo": "tokenizer.model", "demo-visualglm": "ice_text.model"}
MOST_BYTES = 12_000_000  # of one model's weights
MOST_BYTES_IN_ALL = 25_000_000  # that the wheel carries
LEAST_CONTEXT = 2048  # tokens beside a picture

every_model = pytest.mark.parametrize("name", BUILT_IN)


def folder_of(name: str) -> Path:
    return PACKAGED / BUILT_IN[name]


def read(name: str, file: str) -> Any:
    return json.loads((folder_of(name) / file).read_text(encoding="utf-8"))


@every_model
def test_a_demo_model_has_every_file_of_a_published_one(name):
    """Catches weights without their tokenizer, index or cards, and a file left over."""
    shards = set(read(name, "model.safetensors.index.json")["weight_map"].values())
    assert len(shards) > 1
    assert {path.name for path in folder_of(name).iterdir()} == shards | {
        "README.md",
        "README.zh.md",
        "config.json",
        "generation_config.json",
        "model.safetensors.index.json",
        "tokenizer_config.json",
        TOKENIZERS[name],
    }


@every_model
def test_every_file_of_a_demo_model_goes_into_the_wheel(name):
    """Catches a pattern in pyproject.toml that no longer fits: pip would install no weights."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    build = settings["tool"]["scikit-build"]
    assert build["wheel"]["packages"] == ["src/glimt"]  # with every file in it, but for these
    files = [path.relative_to(ROOT / "src") for path in folder_of(name).iterdir()]
    assert files
    for file in files:
        assert not any(fnmatch(str(file), pattern) for pattern in build["wheel"]["exclude"]), file


def test_git_keeps_every_file_of_the_demo_models():
    """Catches a line of .gitignore that leaves weights out of a fresh clone."""
    lines = (ROOT / ".gitignore").read_text(encoding="utf-8").split()
    for folder in BUILT_IN.values():
        for part in (*Path("src/glimt/demo", folder).parts, "model.safetensors", "ice_text.model"):
            assert not any(fnmatch(part, line.rstrip("/")) for line in lines), part


@every_model
def test_weights_are_bfloat16_in_shards_that_the_index_names(name):
    """Catches float32 weights, which are twice as large, and an index of another export."""
    index, dtypes, nbytes = read(name, "model.safetensors.index.json"), set(), 0
    for shard in sorted(set(index["weight_map"].values())):
        path = folder_of(name) / shard
        nbytes += path.stat().st_size
        with safe_open(path, "pt") as file:
            assert set(file.keys()) == {n for n, f in index["weight_map"].items() if f == shard}
            dtypes |= {file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118
    assert dtypes == {"BF16"}
    assert read(name, "config.json")["torch_dtype"] == "bfloat16"
    assert nbytes <= MOST_BYTES


def test_both_models_together_keep_the_wheel_small():
    """Catches a package that takes minutes to download."""
    files = [path for name in BUILT_IN for path in folder_of(name).iterdir()]
    assert 0 < sum(path.stat().st_size for path in files) <= MOST_BYTES_IN_ALL


@every_model
def test_long_texts_fit_beside_a_picture(name):
    """Catches a context too short to time long inputs in."""
    opened = open_model(EngineConfig(model=name))
    image_tokens = opened.processor.image_cost(320, 240)
    assert opened.max_model_len - image_tokens >= LEAST_CONTEXT
    length = {"demo": "seq_length", "demo-visualglm": "max_sequence_length"}[name]
    assert read(name, "config.json")[length] == opened.max_model_len


@every_model
def test_both_cards_say_that_it_is_a_toy_and_under_which_licence(name):
    """Catches a card that a user would take for that of the real model."""
    for card, toy in (("README.md", "toy"), ("README.zh.md", "玩具")):
        text = (folder_of(name) / card).read_text(encoding="utf-8")
        assert BUILT_IN[name] in text
        assert toy in text
        assert "Apache-2.0" in text
        assert "Fashion-MNIST" in text
