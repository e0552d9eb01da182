"""PictureReader: a conversation's pictures, from wherever they may come, as decoded ones."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from glimt.config import ImageLimits
from glimt.errors import ImageError
from glimt.inputs.image_source import read_source
from glimt.server.config import ServerConfig
from glimt.server.decoding import Decoders
from glimt.server.fetch import Fetcher
from glimt.server.metrics import Metrics
from glimt.types import ImagePart, Message, TextPart

_URLS = ("http://", "https://")


class PictureReader:
    """Fetches and decodes for one server."""

    def __init__(self, config: ServerConfig, metrics: Metrics) -> None:
        self._fetcher = Fetcher(config)
        self._metrics = metrics
        limits = ImageLimits(
            max_bytes=config.max_image_bytes,
            max_pixels=config.max_image_pixels,
            max_images=config.limit_images,
        )
        self._media_path = config.media_path
        self._limits = limits
        self._decoders = Decoders(config.num_decoders, limits)

    async def read(self, messages: Sequence[Message]) -> list[Message]:
        """The same conversation with every picture decoded.

        Raises ImageError naming the part.
        """
        return [await self._message(message, m) for m, message in enumerate(messages)]

    async def _message(self, message: Message, m: int) -> Message:
        parts = (
            self._part(part, f"messages[{m}].content[{p}]") for p, part in enumerate(message.parts)
        )
        return replace(message, parts=tuple(await asyncio.gather(*parts)))

    async def _part(self, part: TextPart | ImagePart, field: str) -> TextPart | ImagePart:
        if isinstance(part, TextPart):
            return part
        fetch_s = None
        try:
            began_s = time.monotonic()
            content = part.source
            if isinstance(content, Path):
                content = await asyncio.to_thread(self._file, content, field)
            if isinstance(content, str) and content.lower().startswith(_URLS):
                content = await self._fetcher.fetch(content, field)
                fetch_s = time.monotonic() - began_s
                began_s = time.monotonic()
            image = await self._decoders.decode(content, field)
        except ImageError:
            self._metrics.image("refused", fetch_s, None)
            raise
        self._metrics.image("read", fetch_s, time.monotonic() - began_s)
        return ImagePart(image)

    def _file(self, path: Path, field: str) -> bytes:
        """A file of the media folder, and of no other, whatever links and dots its name has."""
        folder = self._media_path
        if folder is None:
            raise ImageError(field, "names a file; send the picture itself as a data URL")
        try:
            found = path.resolve(strict=True)
            is_inside = found.is_relative_to(folder.resolve())
        except (OSError, ValueError, RuntimeError):
            is_inside = False
        if not is_inside:
            raise ImageError(field, "names no file of the server's media folder")
        return read_source(found, self._limits, allow_files=True, field=field)

    def close(self) -> None:
        """End the child processes."""
        self._decoders.close()
