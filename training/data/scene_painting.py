"""Scene -> pixels. Varies what a question never asks: exact colours, smooth edges, texture."""

from __future__ import annotations

import math
import random

from PIL import Image, ImageChops, ImageDraw

from training.data.layout import ground_kind, object_kind
from training.data.scene import Object, Scene

_Colour = tuple[int, int, int]
_Range = tuple[_Colour, _Colour]

# A colour is drawn from between the two, so that a pure (255, 0, 0) is red as well.
_COLOUR_RANGES: dict[str, _Range] = {
    "red": ((255, 0, 0), (205, 30, 40)),
    "blue": ((0, 0, 255), (45, 95, 215)),
    "green": ((0, 115, 40), (30, 215, 60)),
    "yellow": ((255, 255, 0), (240, 200, 15)),
    "black": ((0, 0, 0), (40, 40, 40)),
    "orange": ((255, 115, 0), (250, 150, 30)),
    "purple": ((110, 20, 150), (170, 60, 205)),
    "brown": ((105, 60, 30), (150, 85, 45)),
}
_BACKGROUND_RANGES: dict[str, _Range] = {
    "white": ((255, 255, 255), (246, 246, 246)),
    "gray": ((205, 205, 205), (185, 185, 185)),
    "pink": ((255, 205, 220), (250, 185, 205)),
    "light blue": ((195, 225, 255), (175, 210, 250)),
    "light green": ((200, 245, 200), (180, 235, 185)),
    "light yellow": ((255, 250, 195), (255, 243, 175)),
}
BOX = 1.12  # side of the box that holds an object at any angle drawn, in diameters
MAX_ANGLE = 12  # degrees


def paint(scene: Scene, rng: random.Random) -> Image.Image:
    """The scene as an RGB picture of its size."""
    image = Image.new(
        "RGB", (scene.width, scene.height), _between(_BACKGROUND_RANGES[scene.background], rng)
    )
    if rng.random() < 0.4:
        image = _textured(image, rng)
    is_smooth = rng.random() < 0.7
    for thing in scene.objects:
        _paint_object(image, thing, _between(_COLOUR_RANGES[thing.colour], rng), is_smooth)
    return image


def layout_of(scene: Scene) -> Image.Image:
    """Which object is where, as training.data.layout says."""
    layout = Image.new("L", (scene.width, scene.height), ground_kind(scene.background))
    draw = ImageDraw.Draw(layout)
    for thing in scene.objects:
        middle = thing.x * scene.width, thing.y * scene.height
        diameter = thing.diameter * min(scene.width, scene.height)
        _draw_shape(draw, thing, middle, diameter, object_kind(thing))
    return layout


def _between(ends: _Range, rng: random.Random) -> _Colour:
    share = rng.random()
    red, green, blue = (round(a + share * (b - a)) for a, b in zip(*ends, strict=True))
    return red, green, blue


def _textured(image: Image.Image, rng: random.Random) -> Image.Image:
    """Coarse spots a few grey levels strong, darker only: light stays light."""
    side, strength = rng.choice((4, 12, 40)), rng.randint(4, 12)
    noise = Image.frombytes("L", (side, side), rng.randbytes(side * side))
    spots = noise.point([value * strength // 255 for value in range(256)])
    spots = spots.resize(image.size, Image.Resampling.BILINEAR)
    return ImageChops.subtract(image, Image.merge("RGB", (spots, spots, spots)))


def _paint_object(image: Image.Image, thing: Object, colour: _Colour, is_smooth: bool) -> None:
    diameter = thing.diameter * min(image.size)
    left = math.floor(thing.x * image.width - diameter * BOX / 2)
    top = math.floor(thing.y * image.height - diameter * BOX / 2)
    scale = (4 if diameter < 60 else 2) if is_smooth else 1
    side = math.ceil(diameter * BOX) + 1
    mask = Image.new("L", (side * scale, side * scale))
    middle = (thing.x * image.width - left) * scale, (thing.y * image.height - top) * scale
    _draw_shape(ImageDraw.Draw(mask), thing, middle, diameter * scale, 255)
    image.paste(colour, (left, top), mask.reduce(scale) if scale > 1 else mask)


def _draw_shape(
    draw: ImageDraw.ImageDraw,
    thing: Object,
    middle: tuple[float, float],
    diameter: float,
    fill: int,
) -> None:
    x, y = middle
    if thing.shape == "circle":
        half = diameter / 2
        draw.ellipse((x - half, y - half, x + half, y + half), fill=fill)
        return
    turn = math.radians(thing.angle)
    cos, sin = math.cos(turn) * diameter, math.sin(turn) * diameter
    corners = _unit_corners(thing.shape)
    draw.polygon([(x + a * cos - b * sin, y + a * sin + b * cos) for a, b in corners], fill=fill)


def _unit_corners(shape: str) -> list[tuple[float, float]]:
    """Corners of a shape of diameter 1 about its middle; y grows downwards."""
    if shape == "square":
        return [(-0.44, -0.44), (0.44, -0.44), (0.44, 0.44), (-0.44, 0.44)]
    if shape == "triangle":
        return [(0, -0.42), (0.49, 0.42), (-0.49, 0.42)]
    radii = (0.55, 0.235)  # of a star's points and of the notches between them
    turns = [math.pi * number / 5 for number in range(10)]
    return [
        (radii[number % 2] * math.sin(turn), -radii[number % 2] * math.cos(turn))
        for number, turn in enumerate(turns)
    ]
