"""What a drawn scene is: objects with shape, colour, size and place; knows no pixels, no questions.

Places are shares of the picture's width and height, so they stay true when it is squashed.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

from training.data.sample import Language, Words

Direction = Literal["left", "right", "up", "down"]


class ShapeName(NamedTuple):
    """A shape's name; English needs the plural for counting."""

    zh: str
    en: str
    plural: str


SHAPES = {
    "circle": ShapeName("圆形", "circle", "circles"),
    "square": ShapeName("正方形", "square", "squares"),
    "triangle": ShapeName("三角形", "triangle", "triangles"),
    "star": ShapeName("五角星", "star", "stars"),
}
ANY_SHAPE = ShapeName("图形", "object", "objects")
COLOURS = {
    "red": Words("红色", "red"),
    "blue": Words("蓝色", "blue"),
    "green": Words("绿色", "green"),
    "yellow": Words("黄色", "yellow"),
    "black": Words("黑色", "black"),
    "orange": Words("橙色", "orange"),
    "purple": Words("紫色", "purple"),
    "brown": Words("棕色", "brown"),
}
BACKGROUNDS = {
    "white": Words("白色", "white"),
    "gray": Words("灰色", "gray"),
    "pink": Words("粉色", "pink"),
    "light blue": Words("浅蓝色", "light blue"),
    "light green": Words("浅绿色", "light green"),
    "light yellow": Words("浅黄色", "light yellow"),
}
SIZES = {True: Words("大的", "large"), False: Words("小的", "small")}
ZONES = (  # row by row, as the picture is divided into thirds
    Words("在左上角", "at the top left"),
    Words("在上面", "at the top"),
    Words("在右上角", "at the top right"),
    Words("在左边", "on the left"),
    Words("在中间", "in the middle"),
    Words("在右边", "on the right"),
    Words("在左下角", "at the bottom left"),
    Words("在下面", "at the bottom"),
    Words("在右下角", "at the bottom right"),
)

BORDER_MARGIN = 0.05  # a centre nearer to a border between thirds has no clear zone
SIDE_BY_SIDE = 0.18  # centres must be this far apart to be left and right, above and below
NEXT_IN_ORDER = 0.1  # and this far to be named from left to right


@dataclass(frozen=True, slots=True)
class Object:
    """One object.

    x, y:     its centre, as shares of the picture's width and height
    diameter: as a share of the picture's shorter side
    angle:    degrees it is turned
    """

    shape: str
    colour: str
    is_large: bool
    x: float
    y: float
    diameter: float
    angle: float

    def zone(self) -> int | None:
        """Which of ZONES its centre is clearly in."""
        column, row = _third(self.x), _third(self.y)
        return None if column is None or row is None else 3 * row + column

    def nearest_zone(self) -> int:
        """Which of ZONES its centre is in, be it near a border."""
        return 3 * min(2, int(self.y * 3)) + min(2, int(self.x * 3))

    def is_clearly(self, direction: Direction, other: Object) -> bool:
        """Is it clearly to the left of the other (right of it, above it, below it)?"""
        return other.along(direction) + SIDE_BY_SIDE <= self.along(direction)

    def along(self, direction: Direction) -> float:
        """How far its centre is towards a direction; grows in that direction."""
        ways = {"left": -self.x, "right": self.x, "up": -self.y, "down": self.y}
        return ways[direction]


@dataclass(frozen=True, slots=True)
class Scene:
    """A picture's size in pixels, its background and the objects on it, which do not overlap."""

    width: int
    height: int
    background: str
    objects: tuple[Object, ...]

    def from_left_to_right(self) -> tuple[Object, ...] | None:
        """The objects in that order, None unless it is clear."""
        ordered = sorted(self.objects, key=lambda thing: thing.x)
        return tuple(ordered) if self.narrowest_gap("right") >= NEXT_IN_ORDER else None

    def narrowest_gap(self, direction: Direction) -> float:
        """How far the two nearest objects are apart along a direction; 1 of a single object."""
        places = sorted(thing.along(direction) for thing in self.objects)
        return min((far - near for near, far in pairwise(places)), default=1.0)

    def outermost(self, direction: Direction) -> Object | None:
        """The object farthest in a direction, None unless it is clearly so."""
        *others, last = sorted(self.objects, key=lambda thing: thing.along(direction))
        is_clear = others and all(last.is_clearly(direction, other) for other in others)
        return last if is_clear else None


def shape_name(shape: str | None, language: Language, *, plural: bool = False) -> str:
    """A shape's name, or the word for any shape."""
    name = ANY_SHAPE if shape is None else SHAPES[shape]
    if language == "zh":
        return name.zh
    return name.plural if plural else name.en


def _third(share: float) -> int | None:
    number = min(2, int(share * 3))
    borders = (1 / 3, 2 / 3)
    return number if all(abs(share - border) >= BORDER_MARGIN for border in borders) else None
