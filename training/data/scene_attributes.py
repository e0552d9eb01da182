"""Questions about one attribute of one object, and the follow-ups that call it "it"."""

from __future__ import annotations

import random
from collections.abc import Callable

from training.data.sample import Exchange, Language, Wordings, Words
from training.data.scene import COLOURS, SIZES, ZONES, Object, Scene, shape_name
from training.data.scene_words import Asked, article, describe_uniquely, place_answer

_ATTRIBUTE_QUESTIONS = {
    "colour": Wordings(
        ("{}是什么颜色的？", "{}是什么颜色？", "{}的颜色是什么？"),
        ("What colour is {}?", "What color is {}?", "What is the colour of {}?"),
    ),
    "shape": Wordings(
        ("{}是什么形状的？", "{}是什么形状？", "{}的形状是什么？"),
        ("What shape is {}?", "What is the shape of {}?", "Which shape does {} have?"),
    ),
    "size": Wordings(
        ("{}是大的还是小的？", "{}是大还是小？", "{}有多大？"),
        ("Is {} large or small?", "Is {} big or small?", "How large is {}?"),
    ),
    "where": Wordings(
        ("{}在哪里？", "{}在图片的哪里？", "{}在什么位置？"),
        ("Where is {}?", "Where is {} in the picture?", "In which part of the picture is {}?"),
    ),
}
_SHAPE_AT = {
    "left": Words("最左边是什么图形？", "What shape is on the far left?"),
    "right": Words("最右边是什么图形？", "What shape is on the far right?"),
    "up": Words("最上面是什么图形？", "What shape is at the very top?"),
    "down": Words("最下面是什么图形？", "What shape is at the very bottom?"),
}
_FOLLOW_UPS = {
    "colour": Wordings(
        ("它是什么颜色的？", "它是什么颜色？", "那它是什么颜色的？"),
        ("What colour is it?", "What color is it?", "And what colour is it?"),
    ),
    "shape": Wordings(
        ("它是什么形状的？", "它是什么形状？", "那它是什么形状的？"),
        ("What shape is it?", "Which shape does it have?", "And what shape is it?"),
    ),
    "size": Wordings(
        ("它是大的还是小的？", "它是大还是小？", "它有多大？"),
        ("Is it large or small?", "Is it big or small?", "How large is it?"),
    ),
    "where": Wordings(
        ("它在哪里？", "它在图片的哪里？", "它在什么位置？"),
        ("Where is it?", "Where is it in the picture?", "And where is it?"),
    ),
}
# So that all four come up about equally, though places are often unclear and sizes seldom told.
_FOLLOW_UP_WEIGHTS = {"colour": 1.0, "shape": 1.0, "size": 0.6, "where": 1.3}


def _attribute_answer(attribute: str, thing: Object, language: Language) -> str | None:
    """The sentence that tells the attribute, None where the place is not clear."""
    if attribute == "colour":
        colour = COLOURS[thing.colour]
        return f"它是{colour.zh}的。" if language == "zh" else f"It is {colour.en}."
    if attribute == "shape":
        name = shape_name(thing.shape, language)
        return f"它是{name}。" if language == "zh" else f"It is {article(name)} {name}."
    if attribute == "size":
        size = SIZES[thing.is_large]
        return f"它是{size.zh}。" if language == "zh" else f"It is {size.en}."
    zone = thing.zone()
    return None if zone is None else place_answer(ZONES[zone], language)


def asker_of(attribute: str) -> Callable[[Scene, random.Random, Language], Asked | None]:
    """The asker of questions about one attribute: colour, shape, size or where."""

    def asker(scene: Scene, rng: random.Random, language: Language) -> Asked | None:
        thing = rng.choice(scene.objects)
        answer = _attribute_answer(attribute, thing, language)
        description = describe_uniquely(scene, thing, rng, without=attribute)
        if answer is None or description is None:
            return None
        question = _ATTRIBUTE_QUESTIONS[attribute].choose(rng, language)
        question = question.format(description.definite(language))
        if attribute == "shape" and description.outermost and rng.random() < 0.5:
            question = _SHAPE_AT[description.outermost].said(language)
        return Asked(question, answer, thing, description.attributes() | {attribute})

    return asker


def follow_up_to(asked: Asked, rng: random.Random, language: Language) -> Exchange | None:
    """A question about "it", the object just spoken of."""
    if asked.about is None:
        return None
    answers = {
        attribute: answer
        for attribute in _FOLLOW_UPS
        if attribute not in asked.known
        and (answer := _attribute_answer(attribute, asked.about, language))
    }
    if not answers:
        return None
    attributes = tuple(answers)
    (attribute,) = rng.choices(attributes, [_FOLLOW_UP_WEIGHTS[name] for name in attributes])
    question = _FOLLOW_UPS[attribute].choose(rng, language)
    return Exchange(question, answers[attribute], "second_turn")
