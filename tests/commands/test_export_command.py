"""`glimt export vision`, and the engine that answers through what it wrote."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shlex
import shutil
import sys
from collections import namedtuple
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.exporting import DEMOS, exported
from typer.testing import CliRunner

from glimt.cli import app
from glimt.commands import export
from glimt.commands.quantize import plan_quantize, quantize
from glimt.config import EngineConfig
from glimt.demo.noise import write_noise_model
from glimt.errors import ConfigError
from glimt.export.check import LIMITS, measured
from glimt.llm import LLM
from glimt.loader import open_model
from glimt.quant.plan import QuantOptions
from glimt.types import SamplingParams
from glimt.weights import is_vision

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
ROWS = json.loads((EXAMPLES / "questions.json").read_text(encoding="utf-8"))
GREEDY = SamplingParams(temperature=0, max_tokens=64)
NOISE = {"checks": False}  # noise models have huge features; the demos are compared


def run(*arguments: str | Path):
    return CliRunner().invoke(app, ["export", "vision", *map(str, arguments)])


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A file of each demo model, by the name of the model: one with a batch of two."""
    folder = tmp_path_factory.mktemp("towers")
    made = {model: folder / f"{model}.onnx" for model in DEMOS.values()}
    exported("demo", made["demo"], batch="dynamic")
    exported("demo-visualglm", made["demo-visualglm"], batch="2")
    return made


# --- what is written -------------------------------------------------------------------------


def test_the_command_tells_what_it_wrote_and_measured(tmp_path):
    """Catches a file without its manifest, and figures that only a script gets."""
    done = run("-m", "demo-visualglm", "-o", tmp_path / "v.onnx")
    assert done.exit_code == 0, done.output
    first, sizes, files, check = done.stdout.splitlines()
    assert first == f"{tmp_path}/v.onnx: visualglm, opset 13, float32"
    assert sizes == "input [1, 96, 96, 3] float32, 0 to 255; output [1, 32, 192]"
    assert re.fullmatch(r"files: v\.onnx [\d.]+ MiB", files)
    figure = r"largest difference \d\.\d\de-0\d of the largest value \(limit 0\.0001\)"
    assert re.fullmatch(rf"beside the torch tower: {figure}, cosine 1\.0+ .*", check)
    assert names(tmp_path) == {"v.onnx", "v.onnx.json"}


def test_json_has_the_manifest_and_the_figures(tmp_path):
    """Catches a script that must parse lines, and a manifest that says something else."""
    done = run("-o", tmp_path / "d.onnx", "--dtype", "float16", "--opset", "18", "--json")
    said = json.loads(done.stdout)
    manifest = json.loads((tmp_path / "d.onnx.json").read_text(encoding="utf-8"))
    both = ("family", "tower_digest", "grid", "opset", "dtype", "files", "batch", "hidden_size")
    assert {name: said[name] for name in both} == {name: manifest[name] for name in both}
    assert (said["family"], said["opset"], said["dtype"]) == ("glm4v_9b", 18, "float16")
    assert said["files"] == {"d.onnx": (tmp_path / "d.onnx").stat().st_size}
    assert said["sha256"] == manifest["sha256"] == {"d.onnx": sha256(tmp_path / "d.onnx")}
    assert said["check"]["difference"] < LIMITS["float16"].difference == 1e-2
    assert said["check"]["cosine"] >= 0.9999
    assert (said["atc"], said["compiled"]) == (None, False)


def test_progress_is_told_of_all_that_is_read_written_and_hashed(folder, tmp_path):
    """Catches a bar that stands still while gigabytes are hashed."""
    read: list[int] = []
    written: list[int] = []
    hashed: list[int] = []
    job = export.ExportJob(model=str(folder), to="onnx", output=tmp_path / "t.onnx", **NOISE)
    plan = export.plan_export(job)
    report = export.export_vision(plan, read.append, written.append, hashed.append)
    assert (sum(read), sum(written)) == (plan.reads, plan.writes)
    assert sum(hashed) == sum(report.files.values()) >= plan.hashes


