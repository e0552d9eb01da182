"""Pictures from every source, format and mode; limits, damage, and digests."""

import base64
import binascii
import dataclasses
import io
import os
import random
import socket
import struct
import threading
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.WebPImagePlugin import WebPImageFile

from glimt.config import ImageLimits
from glimt.errors import ImageError
from glimt.inputs import image as image_module
from glimt.inputs import image_source
from glimt.inputs.image import decode_image, open_image

LIMITS = ImageLimits()
ANY_SIZE = ImageLimits(min_side=1, max_aspect=1e6)


def encode(picture, picture_format, **options):
    buffer = io.BytesIO()
    picture.save(buffer, picture_format, **options)
    return buffer.getvalue()


def open_(source, limits=LIMITS, allow_files=False):
    return open_image(source, limits, allow_files=allow_files, field="messages[0].content[1]")


def decode(source, limits=LIMITS):
    return decode_image(open_(source, limits))


def pixels(source):
    rgb = np.asarray(decode(source, ANY_SIZE).rgb)
    return [tuple(pixel) for pixel in rgb.reshape(-1, 3).tolist()]


def noise(width, height, channels=3, seed=0):
    values = np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)
    return Image.fromarray(values.squeeze())


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width, height, *chunks, bits=8, color=0):
    """A PNG by hand: header, the chunks, end."""
    header = struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0)
    inner = b"".join(chunk(kind, body) for kind, body in chunks)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + inner + chunk(b"IEND", b"")


def gif_header(width, height):
    return b"GIF89a" + struct.pack("<HHBBB", width, height, 0, 0, 0)


def gif_frame(width, height):
    return b"," + struct.pack("<4HB", 0, 0, width, height, 0) + b"\x02\x02\x4c\x01\x00"


def palette_picture():
    picture = Image.new("P", (2, 2))
    picture.putpalette([1, 2, 3, 40, 50, 60])
    picture.putdata([0, 1, 1, 0])
    return picture


def frames(mode="RGB"):
    return [Image.new(mode, (6, 4), c) for c in ("red", "lime", "blue")]


def save_animation(picture_format, **options):
    first, *rest = frames()
    return encode(first, picture_format, save_all=True, append_images=rest, **options)


def exif_orientation(value):
    exif = Image.Exif()
    exif[0x0112] = value
    return exif.tobytes()


def corpus():
    """Small files of every format and mode that is read, by name."""
    rgb, grey, rgba = noise(24, 18), noise(24, 18, 1), noise(24, 18, 4)
    sixteen = Image.fromarray(np.arange(432, dtype=np.uint16).reshape(18, 24) * 150)
    return {
        "jpeg": encode(rgb, "JPEG"),
        "jpeg progressive": encode(rgb, "JPEG", progressive=True),
        "jpeg grey": encode(grey, "JPEG"),
        "jpeg cmyk": encode(rgb.convert("CMYK"), "JPEG"),
        "jpeg exif": encode(rgb, "JPEG", exif=exif_orientation(6), icc_profile=b"x" * 99),
        "png": encode(rgb, "PNG"),
        "png 1 bit": encode(grey.convert("1"), "PNG"),
        "png grey": encode(grey, "PNG"),
        "png grey alpha": encode(rgba.convert("LA"), "PNG"),
        "png 16 bit": encode(sixteen, "PNG"),
        "png palette": encode(rgb.quantize(16), "PNG", transparency=bytes(range(16))),
        "png alpha": encode(rgba, "PNG", exif=exif_orientation(3)),
        "png animated": save_animation("PNG"),
        "webp": encode(rgb, "WEBP"),
        "webp lossless alpha": encode(rgba, "WEBP", lossless=True, exif=exif_orientation(8)),
        "webp animated": save_animation("WEBP", lossless=True),
        "bmp": encode(rgb, "BMP"),
        "bmp 1 bit": encode(grey.convert("1"), "BMP"),
        "bmp palette": encode(rgb.quantize(16), "BMP"),
        "bmp alpha": encode(rgba, "BMP"),
        "gif": encode(rgb.quantize(16), "GIF", transparency=3),
        "gif animated": save_animation("GIF"),
    }


CORPUS = corpus()
each_file = pytest.mark.parametrize("name", CORPUS)


# --- formats and modes -----------------------------------------------------------------------


