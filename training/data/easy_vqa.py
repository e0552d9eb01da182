"""easy-VQA: one shape in 64 x 64 pixels, and questions in English that we also put in Chinese.

Data: Victor Zhou's easy-vqa 1.0 (PyPI, MIT). Their rectangle may be what scenes call a square, so
they are asked after in other words: 形状 here, 图形 there; "shape" here, "object" there.
"""

from __future__ import annotations

import importlib.util
import json
import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from training.data.sample import YES_NO, DataMissing, Exchange, Language, Sample, Words

SHAPES = {
    "circle": Words("圆形", "circle"),
    "rectangle": Words("矩形", "rectangle"),
    "triangle": Words("三角形", "triangle"),
}
COLOURS = {
    "black": Words("黑色", "black"),
    "blue": Words("蓝色", "blue"),
    "brown": Words("棕色", "brown"),
    "gray": Words("灰色", "gray"),
    "green": Words("绿色", "green"),
    "red": Words("红色", "red"),
    "teal": Words("青色", "teal"),
    "yellow": Words("黄色", "yellow"),
}
# All their question forms. {} is "shape", "circle" ..., "red shape" ...; never two of these.
_RENDERINGS = (
    (r"what color is the (.+)\?", "{}是什么颜色？"),
    (r"what is the color of the (.+)\?", "{}的颜色是什么？"),
    (r"what is the (.+ shape)\?", "{}是什么？"),
    (r"what shape is in the image\?", "图片里是什么形状？"),
    (r"what shape does the image contain\?", "图片包含什么形状？"),
    (r"what shape is present\?", "有什么形状？"),
    (r"is there an? (.+) in the image\?", "图片里有{}吗？"),
    (r"is there an? (.+)\?", "有{}吗？"),
    (r"is an? (.+) present\?", "存在{}吗？"),
    (r"does the image contain an? (.+)\?", "图片包含{}吗？"),
    (r"is there not an? (.+) in the image\?", "图片里没有{}吗？"),
    (r"is there not an? (.+)\?", "没有{}吗？"),
    (r"is no (.+) present\?", "不存在{}吗？"),
    (r"does the image not contain an? (.+)\?", "图片不包含{}吗？"),
)
_MOST_ASKED = 6  # questions per picture


class _Asked(NamedTuple):
    """A question and a one-word answer, as shipped."""

    question: str
    answer: str


class EasyVqaSource:
    """Draws the pictures of easy-vqa's own train or test part.

    folder: the package's `data`; None finds it where pip installed it
    Raises DataMissing when it is not there.
    """

    task = "easy_vqa"

    def __init__(self, folder: Path | None = None, *, held_out: bool = False) -> None:
        self._folder = (folder or find_data()) / ("test" if held_out else "train")
        self._asked = _read_questions(self._folder / "questions.json")
        self._numbers = tuple(self._asked)

    def draw(self, rng: random.Random, language: Language) -> Sample:
        """A picture drawn by chance, and some of its questions."""
        number = rng.choice(self._numbers)
        asked = self._asked[number]
        chosen = rng.sample(asked, min(len(asked), _MOST_ASKED))
        with Image.open(self._folder / "images" / f"{number}.png") as file:
            image = file.convert("RGB")
        exchanges = tuple(_exchange(*one, language) for one in chosen)
        return Sample(image, exchanges, self.task, language)


def find_data() -> Path:
    """The data folder of the installed package, found without importing it."""
    spec = importlib.util.find_spec("easy_vqa")
    if spec is None or not spec.submodule_search_locations:
        raise DataMissing("the package easy-vqa is not installed: pip install easy-vqa")
    return Path(spec.submodule_search_locations[0]) / "data"


def in_chinese(question: str) -> str:
    """One of their questions in Chinese; raises ValueError for a form that is not theirs."""
    for pattern, rendering in _RENDERINGS:
        if match := re.fullmatch(pattern, question):
            return rendering.format(*map(_thing_in_chinese, match.groups()))
    raise ValueError(f"not a question of easy-vqa: {question!r}")


def _thing_in_chinese(thing: str) -> str:
    """A shape by its name, or by its colour, or as such."""
    if thing in SHAPES:
        return SHAPES[thing].zh
    return "这个形状" if thing == "shape" else f"{COLOURS[thing.removesuffix(' shape')].zh}的形状"


def _exchange(question: str, answer: str, language: Language) -> Exchange:
    asked = in_chinese(question) if language == "zh" else question
    if answer in ("yes", "no"):
        return Exchange(asked, YES_NO[answer == "yes"].said(language), "yes_no")
    if answer in SHAPES:
        shape = SHAPES[answer]
        return Exchange(
            asked, Words(f"它是{shape.zh}。", f"It is a {shape.en}.").said(language), "shape"
        )
    colour = COLOURS[answer]
    return Exchange(
        asked, Words(f"它是{colour.zh}的。", f"It is {colour.en}.").said(language), "colour"
    )


def _read_questions(path: Path) -> Mapping[int, Sequence[_Asked]]:
    """The questions of each picture, without those asked twice."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataMissing(f"{path} is not there: pip install easy-vqa") from error
    asked: dict[int, dict[str, _Asked]] = {}
    for question, answer, number in rows:
        asked.setdefault(number, {})[question] = _Asked(question, answer)
    return {number: tuple(by_question.values()) for number, by_question in asked.items()}
