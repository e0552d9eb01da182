"""onnxruntime on the processor."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np

from glimt.errors import MissingDependency
from glimt.runtimes.base import VisionRuntime, unreadable
from glimt.runtimes.manifest import INPUT, OUTPUT


class OnnxSession:
    """An ONNX file in onnxruntime."""

    def __init__(self, session: Any) -> None:
        self._session = session

    def run(self, pixels: np.ndarray) -> np.ndarray:
        """[batch, height, width, 3] float32 -> [batch, image tokens, hidden], the file's dtype."""
        return np.asarray(self._session.run([OUTPUT], {INPUT: pixels})[0])


def open_onnx(path: Path, num_threads: int | None) -> OnnxSession:
    """Load an ONNX file.

    Raises MissingDependency without onnxruntime, ConfigError for a file that it does not take.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingDependency("onnxruntime", "export") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads or 0
    options.log_severity_level = 3
    # Its threads would go on turning after each run, on the cores that the next step needs.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions have no common class
        raise unreadable(path, error) from error
    return OnnxSession(session)


def _absent() -> str | None:
    if importlib.util.find_spec("onnxruntime"):
        return None
    return "onnxruntime is not installed; pip install 'glimt[export]'"


RUNTIME = VisionRuntime("onnxruntime", "onnx", open_onnx, _absent)
