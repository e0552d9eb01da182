"""A server's requests without HTTP, for tests: a noise model's engine behind a `Service`."""

from __future__ import annotations

import asyncio
import io
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import glimt
from glimt.inputs.chat import parse_messages
from glimt.server.config import ServerConfig
from glimt.server.host import EngineHost
from glimt.server.metrics import Metrics
from glimt.server.service import Ask, Service
from glimt.types import SamplingParams

NUM_BLOCKS = 64


def picture() -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def conversation(num_images: int = 0) -> list[dict[str, Any]]:
    shown = [{"type": "image", "image": picture()}] * num_images
    return [{"role": "user", "content": [*shown, {"type": "text", "text": "你好"}]}]


def ask(num_images: int = 0, request_id: str = "r", **fields: Any) -> Ask:
    sampling = {"temperature": 0, "max_tokens": 4, "ignore_eos": True} | fields.pop("sampling", {})
    messages = parse_messages(conversation(num_images), glimt.ImageLimits())
    given = {"messages": messages, "sampling": SamplingParams(**sampling), **fields}
    return Ask(protocol="openai", request_id=request_id, **given)


@asynccontextmanager
async def service(folder: Path, **settings: Any) -> AsyncGenerator[Service, None]:
    def load() -> glimt.AsyncEngine:
        config = glimt.EngineConfig(model=str(folder), num_blocks=NUM_BLOCKS, max_num_seqs=2)
        return glimt.AsyncEngine.load(config)

    config = ServerConfig(**{"num_decoders": 0, **settings})
    host = EngineHost(load, 3, 60)
    await host.start()
    opened = Service(host, config, Metrics(host, "m"))
    yield opened
    await host.stop()
    opened.pictures.close()


def run(folder: Path, scene: Callable[[Service], Any], **settings: Any) -> Any:
    async def inside() -> Any:
        async with service(folder, **settings) as opened:
            return await scene(opened)

    return asyncio.run(inside())


async def settled(opened: Service) -> None:
    """Return once every block is free again."""
    engine = opened.host.engine
    deadline = time.monotonic() + 5
    while engine.stats().num_free_blocks < NUM_BLOCKS or engine.stats().num_running:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)
