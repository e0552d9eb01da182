"""The runtimes themselves; ais_bench as a module with the documented interface."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from tests.exporting import InferSession

from glimt.errors import ConfigError, MissingDependency
from glimt.runtimes.om import RUNTIME as OM
from glimt.runtimes.onnx_runtime import RUNTIME as ONNX


@pytest.mark.parametrize("runtime", [OM, ONNX], ids=lambda runtime: runtime.name)
def test_a_file_that_is_no_model_is_named(stand_in_ais_bench, tmp_path, runtime):
    """Catches a library's traceback in place of what to do."""
    path = tmp_path / "tower.onnx"
    path.write_bytes(b"no model at all")
    with pytest.raises(ConfigError, match=r"tower.onnx cannot be loaded: .*; run `glimt export"):
        runtime.open(path, None)


def test_a_missing_package_is_told_with_its_command(monkeypatch, tmp_path):
    """Catches an ImportError, which says nothing of the extra."""
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingDependency, match=r"pip install 'glimt\[export\]'"):
        ONNX.open(tmp_path / "tower.onnx", None)


def test_a_missing_ais_bench_is_told_with_where_it_is(tmp_path):
    """Catches advice to install a package of this name, which is another one."""
    said = "om needs ais_bench, which cannot be imported .*wheels of Ascend/tools, which are not on"
    with pytest.raises(ConfigError, match=said):
        OM.open(tmp_path / "tower.om", None)
    assert "ais_bench is not installed" in str(OM.absent())


def test_an_om_session_feeds_the_host_array_in_static_mode(stand_in_ais_bench, monkeypatch):
    """Catches another mode, whose sizes must be set first, and a feed that is no list."""
    asked = []

    def infer(self, feeds, mode="static"):
        asked.append((feeds, mode))
        return [np.full((1, 2, 3), 0.5, np.float16)]

    monkeypatch.setattr(InferSession, "__init__", lambda self, device_id, model_path: None)
    monkeypatch.setattr(InferSession, "infer", infer)
    pixels = np.zeros((1, 4, 4, 3), np.float32)
    found = OM.open("tower.om", None).run(pixels)
    ((feeds, mode),) = asked
    assert (len(feeds), feeds[0] is pixels, mode) == (1, True, "static")
    assert (found.shape, found.dtype) == ((1, 2, 3), np.float16)
