"""`glimt precision`: what passes, what fails and where, stored references, what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner, Result

from glimt.cli import app
from glimt.commands import reporting
from glimt.demo.noise import write_noise_model
from glimt.layers import rotary
from glimt.loader import model_folder

SMALL = ("--probes", 12, "--tokens", 60, "--stages", 2)
FAMILY_OF = {"demo": "glm4v_9b", "demo-visualglm": "visualglm"}


@pytest.fixture(scope="module", params=FAMILY_OF)
def demo(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def reference(demo: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A demo model in float32, as another machine would have stored it."""
    path = tmp_path_factory.mktemp(demo) / "reference.safetensors"
    done = run("-m", demo, "--dtype", "float32", "--record", path, *SMALL)
    assert done.exit_code == 0, done.stderr
    return path


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("noise")
    write_noise_model(folder, "glm4v_9b")
    return folder


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["precision", *map(str, arguments)])


def compared(*arguments: object) -> tuple[int, dict[str, Any]]:
    done = run(*arguments, "--json")
    return done.exit_code, json.loads(done.stdout)


def damaged(demo: str, folder: Path, name: str, change: Callable[[Tensor], Tensor]) -> Path:
    """A copy of a demo model of which one tensor is changed."""
    shutil.copytree(model_folder(demo), folder)
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        if name in tensors:
            tensors[name] = change(tensors[name]).contiguous()
            save_file(tensors, file, {"format": "pt"})
            return folder
    raise AssertionError(f"{name} is in no file")


def with_noise(weight: Tensor) -> Tensor:
    """A quarter of what the weight is itself: too little for a wrong answer."""
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    return (weight + 0.25 * weight.float().std() * noise).to(weight.dtype)


def test_bfloat16_passes_against_float32(demo, tmp_path):
    """Catches lines that the type itself cannot keep, and a report that was not asked for."""
    status, found = compared("-m", demo, "--dtype", "bfloat16", *SMALL)
    assert (status, found["passes"], found["first_drift"]) == (0, True, None)
    assert found["gate"]["name"] == "bfloat16 against float32"
    assert (found["tested"]["dtype"], found["reference"]["dtype"]) == ("bfloat16", "float32")
    assert found["num_tokens"] >= 60
    assert 0 < next(c["value"] for c in found["checks"] if "KL" in c["name"]) < 1e-3


def test_a_setting_passes_against_its_own_stored_reference(demo, reference):
    """Catches a file that loses digits or probes, and a comparison that is not of the same."""
    status, found = compared("-m", demo, "--dtype", "float32", "--against", reference)
    assert status == 0
    assert found["gate"]["name"] == "float32 against float32"
    assert {check["name"]: check["value"] for check in found["checks"]} == {
        "cosine of logits, least": pytest.approx(1.0, abs=1e-9),
        "cosine of logits, 99 % reach": pytest.approx(1.0, abs=1e-9),
        "cosine of logits, mean": pytest.approx(1.0, abs=1e-9),
        "KL divergence, mean (nats)": pytest.approx(0.0, abs=1e-9),
        "KL divergence, p99 (nats)": pytest.approx(0.0, abs=1e-9),
        "same likeliest token": 1.0,
        "largest error / range": pytest.approx(0.0, abs=1e-6),
        "perplexity ratio": pytest.approx(1.0, abs=1e-6),
    }
    names = [stage["name"] for stage in found["stages"]]
    assert names[:4] == ["pixels", "patches", "tower.embed", "tower.blocks.0"]
    assert names[-3:] == ["blocks.5", "final_norm", "logits"]
    assert names.index("embeddings") < names.index("rotary") < names.index("blocks.0")


LAYERS = {
    "demo": "transformer.encoder.layers.3.mlp.dense_4h_to_h.weight",
    "demo-visualglm": "transformer.layers.3.mlp.dense_4h_to_h.weight",
}
TOWERS = {
    "demo": "transformer.vision.transformer.layers.2.mlp.fc2.weight",
    "demo-visualglm": "image_encoder.vit.transformer.layers.2.mlp.dense_4h_to_h.weight",
}


def test_a_damaged_layer_is_named(demo, reference, tmp_path):
    """Catches a comparison that only sees the end, where no stage says what is wrong."""
    folder = damaged(demo, tmp_path / "model", LAYERS[demo], with_noise)
    status, found = compared("-m", folder, "--dtype", "bfloat16", "--against", reference)
    assert (status, found["first_drift"]) == (1, "blocks.3")


def test_a_damaged_tower_block_is_named(demo, reference, tmp_path):
    """Catches a tower whose error is only seen once it is in the language model."""
    folder = damaged(demo, tmp_path / "model", TOWERS[demo], with_noise)
    status, found = compared("-m", folder, "--dtype", "bfloat16", "--against", reference)
    assert (status, found["first_drift"]) == (1, "tower.blocks.2")


def test_a_damaged_resize_is_named(demo, reference, monkeypatch):
    """Catches a resize by another rule, which changes pixels by little and answers rarely."""

    def bilinear(image: Image.Image, size: tuple[int, int], *rest: object) -> Any:
        return original(image, size, Image.Resampling.BILINEAR)

    original = Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", bilinear)
    status, found = compared("-m", demo, "--dtype", "bfloat16", "--against", reference)
    assert (status, found["first_drift"]) == (1, "pixels")


