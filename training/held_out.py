"""Writes the held-out questions for `glimt evaluate`: `python -m training.held_out DIR`.

The same seed writes the same folder: questions of garments (t10k of Fashion-MNIST), drawn scenes,
yes or no (half of them easy-vqa's test part), texts, second turns, and photographs to decline.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from PIL import Image
from rich.progress import track

from glimt.evaluate.questions import FILE
from training.data.mixture import held_out_questions
from training.data.sample import Sample

TASKS = ("garments", "scenes", "yes_no", "texts", "second_turns", "photos")
SEED = 1


def tasks_with(photos: Path | None) -> list[str]:
    """The tasks that can be asked about: photographs only if there are some."""
    return [task for task in TASKS if photos or task != "photos"]


def write(folder: Path, count: int, photos: Path | None) -> None:
    """`count` questions per task, half of them in each language; photographs only if given."""
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps(row, ensure_ascii=False)
        for task in track(tasks_with(photos), "drawing questions")
        for row in _rows(folder, task, count, photos)
    ]
    (folder / FILE).write_text("\n".join(lines) + "\n", encoding="utf-8")


def _rows(folder: Path, task: str, count: int, photos: Path | None) -> Iterator[dict[str, Any]]:
    for number, sample in enumerate(held_out_questions(task, count, SEED, photos=photos)):
        exchange = sample.exchanges[0]
        yield {
            "id": f"{task}-{number}",
            "task": task,
            "language": sample.language,
            "messages": _messages(sample, folder),
            "answer": (exchange.follow_up or exchange).answer,
        }


def _messages(sample: Sample, folder: Path) -> list[dict[str, Any]]:
    """A conversation that ends with the question; a second turn stands on the right first answer,
    so that only it is judged.
    """
    exchange = sample.exchanges[0]
    parts: list[dict[str, str]] = [{"type": "text", "text": exchange.question}]
    if sample.image is not None:
        parts.insert(0, {"type": "image", "image": _saved(sample.image, folder)})
    messages: list[dict[str, Any]] = [{"role": "user", "content": parts}]
    if exchange.follow_up:
        messages.append({"role": "assistant", "content": exchange.answer})
        messages.append({"role": "user", "content": exchange.follow_up.question})
    return messages


def _saved(image: Image.Image, folder: Path) -> str:
    """Path of the picture's file, relative to the folder; one file for equal pictures."""
    name = hashlib.sha256(repr(image.size).encode() + image.tobytes()).hexdigest()[:20]
    path = folder / "pictures" / f"{name}.png"
    if not path.exists():
        image.save(path)
    return str(path.relative_to(folder))


def main(
    folder: Annotated[Path, typer.Argument(help="Written to; may exist.")],
    count: Annotated[int, typer.Option(help="Questions per task, half in each language.")] = 2000,
    photos: Annotated[Path | None, typer.Option(help="Folder of photographs to decline.")] = None,
) -> None:
    """Write questions.jsonl and pictures/."""
    write(folder, count, photos)


if __name__ == "__main__":
    typer.run(main)
