"""Exported towers beside the torch towers, and beside the originals' own outputs."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from tests.exporting import DEMOS, exported

from glimt.devices.base import Device
from glimt.errors import ConfigError
from glimt.export.check import LIMITS, check_picture, measured
from glimt.export.onnx_file import check_onnx, write_onnx
from glimt.export.trace import GraphShape, trace_tower
from glimt.loader import ModelFolder, build_model, model_folder, read_folder
from glimt.models.base import BuildContext
from glimt.models.visualglm import VisualGlmModel
from glimt.quant.plan import QuantOptions
from glimt.runtimes.onnx_runtime import open_onnx
from glimt.weights import is_vision, load_weights

VALUES = 2e-5  # as tests/models/test_oracle.py: float32 in another order
KINDS = [
    {"opset": 13, "batch": "1", "dtype": "float32"},
    {"opset": 17, "batch": "dynamic", "dtype": "float32"},
    {"opset": 13, "batch": "dynamic", "dtype": "float16"},
    {"opset": 20, "batch": "2", "dtype": "float16"},
]


@pytest.fixture(scope="module", params=DEMOS.values())
def demo(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def pictures_and_features(demo: str) -> tuple[np.ndarray, torch.Tensor]:
    """Three pictures [3, height, width, 3], and what the plain torch tower makes of them."""
    found = read_folder(model_folder(demo))
    context = BuildContext(Device(), torch.float32, found.config.max_positions)
    model = build_model(found, context)
    load_weights(found.checkpoint, model, torch.float32, torch.device("cpu"), chooses=is_vision)
    pixels = check_picture(found.processor).pixels
    raw = np.stack([pixels, pixels[::-1], pixels[:, ::-1]]).astype(np.float32)
    with torch.inference_mode():
        return raw, model.encode_raw(torch.from_numpy(raw))


def run(path: Path, raw: np.ndarray, batch: str) -> torch.Tensor:
    """All pictures, together or as many at a time as the file takes."""
    session = open_onnx(path, 1)
    size = len(raw) if batch == "dynamic" else int(batch)
    groups = [raw[i : i + size] for i in range(0, len(raw) - size + 1, size)]
    found = np.concatenate([session.run(group) for group in groups])
    return torch.from_numpy(found).float()


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(map(str, kind.values())))
def test_every_kind_of_file_gives_the_torch_towers_features(
    demo, pictures_and_features, tmp_path, kind
):
    """Catches a batch that is baked into the graph or mixes its pictures, another order of the
    channels, a norm that runs in float16, and a weight under another's name.
    """
    path = tmp_path / "tower.onnx"
    report = exported(demo, path, **kind)
    raw, expected = pictures_and_features
    found = run(path, raw, kind["batch"])
    for ours, right in zip(found, expected[: len(found)], strict=True):
        assert measured(ours, right, LIMITS[kind["dtype"]]).is_within
    assert len(found) >= 2, "the last picture of a batch was looked at"
    graph = onnx.load(path)
    assert [entry.version for entry in graph.opset_import] == [kind["opset"]]
    assert [value.name for value in graph.graph.input] == ["input"]
    assert [value.name for value in graph.graph.output] == ["output"]
    assert report.comparison.is_within
    limit = {"float32": 1e-5, "float16": 5e-3}[kind["dtype"]]  # what it is in fact
    assert 0 < report.comparison.difference < limit


def test_a_fixed_batch_leaves_no_shape_to_be_computed(tmp_path):
    """Catches shapes that ATC would have to work out: only what says how far to expand is left."""
    exported("demo", tmp_path / "tower.onnx", checks=False)
    graph = onnx.load(tmp_path / "tower.onnx").graph
    kinds = {node.op_type for node in graph.node}
    assert not kinds & {"Loop", "If", "NonZero", "Scan", "Mod", "Gather", "Range"}
    output = graph.output[0].type.tensor_type.shape.dim
    assert [dim.dim_value for dim in output] == [1, 38, 192]


def test_float16_norms_run_in_float32(tmp_path):
    """Catches squares beyond 65504 on a chip, where a runtime on the CPU widens by itself."""
    exported("demo", tmp_path / "tower.onnx", dtype="float16", checks=False)
    graph = onnx.shape_inference.infer_shapes(onnx.load(tmp_path / "tower.onnx")).graph
    kinds = {value.name: value.type.tensor_type.elem_type for value in graph.value_info}
    squares = [node.output[0] for node in graph.node if node.op_type == "Pow"]
    assert len(squares) >= 9
    assert {kinds[name] for name in squares} == {onnx.TensorProto.FLOAT}


@pytest.fixture(params=["glm4v_wide", "visualglm_wide"])
def wide(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(f"{request.param}_oracle")


@pytest.mark.parametrize(("opset", "inline"), [(13, False), (18, True)])
def test_the_originals_features_come_out_of_the_file(wide: Any, tmp_path, opset, inline):
    """Catches what our own tower and its export have in common: the numbers are the originals'.

    Also with the weights in a file of their own, as a large tower has them.
    """
    opened = wide.open(device="cpu")
    found = ModelFolder(
        wide.family, wide.config, opened.processor, opened.checkpoint, (), QuantOptions()
    )
    context = BuildContext(Device(), torch.float32, wide.config.max_positions)
    model = wide.family.build(wide.config, context)
    load_weights(opened.checkpoint, model, torch.float32, torch.device("cpu"), chooses=is_vision)
    image, path = wide.image(), tmp_path / "tower.onnx"
    graph = trace_tower(found, image, GraphShape(batch=1, opset=opset, dtype=torch.float32))
    weights = {name: p.data for name, p in model.named_parameters() if is_vision(name)}
    done: list[int] = []
    write_onnx(
        graph, weights, path, torch.float32, done.append, inline_bytes=2**30 if inline else 0
    )
    check_onnx(path)
    assert sum(done) == sum(weight.nbytes for weight in weights.values())
    beside = tmp_path / "tower.onnx.data"
    assert beside.exists() != inline
    if not inline:
        assert path.stat().st_size < 2**20 <= beside.stat().st_size * 100
    features = open_onnx(path, 1).run(image.pixels[None].astype(np.float32))
    np.testing.assert_allclose(features[0], wide.arrays["image_features"], atol=VALUES, rtol=0)


def test_a_value_that_float16_cannot_hold_is_named(tmp_path):
    """Catches an infinity in the file, which makes every feature NaN on the chip."""
    found = read_folder(model_folder("demo"))
    image = check_picture(found.processor)
    graph = trace_tower(found, image, GraphShape(batch=1, opset=13, dtype=torch.float16))
    weights = {
        given.name: torch.zeros([dim.dim_value for dim in given.type.tensor_type.shape.dim])
        for given in graph.graph.input
        if given.name != "input"
    }
    weights["adapter.down.weight"][0, 0] = 7e4
    with pytest.raises(ConfigError, match=r"adapter\.down\.weight has values up to 70000"):
        write_onnx(deepcopy(graph), weights, tmp_path / "tower.onnx", torch.float16)
    weights["adapter.down.weight"][0, 0] = torch.nan
    with pytest.raises(ConfigError, match=r"adapter\.down\.weight is not finite: the checkpoint"):
        write_onnx(graph, weights, tmp_path / "tower.onnx", torch.float16)


def test_a_family_that_does_not_say_how_is_told(monkeypatch):
    """Catches a TypeError out of the tracer for a family whose pictures differ in size."""
    monkeypatch.delattr(VisualGlmModel, "encode_raw")
    found = read_folder(model_folder("demo-visualglm"))
    shape = GraphShape(batch=1, opset=13, dtype=torch.float32)
    with pytest.raises(ConfigError, match="its family visualglm has no tower that can be exported"):
        trace_tower(found, check_picture(found.processor), shape)
