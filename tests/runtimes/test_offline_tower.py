"""Pictures through a compiled tower: groups, padding, and files that are refused."""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from glimt.errors import ConfigError, EngineError
from glimt.runtimes import base
from glimt.runtimes.base import VisionRuntime, find_runtime
from glimt.runtimes.manifest import Manifest, manifest_path, read_manifest, sha256_of
from glimt.runtimes.vision import OfflineTower, TowerOwner, open_tower
from glimt.types import ImageInput

CPU = torch.device("cpu")
MANIFEST = Manifest(
    format="onnx",
    family="visualglm",
    tower_digest="sha256:0123456789abcdef",
    image_size=(4, 6),
    grid=(2, 3),
    image_tokens=5,
    hidden_size=2,
    batch=2,
    opset=13,
    dtype="float16",
    files={},
)


class Session:
    """Every feature of a picture is the mean of its pixels; remembers what it was fed."""

    def __init__(self, width: int = 2) -> None:
        self.fed: list[np.ndarray] = []
        self.width = width

    def run(self, pixels: np.ndarray) -> np.ndarray:
        assert pixels.dtype == np.float32
        self.fed.append(pixels)
        means = pixels.mean((1, 2, 3))
        return np.broadcast_to(means[:, None, None], (len(means), 5, self.width)).astype(np.float16)


def pictures(*shades: int) -> list[ImageInput]:
    blank = np.ones((4, 6, 3), np.uint8)
    return [ImageInput(bytes([shade]), 5, (2, 3), blank * shade) for shade in shades]


def tower(session: Session, batch: int | None, dtype: torch.dtype = torch.float32) -> OfflineTower:
    return OfflineTower(session, replace(MANIFEST, batch=batch), CPU, dtype)


@pytest.mark.parametrize(("batch", "sizes"), [(1, [1, 1, 1]), (2, [2, 2]), (4, [4]), (None, [3])])
def test_pictures_go_in_groups_of_the_files_batch(batch, sizes):
    """Catches a last group that is short, which a file of fixed shape refuses, features of the
    padding taken for a picture's, and pictures that change places.
    """
    session = Session()
    features = tower(session, batch, torch.bfloat16).image_features(pictures(7, 80, 255))
    assert [len(pixels) for pixels in session.fed] == sizes
    assert [float(each[0, 0]) for each in features] == [7.0, 80.0, 255.0]
    assert {(tuple(each.shape), each.dtype) for each in features} == {((5, 2), torch.bfloat16)}


def test_others_go_on_between_two_groups():
    """Catches a request with many pictures that stops all answers until the last one is encoded."""
    session = Session()
    stages = tower(session, 2).image_stages(pictures(1, 2, 3, 4, 5))
    assert [next(stages), len(session.fed)] == [math.inf, 1]
    assert [next(stages), len(session.fed)] == [math.inf, 2]
    with pytest.raises(StopIteration) as end:
        next(stages)
    assert [float(each[0, 0]) for each in end.value.value] == [1, 2, 3, 4, 5]


def test_features_of_another_shape_are_an_error():
    """Catches rows of one picture put where another's stand, after a file was swapped."""
    with pytest.raises(EngineError, match=r"gave \[2, 5, 3\], but \[2, 5, 2\] is expected"):
        tower(Session(width=3), 2).image_features(pictures(1))


# --- files -----------------------------------------------------------------------------------


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """What the runtime "still" was asked to open."""
    paths: list[Path] = []
    runtime = VisionRuntime(
        "still", "onnx", lambda path, threads: paths.append(path) or Session(), lambda: None
    )
    monkeypatch.setattr(base, "all_runtimes", lambda: {"still": runtime})
    return paths


def written(folder: Path, **changes: object) -> Path:
    path = folder / "tower.onnx"
    path.write_bytes(b"graph")
    manifest = replace(MANIFEST, **{"files": {path.name: 5}, **changes})
    manifest_path(path).write_text(manifest.to_json(), encoding="utf-8")
    return path


OWNER = TowerOwner("visualglm", MANIFEST.tower_digest)
PLACE = (CPU, torch.float32)


def refusal(path: Path, owner: TowerOwner = OWNER, name: str = "still") -> str:
    with pytest.raises(ConfigError) as caught:
        open_tower(name, path, owner, None, PLACE)
    return str(caught.value)


def with_weights(folder: Path) -> Path:
    """An export of two files whose manifest has the digests of both."""
    weights = folder / "tower.onnx.data"
    weights.write_bytes(bytes(range(256)) * 64)
    files = {"tower.onnx": 5, weights.name: weights.stat().st_size}
    digests = {"tower.onnx": hashlib.sha256(b"graph").hexdigest(), weights.name: sha256_of(weights)}
    return written(folder, files=files, sha256=digests)


def test_a_manifest_is_read_as_it_was_written(tmp_path):
    """Catches a field that the form in JSON loses."""
    changes = {"batch": None, "soc_version": "Ascend910B3", "sha256": {"tower.onnx": "0" * 64}}
    path = written(tmp_path, **changes)
    assert read_manifest(path) == replace(MANIFEST, files={"tower.onnx": 5}, **changes)


def test_a_whole_file_of_this_model_is_opened_when_it_is_loaded(opened, tmp_path, caplog):
    """Catches checks that refuse everything, a server that loads the file twice, and progress that
    never reaches its end.
    """
    path = with_weights(tmp_path)
    tower = open_tower("still", path, OWNER, None, PLACE)
    assert opened == []
    seen: list[int] = []
    tower.load(seen.append)
    assert opened == [path]
    assert sum(seen) == tower.nbytes == 5 + 256 * 64
    assert tower.loaded.manifest == read_manifest(path)
    assert caplog.text == ""


