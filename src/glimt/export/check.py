"""Holds a written ONNX file to the torch tower that it was made of."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from glimt.errors import EngineError
from glimt.models.base import Processor
from glimt.runtimes.manifest import Manifest
from glimt.runtimes.onnx_runtime import open_onnx
from glimt.runtimes.vision import OfflineTower
from glimt.types import ImageInput


@dataclass(frozen=True, slots=True)
class Limits:
    """What a file may differ by.

    difference: the largest, as a share of the largest magnitude; cosine: at least
    """

    difference: float
    cosine: float


# In float32 only the order of additions differs; float16 rounds every layer to 11 bits.
LIMITS = {"float32": Limits(1e-4, 0.9999), "float16": Limits(1e-2, 0.9999)}


@dataclass(frozen=True, slots=True)
class Comparison:
    """An ONNX file beside the torch tower in float32, on one picture.

    difference: the largest, as a share of the tower's largest magnitude
    cosine:     of all features as one vector
    """

    difference: float
    cosine: float
    limits: Limits

    @property
    def is_within(self) -> bool:
        """Both figures are within their limits; NaN is not."""
        close = self.difference <= self.limits.difference
        return bool(close and self.cosine >= self.limits.cosine)

    def as_text(self) -> str:
        """One line with the figures and their limits."""
        return (
            f"largest difference {self.difference:.2e} of the largest value (limit "
            f"{self.limits.difference:g}), cosine {self.cosine:.6f} (at least {self.limits.cosine})"
        )


def check_picture(processor: Processor) -> ImageInput:
    """The same every time: slow waves of colour and fixed noise, so that no value is missing."""
    y, x = np.mgrid[0:240, 0:320]
    waves = np.stack([np.sin(x / 40), np.cos(y / 30), np.sin((x + y) / 50)], axis=-1)
    noise = np.random.default_rng(0).uniform(-40, 40, waves.shape)
    pixels = np.clip(127 + 80 * waves + noise, 0, 255).astype(np.uint8)
    return processor.prepare_image(Image.fromarray(pixels), digest=b"the export's test picture")


def compare(
    path: Path, manifest: Manifest, image: ImageInput, expected: Tensor, threads: int | None = None
) -> Comparison:
    """Run a picture through the file, beside features that are known.

    expected: [image tokens, hidden_size] float32. Raises as `open_onnx` does, EngineError if the
    file cannot be run or gives another shape.
    """
    cpu = torch.device("cpu")
    tower = OfflineTower(open_onnx(path, threads), manifest, cpu, torch.float32)
    try:
        (found,) = tower.image_features([image])
    except EngineError:
        raise
    except Exception as error:  # onnxruntime's exceptions have no common class
        raise EngineError(f"onnxruntime cannot run the exported file: {error}") from error
    return measured(found, expected, LIMITS[manifest.dtype])


def measured(found: Tensor, expected: Tensor, limits: Limits) -> Comparison:
    """Features [image tokens, hidden_size] beside those that are right."""
    a, b = found.double().flatten(), expected.double().flatten()
    difference = float((a - b).abs().max() / b.abs().max())
    return Comparison(difference, float(torch.cosine_similarity(a, b, dim=0)), limits)
