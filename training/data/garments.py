"""Garments: photographs of Fashion-MNIST, white on black, and the question what they show.

Fashion-MNIST (Xiao, Rasul, Vollgraf, arXiv 1708.07747; MIT) as Debian's dataset-fashion-mnist
ships it. The 60,000 pictures train, the 10,000 of t10k are held out.
"""

from __future__ import annotations

import gzip
import math
import random
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from training.data.sample import DataMissing, Exchange, Language, Sample, Wordings, Words

FASHION_FOLDER = Path("/usr/share/datasets/fashion-mnist")
SIDE = 28  # pixels, as shipped

# In the order of the labels 0 to 9; shoes come one by one, not in pairs.
NAMES = (
    Words("一件T恤", "a T-shirt"),
    Words("一条裤子", "trousers"),
    Words("一件套头衫", "a pullover"),
    Words("一条连衣裙", "a dress"),
    Words("一件外套", "a coat"),
    Words("一只凉鞋", "a sandal"),
    Words("一件衬衫", "a shirt"),
    Words("一只运动鞋", "a sneaker"),
    Words("一个包", "a bag"),
    Words("一只短靴", "an ankle boot"),
)
ANSWER = Words("图片里是{}。", "The picture shows {}.")
QUESTIONS = Wordings(
    zh=(
        "图片里是什么？",
        "图里是什么？",
        "这是什么？",
        "图片里有什么？",
        "这张图片里是什么？",
        "图中是什么东西？",
        "照片里是什么？",
        "这是什么衣物？",
        "图片里是哪种衣物？",
        "请说出图片里的衣物。",
    ),
    en=(
        "What is in the picture?",
        "What is this?",
        "What does the picture show?",
        "What can you see in the picture?",
        "What is shown here?",
        "What item is this?",
        "What garment is this?",
        "What kind of clothing is this?",
        "Which garment is in the picture?",
        "Name the garment in the picture.",
    ),
)

_FILTERS = (
    Image.Resampling.NEAREST,
    Image.Resampling.BILINEAR,
    Image.Resampling.BICUBIC,
)
_LARGEST = 224  # pixels a side
_WORKING_SIDE = 96  # affine maps are slow, so they work here and the result is enlarged


class GarmentSource:
    """Draws garments: trained on with mild changes, or held out and merely enlarged.

    Raises DataMissing when the files of Fashion-MNIST are not in the folder.
    """

    task = "garments"

    def __init__(self, folder: Path = FASHION_FOLDER, *, held_out: bool = False) -> None:
        self._pixels, self._labels = _read_fashion(folder, "t10k" if held_out else "train")
        self._is_changed = not held_out

    def __len__(self) -> int:
        return len(self._labels)

    def label_of(self, index: int) -> int:
        """Which of NAMES picture `index` shows."""
        return int(self._labels[index])

    def picture(self, rng: random.Random) -> tuple[Image.Image, int]:
        """A picture and its label, for a classification loss."""
        index = rng.randrange(len(self))
        return self._enlarged(index, rng), self.label_of(index)

    def draw(self, rng: random.Random, language: Language) -> Sample:
        """A garment drawn by chance, and what it is."""
        return self.sample_of(rng.randrange(len(self)), rng, language)

    def sample_of(self, index: int, rng: random.Random, language: Language) -> Sample:
        """Garment `index`, and what it is."""
        label = self.label_of(index)
        answer = answer_of(label, language)
        exchange = Exchange(QUESTIONS.choose(rng, language), answer, "garment")
        return Sample(self._enlarged(index, rng), (exchange,), self.task, language, label)

    def _enlarged(self, index: int, rng: random.Random) -> Image.Image:
        image = Image.fromarray(self._pixels[index])
        side = rng.choice((SIDE, rng.randint(SIDE, _LARGEST)))
        resample = rng.choice(_FILTERS)
        if self._is_changed:
            image = _changed(image, rng, min(side, _WORKING_SIDE), resample)
        image = image.resize((side, side), resample)
        if self._is_changed and rng.random() < 0.2:
            image = _pasted(image, rng)
        return image.convert("RGB")


def answer_of(label: int, language: Language) -> str:
    """The sentence that names a garment."""
    return ANSWER.said(language).format(NAMES[label].said(language))


def _changed(
    image: Image.Image, rng: random.Random, side: int, resample: Image.Resampling
) -> Image.Image:
    """Mirrored, brighter or darker, and mostly turned, scaled and shifted a little."""
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    gain = rng.uniform(0.75, 1.2)
    image = image.point([min(255, round(value * gain)) for value in range(256)])
    if rng.random() < 0.3:
        return image
    return image.transform((side, side), Image.Transform.AFFINE, _affine(rng, side), resample)


def _affine(rng: random.Random, side: int) -> tuple[float, ...]:
    """From pixels of a `side` wide result to pixels of the original, both about the middle."""
    angle = math.radians(rng.uniform(-8, 8))
    step = SIDE / side / rng.uniform(0.85, 1.1)
    cos, sin = step * math.cos(angle), step * math.sin(angle)
    half = side / 2
    left = SIDE / 2 + rng.uniform(-2, 2) - half * (cos - sin)
    top = SIDE / 2 + rng.uniform(-2, 2) - half * (sin + cos)
    return cos, -sin, left, sin, cos, top


def _pasted(image: Image.Image, rng: random.Random) -> Image.Image:
    """Small somewhere on a black canvas."""
    width, height = (round(image.width * rng.uniform(1.1, 1.8)) for _ in range(2))
    canvas = Image.new("L", (width, height))
    place = rng.randint(0, width - image.width), rng.randint(0, height - image.height)
    canvas.paste(image, place)
    return canvas


def _read_fashion(folder: Path, part: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Pixels [num_pictures, 28, 28] and labels [num_pictures] of one part."""
    pixels = _read_idx(folder / f"{part}-images-idx3-ubyte.gz", header_bytes=16)
    labels = _read_idx(folder / f"{part}-labels-idx1-ubyte.gz", header_bytes=8)
    return pixels.reshape(len(labels), SIDE, SIDE), labels


def _read_idx(path: Path, *, header_bytes: int) -> NDArray[np.uint8]:
    """The bytes after the header (format: the end of yann.lecun.com/exdb/mnist)."""
    try:
        with gzip.open(path) as file:
            return np.frombuffer(file.read(), np.uint8, offset=header_bytes)
    except FileNotFoundError as error:
        raise DataMissing(
            f"{path} is not there; on Debian: apt-get install dataset-fashion-mnist"
        ) from error
