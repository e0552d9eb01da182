"""Decoding in child processes: the same picture, and nothing that a picture does reaches us."""

from __future__ import annotations

import asyncio
import base64
import io
import os
import signal
import struct
import zlib
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

from glimt.config import ImageLimits
from glimt.errors import ImageError
from glimt.server import decoding
from glimt.server.decoding import Decoders

LIMITS = ImageLimits(max_pixels=1_000_000, max_bytes=100_000)


@pytest.fixture(scope="module")
def decoders() -> Iterator[Decoders]:
    opened = Decoders(1, LIMITS)
    yield opened
    opened.close()


def png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def noise() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8))


@pytest.mark.parametrize("mode", ["RGB", "P", "L", "RGBA", "1"])
def test_a_child_gives_what_would_be_decoded_here(decoders, mode):
    """Catches a palette or alpha that is lost on the way."""
    given = png(noise().convert(mode))
    there = asyncio.run(decoders.decode(given, "f"))
    here = asyncio.run(Decoders(0, LIMITS).decode(given, "f"))
    assert there.mode == here.mode == "RGB"
    assert (
        there.tobytes() == here.tobytes() == Image.open(io.BytesIO(given)).convert("RGB").tobytes()
    )


def test_base64_and_data_urls_are_read_in_the_child(decoders):
    """Catches a form that only one of the two ways takes."""
    text = base64.b64encode(png(noise())).decode()
    for form in (text, f"data:image/png;base64,{text}"):
        assert asyncio.run(decoders.decode(form, "f")).tobytes() == noise().tobytes()


def huge_png(width: int, height: int) -> bytes:
    """A header of so many pixels, and hardly any data."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(b"\0" * 100)), (b"IEND", b""))
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (huge_png(50_000, 50_000), "2,500,000,000 in all"),
        (huge_png(5, 50_000), "the long side may be at most 200 times"),
        (png(noise())[:-40], "cannot be read as a picture"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is no "),
        (b"<html>", "is no "),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 200_000, "200,008 bytes"),
        ("data:text/html;base64,PGI+", "is a data URL that begins"),
        ("not base64!", "not a data URL"),
        ("/etc/passwd", "not a data URL"),
        ("file:///etc/passwd", "files are not read here"),
    ],
    ids=str,
)
def test_what_is_no_picture_is_refused_with_its_reason(decoders, content, said):
    """Catches a bomb that is decoded, a file that is read, and an error that loses its words."""
    with pytest.raises(ImageError) as caught:
        asyncio.run(decoders.decode(content, "messages[0].content[1]"))
    assert caught.value.field == "messages[0].content[1]"
    assert said in caught.value.message


async def until_noticed(decoders: Decoders) -> None:
    for _ in range(50):
        await decoders.decode(png(noise()), "f")
        await asyncio.sleep(0.05)


def test_a_child_that_dies_is_replaced(decoders):
    """Catches a server that decodes nothing any more after one bad picture."""

    async def scene() -> None:
        await decoders.decode(png(noise()), "f")
        assert decoders._pool is not None
        (child,) = decoders._pool._processes
        os.kill(child, signal.SIGKILL)
        with pytest.raises(ImageError, match="too much memory or time"):
            await until_noticed(decoders)
        assert (await decoders.decode(png(noise()), "f")).size == (40, 30)

    asyncio.run(scene())


def test_a_decoder_that_hangs_is_ended(monkeypatch):
    """Catches a picture that blocks its decoder, and everybody's behind it, for ever."""
    monkeypatch.setattr(decoding, "_DECODE_S", 0.0)
    decoders = Decoders(1, LIMITS)
    with pytest.raises(ImageError, match="took longer than 0 s"):
        asyncio.run(decoders.decode(png(noise()), "f"))
    assert decoders._pool is None
    monkeypatch.setattr(decoding, "_DECODE_S", 30.0)
    assert asyncio.run(decoders.decode(png(noise()), "f")).size == (40, 30)
    decoders.close()
