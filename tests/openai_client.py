"""OpenAI's own client, unmodified, for a server of tests."""

from __future__ import annotations

from typing import Any

import openai

from serving import Served


def connect(served: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="any", max_retries=0)


def said(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]