@each_file
def test_pixels_are_those_of_pillows_own_convert(name):
    """Catches any handling of modes, alpha or frames that differs from the originals'."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = Image.open(io.BytesIO(CORPUS[name])).convert("RGB")
    rgb = decode(CORPUS[name]).rgb
    assert (rgb.mode, rgb.size) == ("RGB", expected.size)
    assert rgb.tobytes() == expected.tobytes()


@each_file
def test_header_gives_size_and_format_before_decoding(name):
    """Catches a format whose size or name is taken from the wrong place."""
    opened = open_(CORPUS[name])
    expected = (6, 4) if "animated" in name else (24, 18)
    assert (opened.width, opened.height) == expected
    assert opened.format == name.split()[0].upper()


@pytest.mark.parametrize(
    ("picture", "expected"),
    [
        (Image.new("L", (2, 1), 200), (200, 200, 200)),
        (Image.new("LA", (2, 1), (200, 0)), (200, 200, 200)),
        (Image.new("RGBA", (2, 1), (10, 20, 30, 0)), (10, 20, 30)),
        (Image.new("RGBA", (2, 1), (10, 20, 30, 128)), (10, 20, 30)),
        (Image.new("1", (2, 1), 1), (255, 255, 255)),
    ],
)
def test_alpha_is_dropped_and_grey_is_spread(picture, expected):
    """Catches blending onto black or white, which other servers do and the originals do not."""
    assert pixels(encode(picture, "PNG")) == [expected] * 2
    assert pixels(picture) == [expected] * 2


@pytest.mark.parametrize(
    ("picture_format", "transparency"),
    [("PNG", 0), ("PNG", 1), ("PNG", b"\x00\x80"), ("GIF", 0), ("GIF", 1)],
)
def test_transparent_palette_entries_keep_their_colour(picture_format, transparency):
    """Catches Pillow's warning about palettes with transparency, and entries turned to black."""
    data = encode(palette_picture(), picture_format, transparency=transparency)
    assert pixels(data) == [(1, 2, 3), (40, 50, 60), (40, 50, 60), (1, 2, 3)]


def test_sixteen_bits_are_clipped_as_pillow_clips_them():
    """Catches scaling by 256, which looks better and is not what the originals saw."""
    values = [0, 100, 255, 256, 1000, 65535]
    picture = Image.fromarray(np.array([values, values], dtype=np.uint16))
    assert picture.mode == "I;16"
    grey = [r for r, _, _ in pixels(encode(picture, "PNG"))]
    assert grey[:6] == [0, 100, 255, 255, 255, 255]


def test_cmyk_jpeg_is_not_inverted():
    """Catches reading Adobe's inverted inks as they stand."""
    red = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    r, g, b = decode(encode(red, "JPEG")).rgb.getpixel((8, 8))
    assert (r > 240, g < 15, b < 15) == (True, True, True)


@pytest.mark.parametrize(
    "data",
    [
        save_animation("GIF"),
        save_animation("WEBP", lossless=True),
        save_animation("PNG"),
        save_animation("GIF", disposal=2),
    ],
    ids=["gif", "webp", "apng", "gif with disposal"],
)
def test_only_the_first_frame_of_an_animation_is_read(data):
    """Catches the last frame, or a blend of all."""
    assert set(pixels(data)) == {(255, 0, 0)}


@pytest.mark.parametrize("picture_format", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation_is_not_applied(picture_format):
    """Catches a turned picture: both originals look at it as it is stored."""
    options = {"lossless": True} if picture_format == "WEBP" else {}
    plain = encode(noise(30, 20), picture_format, **options)
    turned = encode(noise(30, 20), picture_format, exif=exif_orientation(6), **options)
    opened = open_(turned)
    assert (opened.width, opened.height) == (30, 20)
    assert decode(turned).rgb.tobytes() == decode(plain).rgb.tobytes()


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "I", "F", "I;16"]
)
def test_pil_images_of_any_mode_are_taken(mode):
    """Catches a mode that cannot be hashed or converted."""
    picture = Image.new(mode, (5, 3))
    decoded = decode(picture)
    assert decoded.rgb.mode == "RGB"
    assert len(decoded.digest("")) == 32


def test_mode_that_pillow_cannot_convert_is_refused():
    """Catches Pillow's ValueError reaching the caller."""
    with pytest.raises(ImageError, match="conversion"):
        decode(Image.new("La", (5, 3)))


@pytest.mark.parametrize(
    "data",
    [b"\x89PNG\r\n\x1a\n", b"RIFF\x20\0\0\0WEBPVP8X", b"GIF89a\0", b"BM\0\0"],
    ids=["PNG", "WebP", "GIF", "BMP"],
)
def test_a_header_that_is_cut_off_is_told_in_plain_words(data):
    """Catches the buffer sizes of Python's struct module shown to a user."""
    with pytest.raises(ImageError, match="the data ends too soon; save or download it again"):
        open_(data)


