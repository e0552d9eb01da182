"""Decodes pictures in child processes with little memory and time: none can harm the server.

What a hostile file may do is then to end a child, which is replaced, and its own request.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import resource
import threading
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

from PIL import Image

from glimt.config import ImageLimits
from glimt.errors import ImageError
from glimt.inputs.image import decode_image, open_image

_CHILD_BYTES = 3 * 2**30  # of address space: a 50-megapixel picture takes 0.4 of it
_CHILD_CPU_S = 600  # of all its pictures together; a new child then takes over
_DECODE_S = 30.0
_TASKS_PER_CHILD = 500


@dataclass(frozen=True, slots=True)
class RawPicture:
    """A decoded picture as RGB bytes."""

    size: tuple[int, int]
    pixels: bytes

    def image(self) -> Image.Image:
        """The picture again."""
        return Image.frombytes("RGB", self.size, self.pixels)


class Decoders:
    """Child processes that decode; none: everything is decoded here, by whoever asks."""

    def __init__(self, num_processes: int, limits: ImageLimits) -> None:
        self._num_processes = num_processes
        self._limits = limits
        self._pool: ProcessPoolExecutor | None = None

    async def decode(self, content: bytes | str, field: str) -> Image.Image:
        """The picture as RGB; content: the encoded file, or its base64 or data URL.

        Raises ImageError.
        """
        if not self._num_processes:
            return await asyncio.to_thread(lambda: _image(_decode(content, self._limits), field))
        loop = asyncio.get_running_loop()
        pool = self._pool or self._started()
        try:
            async with asyncio.timeout(_DECODE_S):
                found = await loop.run_in_executor(pool, _decode, content, self._limits)
        except BrokenProcessPool:
            self._forget(pool)
            raise ImageError(field, "decoding the picture took too much memory or time") from None
        except TimeoutError:
            self._forget(pool)
            raise ImageError(field, f"decoding took longer than {_DECODE_S:g} s") from None
        return await asyncio.to_thread(_image, found, field)

    def _started(self) -> ProcessPoolExecutor:
        self._pool = ProcessPoolExecutor(
            self._num_processes,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_limit_child,
            max_tasks_per_child=_TASKS_PER_CHILD,
        )
        return self._pool

    def _forget(self, pool: ProcessPoolExecutor) -> None:
        """The next picture gets new children; those of a decoder that hangs are ended."""
        if self._pool is pool:
            self._pool = None
        for child in list((pool._processes or {}).values()):
            child.kill()
        pool.shutdown(wait=False, cancel_futures=True)

    def close(self) -> None:
        """End the children."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None


def _limit_child() -> None:
    for what, most in ((resource.RLIMIT_AS, _CHILD_BYTES), (resource.RLIMIT_CPU, _CHILD_CPU_S)):
        _, hard = resource.getrlimit(what)
        least = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(what, (least, least))
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A server that is killed ends nobody: this child would wait for pictures for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "this runs in a child"
    parent.join()
    os._exit(1)


def _decode(content: bytes | str, limits: ImageLimits) -> RawPicture | str:
    """In the child: read, check and decode; what stands against it comes back as a text."""
    try:
        opened = open_image(content, limits, allow_files=False, field="")
        image = decode_image(opened).rgb
    except ImageError as error:
        return error.message
    return RawPicture(image.size, image.tobytes())


def _image(found: RawPicture | str, field: str) -> Image.Image:
    if isinstance(found, str):
        raise ImageError(field, found)
    return found.image()
