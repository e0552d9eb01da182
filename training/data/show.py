"""A contact sheet of samples to look at: `python -m training.data.show sheet.png`.

Pictures are shown as the models see them, squashed to a small square, and twice as large as that.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer
from PIL import Image, ImageDraw, ImageFont

from training.configs import IMAGE_SIZE
from training.data.mixture import held_out_questions, training_mixtures
from training.data.sample import Exchange, Sample
from training.data.texts import FONT

SEEN_SIDE = IMAGE_SIZE
_SHOWN_SIDE = 2 * SEEN_SIDE
_CELL = (720, _SHOWN_SIDE + 16)
_TEXT_SIZE, _LINE_HEIGHT = 15, 20


def contact_sheet(samples: Sequence[Sample], num_columns: int = 2) -> Image.Image:
    """All samples on one picture, each with its questions and answers beside it."""
    num_rows = -(-len(samples) // num_columns)
    sheet = Image.new("RGB", (_CELL[0] * num_columns, _CELL[1] * num_rows), "white")
    font = ImageFont.truetype(str(FONT), _TEXT_SIZE)
    for number, sample in enumerate(samples):
        row, column = divmod(number, num_columns)
        _put(sheet, sample, (column * _CELL[0] + 8, row * _CELL[1] + 8), font)
    return sheet


def _put(
    sheet: Image.Image,
    sample: Sample,
    corner: tuple[int, int],
    font: ImageFont.FreeTypeFont,
) -> None:
    left, top = corner
    draw = ImageDraw.Draw(sheet)
    size = "no picture"
    if sample.image is not None:
        size = f"{sample.image.width} x {sample.image.height}"
        seen = sample.image.resize((SEEN_SIDE, SEEN_SIDE), Image.Resampling.BICUBIC)
        shown = seen.resize((_SHOWN_SIDE, _SHOWN_SIDE), Image.Resampling.NEAREST)
        sheet.paste(shown, corner)
    lines = [f"[{sample.task}, {size}]"]
    lines += [line for exchange in sample.exchanges for line in _lines(exchange, "")]
    for number, line in enumerate(lines[: _SHOWN_SIDE // _LINE_HEIGHT]):
        place = (left + _SHOWN_SIDE + 10, top + number * _LINE_HEIGHT)
        draw.text(place, line, fill="black", font=font)


def _lines(exchange: Exchange, indent: str) -> Iterator[str]:
    yield f"{indent}{exchange.question} {exchange.answer}"
    if exchange.follow_up:
        yield from _lines(exchange.follow_up, indent + "    ")


def main(
    path: Annotated[Path, typer.Argument(help="The PNG file to write.")],
    count: Annotated[int, typer.Option(help="How many samples.")] = 24,
    seed: Annotated[int, typer.Option(help="Another seed, other samples.")] = 0,
    held_out: Annotated[str, typer.Option(help="A task whose held-out questions to show.")] = "",
    photos: Annotated[Path | None, typer.Option(help="Folder of photographs.")] = None,
) -> None:
    """Write a contact sheet of the training mixture, or of held-out questions."""
    if held_out:
        samples = list(held_out_questions(held_out, count, seed, photos=photos))
    else:
        mixture, rng = training_mixtures(photos=photos).conversations, random.Random(seed)
        samples = [mixture.draw(rng) for _ in range(count)]
    contact_sheet(samples).save(path)
    typer.echo(f"{path}: {len(samples)} samples")


if __name__ == "__main__":
    typer.run(main)
