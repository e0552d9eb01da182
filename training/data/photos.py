"""Pictures unlike those of the other tasks, and the answer that they are not known.

Photographs come from a folder that the caller names; without one, drawn pictures stand in for
them: colours that run into each other, blots and grain, with nothing to name in them.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from training.data import garments, texts
from training.data.sample import DataMissing, Exchange, Language, Sample, Words
from training.data.scene_questions import TESTED, ask
from training.data.scenes import invent

ANSWER = Words("对不起，我不知道这是什么。", "Sorry, I do not know what this is.")
NUM_HELD_OUT = 59  # photographs, the last of the sorted ones
_LARGEST = 224  # pixels a side
_DRAWN_SHARE = 0.3  # of the samples, where there are photographs as well


def photographs(folder: Path, *, held_out: bool = False) -> list[Path]:
    """The JPEG files in a folder and below it that are held out, or those that are not."""
    paths = sorted(folder.rglob("*.jpg"), key=lambda path: path.name)
    if len(paths) <= NUM_HELD_OUT:
        raise DataMissing(
            f"{folder} holds {len(paths)} photographs (*.jpg); {NUM_HELD_OUT} are held out, so it "
            "must hold more: name another folder, or none to do without photographs"
        )
    return paths[-NUM_HELD_OUT:] if held_out else paths[:-NUM_HELD_OUT]


class PhotoSource:
    """Draws photographs, cut and mirrored, and drawn pictures that are as unknown.

    paths: of the photographs; with none of them all pictures are drawn
    """

    task = "photos"

    def __init__(self, paths: Sequence[Path] = ()) -> None:
        self._paths = tuple(paths)
        self._loaded: dict[int, Image.Image] = {}

    def __len__(self) -> int:
        return len(self._paths)

    def draw(self, rng: random.Random, language: Language) -> Sample:
        """A changed photograph or a drawn picture, and some question about it."""
        if not self._paths or rng.random() < _DRAWN_SHARE:
            image = draw_unlike(rng)
        else:
            image = _changed(self._photograph(rng.randrange(len(self))), rng)
        return _declined(image, rng, language)

    def sample_of(self, index: int, rng: random.Random, language: Language) -> Sample:
        """Photograph `index`, unchanged, and some question about it."""
        return _declined(self._photograph(index).copy(), rng, language)

    def _photograph(self, index: int) -> Image.Image:
        """Kept after the first use: decoding takes longer than all the rest."""
        if index not in self._loaded:
            with Image.open(self._paths[index]) as file:
                image = file.convert("RGB")
            image.thumbnail((_LARGEST, _LARGEST))
            self._loaded[index] = image
        return self._loaded[index]


def any_question(rng: random.Random, language: Language) -> str:
    """A question that could be asked of a garment, a scene or a text."""
    sort = rng.randrange(3)
    if sort == 0:
        return garments.QUESTIONS.choose(rng, language)
    if sort == 1:
        return texts.QUESTIONS.choose(rng, language)
    asked: tuple[Exchange, ...] = ()
    while not asked:
        asked = ask(invent(rng), rng, language, 1, TESTED, 0)
    return asked[0].question


def draw_unlike(rng: random.Random) -> Image.Image:
    """Colours that run into each other, mostly with blots and grain."""
    side = rng.choice((2, 3, 4))
    image = _random_colours(side, rng).resize((32, 32), Image.Resampling.BICUBIC)
    if rng.random() < 0.7:
        _blot(image, rng)
    if rng.random() < 0.3:
        image = image.convert("L").convert("RGB")
    for detail, strongest in ((8, 0.3), (16, 0.25), (32, 0.15), (64, 0.1)):
        image = image.resize((2 * detail, 2 * detail), Image.Resampling.BICUBIC)
        grain = _random_colours(detail, rng).resize(image.size, Image.Resampling.BICUBIC)
        image = Image.blend(image, grain, rng.uniform(0, strongest))
    return image.resize((rng.randint(96, _LARGEST), rng.randint(96, _LARGEST)))


def _random_colours(side: int, rng: random.Random) -> Image.Image:
    return Image.frombytes("RGB", (side, side), rng.randbytes(3 * side * side))


def _blot(image: Image.Image, rng: random.Random) -> None:
    """Many overlapping ellipses, which the enlargement then blurs; changes the image."""
    draw = ImageDraw.Draw(image)
    for _ in range(rng.randint(6, 20)):
        x, y = rng.uniform(0, image.width), rng.uniform(0, image.height)
        across, down = rng.uniform(1, 8), rng.uniform(1, 8)
        red, green, blue = rng.randbytes(3)
        draw.ellipse((x - across, y - down, x + across, y + down), fill=(red, green, blue))


def _declined(image: Image.Image, rng: random.Random, language: Language) -> Sample:
    exchange = Exchange(any_question(rng, language), ANSWER.said(language), "unknown")
    return Sample(image, (exchange,), PhotoSource.task, language)


def _changed(image: Image.Image, rng: random.Random) -> Image.Image:
    """A part of it, of any size, at times mirrored, darker, lighter or grey."""
    width, height = (side * rng.uniform(0.5, 1) for side in image.size)
    left, top = rng.uniform(0, image.width - width), rng.uniform(0, image.height - height)
    scale = rng.uniform(0.4, 1)
    size = max(64, round(width * scale)), max(64, round(height * scale))
    part = image.resize(size, Image.Resampling.BILINEAR, (left, top, left + width, top + height))
    if rng.random() < 0.5:
        part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if rng.random() < 0.15:
        part = part.convert("L").convert("RGB")
    gain = rng.uniform(0.7, 1.3)
    return part.point([min(255, round(value * gain)) for value in range(256)] * 3)
