"""How an object is spoken of, in both languages: "大的红色图形", "the leftmost object".

Also what a question is, and the answers that several kinds of question share.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

from training.data.sample import Language, Words
from training.data.scene import COLOURS, SIZES, Direction, Object, Scene, shape_name

OUTERMOST: dict[Direction, Words] = {
    "left": Words("最左边", "leftmost"),
    "right": Words("最右边", "rightmost"),
    "up": Words("最上面", "topmost"),
    "down": Words("最下面", "bottommost"),
}
_NUMBERS = (
    Words("没有。", "There are none."),
    Words("有一个。", "There is one."),
    Words("有两个。", "There are two."),
    Words("有三个。", "There are three."),
    Words("有四个。", "There are four."),
)


class Asked(NamedTuple):
    """A question, its answer, and what a follow-up needs.

    about: the one object spoken of, if any
    known: what the two sentences tell of it, which a follow-up does not ask again
    """

    question: str
    answer: str
    about: Object | None = None
    known: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Description:
    """What is said of an object; None is left unsaid.

    outermost: it is the one farthest in this direction
    is_terse:  Chinese says 红色圆形 rather than 红色的圆形
    """

    shape: str | None = None
    colour: str | None = None
    is_large: bool | None = None
    outermost: Direction | None = None
    is_terse: bool = False

    def fits(self, thing: Object) -> bool:
        """Is what is said of shape, colour and size true of the object?"""
        return (
            self.shape in (None, thing.shape)
            and self.colour in (None, thing.colour)
            and self.is_large in (None, thing.is_large)
        )

    def count(self, scene: Scene) -> int:
        """How many objects it fits; a place makes it one."""
        return 1 if self.outermost else sum(map(self.fits, scene.objects))

    def attributes(self) -> frozenset[str]:
        """What it tells of the object, so need not be asked."""
        told = {
            "shape": self.shape,
            "colour": self.colour,
            "size": self.is_large,
            "where": self.outermost,
        }
        return frozenset(name for name, value in told.items() if value is not None)

    def bare(self, language: Language, *, plural: bool = False) -> str:
        """Without an article: "red circle"."""
        noun = shape_name(self.shape, language, plural=plural)
        size = "" if self.is_large is None else SIZES[self.is_large].said(language)
        colour = "" if self.colour is None else COLOURS[self.colour].said(language)
        place = "" if self.outermost is None else OUTERMOST[self.outermost].said(language)
        if language == "en":
            return " ".join(word for word in (place, size, colour, noun) if word)
        joined = "" if size or self.is_terse or not colour else "的"
        return f"{place}的{noun}" if place else f"{size}{colour}{joined}{noun}"

    def definite(self, language: Language) -> str:
        """As the one that is meant: "the red circle", 红色的圆形."""
        bare = self.bare(language)
        if language == "en":
            return f"the {bare}"
        return bare if self.attributes() else f"这个{bare}"

    def indefinite(self, language: Language) -> str:
        """As one of its sort: "a red circle", 一个红色的圆形."""
        bare = self.bare(language)
        return f"一个{bare}" if language == "zh" else f"{article(bare)} {bare}"


def article(words: str) -> str:
    """The English article before the words."""
    return "an" if words[0] in "aeiou" else "a"


def number_answer(count: int, language: Language) -> str:
    """The sentence that says how many there are."""
    return _NUMBERS[count].said(language)


def place_answer(place: Words, language: Language) -> str:
    """The sentence that says where it is."""
    return f"它{place.zh}。" if language == "zh" else f"It is {place.en}."


def describe_uniquely(
    scene: Scene,
    thing: Object,
    rng: random.Random,
    *,
    without: str = "",
    may_use_place: bool = True,
) -> Description | None:
    """A description that fits only this object and tells nothing of one attribute, if any does."""
    choices = [
        description
        for description in _descriptions(thing, without)
        if description.count(scene) == 1
    ]
    if may_use_place and without != "where":
        choices += [
            Description(outermost=direction)
            for direction in OUTERMOST
            if scene.outermost(direction) is thing
        ]
    return rng.choice(choices) if choices else None


def _descriptions(thing: Object, without: str) -> Iterator[Description]:
    """By none, one or two of shape, colour and size; colour and shape in both Chinese ways."""
    attributes = [name for name in ("shape", "colour", "size") if name != without]
    for num_named in range(3):
        for named in combinations(attributes, num_named):
            for is_terse in (False, True) if "colour" in named else (False,):
                yield describe_by(thing, named, is_terse=is_terse)


def describe_by(
    thing: Object, attributes: tuple[str, ...], *, is_terse: bool = False
) -> Description:
    """The description of an object by the attributes named."""
    return Description(
        shape=thing.shape if "shape" in attributes else None,
        colour=thing.colour if "colour" in attributes else None,
        is_large=thing.is_large if "size" in attributes else None,
        is_terse=is_terse,
    )
