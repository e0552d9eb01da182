"""Draws the example pictures of this folder, so that they carry nobody's licence but ours.

usage: python examples/draw_pictures.py [FOLDER]
"""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image, ImageDraw

Box = tuple[int, int, int, int]


def shapes() -> Image.Image:
    """A red circle left of a blue square over a green triangle, on white."""
    image = Image.new("RGB", (320, 240), "white")
    draw = ImageDraw.Draw(image)
    draw.ellipse((40, 40, 130, 130), fill=(214, 40, 40))
    draw.rectangle((190, 45, 275, 130), fill=(38, 84, 201))
    draw.polygon([(160, 150), (110, 220), (210, 220)], fill=(44, 160, 72))
    return image


def house() -> Image.Image:
    """A yellow house with a red roof under a sun."""
    image = Image.new("RGB", (320, 240), (172, 216, 240))
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 180, 320, 240), fill=(112, 172, 84))
    draw.rectangle((90, 110, 230, 200), fill=(240, 208, 96))
    draw.polygon([(75, 112), (160, 50), (245, 112)], fill=(190, 50, 44))
    draw.rectangle((145, 150, 175, 200), fill=(110, 70, 40))
    draw.ellipse((250, 20, 300, 70), fill=(250, 200, 50))
    return image


def main(folder: Path) -> None:
    """Write every picture as a PNG."""
    folder.mkdir(parents=True, exist_ok=True)
    for draw in (shapes, house):
        draw().save(folder / f"{draw.__name__}.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
