"""Drawn scenes: invents one to four objects, has them painted and asks about them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

from training.data.sample import Language, Sample
from training.data.scene import BACKGROUNDS, COLOURS, SHAPES, Object, Scene
from training.data.scene_painting import BOX, MAX_ANGLE, layout_of, paint
from training.data.scene_questions import TESTED, ask

_SIDES = (96, 224)  # pixels, of the shorter side; the longer has up to 4/3 of that
_LARGE, _SMALL = (0.30, 0.36), (0.165, 0.2)  # diameters, as shares of the shorter side
_GAP = 0.01  # between objects, as a share of the shorter side
_TRIES = 12  # places tried for one object before the whole scene is invented anew


class SceneSource:
    """Draws scenes with several questions each.

    num_exchanges: questions per picture, fewer when a simple scene has no more
    kinds:         the kinds of question asked, one named twice twice as often; a scene that allows
                   none of them is passed over
    follow_ups:    share of the questions that get a follow-up, where one is possible
    """

    task = "scenes"

    def __init__(
        self,
        *,
        num_exchanges: int = 4,
        kinds: Sequence[str] = TESTED,
        follow_ups: float = 0.4,
    ) -> None:
        self._num_exchanges = num_exchanges
        self._kinds = tuple(kinds)
        self._follow_ups = follow_ups

    def draw(self, rng: random.Random, language: Language) -> Sample:
        """A scene, and questions about it."""
        return self.draw_with_scene(rng, language)[0]

    def draw_with_scene(self, rng: random.Random, language: Language) -> tuple[Sample, Scene]:
        """A sample and the scene that it shows."""
        while True:
            scene = invent(rng)
            exchanges = ask(
                scene, rng, language, self._num_exchanges, self._kinds, self._follow_ups
            )
            if exchanges:
                image, layout = paint(scene, rng), layout_of(scene)
                middles = tuple((thing.x, thing.y) for thing in scene.objects)
                sample = Sample(
                    image, exchanges, self.task, language, layout=layout, middles=middles
                )
                return sample, scene


def invent(rng: random.Random) -> Scene:
    """A scene of one to four objects, each number as likely as the others."""
    short = rng.randint(*_SIDES)
    long = short if rng.random() < 0.4 else round(short * rng.uniform(1, 4 / 3))
    width, height = rng.choice(((short, long), (long, short)))
    background = rng.choice(tuple(BACKGROUNDS))
    looks = _invent_looks(rng.randint(1, 4), rng)
    # The looks stay until there is room for them, or large objects would be rare.
    objects = None
    while objects is None:
        objects = _place_all(looks, width, height, rng)
    return Scene(width, height, background, objects)


class _Look(NamedTuple):
    """What an object is, before it has a place."""

    shape: str
    colour: str
    is_large: bool


def _invent_looks(num_objects: int, rng: random.Random) -> list[_Look]:
    shapes, colours = _some_of(tuple(SHAPES), rng), _some_of(tuple(COLOURS), rng)
    return [
        _Look(rng.choice(shapes), rng.choice(colours), rng.random() < 0.5)
        for _ in range(num_objects)
    ]


def _place_all(
    looks: Sequence[_Look], width: int, height: int, rng: random.Random
) -> tuple[Object, ...] | None:
    """Objects that do not overlap, None when there was no room for them."""
    objects: list[Object] = []
    for look in looks:
        tries = (_placed(look, width, height, rng) for _ in range(_TRIES))
        fitting = (
            thing
            for thing in tries
            if all(_are_apart(thing, other, width, height) for other in objects)
        )
        thing = next(fitting, None)
        if thing is None:
            return None
        objects.append(thing)
    return tuple(objects)


def _some_of(names: Sequence[str], rng: random.Random) -> Sequence[str]:
    """Mostly all of them, else one or two, so that there is something to count."""
    share = rng.random()
    return names if share < 0.6 else rng.sample(names, 2 if share < 0.85 else 1)


def _placed(look: _Look, width: int, height: int, rng: random.Random) -> Object:
    """An object somewhere wholly inside the picture."""
    diameter = rng.uniform(*(_LARGE if look.is_large else _SMALL))
    half = (diameter * BOX / 2 + _GAP) * min(width, height)
    x, y = rng.uniform(half, width - half) / width, rng.uniform(half, height - half) / height
    angle = rng.choice((0.0, rng.uniform(-MAX_ANGLE, MAX_ANGLE)))
    return Object(*look, x, y, diameter, angle)


def _are_apart(one: Object, other: Object, width: int, height: int) -> bool:
    """Do the boxes that hold the two not touch?"""
    reach = ((one.diameter + other.diameter) * BOX / 2 + _GAP) * min(width, height)
    return abs(one.x - other.x) * width >= reach or abs(one.y - other.y) * height >= reach