@pytest.mark.parametrize("picture_format", ["TIFF", "PPM", "ICO", "TGA", "JPEG2000", "PCX"])
def test_other_formats_are_refused(picture_format):
    """Catches a decoder that we do not mean to offer to strangers."""
    with pytest.raises(ImageError, match="is no JPEG, PNG, WebP, BMP or GIF picture"):
        open_(encode(noise(16, 16), picture_format))


def test_run_length_coded_bmp_is_refused():
    """Catches Pillow's decoder in Python, which 1 KB can keep busy for many seconds."""
    header = struct.pack("<IiiHHIIiiII", 40, 40000, 2000, 1, 8, 1, 0, 0, 0, 0, 0)
    data = b"BM" + struct.pack("<IHHI", 2000, 0, 0, 1078) + header + bytes(1024) + b"\1\1\0\0" * 99
    with pytest.raises(ImageError, match="run-length"):
        open_(data)


# --- sources ---------------------------------------------------------------------------------

PICTURE = encode(noise(9, 7, seed=3), "PNG")
TEXT = base64.b64encode(PICTURE).decode()
URL_SAFE = base64.urlsafe_b64encode(PICTURE).decode()
assert TEXT != URL_SAFE


@pytest.mark.parametrize(
    "source",
    [
        pytest.param(PICTURE, id="bytes"),
        pytest.param(bytearray(PICTURE), id="bytearray"),
        pytest.param(memoryview(PICTURE + bytes(1))[:-1], id="memoryview"),
        pytest.param(TEXT, id="base64"),
        pytest.param(TEXT.rstrip("="), id="without padding"),
        pytest.param(URL_SAFE, id="URL-safe"),
        pytest.param(base64.encodebytes(PICTURE).decode(), id="in lines"),
        pytest.param("\r\n\t " + TEXT + "\n", id="between white space"),
        pytest.param("data:image/png;base64," + TEXT, id="data URL"),
        pytest.param("data:image/jpeg;base64," + TEXT, id="data URL of another type"),
        pytest.param("DATA:Image/PNG;BASE64," + TEXT, id="data URL in capitals"),
        pytest.param("data:image/svg+xml;charset=utf-8;base64," + TEXT, id="charset"),
        pytest.param("data:image/x;name=a;x=y;base64," + URL_SAFE.rstrip("="), id="parameters"),
        pytest.param(noise(9, 7, seed=3), id="PIL"),
    ],
)
@pytest.mark.parametrize("allow_files", [True, False])
def test_every_way_to_hand_over_a_picture_gives_the_same_picture(source, allow_files):
    """Catches a source that is mistaken for another, or decoded with a byte too few."""
    decoded = decode_image(open_(source, allow_files=allow_files))
    assert decoded.rgb.tobytes() == noise(9, 7, seed=3).tobytes()
    assert decoded.digest("x") == decode(PICTURE).digest("x")


@pytest.mark.parametrize("kind", ["str", "path", "file:///", "file://localhost/", "file:/", "FILE"])
def test_files_are_read_by_path_and_url(tmp_path, kind):
    """Catches percent signs and spaces taken literally, and a scheme compared by case."""
    path = tmp_path / "a picture é.png"
    path.write_bytes(PICTURE)
    as_url = str(path).replace(" ", "%20").replace("é", "%C3%A9")
    sources = {
        "str": str(path),
        "path": path,
        "file:///": f"file://{as_url}",
        "file://localhost/": f"file://localhost{as_url}",
        "file:/": f"file:{as_url}",
        "FILE": f"FILE://{as_url}",
    }
    assert decode_image(open_(sources[kind], allow_files=True)).rgb.size == (9, 7)


