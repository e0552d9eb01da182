"""A folder's pictures by name, as pixels, and small for a report. Knows no model."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from glimt.config import ImageLimits
from glimt.errors import ConfigError, ImageError
from glimt.inputs.image import decode_image, open_image
from glimt.inputs.image_formats import format_of
from glimt.reports.document import Card

_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif"))
_HEAD = 64  # bytes that tell a format
_THUMBNAIL = (320, 240)  # pixels at most; 100 of them make a report of a few megabytes
_QUALITY = 78


@dataclass(frozen=True, slots=True)
class Folder:
    """What a folder holds.

    pictures: the folder as given joined with each picture's name, sorted by name
    others:   names of what is no picture
    """

    pictures: tuple[str, ...]
    others: tuple[str, ...]


def list_pictures(folder: str) -> Folder:
    """All pictures that lie in a folder itself, told by their first bytes or their names.

    What is named like a picture and cannot be read as one counts as a picture: that it fails must
    be told, and not passed over. Raises ConfigError for a folder that cannot be read or has none.
    """
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        said = f"{folder} cannot be read: {error.strerror or error}"
        raise ConfigError("images", [f"{said}; name a folder of pictures"]) from error
    pictures = [name for name in names if _is_picture(Path(folder, name))]
    if not pictures:
        known = ", ".join(sorted(suffix[1:] for suffix in _SUFFIXES))
        raise ConfigError("images", [f"{folder} holds no picture ({known})"])
    taken = set(pictures)
    return Folder(
        tuple(os.path.join(folder, name) for name in pictures),
        tuple(name for name in names if name not in taken),
    )


def _is_picture(path: Path) -> bool:
    if not path.is_file():
        return False
    if path.suffix.lower() in _SUFFIXES:
        return True
    try:
        with path.open("rb") as stream:
            return format_of(stream.read(_HEAD)) is not None
    except OSError:
        return False


def read_rgb(path: Path | str) -> Image.Image:
    """A picture file decoded, mode RGB. Raises ImageError naming it."""
    field = f"picture {str(path)!r}"
    return decode_image(open_image(Path(path), ImageLimits(), allow_files=True, field=field)).rgb


def card(
    name: str, picture: Path | str | Image.Image, lines: Sequence[tuple[str, str]]
) -> Card | None:
    """A picture with what was said of it; None if it cannot be read any more."""
    try:
        rgb = picture if isinstance(picture, Image.Image) else read_rgb(picture)
    except ImageError:
        return None
    return Card(name, thumbnail(rgb), tuple(lines))


def thumbnail(picture: Image.Image) -> bytes:
    """The picture as a small JPEG; its sides keep their ratio."""
    small = picture.convert("RGB")
    small.thumbnail(_THUMBNAIL, Image.Resampling.BICUBIC)
    stream = io.BytesIO()
    small.save(stream, format="JPEG", quality=_QUALITY)
    return stream.getvalue()
