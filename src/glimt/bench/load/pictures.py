"""Pictures to send: drawn in given sizes from a seed, or the files of a folder as they are."""

from __future__ import annotations

import base64
import io
import random
from dataclasses import dataclass
from pathlib import Path

from glimt.errors import ConfigError

_TYPES = {
    ".jpg": "jpeg",
    ".jpeg": "jpeg",
    ".png": "png",
    ".webp": "webp",
    ".gif": "gif",
    ".bmp": "bmp",
}
_QUALITY = 90
_MOST_PIXELS = 64 * 10**6


@dataclass(frozen=True, slots=True)
class Size:
    """Width and height in pixels."""

    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


def parse_size(text: str) -> Size:
    """Read "1120x1120". Raises ConfigError."""
    width, _, height = text.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        said = f"is {text!r}; a width and a height in pixels are needed, as in 1120x1120"
        raise ConfigError("image_size", [said])
    size = Size(int(width), int(height))
    if not (size.width and size.height and size.width * size.height <= _MOST_PIXELS):
        said = f"is {text}; both sides must be above 0, and their product at most {_MOST_PIXELS:,}"
        raise ConfigError("image_size", [said])
    return size


def draw_picture(size: Size, seed: str) -> bytes:
    """A JPEG of coloured shapes; equal seeds give equal pictures, others never the same one."""
    from PIL import Image, ImageDraw

    generator = random.Random(seed)
    picture = Image.new("RGB", (size.width, size.height), _colour(generator))
    pen = ImageDraw.Draw(picture)
    for number in range(40):
        xs = sorted(generator.randrange(size.width) for _ in range(2))
        ys = sorted(generator.randrange(size.height) for _ in range(2))
        shape = pen.ellipse if number % 2 else pen.rectangle
        shape((xs[0], ys[0], xs[1], ys[1]), fill=_colour(generator))
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=_QUALITY)
    return stream.getvalue()


def _colour(generator: random.Random) -> tuple[int, int, int]:
    red, green, blue = (generator.randrange(256) for _ in range(3))
    return red, green, blue


def data_url(image: bytes, kind: str) -> str:
    """A picture as it stands in a message; kind: what follows "image/" in its type."""
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"


def find_pictures(folder: Path) -> tuple[Path, ...]:
    """The picture files of a folder, by name. Raises ConfigError where there is none."""
    try:
        files = sorted(path for path in folder.iterdir() if path.suffix.lower() in _TYPES)
    except OSError as error:
        said = f"{folder} cannot be read: {error.strerror or error}"
        raise ConfigError("images", [f"{said}; name a folder of pictures"]) from error
    if not files:
        raise ConfigError("images", [f"{folder} holds no {', '.join(_TYPES)} file"])
    return tuple(files)


def file_url(path: Path) -> str:
    """A picture file as a data URL, byte for byte. Raises ConfigError."""
    try:
        return data_url(path.read_bytes(), _TYPES[path.suffix.lower()])
    except OSError as error:
        said = f"{path} cannot be read: {error.strerror or error}"
        raise ConfigError("images", [f"{said}; take it out of the folder"]) from error
