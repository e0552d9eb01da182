"""to_pixels: sizes, places and values, computed by hand or by Pillow's own steps."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from glimt.errors import ConfigError
from glimt.evaluate.clip_pixels import MEAN, STD, PixelSettings, of_hub_folder, to_pixels

PLAIN = PixelSettings(8, 8, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def picture(width: int, height: int) -> Image.Image:
    random = np.random.default_rng(0)
    return Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_a_picture_of_the_right_size_is_only_scaled_and_normalised():
    """Catches channels in the wrong order, mean and deviation exchanged, 256 for 255."""
    image = picture(8, 8)
    raw = torch.from_numpy(np.asarray(image).astype(np.float64) / 255)
    expected = ((raw - torch.tensor(MEAN)) / torch.tensor(STD)).permute(2, 0, 1)
    ours = to_pixels(image, PixelSettings(8, 8))
    assert ours.dtype == torch.float32
    assert (ours - expected).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("size", "resized", "corner"),
    [
        ((16, 24), (8, 12), (0, 2)),
        ((24, 16), (12, 8), (2, 0)),
        ((10, 13), (8, 10), (0, 1)),  # 10.4 is rounded down
        ((16, 18), (8, 9), (0, 0)),  # half a pixel goes to the even side: 0
        ((16, 22), (8, 11), (0, 2)),  # 1.5 goes to 2
        ((4, 5), (8, 10), (0, 1)),  # enlarged
    ],
)
def test_the_middle_is_cut_out_as_torchvision_does(size, resized, corner):
    """Catches a crop that is a pixel off, and a long side rounded up."""
    image = picture(*size)
    left, top = corner
    middle = image.resize(resized, Image.Resampling.BICUBIC).crop((left, top, left + 8, top + 8))
    expected = torch.from_numpy(np.asarray(middle).astype(np.float32) / 255).permute(2, 0, 1)
    assert torch.equal(to_pixels(image, PLAIN), expected)


GOOD = {
    "size": {"shortest_edge": 32},
    "crop_size": {"height": 28, "width": 28},
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.25, 0.25, 0.25],
    "resample": 3,
}


def test_the_folders_own_settings_are_used(tmp_path):
    """Catches CLIP's usual mean applied to a model that was trained with another."""
    assert of_hub_folder(tmp_path, 28) == PixelSettings(28, 28)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(GOOD))
    half, quarter = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
    assert of_hub_folder(tmp_path, 28) == PixelSettings(32, 28, half, quarter)
    (tmp_path / "preprocessor_config.json").write_text('{"size": 28, "crop_size": 28}')
    assert of_hub_folder(tmp_path, 28) == PixelSettings(28, 28)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"resample": 2}, "only 3, bicubic"),
        ({"do_center_crop": False}, "must all be on"),
        ({"size": {"height": 28, "width": 32}}, "do not suit"),
        ({"crop_size": 24}, "do not suit"),
        ({"size": 20}, "do not suit"),
        ({"image_mean": [1, 2]}, "three numbers"),
    ],
)
def test_another_preprocessing_is_refused(tmp_path, change, said):
    """Catches pictures judged in a form that the model never saw."""
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(GOOD | change))
    with pytest.raises(ConfigError, match=said):
        of_hub_folder(tmp_path, 28)
