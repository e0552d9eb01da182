"""`glimt quantize`, and quantising while loading: both must give the same model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from glimt.cli import app
from glimt.commands.quantize import plan_quantize, quantize
from glimt.config import EngineConfig
from glimt.demo.noise import FAMILIES, write_noise_model
from glimt.errors import CheckpointError, ConfigError
from glimt.layers.linear import Linear
from glimt.llm import LLM
from glimt.loader import OpenedModel, open_model
from glimt.quant.base import QuantisedWeight, all_formats
from glimt.quant.plan import QuantOptions
from glimt.types import SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=8)
WEIGHTS = "model-00001-of-00001.safetensors"


@pytest.fixture(scope="module", params=FAMILIES)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param)
    write_noise_model(path, request.param)
    (path / "README.md").write_text("a card", encoding="utf-8")
    (path / "modeling.py").write_text("code", encoding="utf-8")
    return path


def run(*arguments: str | Path):
    return CliRunner().invoke(app, ["quantize", *map(str, arguments)])


def written(source: Path, target: Path, **options: str) -> Path:
    quantize(plan_quantize(source, target, QuantOptions(**options)))
    return target


def loaded(folder: Path, **settings: str) -> OpenedModel:
    opened = open_model(EngineConfig(model=str(folder), **settings))
    opened.load()
    return opened


@pytest.fixture(autouse=True)
def _plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that are packed for a kernel cannot be looked at."""
    monkeypatch.setenv("GLIMT_ISA", "none")


def quantised_weights(opened: OpenedModel) -> dict[str, torch.Tensor]:
    return {
        name: module.held.dequantise()
        for name, module in opened.model.named_modules()
        if isinstance(module, Linear) and isinstance(module.held, QuantisedWeight)
    }


def answer(folder: Path, **settings: str) -> tuple[int, ...]:
    llm = LLM(str(folder), num_blocks=16, **settings)
    return llm.generate("abc", GREEDY).token_ids


@pytest.mark.parametrize("blocks", ["w8a8", "int4", "int4-asym-g32"])
def test_a_written_folder_is_the_model_quantised_while_loading(source, tmp_path, blocks):
    """Catches a weight under another's name, one more rounding on the way through a file, and a
    role that one of the two ways forgets.
    """
    target = written(source, tmp_path / "out", blocks=blocks, tower="int8")
    stored = quantised_weights(loaded(target))
    made = quantised_weights(loaded(source, quant=blocks, quant_tower="int8"))
    assert stored.keys() == made.keys()
    assert "head" in made
    assert any(name.startswith("tower.") for name in made)
    for name in made:
        assert torch.equal(stored[name], made[name]), name
    assert answer(target) == answer(source, quant=blocks, quant_tower="int8")


def test_weights_are_rounded_from_the_files_values(source, tmp_path):
    """Catches a cast to the engine's dtype first: bfloat16 would round twice."""
    target = written(source, tmp_path / "out", blocks="int8")
    in_float32 = quantised_weights(loaded(target, dtype="float32"))
    in_bfloat16 = quantised_weights(loaded(source, dtype="bfloat16", quant="int8"))
    assert all(torch.equal(in_float32[name], in_bfloat16[name]) for name in in_float32)


def test_what_is_not_quantised_is_copied_bit_by_bit(source, tmp_path):
    """Catches norms and tables that change their dtype, or lose tensors."""
    target = written(source, tmp_path / "out", blocks="int4", head="none")
    before, after = load_file(source / "model.safetensors"), load_file(target / WEIGHTS)
    replaced = {name.removesuffix(".values") for name in after if name.endswith(".values")}
    kept = before.keys() - replaced
    assert kept == {n for n in after if not n.endswith((".values", ".scales"))}
    assert all(torch.equal(after[name], before[name]) for name in kept)
    assert all(after[name].dtype == before[name].dtype for name in kept)
    assert len(replaced) == 4 * json.loads((source / "config.json").read_text())["num_layers"]


def test_the_folder_has_its_tokenizer_and_cards_but_no_code(source, tmp_path):
    """Catches a folder that cannot be opened, and code that travels along."""
    target = written(source, tmp_path / "out", blocks="int8")
    names = {path.name for path in target.iterdir()}
    left_out = {"modeling.py", "model.safetensors"}
    assert names == {p.name for p in source.iterdir()} - left_out | {
        WEIGHTS,
        "model.safetensors.index.json",
    }
    config = json.loads((target / "config.json").read_text(encoding="utf-8"))
    said = {"version": 1, "blocks": "int8", "head": "int8", "tower": "none"}
    original = json.loads((source / "config.json").read_text(encoding="utf-8"))
    assert config == original | {"glimt_quantization": said}


