"""Files, bytes, base64 text and PIL images become RGB pixels; every limit on a picture is here.

A picture is taken in two steps, so that a request can be refused before anything is decoded:

    open_image     source -> encoded bytes -> header (format, width, height), limits checked
    decode_image   encoded bytes -> RGB pixels and a digest

As in both originals alpha is dropped and not blended, EXIF orientation is not applied, and of an
animation only the first frame is read. Knows no model: resizing belongs to the family.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from PIL import Image

from glimt.config import ImageLimits
from glimt.errors import ImageError
from glimt.inputs.image_formats import FORMAT_NAMES, FORMATS, ImageFormat, Size, format_of
from glimt.inputs.image_source import read_source, shortened

SOURCE_TYPES = (str, os.PathLike, bytes, bytearray, memoryview, Image.Image)
"""What open_image takes."""


@dataclass(frozen=True, slots=True, eq=False)
class OpenedImage:
    """A picture whose header has been read and found within the limits; nothing is decoded yet.

    width, height: pixels, as stored (EXIF orientation not applied)
    format:        "JPEG", "PNG", "WEBP", "BMP" or "GIF"; "PIL" for a PIL image
    field:         names the picture in errors
    content:       the encoded bytes, or the caller's own PIL image, which is not copied until
                   it is decoded
    """

    width: int
    height: int
    format: str
    field: str
    content: bytes | Image.Image = dataclasses.field(repr=False)


@dataclass(frozen=True, slots=True, eq=False)
class DecodedImage:
    """A decoded picture.

    rgb:            mode RGB
    image_digest: SHA-256 of the picture before it became RGB: mode, size, palette and pixels
    """

    rgb: Image.Image
    image_digest: bytes

    def digest(self, settings: str) -> bytes:
        """SHA-256, 32 bytes, of the picture and of the settings it will be prepared with."""
        return _hash_parts(self.image_digest, settings.encode())


def open_image(source: Any, limits: ImageLimits, *, allow_files: bool, field: str) -> OpenedImage:
    """Find a picture's bytes and read its header, which is checked against the limits.

    source: a path or `file:` URL (only with allow_files), encoded bytes, base64 text, a base64
            data URL, or a PIL image
    field:  names the picture in errors
    Raises ImageError.
    """
    if isinstance(source, Image.Image):
        _check_size(source.width, source.height, limits, field)
        return OpenedImage(source.width, source.height, "PIL", field, source)
    data = read_source(source, limits, allow_files, field)
    image_format = format_of(data)
    if image_format is None:
        said = f"is no {FORMAT_NAMES} picture (it begins {data[:12]!r})"
        raise ImageError(field, f"{said}; save it as one of these")
    width, height = _read_size(data, image_format, limits, field)
    return OpenedImage(width, height, image_format.name, field, data)


def decode_image(opened: OpenedImage) -> DecodedImage:
    """Decode an opened picture: its first frame, or a PIL image's current one.

    Pictures of 16 bits are clipped to 8, not scaled, which is what Pillow and so the originals do.
    Raises ImageError for damaged data.
    """
    with _pillow_errors(opened.field):
        image = _pillow_image(opened)
        image.load()
        image = _without_transparency(image)
        return DecodedImage(image.convert("RGB"), _hash_image(image))


# --- width and height -------------------------------------------------------------------------


def _read_size(data: bytes, image_format: ImageFormat, limits: ImageLimits, field: str) -> Size:
    """Width and height from the header, both within the limits."""
    with _pillow_errors(field):
        if (early := image_format.check(data)) is not None:
            _check_size(*early, limits, field)
        image = image_format.pillow_class(io.BytesIO(data))
        _check_size(image.width, image.height, limits, field)
        return image.size


def _check_size(width: int, height: int, limits: ImageLimits, field: str) -> None:
    size, short, long = f"is {width} x {height} pixels", min(width, height), max(width, height)
    if short < limits.min_side:
        raise ImageError(field, f"{size}; each side must have at least {limits.min_side}")
    if width * height > limits.max_pixels:
        most = f"at most {limits.max_pixels:,} pixels are accepted"
        raise ImageError(field, f"{size}, {width * height:,} in all; {most}: scale it down")
    if long > limits.max_aspect * short:
        most = f"the long side may be at most {limits.max_aspect:g} times the short one"
        raise ImageError(field, f"{size}; {most}: crop it or cut it into several")


# --- encoded bytes -> pixels -----------------------------------------------------------------


def _pillow_image(opened: OpenedImage) -> Image.Image:
    """The picture, still to be loaded, of the size it had when it was opened."""
    content = opened.content
    if isinstance(content, Image.Image):
        image = content
    else:
        image_format = next(known for known in FORMATS if known.name == opened.format)
        image = image_format.pillow_class(io.BytesIO(content))
    if image.size != (opened.width, opened.height):
        was, now = f"{opened.width} x {opened.height}", f"{image.width} x {image.height}"
        raise ValueError(f"it was {was} pixels when it was checked and is {now} now")
    return image


def _without_transparency(image: Image.Image) -> Image.Image:
    """The picture without its note of a transparent colour.

    The note changes no RGB value, but Pillow warns of some notes. A caller's own image keeps it.
    """
    if "transparency" not in image.info:
        return image
    image = image.copy()
    del image.info["transparency"]
    return image


def _hash_image(image: Image.Image) -> bytes:
    """SHA-256 of a loaded picture: mode, size, palette and pixels."""
    palette = image.getpalette("RGB") if image.mode in ("P", "PA") else None
    size = struct.pack(">QQ", *image.size)
    return _hash_parts(image.mode.encode(), size, bytes(palette or ()), _hash_pixels(image))


_STRIP_PIXELS = 2**20


def _hash_pixels(image: Image.Image) -> bytes:
    """SHA-256 of the raw pixels, taken in strips so that they are never all copied at once."""
    sha256 = hashlib.sha256()
    num_rows = max(1, _STRIP_PIXELS // image.width)
    for top in range(0, image.height, num_rows):
        bottom = min(top + num_rows, image.height)
        sha256.update(image.crop((0, top, image.width, bottom)).tobytes())
    return sha256.digest()


def _hash_parts(*parts: bytes) -> bytes:
    """SHA-256 of the parts, each after its length, so that no part runs into the next."""
    sha256 = hashlib.sha256()
    for part in parts:
        sha256.update(struct.pack(">Q", len(part)))
        sha256.update(part)
    return sha256.digest()


# --- errors ----------------------------------------------------------------------------------


@contextmanager
def _pillow_errors(field: str) -> Iterator[None]:
    """Turn whatever a picture makes Pillow raise into an ImageError.

    Damaged data makes it raise OSError, SyntaxError, ValueError, EOFError, struct.error,
    IndexError, MemoryError and its own errors and warnings; the list differs from one release to
    the next, so every Exception is taken as the picture's fault.
    """
    try:
        yield
    except ImageError:
        raise
    except Exception as error:
        said = shortened(str(error)) or type(error).__name__
        # Where a header cannot be read, Pillow raises SyntaxError from what it met there.
        met = error.__cause__ if isinstance(error, SyntaxError) else error
        if isinstance(met, (IndexError, EOFError, struct.error)):
            said = "the data ends too soon; save or download it again"
        raise ImageError(field, f"cannot be read as a picture: {said}") from error
