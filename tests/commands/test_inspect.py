"""commands/inspect.py: the numbers are checked against counts made from the spec files alone."""

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest

from glimt.commands.inspect import CheckpointSummary, describe
from glimt.demo.noise import FAMILIES, write_noise_model
from glimt.errors import CheckpointError

GOLDEN = Path(__file__).parents[1] / "golden"
NUM_WORDS = 640  # instead of the golden vocabularies, whose size is not the point here


def small_spec(name: str) -> dict[str, Any]:
    spec = json.loads((GOLDEN / f"{name}-tiny.spec.json").read_text(encoding="utf-8"))
    key = "vocab_size" if name == "visualglm" else "padded_vocab_size"
    old, spec["config"][key] = spec["config"][key], NUM_WORDS
    for tensor in spec["tensors"]:
        tensor[1] = [NUM_WORDS if n == old else n for n in tensor[1]]
    spec["max_shard_bytes"] = 200_000
    return spec


def write(spec: dict[str, Any], folder: Path) -> Path:
    module_spec = importlib.util.spec_from_file_location("drawing", GOLDEN / "make_checkpoint.py")
    drawing = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(drawing)
    (folder / "spec.json").write_text(json.dumps(spec))
    drawing.main(str(folder / "spec.json"), str(folder / "model"))
    return folder / "model"


def num_elements(spec: dict[str, Any], *parts: str) -> int:
    """Elements of the tensors whose names contain one of the parts, inv_freq left out."""
    return sum(
        math.prod(shape)
        for name, shape, _ in spec["tensors"]
        if any(part in name for part in parts) and "inv_freq" not in name
    )


def of_weights(found: CheckpointSummary) -> list[str]:
    """Problems but for the tokenizer, which the golden files have none of."""
    return [problem for problem in found.problems if "copy it from" not in problem]


# family: (golden file, what its picture tensors have in their names, cached numbers per token)
CASES = {
    "visualglm": ("visualglm", "image_encoder.", 2 * 3 * 64),
    "glm4v_9b": ("glm-4v", "transformer.vision.", 2 * 3 * 2 * 16),
}


@pytest.mark.parametrize("family", CASES)
def test_the_numbers_are_those_of_the_checkpoint(tmp_path, family):
    """Catches a group, a dtype size or the grouped-query factor counted wrongly."""
    golden, vision, num_cached = CASES[family]
    spec = small_spec(golden)
    found = describe(write(spec, tmp_path))
    total, in_vision = num_elements(spec, ""), num_elements(spec, vision)
    groups = {group.name: group for group in found.groups}
    assert found.family == family
    assert of_weights(found) == []
    assert found.num_parameters == total
    assert groups["vision"].num_elements == in_vision
    assert groups["language"].num_elements == total - in_vision
    assert groups["language"].nbytes == 4 * (total - in_vision)
    ignored = [name for name, _, _ in spec["tensors"] if "inv_freq" in name]
    assert groups["other"].num_tensors == len(ignored)
    assert sum(group.num_tensors for group in found.groups) == len(spec["tensors"])
    assert found.weight_bytes == {"float32": 4 * total, "float16": 2 * total, "bfloat16": 2 * total}
    assert found.kv_bytes_per_token["float32"] == 4 * num_cached
    assert found.kv_bytes_per_token["bfloat16"] == 2 * num_cached


def test_the_config_and_the_files_are_told(tmp_path):
    """Catches reporting class defaults instead of the file's own values."""
    folder = write(small_spec("visualglm"), tmp_path)
    found = describe(folder)
    assert (found.context_tokens, found.vocab_size) == (2048, NUM_WORDS)
    assert found.declared_dtype == "float32"
    assert found.dtypes == {"float32": 142}
    assert len(found.files) > 1
    assert found.files == {f.name: f.stat().st_size for f in folder.glob("*.safetensors")}


def test_the_summary_is_plain_data(tmp_path):
    """Catches a path, a dtype or a dataclass left in what is printed as JSON."""
    found = describe(write(small_spec("glm-4v"), tmp_path))
    again = json.loads(json.dumps(found.as_dict()))
    assert again["groups"][0]["name"] == "language"
    assert again.keys() == CheckpointSummary.__dataclass_fields__.keys()


def test_weights_of_another_size_are_problems_not_an_exception(tmp_path):
    """Catches an inspection that dies of exactly what it is there to find."""
    folder = write(small_spec("visualglm"), tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["inner_hidden_size"] += 8
    (folder / "config.json").write_text(json.dumps(config))
    problems = of_weights(describe(folder))
    assert len(problems) == 3 * 3  # per layer: up weight, up bias, down weight
    assert all("is needed" in problem for problem in problems)


def test_broken_files_are_problems_and_the_rest_is_still_told(tmp_path):
    """Catches hiding what config.json says because a download is incomplete."""
    folder = write(small_spec("visualglm"), tmp_path)
    first = min(folder.glob("*.safetensors"))
    first.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    found = describe(folder)
    assert len(of_weights(found)) == 1
    assert "git lfs pull" in of_weights(found)[0]
    assert found.num_parameters > 0
    assert found.kv_bytes_per_token["float16"] > 0


@pytest.mark.parametrize("content", [None, "{}", "{", '{"model_type": "llama"}'])
def test_a_folder_that_is_no_model_is_an_error(tmp_path, content):
    """Catches an empty summary for a mistyped path."""
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError) as caught:
        describe(tmp_path)
    assert any("config.json" in problem for problem in caught.value.problems)
    assert any("holds no weights" in problem for problem in caught.value.problems)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_whole_folder_has_no_problems_and_one_without_tokenizer_has_one(tmp_path, family):
    """Catches a folder that is called sound and then cannot be loaded."""
    write_noise_model(tmp_path, family)
    assert describe(tmp_path).problems == ()
    file = tmp_path / {"glm4v_9b": "tokenizer.model", "visualglm": "ice_text.model"}[family]
    file.unlink()
    said = f"{file.name}: is missing; copy it from the original checkpoint"
    assert describe(tmp_path).problems == (said,)