def test_a_damaged_rotary_table_is_named(demo, reference, monkeypatch):
    """Catches frequencies of another base, which short prompts hardly show."""
    original = rotary._tables

    def slower(spec: rotary.RotarySpec, max_positions: int) -> tuple[Tensor, Tensor]:
        cos, sin = original(spec, max_positions)
        return cos.roll(1, 0), sin.roll(1, 0)  # every position takes its neighbour's angle

    monkeypatch.setattr(rotary, "_tables", slower)
    status, found = compared("-m", demo, "--dtype", "bfloat16", "--against", reference)
    assert (status, found["first_drift"]) == (1, "rotary")


def test_other_kernels_are_another_setting(demo, monkeypatch):
    """Catches isa=none that is ignored, or that stays in force after the reference."""
    monkeypatch.delenv("GLIMT_ISA", raising=False)
    status, found = compared("-m", demo, "--dtype", "bfloat16", "--against", "isa=none", *SMALL)
    assert found["reference"]["isa"] == "none"
    assert found["tested"]["isa"] == ""
    assert found["gate"]["name"] == "the same 16-bit type on both sides"
    assert status == 0, found["checks"]


def test_weights_of_both_settings_are_hashed_once(monkeypatch):
    """Catches minutes of reading twice where a checkpoint has tens of gigabytes."""
    hashed = []
    plain = reporting.files_digest
    monkeypatch.setattr(
        reporting, "files_digest", lambda files: hashed.append(1) or plain([*files])
    )
    few = ("--probes", 1, "--tokens", 1, "--stages", 0)
    _, found = compared("-m", "demo", "--dtype", "bfloat16", *few)
    assert hashed == [1]
    assert found["tested"]["model"] == found["reference"]["model"]
    assert found["tested"]["model"].startswith("sha256:")


def test_quantised_weights_have_lines_of_their_own(demo):
    """Catches a quantised setting that is held to what only floats can keep."""
    _, found = compared("-m", demo, "--dtype", "bfloat16", "--quant", "int8", *SMALL)
    assert found["tested"]["quant"] == "int8"
    assert found["gate"]["name"] == "bfloat16 against float32 and 8-bit weights"
    assert found["reference"]["quant"] == "none"


def test_random_weights_are_judged_by_cosines_alone(noise):
    """Catches a verdict by agreement between distributions that are flat."""
    status, found = compared("-m", noise, "--dtype", "bfloat16", *SMALL)
    assert found["is_flat"]
    lines = {check["name"]: check["line"] for check in found["checks"]}
    assert lines["same likeliest token"] is None
    assert lines["KL divergence, mean (nats)"] is None
    assert lines["cosine of logits, mean"] == 0.9999
    assert status == (0 if found["passes"] else 1)


def test_the_table_ends_in_a_verdict(noise, tmp_path):
    """Catches a table that leaves the reader to find out; and a report without its plots."""
    settings = ("--dtype", "float32", "--against", "kv_dtype=auto")
    done = run("-m", noise, *settings, *SMALL, "--report", tmp_path / "out")
    assert done.exit_code == 0, done.stderr
    assert done.stdout.rstrip().splitlines()[-1].startswith("PASS: all figures and stages")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "precision.html",
        "precision.md",
        "precision-by-stage.png",
        "precision-kl.png",
    }
    html = (tmp_path / "out" / "precision.html").read_text(encoding="utf-8")
    for said in ("sha256:", "float32 against float32", "reference: settings", "one run"):
        assert said in html


def test_pictures_of_a_folder_are_asked_about(noise, tmp_path):
    """Catches --images that is taken and not read, and a folder that is drawn on for ever."""
    for i in range(3):
        Image.new("RGB", (20 + i, 30), "red").save(tmp_path / f"{i}.png")
    _, found = compared("-m", noise, "--images", tmp_path, "--prompt", "什么？", *SMALL)
    assert found["num_probes"] == 3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--against", "nonsense"), "'nonsense' is no file that is there, and no setting"),
        (("--against", "quant"), "'quant' is no file that is there, and no setting"),
        (("--against", "colour=red"), "'colour=red' is no file, no dtype"),
        (("--against", "kv_bytes=much"), "kv_bytes: 'much' is no size"),
        (("--against", "num_threads=many"), "num_threads is 'many'"),
        (("--against", "float32", "--record", "x.st"), "exclude each other"),
        (("--prompt", "hm"), "--prompt is for the pictures of --images"),
        (("--max-tokens", 0), "max_tokens is 0; at least 1 is needed"),
        (("--images", "nowhere"), "nowhere cannot be read: No such file or directory"),
        (("--stages", -1), "num_staged is -1; at least 0 is needed"),
    ],
)
def test_what_cannot_be_compared_is_refused(noise, arguments, said):
    """Catches a traceback, and a long run whose end was known at its beginning."""
    done = run("-m", noise, *arguments)
    assert done.exit_code == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_a_file_that_is_no_reference_is_refused(noise, reference, tmp_path):
    """Catches a comparison with half a file, and with another model's."""
    half = tmp_path / "half.safetensors"
    half.write_bytes(reference.read_bytes()[:5000])
    assert (
        "half.safetensors is damaged or is no reference"
        in run("-m", noise, "--against", half).stderr
    )
    other = noise / "model.safetensors"
    assert (
        "is no reference that glimt precision --record wrote"
        in run("-m", noise, "--against", other).stderr
    )
    done = run("-m", noise, "--against", reference)
    assert done.exit_code == 2
    assert "the reference is of" in done.stderr


def test_a_broken_picture_ends_the_run_with_its_name(noise, tmp_path):
    """Catches a broken probe that is left out in silence: both settings must see the same ones."""
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    done = run("-m", noise, "--images", tmp_path)
    assert done.exit_code == 2
    assert "a.png" in done.stderr