def test_an_om_is_made_by_atc_beside_its_graph(stand_in_atc, tmp_path):
    """Catches a compiler that is given other sizes than the graph has, or the wrong casts."""
    stand_in_atc.install()
    options = ("--to", "om", "--soc-version", "Ascend910B3", "--batch", "4", "--no-check")
    done = run("-o", tmp_path / "d.om", *options, "--dtype", "float16")
    assert done.exit_code == 0, done.output
    assert stand_in_atc.asked["argv"] == [
        "--framework=5",
        "--model=d.onnx",
        "--output=d",
        "--soc_version=Ascend910B3",
        "--input_shape=input:4,96,96,3",
        "--precision_mode_v2=origin",
    ]
    assert shlex.join(["atc", *stand_in_atc.asked["argv"]]) in done.stdout
    assert stand_in_atc.asked["files"] == ["d.onnx", "d.onnx.json"]
    assert names(tmp_path) == {"d.onnx", "d.onnx.json", "d.om", "d.om.json"}
    manifest = json.loads((tmp_path / "d.om.json").read_text(encoding="utf-8"))
    assert manifest["files"] == {"d.om": (tmp_path / "d.om").stat().st_size}
    assert manifest["sha256"] == {"d.om": sha256(tmp_path / "d.om")}
    assert (manifest["format"], manifest["soc_version"]) == ("om", "Ascend910B3")


def test_a_failed_atc_leaves_nothing(stand_in_atc, tmp_path):
    """Catches a graph and a manifest beside an OM that was never made."""
    stand_in_atc.install(status=1)
    options = ("--to", "om", "--soc-version", "Ascend910B3", "--no-check")
    done = run("-o", tmp_path / "d.om", *options)
    assert done.exit_code == 2
    assert "atc failed (1)" in done.stderr
    assert "E10007: the chip is unknown" in done.stderr
    assert names(tmp_path) == set()


def test_without_atc_the_command_for_elsewhere_is_told(stand_in_atc, tmp_path):
    """Catches a long export that ends in a missing program; with --print-only it is not needed."""
    options = ("--to", "om", "--soc-version", "Ascend310P3", "--no-check")
    command = "atc --framework=5 --model=d.onnx --output=d --soc_version=Ascend310P3 "
    command += "--input_shape=input:1,96,96,3 --precision_mode_v2=fp16"
    refused = run("-o", tmp_path / "d.om", *options)
    assert refused.exit_code == 2
    assert "atc is not on PATH" in refused.stderr
    assert command in " ".join(refused.stderr.split())
    assert names(tmp_path) == set()
    told = run("-o", tmp_path / "d.om", *options, "--print-only")
    assert told.exit_code == 0, told.output
    assert told.stdout.splitlines()[-1] == command
    assert names(tmp_path) == {"d.onnx", "d.onnx.json", "d.om.json"}
    shutil.copyfile(tmp_path / "d.onnx", tmp_path / "d.om")  # what runs elsewhere makes it
    assert json.loads((tmp_path / "d.om.json").read_text())["files"] == {}


# --- what is refused -------------------------------------------------------------------------


REFUSED: dict[str, tuple[list[str], str]] = {
    "opset": (["--opset", "12"], "opset is 12; 13 to 20 can be written"),
    "opset of atc": (
        ["--to", "om", "--soc-version", "Ascend310P3", "--opset", "19"],
        "opset is 19, but ATC takes 11 to 18",
    ),
    "batch": (["--batch", "0"], "batch is '0'; 1 to 64 or dynamic is needed"),
    "dtype": (["--dtype", "bfloat16"], "dtype 'bfloat16' is unknown; choose one of float32, fl"),
    "format": (["--to", "trt"], "to 'trt' is unknown; choose one of onnx, om"),
    "soc": (["--to", "om", "--soc-version", "910B3"], "soc_version '910B3' is no chip of Ascend"),
    "no soc": (["--to", "om"], "name the chip with --soc-version"),
    "soc for onnx": (["--soc-version", "Ascend310P3"], "--soc-version is for --to om; leave it"),
    "dynamic om": (
        ["--to", "om", "--soc-version", "Ascend310P3", "--batch", "dynamic"],
        "batch is dynamic, but an OM has one size; give the number of pictures",
    ),
    "precision": (
        ["--to", "om", "--soc-version", "Ascend310P3", "--precision-mode", "fp8"],
        "precision_mode 'fp8' is unknown; choose one of fp16, origin",
    ),
}


