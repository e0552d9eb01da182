"""loader.py: whatever is wrong with a model folder is told at once, before any data is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from glimt.config import EngineConfig
from glimt.demo.noise import FAMILIES, write_noise_model
from glimt.errors import CheckpointError, ConfigError
from glimt.loader import open_model, read_folder

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
SHARDS = [f"model-{i:05}-of-00004.safetensors" for i in range(1, 5)]
TOKENIZER = {"glm4v_9b": "tokenizer.model", "visualglm": "ice_text.model"}


def sharded(folder: Path, family: str) -> dict[str, dict[str, Tensor]]:
    """A noise model in four shards; gives the tensors by shard."""
    write_noise_model(folder, family)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {file: {n: tensors[n] for n in names[i::4]} for i, file in enumerate(SHARDS)}
    for file, held in shards.items():
        save_file(held, folder / file)
    index = {name: file for file, held in shards.items() for name in held}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return shards


def change_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def problems_of(folder: Path) -> list[str]:
    with pytest.raises((CheckpointError, ConfigError)) as caught:
        open_model(EngineConfig(model=str(folder)))
    # The message has them all, and so does whoever catches the error.
    assert all(problem in str(caught.value) for problem in caught.value.problems)
    return list(caught.value.problems)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_that_is_wrong_with_a_folder_is_one_error(tmp_path: Path, family: str) -> None:
    """Catches a stage that stops the next one: each attempt may be a 5 GB download."""
    shards = sharded(tmp_path, family)
    (tmp_path / TOKENIZER[family]).unlink()
    (tmp_path / SHARDS[0]).write_bytes(LFS)
    whole = (tmp_path / SHARDS[1]).read_bytes()
    (tmp_path / SHARDS[1]).write_bytes(whole[:-100])
    third = dict(shards[SHARDS[2]])
    lacking, misshapen, integer = list(third)[:3]
    del third[lacking]
    third[misshapen] = torch.zeros(5, 7)
    third[integer] = third[integer].to(torch.int8)
    third["transformer.stray"] = torch.zeros(1)
    save_file(third, tmp_path / SHARDS[2])
    (tmp_path / SHARDS[3]).unlink()
    found = problems_of(tmp_path)
    expected = (
        f"{TOKENIZER[family]}: is missing",
        f"{SHARDS[0]} is a Git LFS pointer",
        f"{SHARDS[1]} is truncated",
        f"{SHARDS[3]} is missing",
        f"{lacking} is not in {SHARDS[2]}",
        f"{misshapen} in {SHARDS[2]} has shape [5, 7]",
        f"{integer} in {SHARDS[2]} holds int8",
        f"transformer.stray in {SHARDS[2]} is unexpected",
    )
    for text in expected:
        assert [text in problem for problem in found].count(True) == 1, text
    # Tensors of the files that cannot be read are not told of one by one.
    assert len(found) == len(expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_wrong_config_does_not_hide_broken_files(tmp_path: Path, family: str) -> None:
    """Catches an error for config.json alone: the files are told of in the next attempt."""
    sharded(tmp_path, family)
    change_config(tmp_path, num_layers=None, hidden_size="64")
    (tmp_path / TOKENIZER[family]).write_bytes(LFS)
    (tmp_path / SHARDS[2]).write_bytes(b"")
    found = problems_of(tmp_path)
    assert len(found) == 4
    assert found[:2] == [
        "config.json: num_layers is missing",
        "config.json: hidden_size is '64'; a whole number >= 1 is needed",
    ]
    assert found[2].startswith(f"{TOKENIZER[family]}: is a Git LFS pointer")
    assert found[3] == f"{SHARDS[2]} is empty"


def test_a_config_that_cannot_be_read_does_not_hide_broken_files(tmp_path: Path) -> None:
    """Catches a JSON parser's words for a pointer, and the weights left for the next attempt."""
    sharded(tmp_path, "glm4v_9b")
    (tmp_path / "config.json").write_bytes(LFS)
    (tmp_path / SHARDS[1]).write_bytes(LFS)
    found = problems_of(tmp_path)
    assert [problem.split(" is a Git LFS pointer")[0] for problem in found] == [
        "config.json:",
        SHARDS[1],
    ]


