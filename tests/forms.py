"""What tests of the request forms share: a picture, and requests as plain HTTP, byte for byte."""

from __future__ import annotations

import base64
import http.client
import io
import json
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from PIL import Image, ImageDraw

import glimt

QUESTION = "图里有什么?"
GREEDY = glimt.SamplingParams(temperature=0, max_tokens=24, min_tokens=0, repetition_penalty=1.0)


def _png() -> bytes:
    image = Image.new("RGB", (96, 96), "white")
    ImageDraw.Draw(image).rectangle((20, 20, 70, 70), fill=(200, 30, 30))
    content = io.BytesIO()
    image.save(content, "PNG")
    return content.getvalue()


PNG = _png()
BASE64 = base64.b64encode(PNG).decode()
DATA_URL = f"data:image/png;base64,{BASE64}"
PARTS = [
    {"type": "text", "text": QUESTION},
    {"type": "image_url", "image_url": DATA_URL},
]


@dataclass(frozen=True)
class Reply:
    status: int
    headers: dict[str, str]
    content: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.content)

    @property
    def events(self) -> list[Any]:
        """What a stream's `data:` lines hold."""
        blocks = self.content.decode().split("\n\n")
        assert blocks.pop() == ""
        told = [block for block in blocks if not block.startswith(":")]
        assert all(block.startswith("data:") for block in told)
        return [json.loads(block.removeprefix("data:")) for block in told]


def call(
    url: str,
    path: str,
    body: Any = None,
    headers: dict[str, str] | None = None,
    method: str | None = None,
) -> Reply:
    """One request over a connection of its own; body: bytes as they are, else as JSON."""
    content = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
    try:
        connection.request(
            method or ("GET" if body is None else "POST"), path, content, headers or {}
        )
        response = connection.getresponse()
        told = {name.lower(): value for name, value in response.getheaders()}
        return Reply(response.status, told, response.read())
    finally:
        connection.close()


def chat(parts: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": parts}]
