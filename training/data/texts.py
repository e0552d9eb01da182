"""Short texts: digits, capital letters and 60 Chinese characters, set in one font.

The font is WenQuanYi Micro Hei (Debian fonts-wqy-microhei, Apache-2.0 or GPL-3 with exception).
Each character is to be a token of its own: nothing but looking tells what comes next.
"""

from __future__ import annotations

import random
import zlib
from functools import cache
from pathlib import Path

from PIL import Image, ImageChops, ImageDraw, ImageFont

from training.data.layout import character_kind
from training.data.sample import DataMissing, Exchange, Language, Sample, Wordings, Words

FONT = Path("/usr/share/fonts/truetype/wqy/wqy-microhei.ttc")
DIGITS = "0123456789"
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
HANZI = (
    "一二三四五六七八九十人大小天中国上下左右山水火木土日月田口心"
    "手马牛羊鱼花草东西南北春夏秋冬风雨雪云星你好我爱家门书文光明"
)
CHARACTERS = DIGITS + LETTERS + HANZI
# Without O and I, which only their neighbours tell from 0 and 1.
CODES = DIGITS + "ABCDEFGHJKLMNPQRSTUVWXYZ"

ANSWER = Words("写着“{}”。", 'It says "{}".')
QUESTIONS = Wordings(
    zh=(
        "图片里写着什么？",
        "图里写着什么？",
        "上面写着什么？",
        "图片里的文字是什么？",
        "写的是什么？",
        "这是什么字？",
        "请读出图片里的文字。",
        "图片里是什么？",
    ),
    en=(
        "What does the text say?",
        "What is written in the picture?",
        "What is written here?",
        "What text is in the picture?",
        "What does it say?",
        "Read the text.",
        "Read the text in the picture.",
        "What is in the picture?",
    ),
)

_ALPHABETS = (DIGITS, LETTERS, HANZI, CODES, CODES + HANZI)
_ALPHABET_WEIGHTS = (0.2, 0.2, 0.33, 0.14, 0.13)
_LENGTHS = (1, 2, 3, 4)
_TRAINING_WEIGHTS = (0.16, 0.23, 0.29, 0.32)
_HELD_OUT_WEIGHTS = (0.25, 0.25, 0.25, 0.25)

_EM_PIXELS = range(20, 65, 4)
# An em as a share of the picture's width: 19 to 35 of the models' 96 pixels. Digits and capitals
# are about half as wide as an em, so theirs begins higher.
_LARGEST_SHARE, _HANZI_SHARE, _LATIN_SHARE = 0.36, 0.2, 0.26
_WIDEST = 0.94  # share of the picture's width that a line fills at most
_ASPECTS = (0.8, 1.25)  # width over height
_MAX_ANGLE = 5  # degrees


class TextSource:
    """Draws short texts, of one to four characters.

    Texts of three characters and more are parted by a checksum, so that none that is held out is
    ever trained on; there are too few shorter ones for that.
    Raises DataMissing when the font is not there.
    """

    task = "texts"

    def __init__(self, font: Path = FONT, *, held_out: bool = False) -> None:
        if not font.is_file():
            raise DataMissing(f"{font} is not there; on Debian: apt-get install fonts-wqy-microhei")
        self._fonts = {em: ImageFont.truetype(str(font), em) for em in _EM_PIXELS}
        self._is_held_out = held_out

    def draw(self, rng: random.Random, language: Language) -> Sample:
        """A picture of a text, and what it says."""
        text = self._invent(rng)
        answer = ANSWER.said(language).format(text)
        exchange = Exchange(QUESTIONS.choose(rng, language), answer, "text")
        image, layout = self._render(text, rng)
        return Sample(image, (exchange,), self.task, language, layout=layout)

    def _invent(self, rng: random.Random) -> str:
        weights = _HELD_OUT_WEIGHTS if self._is_held_out else _TRAINING_WEIGHTS
        (length,) = rng.choices(_LENGTHS, weights)
        (alphabet,) = rng.choices(_ALPHABETS, _ALPHABET_WEIGHTS)
        while True:
            text = "".join(rng.choices(alphabet, k=length))
            is_ours = length < 3 or is_held_out(text) == self._is_held_out
            if is_ours and is_clear(text):
                return text

    def _render(self, text: str, rng: random.Random) -> tuple[Image.Image, Image.Image]:
        """The text somewhere in a picture of a size that leaves it legible, and the layout."""
        em = rng.choice(_EM_PIXELS)
        line, kinds = _line(text, self._fonts[em], rng)
        margin = em // 12
        size = _picture_size(line, em, margin, text.isascii(), rng)
        left = rng.randint(margin, size[0] - line.width - margin)
        top = rng.randint(margin, size[1] - line.height - margin)
        ink, paper = _inks(rng)
        image = Image.new("RGB", size, paper)
        image.paste(ink, (left, top), line)
        layout = Image.new("L", size)
        layout.paste(kinds, (left, top))
        return (_noisy(image, rng) if rng.random() < 0.5 else image), layout


