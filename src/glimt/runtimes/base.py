"""What every runtime of a compiled tower promises. Knows no runtime by name.

A runtime is one file in this folder ending in a `RUNTIME` object; `find_runtime` scans the folder.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from glimt.errors import ConfigError

TORCH = "torch"  # no runtime: the model's own tower


class VisionSession(Protocol):
    """A compiled tower, loaded."""

    def run(self, pixels: np.ndarray) -> np.ndarray:
        """[batch, height, width, 3] float32, 0 to 255 -> [batch, image tokens, hidden], floats.

        Raises what the runtime raises.
        """


@dataclass(frozen=True, slots=True)
class VisionRuntime:
    """One way to run a compiled tower.

    format: of the files that it runs, "onnx" or "om"
    open:   (file, threads of the processor or None) -> session; raises MissingDependency or
        ConfigError
    absent: why it cannot be used here, and what to do; None when it can
    """

    name: str
    format: str
    open: Callable[[Path, int | None], VisionSession]
    absent: Callable[[], str | None]


def all_runtimes() -> dict[str, VisionRuntime]:
    """Every runtime of this folder by name; a module without RUNTIME is none."""
    package = importlib.import_module("glimt.runtimes")
    modules = [
        importlib.import_module(f"glimt.runtimes.{info.name}")
        for info in pkgutil.iter_modules(package.__path__)
    ]
    found = [module.RUNTIME for module in modules if hasattr(module, "RUNTIME")]
    return {runtime.name: runtime for runtime in found}


def find_runtime(name: str) -> VisionRuntime:
    """The runtime of that name. Raises ConfigError if there is none."""
    runtimes = all_runtimes()
    if name not in runtimes:
        known = ", ".join((TORCH, *sorted(runtimes)))
        raise ConfigError("vision_runtime", [f"{name!r} is unknown; choose one of {known}"])
    return runtimes[name]


def unreadable(path: Path, error: Exception) -> ConfigError:
    """What to say of a file that its runtime does not take."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    said = f"{path} cannot be loaded: {reason}; run `glimt export vision` again"
    return ConfigError("vision_model", [said])
