"""Scene -> questions with their only right answers. Asks nothing that is unclear in the picture."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from training.data.sample import Exchange, Language, Wordings, Words
from training.data.scene import BACKGROUNDS, COLOURS, SHAPES, SIZES, ZONES, Direction, Object, Scene
from training.data.scene_attributes import asker_of, follow_up_to
from training.data.scene_claims import ask_relation, ask_yes_no
from training.data.scene_words import Asked, Description, describe_by, number_answer

Asker = Callable[[Scene, random.Random, Language], Asked | None]


class Kind(NamedTuple):
    """A kind of question: how often it is asked, and who asks it (None: not of this scene)."""

    weight: float
    asker: Asker


def ask(
    scene: Scene,
    rng: random.Random,
    language: Language,
    num_exchanges: int,
    kinds: Sequence[str],
    follow_ups: float,
) -> tuple[Exchange, ...]:
    """Up to `num_exchanges` different questions about the scene.

    follow_ups: share of the questions that get a follow-up, where one is possible
    """
    exchanges: dict[str, Exchange] = {}
    weights = [KINDS[kind].weight for kind in kinds]
    for kind in rng.choices(kinds, weights, k=4 * num_exchanges):
        if len(exchanges) == num_exchanges:
            break
        if asked := KINDS[kind].asker(scene, rng, language):
            follow_up = follow_up_to(asked, rng, language) if rng.random() < follow_ups else None
            exchanges[asked.question] = Exchange(asked.question, asked.answer, kind, follow_up)
    return tuple(exchanges.values())


# --- how many --------------------------------------------------------------------------------


_COUNT_QUESTIONS = Wordings(
    ("图片里有几个{}？", "有几个{}？", "图片里有多少个{}？", "{}有几个？"),
    (
        "How many {} are there?",
        "How many {} are in the picture?",
        "How many {} do you see?",
        "Count the {}.",
    ),
)
_COUNT_WEIGHTS = (0.5, 0.7, 1.0, 1.3, 1.5)  # rarer counts are asked for more often


def _ask_count(scene: Scene, rng: random.Random, language: Language) -> Asked | None:
    by_count: dict[int, list[Description]] = {}
    for description in _COUNTABLE:
        by_count.setdefault(description.count(scene), []).append(description)
    counts = tuple(by_count)
    (count,) = rng.choices(counts, [_COUNT_WEIGHTS[number] for number in counts])
    description = _any_sort(by_count[count], rng)
    question = _COUNT_QUESTIONS.choose(rng, language)
    question = question.format(description.bare(language, plural=True))
    answer = number_answer(count, language)
    if count != 1:
        return Asked(question, answer)
    about = next(filter(description.fits, scene.objects))
    return Asked(question, answer, about, description.attributes())


def _countable() -> Iterator[Description]:
    """All objects, those of a colour, of a shape, of a size, of a colour and a shape."""
    for shape in (None, *SHAPES):
        for colour in (None, *COLOURS):
            yield Description(shape, colour)
        for is_large in SIZES:
            yield Description(shape, is_large=is_large)


_COUNTABLE = tuple(_countable())


def _any_sort(descriptions: Sequence[Description], rng: random.Random) -> Description:
    """One of them: each sort is as likely, though there are more colours than sizes."""
    sorts = sorted({tuple(sorted(description.attributes())) for description in descriptions})
    sort = rng.choice(sorts)
    return rng.choice([one for one in descriptions if tuple(sorted(one.attributes())) == sort])


# --- the whole picture -----------------------------------------------------------------------


_BACKGROUND_QUESTIONS = Wordings(
    ("背景是什么颜色的？", "背景是什么颜色？", "图片的背景是什么颜色？"),
    (
        "What colour is the background?",
        "What color is the background?",
        "What is the background colour?",
    ),
)
_DESCRIBE_QUESTIONS = Wordings(
    ("图片里有什么？", "图里有什么？", "图片里是什么？", "请描述这张图片。", "你看到了什么？"),
    (
        "What is in the picture?",
        "What does the picture show?",
        "What do you see?",
        "Describe the picture.",
        "What objects are in the picture?",
    ),
)
_MOST_DESCRIBED = 3  # objects; more make a long sentence


def _ask_background(scene: Scene, rng: random.Random, language: Language) -> Asked | None:
    colour = BACKGROUNDS[scene.background]
    answer = Words(f"背景是{colour.zh}的。", f"The background is {colour.en}.").said(language)
    return Asked(_BACKGROUND_QUESTIONS.choose(rng, language), answer)


def _ask_describe(scene: Scene, rng: random.Random, language: Language) -> Asked | None:
    """What is there, from left to right; only of scenes where that order is clear."""
    ordered = scene.from_left_to_right()
    if ordered is None or len(ordered) > _MOST_DESCRIBED:
        return None
    named = [describe_by(thing, ("colour", "shape")).indefinite(language) for thing in ordered]
    if len(set(named)) < len(named):  # "a red circle and a red circle" is no way to speak
        return None
    *first, last = named
    comma, joint = ("、", "和") if language == "zh" else (", ", " and ")
    listed = joint.join((comma.join(first), last)) if first else last
    answer = f"有{listed}。" if language == "zh" else f"There is {listed}."
    question = _DESCRIBE_QUESTIONS.choose(rng, language)
    if first:
        return Asked(question, answer)
    return Asked(question, answer, ordered[0], frozenset(("colour", "shape")))


_INVENTORY_QUESTIONS = Wordings(
    ("请详细描述这张图片。", "请逐一说出图片里的图形。", "图片里有哪些图形？都在哪里？"),
    (
        "Describe the picture in detail.",
        "List all objects in the picture.",
        "Which objects are there, and where?",
    ),
)
_IN_ORDER = {
    "right": Words("从左到右：", "From left to right: "),
    "down": Words("从上到下：", "From top to bottom: "),
}


def _ask_inventory(scene: Scene, rng: random.Random, language: Language) -> Asked | None:
    """Everything about every object, along whichever way the objects are further apart."""
    ways: tuple[Direction, Direction] = ("right", "down")
    way = max(ways, key=scene.narrowest_gap)
    ordered = sorted(scene.objects, key=lambda thing: thing.along(way))
    listed = ("；" if language == "zh" else "; ").join(_in_full(x, language) for x in ordered)
    end = "。" if language == "zh" else "."
    answer = f"{_IN_ORDER[way].said(language)}{listed}{end}"
    return Asked(_INVENTORY_QUESTIONS.choose(rng, language), answer)


def _in_full(thing: Object, language: Language) -> str:
    named = describe_by(thing, ("colour", "shape", "size")).indefinite(language)
    place = ZONES[thing.nearest_zone()].said(language)
    return f"{named}{place}" if language == "zh" else f"{named} {place}"


KINDS: Mapping[str, Kind] = {
    "count": Kind(1.5, _ask_count),
    "colour": Kind(1.0, asker_of("colour")),
    "shape": Kind(1.0, asker_of("shape")),
    "size": Kind(0.8, asker_of("size")),
    "where": Kind(1.2, asker_of("where")),
    "relation": Kind(1.2, ask_relation),
    "yes_no": Kind(1.5, ask_yes_no),
    "background": Kind(0.4, _ask_background),
    "describe": Kind(1.2, _ask_describe),
    "inventory": Kind(1.2, _ask_inventory),
}
# An inventory is taught only: one word in forty would make it wrong.
TESTED = tuple(kind for kind in KINDS if kind != "inventory")
