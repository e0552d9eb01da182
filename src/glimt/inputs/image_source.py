"""A picture's source -> its encoded bytes: a path, a URL of a file or of data, base64, or bytes.

Knows which of these are allowed and how large they may be, and nothing of what the bytes hold but
how a picture begins.
"""

from __future__ import annotations

import binascii
import os
import re
import stat
import string
from typing import Any, BinaryIO
from urllib.parse import unquote

from glimt.config import ImageLimits
from glimt.errors import ImageError
from glimt.inputs.image_formats import FORMAT_NAMES, format_of


def read_source(source: Any, limits: ImageLimits, allow_files: bool, field: str) -> bytes:
    """The encoded picture, from 1 to limits.max_bytes bytes.

    source, allow_files, field: of `open_image`, but for a PIL image
    Raises ImageError.
    """
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
    if data is None or (data and format_of(data) is None):
        files = "not an existing file" if allow_files else "not a file, which are not read here"
        said = f"is text of {len(text)} characters ({_shown(text)}): not a data URL, {files}"
        raise ImageError(field, f"{said}, and not the base64 of a {FORMAT_NAMES} picture")
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
        raise ImageError(field, f"cannot be read: {shortened(said)}") from error


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


def _shown(text: str) -> str:
    """A short quotation; a picture's text has megabytes."""
    return repr(text[:40]) + ("…" if len(text) > 40 else "")


def shortened(text: str) -> str:
    """The text, or its beginning where it is long; an error may quote megabytes."""
    return text if len(text) <= 200 else text[:200] + "…"
