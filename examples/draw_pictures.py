"""Draws the example pictures of this folder and writes down what is asked about them.

usage, in the checkout: python -m examples.draw_pictures [FOLDER]

The same files come out every time. Scenes and texts are ours; the garments are pictures of
Fashion-MNIST's held-out part, enlarged, so that none was ever trained on. Questions and answers
are in the words that the demo models are taught; `questions.json` is what `python -m glimt.demo`
asks.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont
from training.data import garments, texts
from training.data.garments import GarmentSource
from training.data.sample import Words
from training.data.scene import Object, Scene
from training.data.scene_painting import paint

SIDE = 192  # pixels of a text or garment
LARGE, SMALL = 0.34, 0.18  # diameters, as shares of the shorter side


class Example(NamedTuple):
    """A picture, a question about it and the right answer."""

    image: Image.Image
    question: Words
    answer: Words


# --- scenes ----------------------------------------------------------------------------------

SCENES: Mapping[str, Scene] = {
    "shapes": Scene(
        288,
        216,
        "white",
        (
            Object("circle", "red", True, 0.24, 0.28, LARGE, 0),
            Object("square", "blue", True, 0.72, 0.3, LARGE, 0),
            Object("triangle", "green", True, 0.5, 0.76, LARGE, 0),
        ),
    ),
    "pair": Scene(
        256,
        216,
        "light yellow",
        (
            Object("star", "purple", True, 0.26, 0.52, LARGE, 0),
            Object("circle", "green", True, 0.74, 0.5, LARGE, 0),
        ),
    ),
    "stars": Scene(
        216,
        216,
        "light blue",
        (
            Object("star", "red", False, 0.2, 0.24, SMALL, 0),
            Object("star", "blue", False, 0.78, 0.3, SMALL, 0),
            Object("star", "black", False, 0.46, 0.76, SMALL, 0),
        ),
    ),
    "sizes": Scene(
        200,
        240,
        "light green",
        (
            Object("square", "orange", True, 0.3, 0.26, LARGE, 0),
            Object("circle", "blue", False, 0.72, 0.76, SMALL, 0),
        ),
    ),
    "four": Scene(
        240,
        200,
        "gray",
        (
            Object("circle", "blue", False, 0.2, 0.3, SMALL, 0),
            Object("square", "black", True, 0.5, 0.72, LARGE, 0),
            Object("circle", "blue", True, 0.78, 0.26, LARGE, 0),
            Object("triangle", "red", False, 0.16, 0.76, SMALL, 0),
        ),
    ),
}
ASKED_OF_SCENES: Mapping[str, tuple[Words, Words]] = {
    "shapes": (
        Words(
            "红色圆形在蓝色正方形的左边还是右边？",
            "Is the red circle to the left or to the right of the blue square?",
        ),
        Words("它在左边。", "It is on the left."),
    ),
    "pair": (
        Words("图片里有什么？", "What is in the picture?"),
        Words(
            "有一个紫色的五角星和一个绿色的圆形。",
            "There is a purple star and a green circle.",
        ),
    ),
    "stars": (
        Words("五角星有几个？", "Count the stars."),
        Words("有三个。", "There are three."),
    ),
    "sizes": (
        Words("请详细描述这张图片。", "Describe the picture in detail."),
        Words(
            "从上到下：一个大的橙色正方形在左上角；一个小的蓝色圆形在右下角。",
            "From top to bottom: a large orange square at the top left; "
            "a small blue circle at the bottom right.",
        ),
    ),
    "four": (
        Words("图片里有几个蓝色的圆形？", "How many blue circles are in the picture?"),
        Words("有两个。", "There are two."),
    ),
}


def _scenes() -> Iterator[tuple[str, Example]]:
    for name, scene in SCENES.items():
        image = paint(scene, random.Random(f"example {name}"))
        yield name, Example(image, *ASKED_OF_SCENES[name])


# --- texts -----------------------------------------------------------------------------------

# Held out in training, as texts.is_held_out tells of texts of three characters or more.
TEXTS: Mapping[str, str] = {"year": "2026", "letters": "GPU", "rain": "雨中花"}
_ASKED_OF_TEXTS = Words("图片里写着什么？", "What does the text say?")
_LATIN_EM, _HANZI_EM = 64, 48  # pixels: a character is a fifth to a quarter of the picture wide


def _texts() -> Iterator[tuple[str, Example]]:
    for name, text in TEXTS.items():
        em = _LATIN_EM if text.isascii() else _HANZI_EM
        font = ImageFont.truetype(str(texts.FONT), em)
        image = Image.new("RGB", (SIDE, SIDE), (250, 248, 240))
        draw = ImageDraw.Draw(image)
        draw.text((SIDE / 2, SIDE / 2), text, fill=(30, 34, 60), font=font, anchor="mm")
        answer = Words(*(said.format(text) for said in texts.ANSWER))
        yield name, Example(image, _ASKED_OF_TEXTS, answer)


# --- garments --------------------------------------------------------------------------------

GARMENTS: Mapping[str, int] = {"boot": 0, "trousers": 3, "dress": 13, "bag": 18}  # of t10k
_ASKED_OF_GARMENTS = Words("图片里是什么？", "What is in the picture?")


def _garments() -> Iterator[tuple[str, Example]]:
    source = GarmentSource(held_out=True)
    for name, index in GARMENTS.items():
        image = _as_shipped(source, index).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        label = source.label_of(index)
        answer = Words(garments.answer_of(label, "zh"), garments.answer_of(label, "en"))
        yield name, Example(image, _ASKED_OF_GARMENTS, answer)


def _as_shipped(source: GarmentSource, index: int) -> Image.Image:
    """Of the sizes that the source draws, the first that is the picture's own."""
    drawn = (source.sample_of(index, random.Random(seed), "en").image for seed in range(100))
    return next(image for image in drawn if image and image.width == garments.SIDE)


# --- a picture that is only shown --------------------------------------------------------------


def house() -> Image.Image:
    """A yellow house with a red roof under a sun: for the real models, not for the demo ones."""
    image = Image.new("RGB", (320, 240), (172, 216, 240))
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 180, 320, 240), fill=(112, 172, 84))
    draw.rectangle((90, 110, 230, 200), fill=(240, 208, 96))
    draw.polygon([(75, 112), (160, 50), (245, 112)], fill=(190, 50, 44))
    draw.rectangle((145, 150, 175, 200), fill=(110, 70, 40))
    draw.ellipse((250, 20, 300, 70), fill=(250, 200, 50))
    return image


def examples() -> dict[str, Example]:
    """Every example by its name, in the order in which they are asked."""
    return {**dict(_scenes()), **dict(_texts()), **dict(_garments())}


def main(folder: Path) -> None:
    """Write every picture as a PNG, and questions.json."""
    folder.mkdir(parents=True, exist_ok=True)
    house().save(folder / "house.png")
    rows = []
    for name, (image, question, answer) in examples().items():
        image.save(folder / f"{name}.png", optimize=True)
        said = {
            language: {"question": question.said(language), "answer": answer.said(language)}
            for language in ("zh", "en")
        }
        rows.append({"picture": f"{name}.png", **said})
    text = json.dumps(rows, ensure_ascii=False, indent=2)
    (folder / "questions.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
