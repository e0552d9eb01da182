"""OM files on an Ascend NPU, through ais_bench's InferSession. Never run on a chip yet.

Source of the interface: Ascend/tools, ais-bench_workload/tool/ais_bench.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np

from glimt.errors import ConfigError
from glimt.runtimes.base import VisionRuntime, unreadable

_DEVICE_ID = 0  # the first of those that ASCEND_RT_VISIBLE_DEVICES shows
_ADVICE = (
    "install the aclruntime and ais_bench wheels of Ascend/tools, which are not on PyPI, and "
    "source CANN's set_env.sh"
)


class OmSession:
    """An OM file on one chip. Inputs and results cross the host, which is all that it takes."""

    def __init__(self, session: Any) -> None:
        self._session = session

    def run(self, pixels: np.ndarray) -> np.ndarray:
        """[batch, height, width, 3] float32 -> [batch, image tokens, hidden], as compiled."""
        return np.asarray(self._session.infer([pixels], mode="static")[0])


def open_om(path: Path, num_threads: int | None) -> OmSession:
    """Load an OM file. num_threads: of no meaning here.

    Raises ConfigError without ais_bench, or for a file that it does not take.
    """
    try:
        interface = importlib.import_module("ais_bench.infer.interface")
    except (ImportError, OSError) as error:  # its own library may not find CANN's
        said = f"om needs ais_bench, which cannot be imported ({error}); {_ADVICE}"
        raise ConfigError("vision_runtime", [said]) from error
    try:
        return OmSession(interface.InferSession(_DEVICE_ID, str(path)))
    except Exception as error:  # aclruntime raises RuntimeError, and other things
        raise unreadable(path, error) from error


def _absent() -> str | None:
    if importlib.util.find_spec("ais_bench"):
        return None
    return f"ais_bench is not installed; {_ADVICE}"


RUNTIME = VisionRuntime("om", "om", open_om, _absent)
