"""Asks by `litellm`, by each of its providers. Input and environment: as `ask_text_generation`."""

from __future__ import annotations

import json
import sys
from typing import Any

import litellm

MAX_TOKENS = 24


def main() -> None:
    """The answers by provider and question, and what a refusal becomes."""
    asked = json.load(sys.stdin)
    places = {
        "openai/demo": f"{asked['url']}/v1",
        "hosted_vllm/demo": f"{asked['url']}/v1",
        "huggingface/demo": asked["url"],
    }
    told: dict[str, Any] = {
        model: {name: answers(model, place, each) for name, each in asked["messages"].items()}
        for model, place in places.items()
    }
    told["triton/demo"] = {"text": triton(f"{asked['url']}/v2/models/demo/generate", asked)}
    told["refused"] = refusal(f"{asked['url']}/v1")
    json.dump(told, sys.stdout)


def ask(model: str, place: str, messages: list[Any], **options: Any) -> Any:
    """One request; what litellm would send elsewhere stays here."""
    settings = {"api_key": "any", "api_base": place, "max_retries": 0, **options}
    return litellm.completion(model=model, messages=messages, max_tokens=MAX_TOKENS, **settings)


def answers(model: str, place: str, messages: list[Any]) -> dict[str, Any]:
    """One question's answer, whole and streamed."""
    whole = ask(model, place, messages, temperature=0)
    chunks = list(ask(model, place, messages, temperature=0, stream=True))
    return {
        "text": whole.choices[0].message.content,
        "finish_reason": whole.choices[0].finish_reason,
        "num_prompt_tokens": whole.usage.prompt_tokens,
        "num_tokens": whole.usage.completion_tokens,
        "streamed_text": "".join(chunk.choices[0].delta.content or "" for chunk in chunks),
        "last_finish_reason": chunks[-1].choices[0].finish_reason,
    }


def triton(place: str, asked: dict[str, Any]) -> dict[str, str]:
    """An answer by Triton's form, for which litellm takes no temperature and tells no counts."""
    messages = asked["messages"]["text"]
    whole = ask("triton/demo", place, messages)
    chunks = ask("triton/demo", place, messages, stream=True)
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks]
    return {"text": whole.choices[0].message.content, "streamed_text": "".join(pieces)}


def refusal(place: str) -> dict[str, Any]:
    """The class and the status of litellm's exception for a prompt that cannot fit."""
    try:
        ask("openai/demo", place, [{"role": "user", "content": "a" * 60000}])
    except litellm.ContextWindowExceededError as error:
        return {"kind": type(error).__name__, "status": error.status_code}
    return {}


if __name__ == "__main__":
    main()
