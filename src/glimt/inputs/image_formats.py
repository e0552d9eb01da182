"""The five formats that are read: how a file of each begins, and what in it is refused unread.

A check walks over a file's parts without decoding any. What Pillow would warn about, or work on far
longer than the data is large, raises ValueError.

Pillow's five format classes are called directly and not through `Image.open`, which warns about
large pictures and damaged multi-picture JPEGs. Such a warning can only be silenced by changing
the filters of the whole process, which is not safe while other threads run; the classes do not
warn, need no global limit changed, and keep every other format out of reach.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

from PIL import Image
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

FORMAT_NAMES = "JPEG, PNG, WebP, BMP or GIF"


class _JpegImageFile(JpegImageFile):
    """Pillow's JPEG, without the search for a resolution in EXIF, which warns when damaged."""

    def _read_dpi_from_exif(self) -> None:
        pass


Size = tuple[int, int]


@dataclass(frozen=True, slots=True)
class ImageFormat:
    """A format that is read.

    magic: what its files begin with
    check: refuses (ValueError) what would make Pillow warn or work far longer than the data is
           large; gives the size for the formats where Pillow allocates pixels for a header
    """

    name: str
    magic: re.Pattern[bytes]
    pillow_class: Callable[[BinaryIO], ImageFile]
    check: Callable[[bytes], Size | None]


def format_of(data: bytes) -> ImageFormat | None:
    """The format whose files begin like this; None if it is none of them."""
    return next((known for known in FORMATS if known.magic.match(data)), None)


_MAX_SEGMENTS = 20_000  # Pillow keeps each in a Python object; an honest file has below 5,000
_MAX_SCANS = 100  # encoders write up to about 15
_MAX_FILL = 2**20  # bytes; Pillow skips what stands between segments byte by byte, in Python
_MAX_GIF_HEADER = 2**20  # bytes; Pillow walks the blocks before the first frame in Python


def _check_png(data: bytes) -> None:
    """Refuse endless chunks and an animation header over which Pillow would warn.

    Source: PNG (third edition), sections 5.3 and 11.3.2.1 (acTL).
    """
    animations = []
    for number, (kind, body) in enumerate(_png_chunks(data)):
        if number == _MAX_SEGMENTS:
            raise ValueError(f"it has more than {_MAX_SEGMENTS:,} chunks")
        if kind == b"acTL":
            animations.append(int.from_bytes(data[body : body + 4], "big"))
    if animations and (len(animations) > 1 or not 0 < animations[0] < 2**31):
        raise ValueError("its animation header is damaged")


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, int]]:
    """Each chunk's type and where its body starts."""
    start = 8
    while start + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, start)
        yield kind, start + 8
        start += length + 12


# FF, then what is neither a stuffed zero, a fill byte nor a restart marker.
_JPEG_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]", re.DOTALL)
_JPEG_TEM, _JPEG_END, _JPEG_SCAN = 0x01, 0xD9, 0xDA


def _check_jpeg(data: bytes) -> None:
    """Refuse endless segments, fill bytes and scans, and a picture without any scan.

    Each scan makes the decoder pass over all pixels, though 10 bytes are enough for one.
    Source: ITU-T T.81, annex B.
    """
    num_scans = num_fill = 0
    for num_segments, (marker, gap) in enumerate(_jpeg_segments(data), start=1):
        num_fill += gap if num_scans == 0 else 0
        num_scans += marker == _JPEG_SCAN
        if num_segments > _MAX_SEGMENTS or num_fill > _MAX_FILL or num_scans > _MAX_SCANS:
            counted = f"{num_segments:,} segments, {num_scans} scans and {num_fill:,} fill bytes"
            raise ValueError(f"it has {counted} or more")
    if num_scans == 0:
        raise ValueError("it holds no scan")


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, int]]:
    """Each segment's marker, and how many bytes stand before it that belong to no segment."""
    start = 2
    while (found := _JPEG_MARKER.search(data, start)) is not None:
        marker, gap, start = data[found.end() - 1], found.start() - start, found.end()
        if marker == _JPEG_END:
            return
        if marker != _JPEG_TEM:
            start += int.from_bytes(data[start : start + 2], "big")
        yield marker, gap