def test_a_file_goes_before_base64(tmp_path, monkeypatch):
    """Catches a file named like base64 text, such as `cats`, that cannot be opened."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cats").write_bytes(PICTURE)
    assert open_("cats", allow_files=True).width == 9


@pytest.mark.parametrize(
    "source", ["{path}", "file://{path}", "/etc/passwd", "/data/cats", "picture.png", "../x", "."]
)
def test_without_allow_files_the_disk_is_never_touched(tmp_path, monkeypatch, source):
    """Catches a server that tells strangers which files it has."""
    path = tmp_path / "cats.png"
    path.write_bytes(PICTURE)

    def touched(*_, **__):
        raise AssertionError("the disk was touched")

    with monkeypatch.context() as patch:
        for target in ("os.stat", "os.lstat", "os.open", "os.path.exists", "builtins.open"):
            patch.setattr(target, touched)
        with pytest.raises(ImageError, match="not read here"):
            open_(source.format(path=path))
        with pytest.raises(ImageError, match="not read here"):
            open_(path)


@pytest.mark.parametrize(
    "url",
    ["http://127.0.0.1/a.png", "HTTPS://example.org/a", "ftp://x/y", "s3://bucket/a", "gopher://x"],
)
@pytest.mark.parametrize("allow_files", [True, False])
def test_urls_are_never_downloaded(monkeypatch, url, allow_files):
    """Catches a request to an address that the caller chose."""

    def connected(*_, **__):
        raise AssertionError("a connection was made")

    monkeypatch.setattr(socket.socket, "connect", connected)
    with pytest.raises(ImageError, match="not downloaded here"):
        open_(url, allow_files=allow_files)


@pytest.mark.parametrize(
    "source",
    [
        "",
        b"",
        "    \n",
        "no such picture.png",
        "/no/such/picture",
        "/no/such\0picture",
        "\ud800",
        "Bild für dich",
        TEXT[: len(TEXT) // 4 * 4 - 3],  # one digit too many
        TEXT + "====",
        TEXT[:40] + "=" + TEXT[40:],
        TEXT[:40] + "!" + TEXT[41:],
        TEXT.replace("iVBO", "iVB\u00a0O"),
        "data:",
        "data:,",
        "data:image/png;base64",
        "data:image/png;base64,",
        "data:image/png;base64,%%%%",
        "data:image/png," + TEXT,
        "data:text/plain;base64," + TEXT,
        "data:;base64," + TEXT,
        "file://elsewhere/picture.png",
        "file:relative.png",
        "file://",
        "file:///%00",
        "file:///no/such/picture.png",
        None,
        7,
        {"url": TEXT},
        [PICTURE],
        io.BytesIO(PICTURE),
        b"GIF",
        b"\xff\xd8\xff",
        b"hello",
    ],
    ids=lambda data: type(data).__name__ if isinstance(data, io.BytesIO) else repr(data),
)
@pytest.mark.parametrize("allow_files", [True, False])
def test_what_is_no_picture_is_refused_with_its_field(source, allow_files):
    """Catches an exception of another kind, and an error that does not say which picture."""
    with pytest.raises(ImageError) as caught:
        open_(source, allow_files=allow_files)
    assert caught.value.field == "messages[0].content[1]"


@pytest.mark.parametrize("source", ["x!" * 10**6, "data:" + "y" * 10**6, "http://" + "z" * 10**6])
def test_errors_do_not_repeat_megabytes(source):
    """Catches a log line as large as the upload."""
    with pytest.raises(ImageError) as caught:
        open_(source, allow_files=True)
    assert len(str(caught.value)) < 400


@pytest.mark.timeout(20)
def test_pipes_devices_sockets_and_folders_are_refused_without_waiting(tmp_path):
    """Catches a read that waits for ever on a pipe, or reads /dev/zero."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    (tmp_path / "broken").symlink_to(tmp_path / "nothing")
    special = [tmp_path / "pipe", tmp_path / "link", "/dev/zero", "/dev/null"]
    for source in [*special, *(f"file://{path}" for path in special)]:
        with pytest.raises(ImageError, match="only regular files"):
            open_(source, allow_files=True)
    for source in (tmp_path, str(tmp_path)):
        with pytest.raises(ImageError, match="folder"):
            open_(source, allow_files=True)
    with pytest.raises(ImageError, match="No such file"):
        open_(tmp_path / "broken", allow_files=True)


@pytest.mark.timeout(20)
def test_a_file_swapped_for_a_pipe_after_its_check_is_refused(tmp_path, monkeypatch):
    """Catches the wait between looking at a name and opening it."""
    (tmp_path / "file").write_bytes(PICTURE)
    os.mkfifo(tmp_path / "pipe")
    before = os.stat(tmp_path / "file")
    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", lambda _: before)
        with pytest.raises(ImageError, match="only regular files"):
            open_(tmp_path / "pipe", allow_files=True)


def test_an_empty_file_is_refused(tmp_path):
    """Catches Pillow being asked to identify nothing."""
    (tmp_path / "empty.png").touch()
    with pytest.raises(ImageError, match="empty"):
        open_(tmp_path / "empty.png", allow_files=True)


