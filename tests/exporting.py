"""Exported towers for tests, and stand-ins of the two Ascend programs that no machine here has."""

from __future__ import annotations

import json
import sys
import types
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from glimt.commands.export import ExportJob, ExportReport, export_vision, plan_export

DEMOS = {"glm4v_9b": "demo", "visualglm": "demo-visualglm"}


def exported(model: str, output: Path, **options: Any) -> ExportReport:
    """An export as the command makes it."""
    to = output.suffix.removeprefix(".")
    return export_vision(plan_export(ExportJob(model=model, to=to, output=output, **options)))


ATC = """#!{python}
import json, os, pathlib, shutil, sys
options = dict(word.removeprefix("--").split("=", 1) for word in sys.argv[1:])
record = {{"argv": sys.argv[1:], "files": sorted(os.listdir())}}
pathlib.Path({record!r}).write_text(json.dumps(record))
print("ATC start working now, please wait for a moment.")
if {status}:
    print("E10007: the chip is unknown")
    sys.exit({status})
shutil.copyfile(options["model"], options["output"] + {ending!r})
"""


class StandInAtc:
    """An `atc` on PATH that records what it is asked and copies the graph, or fails."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.record = folder / "record.json"

    def install(self, status: int = 0, ending: str = ".om") -> None:
        program = self.folder / "atc"
        text = ATC.format(
            python=sys.executable, record=str(self.record), status=status, ending=ending
        )
        program.write_text(text)
        program.chmod(0o755)

    @property
    def asked(self) -> dict[str, Any]:
        return json.loads(self.record.read_text())


@pytest.fixture
def stand_in_atc(tmp_path_factory: pytest.TempPathFactory, monkeypatch) -> StandInAtc:
    """Nothing else is on PATH; not yet installed."""
    folder = tmp_path_factory.mktemp("cann")
    monkeypatch.setenv("PATH", str(folder))
    return StandInAtc(folder)


MODES = ("static", "dymbatch", "dymhw", "dymdims", "dymshape")


class InferSession:
    """ais_bench's, as far as it is documented; the file is an ONNX graph under another name."""

    def __init__(
        self,
        device_id: int,
        model_path: str,
        acl_json_path: str | None = None,
        debug: bool = False,
        loop: int = 1,
    ) -> None:
        import onnxruntime

        if not isinstance(device_id, int):
            raise RuntimeError("device_id must be a number")
        self._session = onnxruntime.InferenceSession(Path(model_path).read_bytes())

    def get_inputs(self) -> list[Any]:
        return self._session.get_inputs()

    def infer(
        self,
        feeds: list[Any],
        mode: str = "static",
        custom_sizes: int = 100000,
        out_array: bool = True,
    ) -> list[np.ndarray]:
        if mode not in MODES:
            raise RuntimeError(f"wrong infer_mode: {mode}")
        wanted = self.get_inputs()
        if len(feeds) != len(wanted):
            raise RuntimeError(f"{len(feeds)} feeds for {len(wanted)} inputs")
        named = {given.name: self._host(x, given) for given, x in zip(wanted, feeds, strict=True)}
        return self._session.run(None, named)

    @staticmethod
    def _host(feed: Any, wanted: Any) -> np.ndarray:
        if isinstance(feed, torch.Tensor):
            if feed.device.type != "cpu":
                raise RuntimeError("only tensors of the CPU are taken")
            feed = feed.numpy()
        if not isinstance(feed, np.ndarray):
            raise RuntimeError(f"a {type(feed).__name__} is no feed")
        if list(feed.shape) != wanted.shape or feed.dtype != np.float32:
            raise RuntimeError(f"{feed.dtype} {feed.shape} for {wanted.type} {wanted.shape}")
        return feed


@pytest.fixture
def stand_in_ais_bench(monkeypatch: pytest.MonkeyPatch) -> None:
    """The module ais_bench.infer.interface with its InferSession."""
    names = ("ais_bench", "ais_bench.infer", "ais_bench.infer.interface")
    for name in names:
        module = types.ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        module.__path__ = []  # type: ignore[attr-defined]
        module.InferSession = InferSession  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, module)
