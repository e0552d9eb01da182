"""How long a running stream stands still while another client's picture is processed.

    python -m benchmarks.stream_gap synthetic:glm-4v-9b,layers=4,vision-layers=4

One stream runs; when it has a while behind it, a picture of 1120 x 1120 and a question come in.
The gaps between the stream's tokens are told: median and largest, without a limit (a whole block of
the tower a step), with --max-stretch, and of a stream that runs alone, which is what the machine
itself does to them. Real server, real client, over loopback.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import platform
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import aiohttp
import numpy as np
import uvicorn
from PIL import Image

import glimt
from glimt.server.app import create_app
from glimt.server.config import ServerConfig


@contextmanager
def served(engine: glimt.AsyncEngine) -> Iterator[str]:
    """The application on a free port, in a thread."""
    app, context = create_app(lambda: engine, ServerConfig(num_decoders=0), "m", 0)
    options: dict[str, Any] = {"port": 0, "log_level": "warning", "lifespan": "on"}
    options |= {"loop": "asyncio", "http": "h11"}  # as glimt serve, whatever else is installed
    server = uvicorn.Server(uvicorn.Config(app, **options))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
    thread.start()
    while not (server.started and context.service.host.is_ready):
        time.sleep(0.05)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(60)


def picture_url() -> str:
    """A picture that nobody has seen, as a data URL."""
    noise = np.random.default_rng().integers(0, 256, (1120, 1120, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noise).save(stream, "JPEG")
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"


def body(content: Any, num_tokens: int, stream: bool) -> dict[str, Any]:
    """A greedy request of an exact number of tokens."""
    return {
        "messages": [{"role": "user", "content": content}],
        "temperature": 0,
        "max_tokens": num_tokens,
        "ignore_eos": True,
        "stream": stream,
    }


async def gaps_of(url: str, num_tokens: int, began: asyncio.Event) -> list[float]:
    """Seconds between the events with text of one stream; `began` is set a third of the way in."""
    gaps, last = [], None
    async with (
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(None)) as session,
        session.post(f"{url}/v1/chat/completions", json=body("字", num_tokens, True)) as reply,
    ):
        assert reply.status == 200, await reply.text()
        async for line in reply.content:
            if b'"content":' not in line:
                continue
            now = time.perf_counter()
            gaps += [] if last is None else [now - last]
            last = now
            if len(gaps) == num_tokens // 10:
                began.set()
    return gaps


def described(gaps: list[float]) -> dict[str, float]:
    """Of a stream: its usual and its largest gap."""
    middle = statistics.median(gaps)
    return {
        "median_ms": 1e3 * middle,
        "largest_ms": 1e3 * max(gaps),
        "ratio": max(gaps) / middle,
    }


async def measure_alone(url: str, num_tokens: int) -> dict[str, float]:
    """The gaps of a stream beside which nothing happens."""
    return described(await gaps_of(url, num_tokens, asyncio.Event()))


async def measure(url: str, num_tokens: int) -> dict[str, float]:
    """The stream's gaps and the other client's time to its whole, one-token answer."""
    began = asyncio.Event()
    running = asyncio.create_task(gaps_of(url, num_tokens, began))
    await began.wait()
    content = [
        {"type": "image_url", "image_url": {"url": picture_url()}},
        {"type": "text", "text": "图"},
    ]
    start = time.perf_counter()
    async with (
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(None)) as session,
        session.post(f"{url}/v1/chat/completions", json=body(content, 1, False)) as reply,
    ):
        assert reply.status == 200, await reply.text()
    picture_s = time.perf_counter() - start
    is_beside = not running.done()
    gaps = await running
    return {
        **described(gaps),
        "picture_s": picture_s,
        "picture_done_beside_stream": is_beside,
    }


def main() -> None:
    """Measure each setting by turns, as often as asked, and print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--stretch", type=float, nargs="*", default=[0.0, 2.0])
    given = parser.parse_args()
    names = ["alone", *map(str, given.stretch)]
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    engines = glimt.AsyncEngine.load(
        glimt.EngineConfig(model=given.model, dtype=given.dtype, max_num_seqs=4)
    )
    with served(engines) as url:
        asyncio.run(measure(url, 60))  # warm-up
        for _ in range(given.repeats):
            found["alone"].append(asyncio.run(measure_alone(url, given.tokens)))
            print("alone", found["alone"][-1], file=sys.stderr)
            for stretch in given.stretch:
                engines.engine.pace.max_stretch = stretch or None
                found[str(stretch)].append(asyncio.run(measure(url, given.tokens)))
                print(stretch, found[str(stretch)][-1], file=sys.stderr)
    print(json.dumps({"model": given.model, "machine": platform.processor(), "runs": found}))


if __name__ == "__main__":
    main()
