"""Files, bytes, base64 text and PIL images become RGB pixels; every limit on a picture is here.

A picture is taken in two steps, so that a request can be refused before anything is decoded:

    open_image     source -> encoded bytes -> header (format, width, height), limits checked
    decode_image   encoded bytes -> RGB pixels and a digest

As in both originals alpha is dropped and not blended, EXIF orientation is not applied, and of an
animation only the first frame is read. Knows no model: resizing belongs to the family.

Pillow's five format classes are called directly and not through `Image.open`, which warns about
large pictures and damaged multi-picture JPEGs. Such a warning can only be silenced by changing
the filters of the whole process, which is not safe while other threads run; the classes do not
warn, need no global limit changed, and keep every other format out of reach.
"""

from __future__ import annotations

import binascii
import dataclasses
import hashlib
import io
import os
import re
import stat
import string
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO
from urllib.parse import unquote

from PIL import Image
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from glimt.config import ImageLimits
from glimt.errors import ImageError

SOURCE_TYPES = (str, os.PathLike, bytes, bytearray, memoryview, Image.Image)
"""What open_image takes."""

_FORMAT_NAMES = "JPEG, PNG, WebP, BMP or GIF"


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
    data = _encoded_bytes(source, limits, allow_files, field)
    image_format = _format_of(data)
    if image_format is None:
        said = f"is no {_FORMAT_NAMES} picture (it begins {data[:12]!r})"
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


# --- source -> encoded bytes -----------------------------------------------------------------


def _encoded_bytes(source: Any, limits: ImageLimits, allow_files: bool, field: str) -> bytes:
    """The encoded picture, from 1 to limits.max_bytes bytes."""
    if isinstance(source, str):
        data = _bytes_of_text(source, limits, allow_files, field)
    elif isinstance(source, os.PathLike):
        data = _read_file(source, limits, allow_files, field)
    elif isinstance(source, (bytes, bytearray, memoryview)):
        _check_num_bytes(memoryview(source).nbytes, limits, field)
        data = bytes(source)
    else:
        kinds = "a path, bytes, base64 text, a data URL or a PIL image"
        raise ImageError(field, f"is a {type(source).__name__}; {kinds} is needed")
    if not data:
        raise ImageError(field, "is empty")
    _check_num_bytes(len(data), limits, field)
    return data


def _bytes_of_text(text: str, limits: ImageLimits, allow_files: bool, field: str) -> bytes:
    """The bytes a string stands for: a URL goes by its scheme, a file before base64."""
    start = text[:5].lower()
    if start == "data:":
        return _bytes_of_data_url(text, limits, field)
    if start == "file:":
        return _read_file(_path_of_url(text, field), limits, allow_files, field)
    if _URL.match(text):
        instead = "send the picture itself" + (", or the path of a file" if allow_files else "")
        said = f"is a URL ({_shown(text)}); pictures are not downloaded here"
        raise ImageError(field, f"{said}: {instead}")
    if allow_files and os.path.exists(text):
        return _read_file(text, limits, allow_files, field)
    data = _bytes_of_base64(text, limits, field)
    # "/data/cat" is also good base64, so only a picture's first bytes tell text from a path.
    if data is None or (data and _format_of(data) is None):
        files = "not an existing file" if allow_files else "not a file, which are not read here"
        said = f"is text of {len(text)} characters ({_shown(text)}): not a data URL, {files}"
        raise ImageError(field, f"{said}, and not the base64 of a {_FORMAT_NAMES} picture")
    return data


_URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)


def _bytes_of_data_url(url: str, limits: ImageLimits, field: str) -> bytes:
    """Decode `data:image/…[;parameter…];base64,…` (RFC 2397)."""
    header, comma, text = url.partition(",")
    media_type, *parameters = header[len("data:") :].lower().split(";")
    is_base64 = bool(comma and parameters) and parameters[-1].strip() == "base64"
    if not is_base64 or not media_type.strip().startswith("image/"):
        needed = "data:image/png;base64,… (or another image type) is needed"
        raise ImageError(field, f"is a data URL that begins {_shown(header)}; {needed}")
    data = _bytes_of_base64(text, limits, field)
    if data is None:
        raise ImageError(field, "is a data URL whose text after the comma is not base64")
    return data


_BASE64_DIGITS = (string.ascii_letters + string.digits + "+/").encode()
_FROM_URL_SAFE = bytes.maketrans(b"-_", b"+/")


