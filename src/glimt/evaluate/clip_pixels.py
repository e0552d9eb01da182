"""A picture as CLIP sees it: shorter side resized, middle cut out, normalised. Pillow alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from glimt.errors import ConfigError
from glimt.models.config_reader import read_json

# Of the pictures that CLIP was trained on. Source: Radford et al., arXiv 2103.00020, its code.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, slots=True)
class PixelSettings:
    """resize: pixels of the shorter side; crop: of both sides of the middle; mean, std: of RGB."""

    resize: int
    crop: int
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD


def to_pixels(picture: Image.Image, settings: PixelSettings) -> Tensor:
    """[3, crop, crop] float32 of an RGB picture.

    Source: open_clip's evaluation transform, which is torchvision's Resize (bicubic, the long
    side rounded down), CenterCrop (half rounded to even), ToTensor and Normalize.
    """
    width, height = picture.size
    short = min(width, height)
    size = (settings.resize * width // short, settings.resize * height // short)
    resized = picture.resize(size, Image.Resampling.BICUBIC)
    left, top = (round((side - settings.crop) / 2) for side in size)
    middle = resized.crop((left, top, left + settings.crop, top + settings.crop))
    pixels = torch.from_numpy(np.asarray(middle, dtype=np.float32) / 255)
    mean, std = torch.tensor(settings.mean), torch.tensor(settings.std)
    return ((pixels - mean) / std).permute(2, 0, 1)


_BICUBIC = int(Image.Resampling.BICUBIC)


def of_hub_folder(folder: Path, image_size: int) -> PixelSettings:
    """What preprocessor_config.json says; without the file, what CLIP is trained with.

    Raises ConfigError for a preprocessing that is not done here.
    """
    path = folder / "preprocessor_config.json"
    if not path.exists():
        return PixelSettings(image_size, image_size)
    raw = read_json(path)
    resize, crop = _side(raw.get("size")), _side(raw.get("crop_size"))
    is_plain = all(raw.get(f"do_{step}", True) for step in ("resize", "center_crop", "normalize"))
    problems = [] if is_plain else ["resizing, cropping and normalising must all be on"]
    if resize is None or crop != image_size or resize < crop:
        problems.append(
            f"size {raw.get('size')} and crop_size {raw.get('crop_size')} do not suit "
            f"a model of {image_size} x {image_size} pixels"
        )
    if raw.get("resample", _BICUBIC) != _BICUBIC:
        problems.append(f"resample is {raw['resample']}; only 3, bicubic, is done here")
    mean, std = (
        _three(raw.get(f"image_{name}"), plain) for name, plain in (("mean", MEAN), ("std", STD))
    )
    if mean is None or std is None:
        problems.append("image_mean and image_std must be three numbers each")
    if problems or resize is None or mean is None or std is None:
        raise ConfigError(str(path), problems)
    return PixelSettings(resize, image_size, mean, std)


def _side(raw: Any) -> int | None:
    """A side in each of the ways in which it has been written; None for a rectangle."""
    if isinstance(raw, dict):
        given = set(raw.values())
        raw = next(iter(given)) if len(given) == 1 else None
    return raw if isinstance(raw, int) and raw > 0 else None


def _three(raw: Any, plain: tuple[float, ...]) -> tuple[float, ...] | None:
    if raw is None:
        return plain
    is_three = isinstance(raw, list) and len(raw) == 3
    return (
        tuple(map(float, raw))
        if is_three and all(isinstance(v, (int, float)) for v in raw)
        else None
    )