@pytest.mark.parametrize("name", ["tower.onnx", "tower.onnx.data"])
def test_one_flipped_bit_is_found_before_the_file_is_opened(opened, tmp_path, name):
    """Catches weights that a disk or a copy has changed, and that still give fluent answers."""
    path = with_weights(tmp_path)
    damaged = path.with_name(name)
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    tower = open_tower("still", path, OWNER, None, PLACE)
    with pytest.raises(ConfigError) as caught:
        tower.load()
    assert re.search(
        rf"vision_model: {re.escape(str(damaged))} is damaged: its SHA-256 is [0-9a-f]{{12}}…, "
        r"but [0-9a-f]{12}… was written; copy it again .*, or export it again",
        str(caught.value),
    )
    assert opened == []


def test_a_file_that_vanished_since_is_told(opened, tmp_path):
    """Catches a traceback where a network folder is gone between two looks."""
    path = with_weights(tmp_path)
    tower = open_tower("still", path, OWNER, None, PLACE)
    path.with_name("tower.onnx.data").unlink()
    with pytest.raises(ConfigError, match=r"tower\.onnx\.data cannot be read: No such file"):
        tower.load()


def test_an_older_export_is_opened_with_a_warning(opened, tmp_path, caplog):
    """Catches exports of before that no longer run, and a check that is left out in silence."""
    path = written(tmp_path)
    raw = json.loads(manifest_path(path).read_text())
    del raw["sha256"]
    manifest_path(path).write_text(json.dumps(raw))
    open_tower("still", path, OWNER, None, PLACE).load()
    assert opened == [path]
    said = "what is in tower.onnx is not checked: its manifest has no digest; "
    assert f"{said}export it again to have one" in caplog.text
    open_tower("still", written(tmp_path, files={}), OWNER, None, PLACE).load()
    assert f"{said}compiled elsewhere" in caplog.text


def test_a_runtime_that_is_absent_is_told_before_anything_is_loaded(opened, tmp_path, monkeypatch):
    """Catches a server that answers 503 until its weights are read, and then ends."""
    gone = VisionRuntime("still", "onnx", lambda path, threads: Session(), lambda: "it is not here")
    monkeypatch.setattr(base, "all_runtimes", lambda: {"still": gone})
    assert refusal(written(tmp_path)) == "vision_runtime: it is not here"


def test_files_that_are_not_this_models_are_refused_unopened(opened, tmp_path):
    """Catches answers about a picture that another model's tower has seen."""
    path = written(tmp_path)
    assert "was made of a visualglm model, but this one is glm4v_9b" in refusal(
        path, TowerOwner("glm4v_9b", MANIFEST.tower_digest)
    )
    other = refusal(path, TowerOwner("visualglm", "sha256:fedcba9876543210"))
    assert "made of other tower weights (sha256:0123456789ab…)" in other
    assert "than this model's (sha256:fedcba987654…)" in other
    om = written(tmp_path, format="om")
    assert "is om, but the runtime still runs onnx; export with --to onnx" in refusal(om)
    assert opened == []


def test_files_that_are_not_whole_are_refused_unopened(opened, tmp_path):
    """Catches a download that was cut off, and weights that were left behind."""
    assert "nowhere.onnx is no file" in refusal(tmp_path / "nowhere.onnx")
    path = written(tmp_path)
    path.write_bytes(b"gra")
    assert "tower.onnx has 3 bytes, but 5 were written; export it again" in refusal(path)
    path = written(tmp_path, files={"tower.onnx": 5, "../tower.onnx.data": 9})
    assert f"{tmp_path}/tower.onnx.data is missing; copy it beside the model" in refusal(path)
    manifest_path(path).unlink()
    assert "tower.onnx.json is missing; copy it too" in refusal(path)
    assert opened == []


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("manifest_version", 2, "only 1 is supported"),
        ("image_size", [224], "image_size"),
        ("batch", 0, "batch is 0"),
        ("files", {"tower.onnx": "five"}, "files.tower.onnx is 'five'"),
        ("tower_digest", None, "tower_digest is missing"),
        ("sha256", {"tower.onnx": 5}, "sha256.tower.onnx is 5"),
        ("sha256", {"tower.onnx": "abc"}, "'abc'; 64 hexadecimal digits are needed"),
        ("sha256", {"other": "0" * 64}, "sha256 names 'other', which is not among files"),
    ],
)
def test_a_manifest_that_was_changed_is_told_by_its_field(tmp_path, name, value, said):
    """Catches a value of the wrong kind that fails later, far from its cause."""
    path = written(tmp_path)
    raw = json.loads(manifest_path(path).read_text())
    manifest_path(path).write_text(json.dumps(raw | {name: value}))
    with pytest.raises(ConfigError, match=said.replace(".", r"\.")):
        read_manifest(path)


def test_a_runtime_that_is_none_is_told_with_those_that_are():
    """Catches a folder that is not scanned, and a name that is taken without being known."""
    assert find_runtime("onnxruntime").format == "onnx"
    with pytest.raises(ConfigError, match="'tensorrt' is unknown; choose one of torch, om, onnx"):
        find_runtime("tensorrt")


@pytest.mark.parametrize("name", [".", "/", ""])
def test_a_name_of_no_file_is_said(name):
    """Catches the traceback of a path that has no name to put .json behind."""
    with pytest.raises(ConfigError, match=r"vision_model: .* is no file"):
        read_manifest(Path(name))