def is_held_out(text: str) -> bool:
    """Is a text of three characters or more kept for the tests? One in ten is."""
    return zlib.crc32(text.encode()) % 10 == 0


def is_clear(text: str) -> bool:
    """Do the other characters tell O from 0? O stands among letters, 0 not among letters alone."""
    others = set(text) - {"O", "0"}
    if "O" in text:
        return bool(others)
    return "0" not in text or not others or not others <= set(LETTERS)


def _line(
    text: str, font: ImageFont.FreeTypeFont, rng: random.Random
) -> tuple[Image.Image, Image.Image]:
    """A mask that just holds the text, mostly turned a little, at times bold; its layout."""
    stroke = rng.choice((0, 0, int(font.size) // 32))
    left, top, right, bottom = font.getbbox(text, stroke_width=stroke)
    mask = Image.new("L", (round(right - left) + 2, round(bottom - top) + 2))
    draw = ImageDraw.Draw(mask)
    draw.text((1 - left, 1 - top), text, fill=255, font=font, stroke_width=stroke)
    kinds = _kinds(text, font, 1 - left, mask.size)
    if rng.random() < 0.3:
        return mask, kinds
    angle = rng.uniform(-_MAX_ANGLE, _MAX_ANGLE)
    turned = mask.rotate(angle, Image.Resampling.BILINEAR, expand=True)
    box = turned.getbbox()
    return turned.crop(box), kinds.rotate(angle, expand=True).crop(box)


def _kinds(
    text: str, font: ImageFont.FreeTypeFont, start: float, size: tuple[int, int]
) -> Image.Image:
    """The layout of a line that is not turned: each character as wide as it moves the pen."""
    kinds = Image.new("L", size)
    draw = ImageDraw.Draw(kinds)
    for character in text:
        end = start + _advance(font, character)
        kind = character_kind(CHARACTERS.index(character))
        draw.rectangle((start, 0, end, size[1]), fill=kind)
        start = end
    return kinds


@cache
def _advance(font: ImageFont.FreeTypeFont, character: str) -> float:
    """Pixels by which a character moves the pen; asking the font takes longer than drawing."""
    return font.getlength(character)


def _picture_size(
    line: Image.Image, em: int, margin: int, is_latin: bool, rng: random.Random
) -> tuple[int, int]:
    """Width and height of a picture in which an em has the share it should have."""
    highest = min(_LARGEST_SHARE, _WIDEST * em / line.width)
    lowest = min(highest, _LATIN_SHARE if is_latin else _HANZI_SHARE)
    width = em / rng.uniform(lowest, highest)
    height = width / rng.uniform(*_ASPECTS)
    room = 2 * margin
    return max(line.width + room, round(width)), max(line.height + room, round(height))


_Colour = tuple[int, int, int]


def _inks(rng: random.Random) -> tuple[_Colour, _Colour]:
    """Ink and paper: dark on light, at times light on dark."""
    dark, light = _colour(rng, 0, 90), _colour(rng, 190, 255)
    return (dark, light) if rng.random() < 0.65 else (light, dark)


def _colour(rng: random.Random, lowest: int, highest: int) -> _Colour:
    if rng.random() < 0.5:
        grey = rng.randint(lowest, highest)
        return grey, grey, grey
    return rng.randint(lowest, highest), rng.randint(lowest, highest), rng.randint(lowest, highest)


def _noisy(image: Image.Image, rng: random.Random) -> Image.Image:
    """Every pixel a few grey levels lighter or darker."""
    strength = rng.randint(8, 30)
    grain = Image.frombytes("L", image.size, rng.randbytes(image.width * image.height))
    grain = grain.point([128 + (value - 128) * strength // 128 for value in range(256)])
    return ImageChops.add(image, Image.merge("RGB", (grain, grain, grain)), 1, -128)