@pytest.mark.parametrize(("options", "said"), REFUSED.values(), ids=REFUSED)
def test_an_option_that_cannot_be_is_told_before_anything_is_read(tmp_path, options, said):
    """Catches a mistake that is found after minutes of reading, or by a library."""
    ending = "om" if "om" in options else "onnx"
    done = run("-m", "nowhere", "-o", tmp_path / f"t.{ending}", *options)
    assert done.exit_code == 2
    assert said in " ".join(done.stderr.split())
    assert "nowhere" not in done.stderr


def test_all_that_is_wrong_with_the_options_is_told_at_once(tmp_path):
    """Catches one round for each mistake."""
    done = run("-o", tmp_path / "t.bin", "--opset", "30", "--batch", "many", "--json")
    said = json.loads(done.stdout)["error"]["message"]
    assert "export: 3 problems" in said
    assert "whose name must end in .onnx" in said


def test_files_that_exist_are_kept_unless_force_is_said(folder, tmp_path):
    """Catches another model's file that is lost to a slip, and --force that does nothing."""
    path = tmp_path / "t.onnx"
    path.write_text("precious")
    done = run("-m", folder, "-o", path)
    assert f"{path} exists; replace it with --force" in " ".join(done.stderr.split())
    assert path.read_text() == "precious"
    assert run("-m", folder, "-o", path, "--force", "--no-check").exit_code == 0
    assert path.stat().st_size > 10_000


def test_weights_that_lie_there_are_kept_unless_force_is_said(folder, tmp_path):
    """Catches another model's weights that are lost because its small file has been moved."""
    path = tmp_path / "t.onnx.data"
    path.write_text("precious")
    done = run("-m", folder, "-o", tmp_path / "t.onnx")
    assert f"{path} exists; replace it with --force" in " ".join(done.stderr.split())
    assert names(tmp_path) == {path.name}


