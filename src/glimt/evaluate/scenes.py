"""Three pictures drawn here, each with its fixed question: the predict mode without a folder.

VisualGLM's port asks three fixed questions about three example pictures; ours need no file.
"""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image, ImageDraw

_SIZE = (320, 240)  # pixels
_RED, _BLUE, _YELLOW, _GREEN = (225, 20, 25), (30, 70, 215), (245, 205, 30), (30, 150, 60)


@dataclass(frozen=True, slots=True, eq=False)
class Scene:
    """A picture and what is asked about it; name: the key of its answer."""

    name: str
    picture: Image.Image
    question: str


def scenes() -> tuple[Scene, ...]:
    """All three, drawn anew; the same pixels every time."""
    return (
        Scene("drawn/circle.png", _circle(), "图片里有什么？"),
        Scene("drawn/square_and_triangle.png", _square_and_triangle(), "最左边是什么图形？"),
        Scene("drawn/house.png", _house(), "描述这张图片。"),
    )


def _circle() -> Image.Image:
    """A red circle on white."""
    image, draw = _canvas("white")
    draw.ellipse((120, 80, 200, 160), fill=_RED)
    return image


def _square_and_triangle() -> Image.Image:
    """A blue square, and a yellow triangle to its right, on grey."""
    image, draw = _canvas((200, 200, 200))
    draw.rectangle((50, 90, 120, 160), fill=_BLUE)
    draw.polygon(((230, 80), (190, 160), (270, 160)), fill=_YELLOW)
    return image


def _house() -> Image.Image:
    """A house on grass under the sun."""
    image, draw = _canvas((170, 210, 245))
    draw.rectangle((0, 180, *_SIZE), fill=_GREEN)
    draw.rectangle((110, 120, 210, 200), fill=(235, 225, 205))
    draw.polygon(((100, 120), (160, 70), (220, 120)), fill=_RED)
    draw.rectangle((148, 155, 172, 200), fill=(110, 70, 40))
    draw.ellipse((255, 20, 300, 65), fill=_YELLOW)
    return image


def _canvas(colour: str | tuple[int, int, int]) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    image = Image.new("RGB", _SIZE, colour)
    return image, ImageDraw.Draw(image)
