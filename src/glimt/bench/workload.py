"""What a bench asks: prompts of an exact number of tokens, and pictures that nobody has seen.

Works with any family and tokenizer, because it only tries what they make of a text. Knows no clock
and no table.
"""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
from PIL import Image

from glimt.engine import Engine
from glimt.errors import ConfigError
from glimt.inputs.image import decode_image, open_image
from glimt.inputs.request import RequestOptions
from glimt.models.base import Tokenizer
from glimt.types import ImagePart, Message, Request, SamplingParams, TextPart

RANDOM = "random"
SIDE = 1120  # pixels of a random picture: what GLM-4v's tower takes
_PIECES = 512  # different single-token texts that prompts are made of
_MAX_DRAWS = 6000  # of candidates for them
_MAX_TRIES = 500  # to make a prompt's length exact
LANGUAGE = "zh"  # one template for all: "auto" would change its length with the text


class Workload:
    """Makes requests for one engine, the same ones for the same seed and the same name.

    image: RANDOM: noise, a new one each time; a file: this picture with one pixel changed each
        time, so that no cache knows it; None: text alone
    Raises ImageError for a file that is no picture, RequestError for a family without a tower.
    """

    def __init__(self, engine: Engine, seed: int, image: str | None = None) -> None:
        self.engine = engine
        self._processor = engine.inputs.processor
        self._seed = seed
        self._random = random.Random(seed)
        self._is_random = image == RANDOM
        self._picture = None if image is None else self._open(image)
        self._pieces: list[str] = []
        self._least: int | None = None
        self.image_tokens = 0
        if self._picture is not None:
            self.image_tokens = self._processor.image_cost(*self._picture.size)

    def begin(self, name: str) -> None:
        """Draw anew: what follows depends on the seed and this name, not on what was drawn before.

        A row that is measured after a stop asks what it would have asked without.
        """
        self._random = random.Random(f"{self._seed} {name}")

    # --- requests ---

    def request(self, num_tokens: int, num_outputs: int) -> Request:
        """A prompt of so many tokens, template included and picture excluded.

        It is answered with exactly num_outputs tokens. Raises ConfigError, as `text` does, and
        PromptTooLong where the context ends before.
        """
        request = self.ask(self.text(num_tokens), num_outputs, self.picture(), LANGUAGE)
        found = len(request.prompt.token_ids) - self.image_tokens
        assert found == num_tokens, f"{found} tokens where {num_tokens} were counted"
        return request

    def ask(
        self, text: str, num_outputs: int, picture: Image.Image | None, language: str = "auto"
    ) -> Request:
        """A text, about a picture if there is one; the likeliest tokens, past any end."""
        shown = [] if picture is None else [{"type": "image", "image": picture}]
        content = [*shown, {"type": "text", "text": text}]
        sampling = SamplingParams(temperature=0, max_tokens=num_outputs, ignore_eos=True)
        options = RequestOptions(language=language)
        return self.engine.prepare_chat([{"role": "user", "content": content}], sampling, options)

    # --- texts ---

    @property
    def least_tokens(self) -> int:
        """Of the shortest prompt: the template and one token."""
        if self._least is None:
            self._least = min(self._count(piece) for piece in self._known_pieces()[:16])
        return self._least

    def text(self, num_tokens: int) -> str:
        """Random text that makes a prompt of so many tokens; whole pieces are added or taken away.

        Two pieces may join to one token where they meet, so the length is tried, not computed.
        Raises ConfigError, naming the least, for a length below the template's.
        """
        self.check_length(num_tokens)
        pieces = self._draw(1)
        for _ in range(_MAX_TRIES):
            lack = num_tokens - self._count("".join(pieces))
            if lack == 0:
                return "".join(pieces)
            pieces = pieces[:lack] if lack < 0 else [*pieces, *self._draw(lack)]
            pieces = pieces or self._draw(1)
        said = f"is {num_tokens}, and no text of exactly that length was found"
        raise ConfigError("input", [f"{said} in {_MAX_TRIES} tries; ask for another length"])

    def check_length(self, num_tokens: int) -> None:
        """Raise ConfigError, naming the least, for a length below the template's."""
        if num_tokens < (least := self.least_tokens):
            said = f"is {num_tokens}, but the prompt template and one token of text take {least}"
            raise ConfigError("input", [f"{said}; ask for {least} or more"])

    def num_text_tokens(self, text: str) -> int:
        """Tokens of a text without the chat template, with what the family puts around a text."""
        return len(self._processor.encode_text(text).token_ids)

    def _count(self, text: str) -> int:
        """Prompt tokens with this text, picture excluded; no picture is opened for it."""
        shown = () if self._picture is None else (ImagePart(None),)
        sizes = () if self._picture is None else (self._picture.size,)
        message = Message("user", (*shown, TextPart(text)))
        prompt = self._processor.encode_chat([message], sizes, LANGUAGE)
        return len(prompt.token_ids) - self.image_tokens

    def _draw(self, count: int) -> list[str]:
        return self._random.choices(self._known_pieces(), k=count)

    def _known_pieces(self) -> list[str]:
        if not self._pieces:
            drawn = random.Random(self._seed)
            self._pieces = single_token_pieces(self._processor.tokenizer, drawn)
        return self._pieces

    # --- pictures ---

    def picture(self) -> Image.Image | None:
        """A picture whose features no cache has; None for a workload of text alone."""
        if self._picture is None:
            return None
        drawn = np.random.default_rng(self._random.getrandbits(32))
        if self._is_random:
            return Image.fromarray(drawn.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8))
        changed = self._picture.copy()
        place = int(drawn.integers(changed.width)), int(drawn.integers(changed.height))
        red, green, blue = (int(value) for value in drawn.integers(0, 256, 3))
        changed.putpixel(place, (red, green, blue))
        return changed

    def _open(self, image: str) -> Image.Image:
        if self._is_random:
            return Image.new("RGB", (SIDE, SIDE))  # its size is all that is asked of it
        limits = self.engine.inputs.image_limits
        opened = open_image(Path(image).expanduser(), limits, allow_files=True, field="image")
        return decode_image(opened).rgb


def single_token_pieces(tokenizer: Tokenizer, drawn: random.Random) -> list[str]:
    """Random texts that are one token each, beside another as well.

    Raises ConfigError for a tokenizer in which none was found.
    """
    found: dict[str, None] = {}
    for _ in range(_MAX_DRAWS):
        for text in (
            tokenizer.decode([drawn.randrange(tokenizer.num_ids)]),
            chr(drawn.randrange(0x4E00, 0x9FA5)),  # Chinese: a token each in many vocabularies
        ):
            if _is_piece(text, tokenizer):
                found[text] = None
        if len(found) >= _PIECES:
            break
    if not found:
        raise ConfigError("tokenizer", ["has no text that is one token; no prompt can be made"])
    return list(found)


def _is_piece(text: str, tokenizer: Tokenizer) -> bool:
    if not text.strip() or not text.isprintable() or "\ufffd" in text:
        return False
    return len(tokenizer.encode(text + text)) == 2