def test_shards_hold_whole_weights_and_the_index_names_them(source, tmp_path):
    """Catches a weight whose parts are torn apart, and an index of other files."""
    job = plan_quantize(source, tmp_path / "out", QuantOptions(blocks="int8"))
    seen: list[int] = []
    report = quantize(job, seen.append, max_shard_bytes=40_000)
    assert len(report.files) > 2
    assert sum(seen) == report.nbytes == job.nbytes
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    for name, file in index["weight_map"].items():
        if name.endswith(".values"):
            assert index["weight_map"][name.replace(".values", ".scales")] == file
    total = 0
    for file in report.files:
        with safe_open(tmp_path / "out" / file, "pt") as shard:
            total += sum(shard.get_tensor(n).nbytes for n in shard.keys())  # noqa: SIM118
    assert total == index["metadata"]["total_size"] == report.nbytes
    assert quantised_weights(loaded(tmp_path / "out"))


def test_bin_files_can_be_quantised(source, tmp_path):
    """Catches a source that is only read if it is in safetensors."""
    pickled = tmp_path / "bin"
    pickled.mkdir()
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            (pickled / file.name).write_bytes(file.read_bytes())
    torch.save(load_file(source / "model.safetensors"), pickled / "pytorch_model.bin")
    target = written(pickled, tmp_path / "out", blocks="int8")
    assert not (target / "pytorch_model.bin").exists()
    assert answer(target) == answer(source, quant="int8")


