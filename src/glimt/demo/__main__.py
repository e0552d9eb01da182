"""`python -m glimt.demo`: both families answer about the example pictures, with random weights.

Until trained demo models exist this shows the whole path, from the picture to the words, on a
seeded random checkpoint with a toy tokenizer; the words are noise, and it says so.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw
from rich.console import Console

from glimt.demo.noise import FAMILIES, write_noise_model
from glimt.llm import LLM
from glimt.types import RequestOutput, SamplingParams

QUESTIONS = ("图片里是什么？", "What is in the picture?")


def main(paths: Sequence[str]) -> None:
    """Ask both families both questions about each picture; a drawn one without any path."""
    console = Console(highlight=False)
    console.print("[bold]The weights are random, so the words below are noise.[/bold]")
    console.print("Everything else is real: tokenizer, picture tower, paged cache, sampling.\n")
    pictures: Sequence[str | Image.Image] = paths or [_drawn_picture()]
    for family in FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            write_noise_model(Path(folder), family)
            llm = LLM(folder)
            for picture in pictures:
                for question in QUESTIONS:
                    _show(console, family, picture, question, _ask(llm, picture, question))


def _drawn_picture() -> Image.Image:
    """A red circle on white."""
    image = Image.new("RGB", (320, 240), "white")
    ImageDraw.Draw(image).ellipse((100, 60, 220, 180), fill="red")
    return image


def _ask(llm: LLM, picture: str | Image.Image, question: str) -> RequestOutput:
    parts = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
    sampling = SamplingParams(max_tokens=24, seed=1, ignore_eos=True)
    return llm.chat([{"role": "user", "content": parts}], sampling)


def _show(
    console: Console,
    family: str,
    picture: str | Image.Image,
    question: str,
    output: RequestOutput,
) -> None:
    name = picture if isinstance(picture, str) else "a red circle, drawn here"
    times = output.timings
    decoded = output.usage.completion_tokens - 1
    console.print(f"[bold]{family}[/bold]  {name}", soft_wrap=True)
    console.print(f"  Q  {question}")
    console.print("  A  ", end="")
    console.print(" ".join(output.text.split()), markup=False, soft_wrap=True)
    console.print(
        f"  picture {times.image_s:.3f} s, first token {times.ttft_s:.3f} s, "
        f"{decoded / max(times.decode_s, 1e-9):.0f} tokens/s\n",
        style="dim",
    )


if __name__ == "__main__":
    main(sys.argv[1:])
