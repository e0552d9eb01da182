"""Pictures named on a command line: read and tried at once, so that a bad one is told at once."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from glimt.config import ImageLimits
from glimt.inputs.image import OpenedImage, decode_image, open_image

_URL = re.compile(r"(data:|[a-z][a-z0-9+.-]*://)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture that is known to be good.

    given:   its path as the user wrote it
    content: the encoded file, kept so that a file that changes does not change the conversation
    """

    given: str
    content: bytes = field(repr=False)
    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.given} ({self.width} x {self.height})"


def read_picture(given: str, limits: ImageLimits) -> Picture:
    """Read and decode a picture file or a data URL. Raises ImageError naming it."""
    name = f"image {given[:80]!r}"
    opened = open_image(_source(given), limits, allow_files=True, field=name)
    decode_image(opened)  # a file that was cut off has a perfect header
    return Picture(given, _content(opened), opened.width, opened.height)


def _source(given: str) -> str | os.PathLike[str]:
    """A path, unless it begins like a URL: a mistyped path is not worth trying as base64."""
    return given if _URL.match(given) else Path(given).expanduser()


def _content(opened: OpenedImage) -> bytes:
    assert isinstance(opened.content, bytes), "a file is opened as its bytes"
    return opened.content
