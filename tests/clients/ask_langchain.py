"""Asks by LangChain's `ChatOpenAI`. Input and environment: as `ask_text_generation`."""

from __future__ import annotations

import json
import sys
from typing import Any

from langchain_openai import ChatOpenAI

MAX_TOKENS = 24


def main() -> None:
    """The answer to each question, and that to a question after an answer."""
    asked = json.load(sys.stdin)
    model = ChatOpenAI(
        model="demo",
        base_url=f"{asked['url']}/v1",
        api_key="any",
        temperature=0,
        max_tokens=MAX_TOKENS,
        max_retries=0,
        stream_usage=True,
    )
    json.dump({name: answers(model, each) for name, each in asked["messages"].items()}, sys.stdout)


def answers(model: ChatOpenAI, messages: list[Any]) -> dict[str, Any]:
    """One question's answer, whole and streamed, with what LangChain counted."""
    whole = model.invoke(messages)
    chunks = list(model.stream(messages))
    last = chunks[0]
    for chunk in chunks[1:]:
        last += chunk
    return {
        "text": whole.content,
        "finish_reason": whole.response_metadata["finish_reason"],
        "num_prompt_tokens": whole.usage_metadata["input_tokens"],
        "num_tokens": whole.usage_metadata["output_tokens"],
        "streamed_text": "".join(chunk.content for chunk in chunks),
        "last_finish_reason": last.response_metadata["finish_reason"],
        "streamed_num_tokens": last.usage_metadata["output_tokens"],
    }


if __name__ == "__main__":
    main()