# --- limits ----------------------------------------------------------------------------------


def test_max_bytes_counts_the_encoded_picture_however_it_comes(tmp_path):
    """Catches a limit that is off by one, or that counts base64 digits or line breaks."""
    path = tmp_path / "picture.png"
    path.write_bytes(PICTURE)
    broken_lines = base64.encodebytes(PICTURE).decode().replace("\n", "\n" * 40)
    sources = [PICTURE, path, TEXT, broken_lines, "data:image/png;base64," + TEXT]
    for source in sources:
        assert open_(source, ImageLimits(max_bytes=len(PICTURE)), allow_files=True).width == 9
        with pytest.raises(ImageError, match="bytes; at most"):
            open_(source, ImageLimits(max_bytes=len(PICTURE) - 1), allow_files=True)


def test_too_much_data_is_refused_before_it_is_read_or_decoded(tmp_path, monkeypatch):
    """Catches a limit that is only looked at once the memory is spent."""
    path = tmp_path / "sparse.png"
    with path.open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(ImageError, match="bytes; at most"):
        open_(path, allow_files=True)

    def decoded(*_):
        raise AssertionError("the text was decoded")

    monkeypatch.setattr(binascii, "a2b_base64", decoded)
    with pytest.raises(ImageError, match="bytes; at most"):
        open_("A" * 4000, ImageLimits(max_bytes=2000))


def test_a_file_that_grows_while_it_is_read_is_refused(tmp_path, monkeypatch):
    """Catches trusting a size asked for earlier."""
    path = tmp_path / "grows.png"
    path.write_bytes(PICTURE)
    monkeypatch.setattr(image_source, "_check_file", lambda *_: path.write_bytes(PICTURE * 2))
    with pytest.raises(ImageError, match="bytes; at most"):
        open_(path, ImageLimits(max_bytes=len(PICTURE)), allow_files=True)


def forbid_allocation(monkeypatch):
    """Let no picture be decoded, and let Pillow not even open what it allocates for at once."""

    def allocated(_):
        raise AssertionError("Pillow allocated the picture")

    monkeypatch.setattr(ImageFile.ImageFile, "load", allocated)
    monkeypatch.setattr(WebPImageFile, "_open", allocated)
    monkeypatch.setattr(GifImageFile, "_open", allocated)


def webp_canvas(width, height):
    sides = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return (
        b"RIFF"
        + struct.pack("<I", 80)
        + b"WEBPVP8X"
        + struct.pack("<II", 10, 0)
        + sides
        + b"0" * 60
    )


def webp_lossless(width, height):
    bits = (width - 1) | (height - 1) << 14
    return (
        b"RIFF"
        + struct.pack("<I", 80)
        + b"WEBPVP8L"
        + struct.pack("<IBI", 60, 0x2F, bits)
        + b"0" * 60
    )


def webp_lossy(width, height):
    head = struct.pack("<I", 60) + b"\x10\0\0\x9d\x01\x2a" + struct.pack("<HH", width, height)
    return b"RIFF" + struct.pack("<I", 80) + b"WEBPVP8 " + head + b"0" * 60


DISPOSED = b"!\xf9\x04\x08\0\0\0\0"  # a graphic control extension: restore to background
BMP_BOMB = b"BM" + struct.pack("<IHHI", 99, 0, 0, 54)
BMP_BOMB += struct.pack("<IiiHHIIiiII", 40, 50000, 50000, 1, 24, 0, 0, 0, 0, 0, 0) + bytes(99)
JPEG_BOMB = CORPUS["jpeg"].replace(struct.pack(">HH", 18, 24), struct.pack(">HH", 60000, 60000))


@pytest.mark.parametrize(
    "data",
    [
        png(60000, 60000, (b"IDAT", zlib.compress(bytes(99))), bits=1),
        png(20000, 20000, bits=1),
        png(2**31 - 1, 2**31 - 1),
        JPEG_BOMB,
        BMP_BOMB,
        webp_canvas(16383, 16383),
        webp_canvas(2**24, 2**24),
        webp_lossless(16383, 16383),
        webp_lossy(16383, 16383),
        gif_header(65535, 65535) + gif_frame(2, 2),
        gif_header(2, 2) + DISPOSED + gif_frame(65535, 2600),
    ],
    ids=[
        "png",
        "png without data",
        "png, largest",
        "jpeg",
        "bmp",
        "webp canvas",
        "webp canvas, largest",
        "webp lossless",
        "webp lossy",
        "gif screen",
        "gif frame",
    ],
)
def test_header_bombs_are_refused_before_pillow_allocates(monkeypatch, data):
    """Catches a few bytes that claim gigapixels and get memory for them."""

    forbid_allocation(monkeypatch)
    with pytest.raises(ImageError, match=r"\d+ x \d+ pixels"):
        open_(data)