# --- nothing half done -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "told"), [(KeyboardInterrupt, KeyboardInterrupt), (OSError, ConfigError)]
)
def test_an_interrupted_run_leaves_nothing(source, tmp_path, error, told):
    """Catches half a checkpoint that looks like a whole one."""
    job = plan_quantize(source, tmp_path / "out", QuantOptions(blocks="int8"))
    counts = iter(range(5))

    def stop(_: int) -> None:
        if next(counts) == 3:
            raise error

    with pytest.raises(told):
        quantize(job, stop)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_replacement_keeps_what_was_there(source, tmp_path):
    """Catches --force that deletes the old folder before the new one is whole."""
    target = written(source, tmp_path / "out", blocks="int8")
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    job = plan_quantize(source, target, QuantOptions(blocks="int4"), force=True)

    def stop(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(job, stop)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_force_replaces_a_model_folder_and_nothing_else(source, tmp_path):
    """Catches an overwritten checkpoint, and --force that empties a home folder."""
    target = tmp_path / "out"
    assert run(source, target).exit_code == 0
    refused = run(source, target, "--format", "int4")
    assert refused.exit_code == 2
    assert "exists and is not empty" in refused.stderr
    assert run(source, target, "--format", "int4", "--force").exit_code == 0
    config = json.loads((target / "config.json").read_text(encoding="utf-8"))
    assert config["glimt_quantization"]["blocks"] == "int4"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    home = tmp_path / "home"
    home.mkdir()
    (home / "letter.txt").write_text("dear", encoding="utf-8")
    assert run(source, home, "--force").exit_code == 2
    assert (home / "letter.txt").exists()


# --- what is said ------------------------------------------------------------------------------


def test_the_command_tells_what_it_wrote(source, tmp_path):
    """Catches a report of other numbers than the folder's."""
    said = run(source, tmp_path / "a", "--format", "int4", "--tower", "int8", "--json")
    assert said.exit_code == 0, said.stderr
    report = json.loads(said.stdout)
    assert report["formats"] == {"blocks": "int4", "head": "int8", "tower": "int8"}
    assert report["files"] == [WEIGHTS]
    tensors = load_file(tmp_path / "a" / WEIGHTS)
    assert report["nbytes"] == sum(tensor.nbytes for tensor in tensors.values())
    before = load_file(source / "model.safetensors")
    assert report["source_bytes"] == sum(tensor.nbytes for tensor in before.values())
    told = run(source, tmp_path / "b", "--head", "none")
    assert f"{tmp_path / 'b'}: 8 weights quantised (blocks int8, head none, tower none)" in (
        told.stdout
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--format", "int5"], "error: format: 'int5' is unknown"),
        (["--format", "none"], "every format is none"),
        (["--tower", "fp8"], "error: tower: 'fp8' is unknown"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_written(source, tmp_path, arguments, said):
    """Catches an error that comes after minutes of work, or as a traceback."""
    result = run(source, tmp_path / "out", *arguments)
    assert result.exit_code == 2
    assert said in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_quantised_folder_is_not_quantised_again(source, tmp_path):
    """Catches the loss of a second rounding."""
    target = written(source, tmp_path / "out", blocks="int8")
    with pytest.raises(ConfigError, match="is quantised already"):
        plan_quantize(target, tmp_path / "again", QuantOptions(blocks="int4"))


def test_source_and_target_must_lie_apart(source):
    """Catches a source that is replaced by its own copy."""
    for target in (source, source / "int8", source.parent):
        with pytest.raises(ConfigError, match="choose another"):
            plan_quantize(source, target, QuantOptions(blocks="int8"), force=True)


def test_a_damaged_source_is_told_before_anything_is_written(source, tmp_path):
    """Catches a conversion that stops at the last tensor."""
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in source.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    tensors = load_file(source / "model.safetensors")
    lost = sorted(tensors)[0]
    save_file({n: t for n, t in tensors.items() if n != lost}, broken / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"{lost}.* is missing"):
        plan_quantize(broken, tmp_path / "out", QuantOptions(blocks="int8"))


# --- reading ---------------------------------------------------------------------------------


def test_missing_and_odd_parts_are_named(source, tmp_path):
    """Catches a weight without its scales, and values of another dtype, that are read anyway."""
    target = written(source, tmp_path / "out", blocks="int8")
    tensors = load_file(target / WEIGHTS)
    scales = sorted(name for name in tensors if name.endswith(".scales"))[:2]
    values = scales[1].replace(".scales", ".values")
    del tensors[scales[0]]
    tensors[values] = tensors[values].to(torch.uint8)
    (target / "model.safetensors.index.json").unlink()
    save_file(tensors, target / WEIGHTS)
    with pytest.raises(CheckpointError) as caught:
        loaded(target)
    assert f"{scales[0]} [" in str(caught.value)
    assert f"{values} in {WEIGHTS} holds uint8, but int8 is needed" in str(caught.value)


def test_a_quantised_folder_cannot_be_quantised_otherwise_while_loading(source, tmp_path):
    """Catches --quant that is ignored in silence."""
    target = written(source, tmp_path / "out", blocks="int8")
    with pytest.raises(ConfigError, match="holds 'int8' already"):
        open_model(EngineConfig(model=str(target), quant="int4"))
    more = loaded(target, quant="int8", quant_tower="int4")
    assert any(name.startswith("tower.") for name in quantised_weights(more))


@pytest.mark.parametrize("bits", [4, 8])
def test_visualglms_own_quantised_checkpoints_load(tmp_path, bits):
    """Catches a quantization_bit that is refused, or read in another layout than its own."""
    source = tmp_path / "source"
    write_noise_model(source, "visualglm")
    tensors = load_file(source / "model.safetensors")
    chosen = all_formats()[f"visualglm-int{bits}"]
    for name in [n for n in tensors if n.startswith("transformer.layers") and n.endswith("weight")]:
        if tensors[name].ndim == 2:
            parts = chosen.parts(chosen.quantise(tensors.pop(name)))
            tensors |= {name + ending: part for ending, part in parts.items()}
    own = tmp_path / "own"
    own.mkdir()
    for file in source.iterdir():
        (own / file.name).write_bytes(file.read_bytes())
    config = json.loads((own / "config.json").read_text(encoding="utf-8"))
    text = json.dumps(config | {"quantization_bit": bits})
    (own / "config.json").write_text(text, encoding="utf-8")
    save_file(tensors, own / "model.safetensors")
    ours = quantised_weights(loaded(own))
    made = quantised_weights(loaded(source, quant=f"visualglm-int{bits}", quant_head="none"))
    assert len(ours) == 4 * config["num_layers"]
    assert all(torch.equal(ours[name], made[name]) for name in made)
    assert answer(own) == answer(source, quant=f"visualglm-int{bits}", quant_head="none")
    with pytest.raises(ConfigError, match="is quantised already"):
        plan_quantize(own, tmp_path / "out", QuantOptions(blocks="int8"))
