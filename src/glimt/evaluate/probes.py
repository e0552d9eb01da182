"""Probes: pictures with a question, of which two settings are asked alike. Knows no model.

A stored reference holds its probes, so whoever checks against it needs nothing else.
"""

from __future__ import annotations

import io
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, cycle
from pathlib import Path

from PIL import Image, ImageDraw

from glimt.evaluate.pictures import list_pictures
from glimt.types import ImagePart, Message, TextPart

QUESTIONS = (
    "图片里有什么？",
    "What is in the picture?",
    "描述这张图片。",
    "Describe this picture.",
)
_TEXTS = ("你好，{}", "Hello, {}. Who are you?", "{} 加一等于几？", "Count to {}.")
_TEXT_EVERY = 8  # of so many drawn probes one has no picture


@dataclass(frozen=True, slots=True)
class Probe:
    """One question.

    images: encoded files
    """

    name: str
    images: tuple[bytes, ...]
    text: str

    @property
    def messages(self) -> tuple[Message, ...]:
        """The conversation to send."""
        shown = [ImagePart(image) for image in self.images]
        return (Message("user", (*shown, TextPart(self.text))),)


def drawn_probes(seed: int) -> Iterator[Probe]:
    """Without end: shapes on a plain ground, of many sizes, asked about in both languages."""
    chance = random.Random(seed)
    questions, texts = cycle(QUESTIONS), cycle(_TEXTS)
    for number in count():
        if number % _TEXT_EVERY == _TEXT_EVERY - 1:
            yield Probe(f"text {number}", (), next(texts).format(number))
        else:
            yield Probe(f"drawn {number}", (_drawn(chance),), next(questions))


def folder_probes(folder: Path, prompt: str | None) -> Iterator[Probe]:
    """Every picture of a folder by name; prompt: None asks QUESTIONS in turn.

    Raises ConfigError if there is none. Whether a picture can be read shows when it is asked about.
    """
    questions = cycle([prompt] if prompt else QUESTIONS)
    for path in map(Path, list_pictures(str(folder)).pictures):
        yield Probe(path.name, (path.read_bytes(),), next(questions))


# --- drawing ---------------------------------------------------------------------------------

_COLOURS = ("red", "green", "blue", "yellow", "orange", "purple", "black", "white")
_SHAPES = ("ellipse", "rectangle", "triangle", "line")


def _drawn(chance: random.Random) -> bytes:
    """One to three shapes; neither sides nor shapes are as a tower would like them."""
    size = chance.randint(48, 640), chance.randint(48, 640)
    image = Image.new("RGB", size, chance.choice(("white", "lightgray", "ivory")))
    draw = ImageDraw.Draw(image)
    for _ in range(chance.randint(1, 3)):
        _draw_shape(draw, size, chance)
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def _draw_shape(draw: ImageDraw.ImageDraw, size: tuple[int, int], chance: random.Random) -> None:
    width, height = size
    side = chance.randint(min(size) // 5, min(size) // 2)
    x, y = chance.randint(0, width - side), chance.randint(0, height - side)
    box = (x, y, x + side, y + side)
    colour = chance.choice(_COLOURS)
    match chance.choice(_SHAPES):
        case "ellipse":
            draw.ellipse(box, fill=colour)
        case "rectangle":
            draw.rectangle(box, fill=colour)
        case "triangle":
            draw.polygon([(x, y + side), (x + side, y + side), (x + side // 2, y)], fill=colour)
        case _:
            draw.line(box, fill=colour, width=max(2, side // 10))