def test_gif_frame_cannot_hide_behind_an_empty_extension(monkeypatch):
    """Catches our walk and Pillow's seeing two different first frames."""
    decoy = b"!\xff\0" + b"\x0f" + gif_frame(2, 2) + b"\0"
    data = gif_header(4, 4) + decoy + gif_frame(600, 500)
    assert Image.open(io.BytesIO(data)).size == (600, 500)
    assert open_(data).width == 600
    forbid_allocation(monkeypatch)
    with pytest.raises(ImageError, match="600 x 500"):
        open_(data, ImageLimits(max_pixels=1000))


@pytest.mark.parametrize(
    "data",
    [
        png(4, 4, *[(b"abCd", b"")] * 20_001),
        CORPUS["jpeg"][:2] + b"\xff\xe5\0\2" * 20_001 + CORPUS["jpeg"][2:],
        CORPUS["jpeg"][:2] + b"\xff\xe5\0\2" + bytes(2**21) + CORPUS["jpeg"][2:],
        CORPUS["jpeg"][:2] + b"\xff" * 2**21 + CORPUS["jpeg"][2:],
        CORPUS["jpeg progressive"][:-2] + b"\xff\xda\0\x08\1\1\0\0\0\0" * 101,
        gif_header(4, 4) + b"!\xfe" + b"\1a" * 2**20,
        gif_header(4, 4) + b"!\xfe\0" * 2**19 + gif_frame(4, 4),
    ],
    ids=["chunks", "segments", "junk", "fill", "scans", "blocks", "extensions"],
)
def test_data_that_costs_far_more_than_its_size_is_refused(data):
    """Catches a small upload that keeps a core busy for minutes."""
    with pytest.raises(ImageError, match=r"more|scans|segments|no frame"):
        open_(data)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((1, 1), "at least 2"),
        ((1, 30000), "at least 2"),
        ((30000, 1), "at least 2"),
        ((2, 402), "200 times"),
        ((402, 2), "200 times"),
        ((2, 2), None),
        ((2, 400), None),
        ((400, 2), None),
    ],
)
@pytest.mark.parametrize("picture_format", ["PNG", "BMP", "GIF", "PIL"])
def test_degenerate_shapes_are_refused_at_the_exact_limit(picture_format, size, message):
    """Catches a 1-pixel side read as a channel count, and a limit off by one."""
    picture = Image.new("L", size)
    source = picture if picture_format == "PIL" else encode(picture, picture_format)
    if message is None:
        assert decode(source).rgb.size == size
        return
    with pytest.raises(ImageError, match=message):
        open_(source)


@pytest.mark.parametrize("size", [(0, 0), (0, 5), (5, 0)])
@pytest.mark.parametrize("limits", [LIMITS, ImageLimits(min_side=0)])
def test_pictures_without_pixels_are_refused(size, limits):
    """Catches a division by a side of zero."""
    with pytest.raises(ImageError):
        decode(png(*size, (b"IDAT", b"")), limits)
    if limits is LIMITS:
        with pytest.raises(ImageError, match="at least"):
            open_(Image.new("RGB", size))


def test_max_pixels_is_inclusive_and_holds_for_pil_images():
    """Catches a limit that PIL images slip past."""
    for source in (noise(10, 10), encode(noise(10, 10), "PNG")):
        assert open_(source, ImageLimits(max_pixels=100)).width == 10
        with pytest.raises(ImageError, match="10 x 10 pixels, 100 in all; at most 99"):
            open_(source, ImageLimits(max_pixels=99))


def test_pictures_beyond_pillows_threshold_neither_warn_nor_change_it(monkeypatch):
    """Catches pictures between Pillow's 89 megapixels and our limit failing under -W error."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)
    monkeypatch.setattr(image_module, "_STRIP_PIXELS", 100)
    for name in ("jpeg", "jpeg exif", "png", "webp", "bmp"):
        assert decode(CORPUS[name]).rgb.size == (24, 18)
    with pytest.raises(ImageError, match="pixels of a GIF are read: scale it down"):
        open_(CORPUS["gif"])
    assert Image.MAX_IMAGE_PIXELS == 300
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


# --- damage ----------------------------------------------------------------------------------


def survives(data):
    """Whether a picture comes out; anything but ImageError, or any warning, fails the test."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            decode(data)
            is_picture = True
        except ImageError:
            is_picture = False
    assert [str(warning.message) for warning in warned] == []
    return is_picture