def test_shards_are_looked_at_though_their_index_is_broken(tmp_path: Path) -> None:
    """Catches an index that is mended first, only to learn that a shard is broken as well."""
    sharded(tmp_path, "visualglm")
    (tmp_path / "model.safetensors.index.json").write_bytes(LFS)
    (tmp_path / SHARDS[3]).write_bytes(LFS)
    found = problems_of(tmp_path)
    assert [problem.split(" is a Git LFS pointer")[0] for problem in found] == [
        "model.safetensors.index.json",
        SHARDS[3],
    ]


def test_every_one_of_many_problems_is_in_the_message(tmp_path: Path) -> None:
    """Catches a message that ends in "and 12 more"."""
    write_noise_model(tmp_path, "visualglm")
    save_file({"transformer.stray": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert len(problems_of(tmp_path)) > 90


def test_wrong_picture_ids_do_not_hide_a_wrong_generation_config(tmp_path: Path) -> None:
    """Catches a processor that stops at its first complaint."""
    write_noise_model(tmp_path, "glm4v_9b")
    change_config(tmp_path, boi_token_id=1)
    (tmp_path / "generation_config.json").write_text('{"temperature": "hot", "top_p": -1}')
    found = problems_of(tmp_path)
    assert [problem.split(" is ")[0].split(" are ")[0] for problem in found] == [
        "generation_config.json: temperature",
        "generation_config.json: top_p",
        "boi_token_id, eoi_token_id",
    ]


def test_one_problem_is_told_in_one_line(tmp_path: Path) -> None:
    """Catches a list of one, and a file that is named twice."""
    write_noise_model(tmp_path, "glm4v_9b")
    change_config(tmp_path, seq_length=None)
    with pytest.raises(ConfigError) as caught:
        open_model(EngineConfig(model=str(tmp_path)))
    assert str(caught.value) == f"{tmp_path / 'config.json'}: seq_length is missing"


@pytest.mark.parametrize(("family", "key"), [("glm4v_9b", "padded_"), ("visualglm", "")])
def test_a_tokenizer_of_another_checkpoint_is_refused(tmp_path, family: str, key: str) -> None:
    """Catches ids without an embedding: every request that holds one would end with an error."""
    write_noise_model(tmp_path, family)
    change_config(tmp_path, **{f"{key}vocab_size": 600 if family == "visualglm" else 520})
    assert any("it belongs to another checkpoint" in problem for problem in problems_of(tmp_path))


@pytest.mark.parametrize(("family", "key"), [("glm4v_9b", "padded_"), ("visualglm", "")])
def test_a_tokenizer_may_use_every_row(tmp_path: Path, family: str, key: str) -> None:
    """Catches a check that refuses a vocabulary without rows to spare."""
    write_noise_model(tmp_path, family)
    processor = read_folder(tmp_path).processor
    assert processor is not None
    num_ids = processor.tokenizer.num_ids
    change_config(tmp_path, **{f"{key}vocab_size": num_ids})
    assert read_folder(tmp_path).errors == ()


@pytest.mark.parametrize("change", [{"vocab_size": 2**62}, {"max_sequence_length": 10**15}])
def test_a_model_of_impossible_size_is_refused(tmp_path: Path, change: dict[str, int]) -> None:
    """Catches an allocator's traceback for a digit too many in config.json."""
    write_noise_model(tmp_path, "visualglm")
    change_config(tmp_path, **change)
    (problem,) = problems_of(tmp_path)
    assert problem.startswith("describes a model of impossible size")


def test_a_rotary_table_of_another_family_is_refused(tmp_path: Path) -> None:
    """Catches an option that is accepted and changes nothing."""
    write_noise_model(tmp_path, "glm4v_9b")
    with pytest.raises(ConfigError, match="rotary_table: is 'hub_fp16', a table of VisualGLM"):
        open_model(EngineConfig(model=str(tmp_path), rotary_table="hub_fp16"))


def test_whoever_loads_a_model_has_freed_memory_kept(tmp_path: Path, monkeypatch) -> None:
    """Catches a command that builds its engine itself, and pays for fresh pages in every layer."""
    write_noise_model(tmp_path, "glm4v_9b")
    kept: list[bool] = []
    opened = open_model(EngineConfig(model=str(tmp_path)))

    def keep(self) -> None:
        kept.append(any(value.is_meta for value in opened.model.parameters()))

    monkeypatch.setattr(type(opened.device), "keep_freed_memory", keep)
    opened.load()
    assert kept == [False], "once, when all weights are in place"