@pytest.fixture
def outside(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Exports put their weights into a second file until it is undone."""
    with_limit = partial(export.write_onnx, inline_bytes=0)
    monkeypatch.setattr(export, "write_onnx", with_limit)
    return monkeypatch


def test_force_leaves_nothing_of_the_export_before(folder, tmp_path, outside):
    """Catches gigabytes of weights beside a file that has its own inside, and files that were not
    of that export gone with them.
    """
    path = tmp_path / "t.onnx"
    (tmp_path / "t.txt").write_text("mine")
    exported(str(folder), path, **NOISE)
    assert names(tmp_path) == {"t.onnx", "t.onnx.data", "t.onnx.json", "t.txt"}
    outside.undo()
    exported(str(folder), path, force=True, **NOISE)
    assert names(tmp_path) == {"t.onnx", "t.onnx.json", "t.txt"}
    assert open_model(through(folder, path)).tower is not None


def test_an_om_of_an_older_graph_does_not_stay_beside_the_new_manifest(stand_in_atc, tmp_path):
    """Catches a manifest without sizes, as of what is compiled elsewhere, that vouches for an OM of
    before.
    """
    stand_in_atc.install()
    options = ("--to", "om", "--soc-version", "Ascend310P3", "--no-check", "-o", tmp_path / "d.om")
    assert run(*options).exit_code == 0
    assert run(*options, "--force", "--print-only").exit_code == 0
    assert names(tmp_path) == {"d.onnx", "d.onnx.json", "d.om.json"}


def through(folder: Path, file: Path) -> EngineConfig:
    """A model whose pictures go through an exported file."""
    return EngineConfig(model=str(folder), vision_runtime="onnxruntime", vision_model=str(file))


@pytest.mark.parametrize("stage", ["write_onnx", "check_onnx", "sha256_of"])
def test_force_that_is_interrupted_leaves_the_old_export_in_use(folder, tmp_path, outside, stage):
    """Catches old weights that go before the new ones are whole."""
    path = tmp_path / "t.onnx"
    exported(str(folder), path, **NOISE)
    before = {file.name: sha256(file) for file in tmp_path.iterdir()}

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    outside.undo()
    outside.setattr(export, stage, interrupted)
    with pytest.raises(KeyboardInterrupt):
        exported(str(folder), path, force=True, **NOISE)
    assert {file.name: sha256(file) for file in tmp_path.iterdir()} == before
    tower = open_model(through(folder, path)).tower
    assert tower is not None
    tower.load()


def test_a_flipped_bit_of_the_weights_ends_the_start(folder, tmp_path, outside):
    """Catches an engine that loads without looking at the digests."""
    path = tmp_path / "t.onnx"
    exported(str(folder), path, **NOISE)
    weights = tmp_path / "t.onnx.data"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    asked = ["--vision-runtime", "onnxruntime", "--vision-model", str(path), "--prompt", "Hi"]
    done = CliRunner().invoke(app, ["generate", "--model", str(folder), *asked])
    assert done.exit_code == 2
    assert f"{weights} is damaged: its SHA-256 is" in " ".join(done.stderr.split())


def test_a_full_disk_leaves_what_was_there(folder, tmp_path, monkeypatch):
    """Catches half a file in the place of a whole one."""
    path = tmp_path / "t.onnx"
    path.write_text("precious")
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda place: usage(10, 10, 0))
        with pytest.raises(ConfigError, match=r"output: .* but 0 bytes are free .*; make room"):
            exported(str(folder), path, force=True, **NOISE)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(export, "write_onnx", full)
    with pytest.raises(ConfigError, match="cannot be written: No space left on device"):
        exported(str(folder), path, force=True, **NOISE)
    assert names(tmp_path) == {"t.onnx"}
    assert path.read_text() == "precious"


def test_a_file_that_computes_something_else_is_not_kept(tmp_path, monkeypatch):
    """Catches a check that measures and then passes everything."""
    whole = export.write_onnx

    def off_by_one(graph: Any, weights: dict[str, torch.Tensor], *rest: Any) -> None:
        whole(graph, weights | {"project.bias": weights["project.bias"] + 1}, *rest)

    monkeypatch.setattr(export, "write_onnx", off_by_one)
    done = run("-m", "demo-visualglm", "-o", tmp_path / "v.onnx")
    assert done.exit_code == 1
    said = " ".join(done.stderr.split())
    assert re.search(r"is not the torch tower: largest difference \d\.\d+e[-+]0\d", said)
    assert said.endswith("export with --dtype float32, or as it is with --no-check")
    assert names(tmp_path) == set()


def test_features_that_are_not_finite_fail_the_check():
    """Catches a comparison that NaN passes."""
    right = torch.ones(3, 4)
    assert measured(right, right, LIMITS["float32"]).is_within
    assert not measured(right * torch.nan, right, LIMITS["float16"]).is_within


def test_models_without_a_tower_to_export_are_told(tmp_path):
    """Catches a traceback for a text model, and rounded weights taken for the checkpoint's."""
    write_noise_model(tmp_path / "text", "glm4v_9b")
    config = tmp_path / "text" / "config.json"
    raw = json.loads(config.read_text())
    config.write_text(json.dumps(raw | {"vision_config": None}))
    weights = tmp_path / "text" / "model.safetensors"
    kept = {name: w for name, w in load_file(weights).items() if ".vision." not in name}
    save_file(kept, weights)
    said = run("-m", tmp_path / "text", "-o", tmp_path / "t.onnx", "--no-check").stderr
    assert "is a text model: it has no vision tower to export" in " ".join(said.split())
    quantised = tmp_path / "quantised"
    write_noise_model(tmp_path / "whole", "visualglm")
    options = QuantOptions(blocks="int8", tower="int8")
    quantize(plan_quantize(tmp_path / "whole", quantised, options))
    said = run("-m", quantised, "-o", tmp_path / "t.onnx", "--no-check").stderr
    assert "its tower is quantised (int8)" in " ".join(said.split())


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_a_missing_package_is_told_with_its_command(monkeypatch, tmp_path, package):
    """Catches a missing package that is found after the tower has run."""
    monkeypatch.setitem(sys.modules, package, None)
    said = " ".join(run("-o", tmp_path / "t.onnx").stderr.split())
    assert f"needs the package '{package}'; install it with: pip install 'glimt[export]'" in said


# --- answers through it ----------------------------------------------------------------------


def questions() -> list[list[dict[str, Any]]]:
    return [
        [
            {
                "role": "user",
                "content": [
                    {"type": "image", "image": EXAMPLES / row["picture"]},
                    {"type": "text", "text": row[language]["question"]},
                ],
            }
        ]
        for row, language in zip(ROWS, ["zh", "en"] * len(ROWS), strict=False)
    ]


@pytest.mark.parametrize("model", DEMOS.values())
def test_every_example_is_answered_the_same(towers, model):
    """Catches features of another picture, of padding, or in another order; all run together."""
    options = {"max_num_seqs": 16, "kv_bytes": 64 * 2**20}
    own = LLM(model, **options)
    offline = LLM(model, vision_runtime="onnxruntime", vision_model=str(towers[model]), **options)
    assert [o.text for o in offline.chat(questions(), GREEDY)] == [
        o.text for o in own.chat(questions(), GREEDY)
    ]
    assert offline.engine.stats().tower_images == len(ROWS)
    parameters = offline.engine.opened.model.named_parameters()
    left_out = {p.is_meta for name, p in parameters if is_vision(name)}
    assert left_out == {True}, "the model's own tower is not loaded"


def test_generate_answers_through_an_om(stand_in_atc, stand_in_ais_bench, tmp_path):
    """Catches options that do not reach the engine, and the OM's way from end to end."""
    stand_in_atc.install()
    om = tmp_path / "v.om"
    exported("demo-visualglm", om, soc_version="Ascend310P3", checks=False)
    options = ["--model", "demo-visualglm", "--vision-runtime", "om", "--vision-model", str(om)]
    asked = ["--image", str(EXAMPLES / "bag.png"), "--prompt", "Describe the image.", "-t", "0"]
    done = CliRunner().invoke(app, ["generate", *options, *asked, "--quiet"])
    assert done.stdout.strip() == "The picture shows a bag."


def test_a_rounded_language_model_takes_the_same_tower(tmp_path):
    """Catches a digest that the language model's format enters, and an export of such a folder that
    misses what is rounded in it.
    """
    write_noise_model(tmp_path / "whole", "visualglm")
    rounded = tmp_path / "rounded"
    quantize(plan_quantize(tmp_path / "whole", rounded, QuantOptions(blocks="int8")))
    ours = exported(str(rounded), tmp_path / "a.onnx", **NOISE).manifest
    whole = exported(str(tmp_path / "whole"), tmp_path / "b.onnx", **NOISE).manifest
    assert ours.tower_digest == whole.tower_digest
    file = str(tmp_path / "b.onnx")
    offline = EngineConfig(model=str(rounded), vision_runtime="onnxruntime", vision_model=file)
    assert open_model(offline).tower is not None


def test_a_foreign_file_is_refused_before_weights_are_loaded(towers, folders):
    """Catches fluent answers about noise: a tower of other weights fits without an error."""
    for model, said in (
        ("demo-visualglm", "was made of a glm4v_9b model, but this one is visualglm"),
        (str(folders["glm4v_9b"]), "was made of other tower weights"),
    ):
        config = EngineConfig(
            model=model, vision_runtime="onnxruntime", vision_model=str(towers["demo"])
        )
        with pytest.raises(ConfigError, match=said):
            open_model(config)


# --- the page --------------------------------------------------------------------------------


def test_the_pages_commands_run_as_they_stand(stand_in_atc, tmp_path, monkeypatch):
    """Catches an example whose options or files are of another release."""
    stand_in_atc.install()
    page = (ROOT / "docs" / "export.md").read_text(encoding="utf-8")
    shown = re.findall(r"^```sh\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    lines = "".join(shown).replace("\\\n", " ").splitlines()
    commands = [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("glimt")]
    assert {command[0] for command in commands} >= {"export", "generate", "doctor"}
    (tmp_path / "examples").symlink_to(EXAMPLES)
    monkeypatch.chdir(tmp_path)
    printed = []
    for command in commands:
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 0, (command, done.output)
        printed += done.stdout.splitlines()
    quoted = re.findall(r"^```text\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    given = {without_figures(line) for line in printed}
    assert {without_figures(line) for line in "".join(quoted).splitlines()} <= given
    assert "The picture shows a bag." in printed


def without_figures(line: str) -> str:
    """A line without what one machine measures otherwise than the next."""
    return re.sub(r"difference [\d.e-]+|cosine [\d.]+", "", line)
