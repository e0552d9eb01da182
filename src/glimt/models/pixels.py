"""Pictures as towers take them: resized, normalised, cut into patches. Knows no family."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def squash(image: Image, height: int, width: int) -> np.ndarray:
    """Resize to exactly this size, bicubic with antialiasing, aspect ratio not kept.

    Returns [height, width, 3] uint8. Both originals do this with Pillow; a tensor library's
    bicubic without antialiasing gives other pixels.
    """
    from PIL.Image import Resampling

    resized = image.convert("RGB").resize((width, height), Resampling.BICUBIC)
    return np.asarray(resized, dtype=np.uint8)


def normalise(pixels: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """[height, width, 3] uint8 -> [3, height, width] float32, (x / 255 - mean) / std."""
    return normalised(torch.tensor(pixels, dtype=torch.float32), mean, std)


def normalised(raw: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """[…, height, width, 3] float32, 0 to 255 -> […, 3, height, width], (x / 255 - mean) / std."""
    x = raw.movedim(raw.dim() - 1, raw.dim() - 3) / 255  # from the front, as exporters want it
    return (x - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """[…, channels, height, width] -> […, rows * columns, channels * patch_size**2], row-major.

    A patch's values are in (channel, y, x) order, which is a convolution weight's own order, so
    that a convolution with stride = kernel size is one matrix product.
    """
    *batch, channels, height, width = images.shape
    rows, columns = height // patch_size, width // patch_size
    x = images.reshape(-1, channels, rows, patch_size, columns, patch_size)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(*batch, rows * columns, channels * patch_size**2)
