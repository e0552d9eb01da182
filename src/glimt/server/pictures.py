"""PictureReader: a conversation's pictures, from wherever they may come, as decoded ones."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

from glimt.config import ImageLimits
from glimt.errors import CapacityError, ImageError
from glimt.inputs.image_source import read_source
from glimt.server.config import ServerConfig
from glimt.server.decoding import Decoders
from glimt.server.fetch import Fetcher
from glimt.server.fetch_places import Held
from glimt.server.metrics import Metrics
from glimt.types import ImagePart, Message, TextPart

_URLS = ("http://", "https://")


Part = TextPart | ImagePart


class PictureReader:
    """Fetches and decodes for one server.

    num_requests: whose pictures may be decoded at one time
    """

    def __init__(self, config: ServerConfig, metrics: Metrics, num_requests: int) -> None:
        # Fetched bytes that wait take no more room than those that are decoded already may.
        of_one = config.limit_images * config.max_image_bytes
        self._fetcher = Fetcher(config, num_requests * of_one)
        self._metrics = metrics
        limits = ImageLimits(
            max_bytes=config.max_image_bytes,
            max_pixels=config.max_image_pixels,
            max_images=config.limit_images,
        )
        self._media_path = config.media_path
        self._limits = limits
        self._decoders = Decoders(config.num_decoders, limits)

    @asynccontextmanager
    async def fetched(self, messages: Sequence[Message]) -> AsyncGenerator[list[Message], None]:
        """The same conversation with a picture's bytes in the place of each web address.

        They count as held until the block ends. Raises ImageError naming the part, CapacityError.
        """
        with self._fetcher.holding() as held:
            yield await _with_parts(messages, lambda part, field: self._fetched(part, field, held))

    async def _fetched(self, part: Part, field: str, held: Held) -> Part:
        source = part.source if isinstance(part, ImagePart) else None
        if not (isinstance(source, str) and source[:8].lower().startswith(_URLS)):
            return part
        began_s = time.monotonic()
        try:
            content = await self._fetcher.fetch(source, field, held)
        except ImageError:
            self._metrics.image("refused", None)
            raise
        except CapacityError:
            self._metrics.failed("overloaded")
            raise
        self._metrics.image_fetched(time.monotonic() - began_s)
        return ImagePart(content)

    async def read(self, messages: Sequence[Message]) -> list[Message]:
        """The same conversation with every picture decoded; those of web addresses are here.

        Raises ImageError naming the part.
        """
        return await _with_parts(messages, self._decoded)

    async def _decoded(self, part: Part, field: str) -> Part:
        if isinstance(part, TextPart):
            return part
        began_s = time.monotonic()
        content = part.source
        try:
            if isinstance(content, Path):
                content = await asyncio.to_thread(self._file, content, field)
            image = await self._decoders.decode(content, field)
        except ImageError:
            self._metrics.image("refused", None)
            raise
        self._metrics.image("read", time.monotonic() - began_s)
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
        """End the child processes, and wait for no host."""
        self._fetcher.close()
        self._decoders.close()


async def _with_parts(
    messages: Sequence[Message], change: Callable[[Part, str], Awaitable[Part]]
) -> list[Message]:
    """A conversation with each of its parts changed; the first error ends the other changes."""
    tasks = [
        [
            asyncio.ensure_future(change(part, f"messages[{m}].content[{p}]"))
            for p, part in enumerate(message.parts)
        ]
        for m, message in enumerate(messages)
    ]
    every = [task for row in tasks for task in row]
    try:
        await asyncio.gather(*every)
    finally:
        for task in every:
            task.cancel()
        await asyncio.gather(*every, return_exceptions=True)
    return [
        replace(message, parts=tuple(task.result() for task in row))
        for message, row in zip(messages, tasks, strict=True)
    ]
