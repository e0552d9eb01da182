"""Workload: what each request asks. A request is a function of the seed and its number alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from glimt.bench.load.client import Ask
from glimt.bench.load.pictures import Size, data_url, draw_picture, file_url
from glimt.bench.load.texts import CountTokens, text_of_length, words


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Workload:
    """What is asked for.

    input_len:   tokens of the text where there is a tokenizer, else words; neither template nor
                 pictures count
    image_sizes, image_files: of pictures, taken by turns; drawn ones are all different
    text_share:  share of the requests that have no picture
    count_tokens: of the model's tokenizer; None: none was given
    """

    model: str
    is_chat: bool
    input_len: int
    output_len: int
    ignore_eos: bool
    temperature: float
    seed: int
    image_sizes: tuple[Size, ...] = ()
    image_files: tuple[Path, ...] = ()
    images_per_request: int = 1
    text_share: float = 0.0
    count_tokens: CountTokens | None = field(default=None, repr=False)

    def ask(self, number: int) -> Ask:
        """Request `number`, from 0; negative ones warm up. Raises ConfigError for a lost file."""
        text = self._text(number)
        urls = self._urls(number)
        body = {
            "model": self.model,
            **self._prompt(text, urls),
            "max_tokens": self.output_len,
            "temperature": self.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
            **({"ignore_eos": True} if self.ignore_eos else {}),
        }
        own = self.count_tokens(text) if self.count_tokens else None
        return Ask(number, json.dumps(body).encode(), len(urls), own)

    @property
    def has_images(self) -> bool:
        """Whether any request shows a picture."""
        return bool(self.image_sizes or self.image_files) and self.text_share < 1

    def as_dict(self) -> dict[str, Any]:
        """The settings as plain data, for JSON."""
        return {
            "input_len": self.input_len,
            "input_len_unit": "tokens" if self.count_tokens else "words",
            "output_len": self.output_len,
            "ignore_eos": self.ignore_eos,
            "temperature": self.temperature,
            "seed": self.seed,
            "image_sizes": [str(size) for size in self.image_sizes],
            "num_image_files": len(self.image_files),
            "images_per_request": self.images_per_request if self.has_images else 0,
            "text_share": self.text_share,
        }

    def _text(self, number: int) -> str:
        seed = f"{self.seed} text {number}"
        if self.count_tokens:
            return text_of_length(self.input_len, seed, self.count_tokens)
        return words(self.input_len, seed)

    def _urls(self, number: int) -> list[str]:
        if not self.has_images or is_text_only(number, self.text_share):
            return []
        first = number * self.images_per_request
        return [self._url(first + i) for i in range(self.images_per_request)]

    def _url(self, number: int) -> str:
        if self.image_files:
            return file_url(self.image_files[number % len(self.image_files)])
        size = self.image_sizes[number % len(self.image_sizes)]
        return data_url(draw_picture(size, f"{self.seed} picture {number}"), "jpeg")

    def _prompt(self, text: str, urls: Sequence[str]) -> dict[str, Any]:
        if not self.is_chat:
            return {"prompt": text}
        parts: list[dict[str, Any]] = [
            {"type": "image_url", "image_url": {"url": url}} for url in urls
        ]
        content = [*parts, {"type": "text", "text": text}] if parts else text
        return {"messages": [{"role": "user", "content": content}]}


def is_text_only(number: int, share: float) -> bool:
    """Whether a request is one of the share without a picture: spread evenly, never by chance."""
    return int((number + 1) * share + 1e-9) > int(number * share + 1e-9)
