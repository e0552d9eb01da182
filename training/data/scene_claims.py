"""Questions how two objects lie to each other, and those answered by yes or no."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import NamedTuple

from training.data.sample import YES_NO, Language, Wordings, Words
from training.data.scene import COLOURS, SHAPES, SIZES, Direction, Object, Scene, shape_name
from training.data.scene_words import (
    Asked,
    Description,
    article,
    describe_by,
    describe_uniquely,
    place_answer,
)

# --- left, right, above, below ---------------------------------------------------------------


_OPPOSITE: dict[Direction, Direction] = {
    "left": "right",
    "right": "left",
    "up": "down",
    "down": "up",
}
_RELATION_ANSWERS: dict[Direction, Words] = {
    "left": Words("在左边", "on the left"),
    "right": Words("在右边", "on the right"),
    "up": Words("在上面", "above"),
    "down": Words("在下面", "below"),
}
_RELATIONS: dict[Direction, Words] = {
    "left": Words("左边", "to the left of"),
    "right": Words("右边", "to the right of"),
    "up": Words("上面", "above"),
    "down": Words("下面", "below"),
}
_SIDEWAYS_QUESTIONS = Wordings(
    ("{}在{}的左边还是右边？", "{}是在{}的左边还是右边？"),
    (
        "Is {} left or right of {}?",
        "Is {} to the left or to the right of {}?",
        "Is {} on the left or on the right of {}?",
    ),
)
_UPRIGHT_QUESTIONS = Wordings(
    ("{}在{}的上面还是下面？", "{}是在{}的上面还是下面？"),
    ("Is {} above or below {}?", "Is {} higher or lower than {}?"),
)


class _Related(NamedTuple):
    """Two objects, how they are spoken of, and where the first clearly is, seen from the other."""

    thing: Object
    one: Description
    other: Description
    direction: Direction


def _find_related(scene: Scene, rng: random.Random) -> _Related | None:
    if len(scene.objects) < 2:
        return None
    thing, reference = rng.sample(scene.objects, 2)
    directions = [way for way in _RELATIONS if thing.is_clearly(way, reference)]
    one = describe_uniquely(scene, thing, rng, may_use_place=False)
    other = describe_uniquely(scene, reference, rng, may_use_place=False)
    if not directions or one is None or other is None:
        return None
    return _Related(thing, one, other, rng.choice(directions))


def ask_relation(scene: Scene, rng: random.Random, language: Language) -> Asked | None:
    """Left or right, above or below: None where that is not clear or the objects look alike."""
    related = _find_related(scene, rng)
    if related is None:
        return None
    is_sideways = related.direction in ("left", "right")
    question = (_SIDEWAYS_QUESTIONS if is_sideways else _UPRIGHT_QUESTIONS).choose(rng, language)
    question = question.format(related.one.definite(language), related.other.definite(language))
    answer = place_answer(_RELATION_ANSWERS[related.direction], language)
    return Asked(question, answer, related.thing, related.one.attributes() | {"where"})


# --- yes or no -------------------------------------------------------------------------------


_EXISTS_QUESTIONS = Wordings(
    ("图片里有{}吗？", "图里有{}吗？", "图片里是不是有{}？", "有{}吗？"),
    (
        "Is there {} in the picture?",
        "Is there {}?",
        "Can you see {}?",
        "Does the picture show {}?",
    ),
)
_NAMED_IN_EXISTS = (
    ("shape",),
    ("colour",),
    ("colour", "shape"),
    ("colour", "shape"),
    ("shape", "size"),
)


def ask_yes_no(scene: Scene, rng: random.Random, language: Language) -> Asked | None:
    """Yes or no is tossed first, so that neither answer is the better guess."""
    is_so = rng.random() < 0.5
    sorts = (_ask_exists, _ask_whether, _ask_whether_related)
    (asker,) = rng.choices(sorts, (0.6, 0.25, 0.15))
    return asker(scene, rng, language, is_so)


def _ask_exists(scene: Scene, rng: random.Random, language: Language, is_so: bool) -> Asked | None:
    while True:  # ends: there are more colours than objects
        named = rng.choice(_NAMED_IN_EXISTS)
        thing = rng.choice(scene.objects)
        description = describe_by(thing, named, is_terse=rng.random() < 0.5)
        if not is_so:
            description = _changed(description, rng.choice(named), scene, rng)
        if (description.count(scene) > 0) == is_so:
            break
    question = _EXISTS_QUESTIONS.choose(rng, language).format(_thing_asked(description, language))
    answer = YES_NO[is_so].said(language)
    is_single = description.count(scene) == 1
    return Asked(question, answer, thing if is_single else None, description.attributes())


def _thing_asked(description: Description, language: Language) -> str:
    return description.bare("zh") if language == "zh" else description.indefinite("en")


def _changed(
    description: Description, attribute: str, scene: Scene, rng: random.Random
) -> Description:
    """With another value of the attribute, often one that something else in the scene has."""
    other = rng.choice(scene.objects)
    if attribute == "colour":
        return replace(description, colour=rng.choice((other.colour, rng.choice(tuple(COLOURS)))))
    if attribute == "shape":
        return replace(description, shape=rng.choice((other.shape, rng.choice(tuple(SHAPES)))))
    return replace(description, is_large=not description.is_large)


def _ask_whether(scene: Scene, rng: random.Random, language: Language, is_so: bool) -> Asked | None:
    """Has the one object that is meant this colour (this shape, this size)?"""
    thing = rng.choice(scene.objects)
    attribute = rng.choice(("colour", "shape", "size"))
    description = describe_uniquely(scene, thing, rng, without=attribute)
    if description is None:
        return None
    claim = describe_by(thing, (attribute,))
    while claim.fits(thing) != is_so:
        claim = _changed(claim, attribute, scene, rng)
    the, claimed = description.definite(language), _claimed(claim, language)
    question = f"{the}是{claimed}吗？" if language == "zh" else f"Is {the} {claimed}?"
    known = description.attributes() | {attribute}
    return Asked(question, YES_NO[is_so].said(language), thing, known)


def _claimed(claim: Description, language: Language) -> str:
    """The one attribute of a claim, as the end of a sentence: "red", 红色的, "a circle"."""
    if claim.shape is not None:
        name = shape_name(claim.shape, language)
        return name if language == "zh" else f"{article(name)} {name}"
    if claim.is_large is not None:
        return SIZES[claim.is_large].said(language)
    colour = COLOURS[claim.colour or ""]
    return f"{colour.zh}的" if language == "zh" else colour.en


def _ask_whether_related(
    scene: Scene, rng: random.Random, language: Language, is_so: bool
) -> Asked | None:
    related = _find_related(scene, rng)
    if related is None:
        return None
    direction = related.direction if is_so else _OPPOSITE[related.direction]
    one, other = related.one.definite(language), related.other.definite(language)
    relation = _RELATIONS[direction].said(language)
    zh, en = f"{one}在{other}的{relation}吗？", f"Is {one} {relation} {other}?"
    known = related.one.attributes() | {"where"}
    answer = YES_NO[is_so].said(language)
    return Asked(zh if language == "zh" else en, answer, related.thing, known)