def _bytes_of_base64(text: str, limits: ImageLimits, field: str) -> bytes | None:
    """Decode base64 text, or None if it is none.

    White space is skipped; the URL-safe digits and missing padding are accepted (RFC 4648,
    sections 4 and 5). Refuses text that would decode to too much, before decoding it.
    """
    num_digits = len(text) - sum(text.count(space) for space in string.whitespace)
    _check_num_bytes(num_digits * 3 // 4 - 2, limits, field)  # up to two digits are padding
    try:
        padded = text.encode("ascii").translate(_FROM_URL_SAFE, string.whitespace.encode())
    except UnicodeEncodeError:
        return None
    digits = padded.rstrip(b"=")
    num_padding = len(padded) - len(digits)
    is_padded_wrong = num_padding > 2 or (num_padding > 0 and len(padded) % 4 != 0)
    if is_padded_wrong or len(digits) % 4 == 1 or digits.translate(None, _BASE64_DIGITS):
        return None
    return binascii.a2b_base64(digits + b"=" * (-len(digits) % 4))


def _path_of_url(url: str, field: str) -> str:
    """The path of `file:///path`, `file://localhost/path` or `file:/path` (RFC 8089)."""
    rest = url[len("file:") :]
    host, path = "", rest
    if rest.startswith("//"):
        host, slash, tail = rest[2:].partition("/")
        path = slash + tail
    if host.lower() not in ("", "localhost") or not path.startswith("/"):
        raise ImageError(field, f"is the URL {_shown(url)}; file:///path/to/picture is needed")
    return unquote(path)


def _read_file(
    path: str | os.PathLike[str], limits: ImageLimits, allow_files: bool, field: str
) -> bytes:
    """Read a regular file that is not too large; never waits for one."""
    if not allow_files:
        raise ImageError(field, "is a file, and files are not read here; send the picture itself")
    try:
        # Asked before opening, because opening a device can do something; asked again of what
        # was opened, because the name may have come to mean something else.
        _check_file(os.stat(path), limits, field)
        with open(path, "rb", opener=_open_without_waiting) as file:
            return _read_regular(file, limits, field)
    except (OSError, ValueError) as error:
        said = (isinstance(error, OSError) and error.strerror) or str(error)
        raise ImageError(field, f"cannot be read: {_cut(said)}") from error


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)


def _read_regular(file: BinaryIO, limits: ImageLimits, field: str) -> bytes:
    _check_file(os.fstat(file.fileno()), limits, field)
    return file.read(limits.max_bytes + 1)  # one more, to notice a file that grows


def _check_file(status: os.stat_result, limits: ImageLimits, field: str) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise ImageError(field, "is a folder; give the path of one picture")
    if not stat.S_ISREG(status.st_mode):
        raise ImageError(field, "is a device, pipe or socket; only regular files are read")
    _check_num_bytes(status.st_size, limits, field)


def _check_num_bytes(num_bytes: int, limits: ImageLimits, field: str) -> None:
    if num_bytes > limits.max_bytes:
        said = f"has {num_bytes:,} bytes; at most {limits.max_bytes:,} are accepted"
        raise ImageError(field, f"{said}: save it smaller or with stronger compression")


# --- encoded bytes -> width and height -------------------------------------------------------


class _JpegImageFile(JpegImageFile):
    """Pillow's JPEG, without the search for a resolution in EXIF, which warns when damaged."""

    def _read_dpi_from_exif(self) -> None:
        pass


_Size = tuple[int, int]


@dataclass(frozen=True, slots=True)
class _Format:
    """A format that is read.

    magic: what its files begin with
    check: refuses (ValueError) what would make Pillow warn or work far longer than the data is
           large; gives the size for the formats where Pillow allocates pixels for a header
    """

    name: str
    magic: re.Pattern[bytes]
    pillow_class: Callable[[BinaryIO], ImageFile]
    check: Callable[[bytes], _Size | None]


def _format_of(data: bytes) -> _Format | None:
    return next((known for known in _FORMATS if known.magic.match(data)), None)


def _read_size(data: bytes, image_format: _Format, limits: ImageLimits, field: str) -> _Size:
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


def _check_webp(data: bytes) -> _Size:
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


def _check_gif(data: bytes) -> _Size:
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


_FORMATS = (
    _Format("JPEG", re.compile(rb"\xff\xd8\xff"), _JpegImageFile, _check_jpeg),
    _Format("PNG", re.compile(rb"\x89PNG\r\n\x1a\n"), PngImageFile, _check_png),
    _Format("WEBP", re.compile(rb"RIFF....WEBPVP8[ LX]", re.DOTALL), WebPImageFile, _check_webp),
    _Format("BMP", re.compile(rb"BM"), BmpImageFile, _check_bmp),
    _Format("GIF", re.compile(rb"GIF8[79]a"), GifImageFile, _check_gif),
)


# --- encoded bytes -> pixels -----------------------------------------------------------------


def _pillow_image(opened: OpenedImage) -> Image.Image:
    """The picture, still to be loaded, of the size it had when it was opened."""
    content = opened.content
    if isinstance(content, Image.Image):
        image = content
    else:
        image_format = next(known for known in _FORMATS if known.name == opened.format)
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
        said = _cut(str(error)) or type(error).__name__
        # Where a header cannot be read, Pillow raises SyntaxError from what it met there.
        met = error.__cause__ if isinstance(error, SyntaxError) else error
        if isinstance(met, (IndexError, EOFError, struct.error)):
            said = "the data ends too soon; save or download it again"
        raise ImageError(field, f"cannot be read as a picture: {said}") from error


def _shown(text: str) -> str:
    """A short quotation; a picture's text has megabytes."""
    return repr(text[:40]) + ("…" if len(text) > 40 else "")


def _cut(text: str) -> str:
    return text if len(text) <= 200 else text[:200] + "…"