@each_file
def test_truncated_files_are_refused_or_complete(name):
    """Catches half a picture taken for a whole one, and Pillow's many kinds of error."""
    data = CORPUS[name]
    assert survives(data)
    # An animation is cut inside its first frame; one that is cut later still has it whole.
    most = 45 if "animated" in name else len(data) // 2
    for length in [*range(0, 45, 3), most // 2, most]:
        assert not survives(data[:length]), length
    for length in range(45, len(data), max(1, len(data) // 25)):
        survives(data[:length])


@each_file
@pytest.mark.parametrize("seed", range(3))
def test_flipped_bytes_give_a_picture_or_an_image_error(name, seed):
    """Catches struct.error, IndexError, warnings and the like from deep inside Pillow."""
    chance = random.Random(f"{name} {seed}")
    for _ in range(25):
        damaged = bytearray(CORPUS[name])
        for _ in range(chance.choice((1, 1, 2, 8))):
            # The header decides most, so it gets half of the damage.
            end = chance.choice((min(80, len(damaged)), len(damaged)))
            damaged[chance.randrange(end)] = chance.randrange(256)
        survives(bytes(damaged))


@pytest.mark.parametrize("seed", range(8))
def test_spliced_files_give_a_picture_or_an_image_error(seed):
    """Catches a decoder that trusts one file's header with another file's data."""
    chance = random.Random(seed)
    for _ in range(25):
        head, tail = chance.choices(list(CORPUS.values()), k=2)
        survives(head[: chance.randrange(len(head))] + tail[chance.randrange(len(tail)) :])


def test_the_cause_of_an_image_error_is_kept():
    """Catches losing Pillow's own words, which are needed to find out what a file lacks."""
    with pytest.raises(ImageError, match="truncated") as caught:
        decode(CORPUS["bmp"][:-40])
    assert isinstance(caught.value.__cause__, OSError)


def test_memory_running_out_is_an_image_error(monkeypatch):
    """Catches one huge picture ending the whole engine."""

    def load(_):
        raise MemoryError

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    with pytest.raises(ImageError, match="MemoryError"):
        decode(CORPUS["bmp"])


DAMAGED_EXIF = b"Exif\0\0II*\0\x08\0\0\0\x09\0" + struct.pack("<HHII", 0x0128, 3, 9, 9999)
DAMAGED_MPO = b"MPF\0II*\0\x08\0\0\0\x01\0" + struct.pack("<HHII", 0xB001, 4, 1, 2) + bytes(4)


@pytest.mark.parametrize(
    ("data", "is_picture"),
    [
        (encode(noise(24, 18), "JPEG", exif=DAMAGED_EXIF), True),
        (
            CORPUS["jpeg"][:2]
            + b"\xff\xe2"
            + struct.pack(">H", 2 + len(DAMAGED_MPO))
            + DAMAGED_MPO
            + CORPUS["jpeg"][2:],
            True,
        ),
        (png(2, 2, (b"acTL", bytes(8)), (b"IDAT", zlib.compress(bytes(6)))), False),
        (png(2, 2, *[(b"acTL", b"\0\0\0\1" * 2)] * 2, (b"IDAT", zlib.compress(bytes(6)))), False),
    ],
    ids=["exif", "mpo", "acTL without frames", "two acTL"],
)
def test_damaged_metadata_does_not_warn(data, is_picture):
    """Catches Pillow's warnings, each of which is first shown to be one when Pillow is asked."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        Image.open(io.BytesIO(data)).load()
    assert warned
    assert survives(data) is is_picture


# --- PIL images and state --------------------------------------------------------------------


def test_a_callers_image_is_left_as_it_was():
    """Catches our dropping the transparency from the caller's own object."""
    picture = palette_picture()
    picture.info["transparency"] = b"\0\1"
    decode(picture)
    assert (picture.mode, picture.info) == ("P", {"transparency": b"\0\1"})


def test_decoded_pixels_do_not_change_with_the_callers_image():
    """Catches a result that shares memory with what the caller draws on next."""
    picture = noise(9, 7)
    decoded = decode(picture)
    picture.paste((0, 0, 0), (0, 0, 9, 7))
    assert decoded.rgb.tobytes() == noise(9, 7).tobytes()


def test_an_image_that_changed_size_after_its_check_is_refused():
    """Catches a picture that is swapped for a larger one once it has passed."""
    opened = open_(noise(9, 7))
    swapped = dataclasses.replace(opened, content=noise(90, 70))
    with pytest.raises(ImageError, match="9 x 7 pixels when it was checked and is 90 x 70 now"):
        decode_image(swapped)


def test_a_closed_pil_image_is_refused():
    """Catches Pillow's error about a closed file."""
    picture = Image.open(io.BytesIO(PICTURE))
    picture.close()
    with pytest.raises(ImageError):
        decode(picture)


def test_an_opened_image_decodes_alike_again_and_from_two_threads():
    """Catches a file position or decoder shared between two decodes."""
    opened = open_(CORPUS["webp animated"])
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(decode_image(opened).digest("s")))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [decode_image(opened).digest("s")] * 4


def test_opened_image_does_not_print_its_bytes():
    """Catches a picture in the log."""
    assert "PNG" in repr(open_(PICTURE))
    assert "\\x" not in repr(open_(PICTURE))


# --- digests ---------------------------------------------------------------------------------


@given(data=st.binary(min_size=12, max_size=24).map(lambda data: data[: len(data) // 12 * 12]))
@settings(max_examples=40, deadline=None)
def test_the_same_bytes_in_another_shape_or_mode_have_another_digest(data):
    """Catches transposed sizes (30 x 100, 100 x 30) and modes that share one digest."""
    channels = {"L": 1, "P": 1, "LA": 2, "I;16": 2, "RGB": 3, "YCbCr": 3, "RGBA": 4, "CMYK": 4}
    digests = [
        decode(Image.frombytes(mode, (width, num_pixels // width), data), ANY_SIZE).digest("")
        for mode, num_channels in channels.items()
        for num_pixels in [len(data) // num_channels]
        for width in range(1, num_pixels + 1)
        if num_pixels % width == 0
    ]
    assert len(set(digests)) == len(digests)


@given(
    palettes=st.lists(st.binary(min_size=6, max_size=6), min_size=2, max_size=4, unique=True),
    settings_texts=st.lists(st.text(max_size=4), min_size=1, max_size=4, unique=True),
)
@settings(max_examples=40, deadline=None)
def test_palettes_and_settings_enter_the_digest(palettes, settings_texts):
    """Catches one user's picture answered with another's, because only the indices were hashed."""
    digests = []
    for palette in palettes:
        picture = palette_picture()
        picture.putpalette(palette)
        digests += [decode(picture).digest(text) for text in settings_texts]
    assert len(set(digests)) == len(palettes) * len(settings_texts)


@given(left=st.binary(max_size=6), right=st.binary(max_size=6), cut=st.integers(0, 12))
def test_parts_of_a_digest_do_not_run_into_each_other(left, right, cut):
    """Catches `ab` + `c` hashed like `a` + `bc`."""
    joined = left + right
    other = (joined[:cut], joined[cut:])
    same = image_module._hash_parts(left, right) == image_module._hash_parts(*other)
    assert same == (other == (left, right))


def test_one_pixel_anywhere_changes_the_digest():
    """Catches a strip that is left out, above all the last and shorter one."""
    height = 2 * image_module._STRIP_PIXELS // 1000 + 7
    picture = Image.new("L", (1000, height))
    found = {decode(picture).digest("")}
    for y in (0, height // 2, height - 1):
        picture.putpixel((999, y), 1)
        found.add(decode(picture).digest(""))
        picture.putpixel((999, y), 0)
    assert len(found) == 4


def test_strips_do_not_change_the_digest(monkeypatch):
    """Catches a cache that is lost, or two digests for one picture, when the strip size changes."""
    whole = [decode(CORPUS[name]).digest("") for name in CORPUS]
    monkeypatch.setattr(image_module, "_STRIP_PIXELS", 50)
    assert [decode(CORPUS[name]).digest("") for name in CORPUS] == whole


def test_the_digest_is_of_the_picture_and_not_of_the_file():
    """Catches metadata or compression that make the same picture new to the cache."""
    picture = noise(12, 10)
    files = [
        encode(picture, "PNG"),
        encode(picture, "PNG", compress_level=0, exif=exif_orientation(6)),
        encode(picture, "BMP"),
        encode(picture, "WEBP", lossless=True),
    ]
    assert {decode(file).digest("s") for file in files} == {decode(picture).digest("s")}