def _check_webp(data: bytes) -> Size:
    """Size of the canvas, which Pillow allocates to read the header (RFC 9649, section 2)."""
    if len(data) < 30:
        raise IndexError("the header is cut off")
    if data[12:16] == b"VP8X":
        return 1 + _little(data[24:27]), 1 + _little(data[27:30])
    if data[12:16] == b"VP8L":
        bits = _little(data[21:25])
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    return _little(data[26:28]) & 0x3FFF, _little(data[28:30]) & 0x3FFF


def _little(data: bytes) -> int:
    return int.from_bytes(data, "little")


_GIF_EXTENSION, _GIF_FRAME, _GIF_COMMENT, _GIF_END = 0x21, 0x2C, 0xFE, 0x3B


def _check_gif(data: bytes) -> Size:
    """Size of the screen and the first frame, for which Pillow may allocate (GIF89a, 18-24).

    Beyond its own threshold Pillow would warn of a frame, so there a GIF is refused.
    """
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    left, top, frame_width, frame_height = struct.unpack_from("<4H", data, _gif_frame(data, flags))
    width, height = max(width, left + frame_width), max(height, top + frame_height)
    if width * height > (Image.MAX_IMAGE_PIXELS or width * height):
        most = f"at most {Image.MAX_IMAGE_PIXELS:,} pixels of a GIF are read"
        raise ValueError(f"it is {width} x {height} pixels; {most}: scale it down")
    return width, height


def _gif_frame(data: bytes, flags: int) -> int:
    """Where the first frame's left, top, width and height stand."""
    head = data[:_MAX_GIF_HEADER]
    start = 13 + (6 << (flags & 7) if flags & 0x80 else 0)
    try:
        while head[start] not in (_GIF_FRAME, _GIF_END):
            is_extension = head[start] == _GIF_EXTENSION
            start = _gif_extension_end(head, start + 1) if is_extension else start + 1
    except IndexError as error:
        raise ValueError(f"it has no frame in its first {len(head):,} bytes") from error
    if head[start] == _GIF_END:
        raise ValueError("it has no frame")
    return start + 1


def _gif_extension_end(data: bytes, start: int) -> int:
    """Where the extension ends whose label is at `start`."""
    end = _gif_blocks_end(data, start + 1)
    # Pillow reads on after an extension without any block, unless it is a comment. Reading as it
    # does keeps a frame from hiding behind one.
    if data[start + 1] == 0 and data[start] != _GIF_COMMENT:
        end = _gif_blocks_end(data, end)
    return end


def _gif_blocks_end(data: bytes, start: int) -> int:
    while data[start] != 0:
        start += 1 + data[start]
    return start + 1


def _check_bmp(data: bytes) -> None:
    """Refuse run-length coding, which Pillow decodes in Python: 1 KB can take it 10 seconds.

    Source: BITMAPINFOHEADER, biCompression (1 is RLE8, 2 is RLE4); the older 12-byte header has
    no such field.
    """
    header_size, compression = struct.unpack_from("<I12xI", data, 14)
    if header_size > 12 and compression in (1, 2):
        raise ValueError("run-length coded BMP is not supported; save it uncompressed or as PNG")


FORMATS = (
    ImageFormat("JPEG", re.compile(rb"\xff\xd8\xff"), _JpegImageFile, _check_jpeg),
    ImageFormat("PNG", re.compile(rb"\x89PNG\r\n\x1a\n"), PngImageFile, _check_png),
    ImageFormat(
        "WEBP", re.compile(rb"RIFF....WEBPVP8[ LX]", re.DOTALL), WebPImageFile, _check_webp
    ),
    ImageFormat("BMP", re.compile(rb"BM"), BmpImageFile, _check_bmp),
    ImageFormat("GIF", re.compile(rb"GIF8[79]a"), GifImageFile, _check_gif),
)
