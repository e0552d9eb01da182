"""Asks by `text-generation`. Standard input: the address and the questions; output: the answers.

Runs in the environment of `requirements.txt`, which has neither glimt nor torch.
"""

from __future__ import annotations

import asyncio
import json
import sys

from text_generation import AsyncClient, Client
from text_generation.errors import ValidationError
from text_generation.types import Message

MAX_TOKENS = 24


def main() -> None:
    """What each method of the client makes of each question."""
    asked = json.load(sys.stdin)
    client = Client(asked["url"], timeout=60)
    told = {name: answers(client, prompt) for name, prompt in asked["prompts"].items()}
    told["async"] = asyncio.run(answer_later(asked["url"], asked["prompts"]["picture"]))
    told["chat"] = chat(client, asked["question"])
    told["refused"] = refusals(client)
    json.dump(told, sys.stdout)


def answers(client: Client, prompt: str) -> dict[str, object]:
    """One question's answer, whole and streamed."""
    whole = client.generate(prompt, max_new_tokens=MAX_TOKENS, decoder_input_details=True)
    events = list(client.generate_stream(prompt, max_new_tokens=MAX_TOKENS))
    details = whole.details
    return {
        "text": whole.generated_text,
        "ids": [token.id for token in details.tokens],
        "num_tokens": details.generated_tokens,
        "num_prompt_tokens": len(details.prefill),
        "finish_reason": details.finish_reason.value,
        "streamed_text": "".join(e.token.text for e in events if not e.token.special),
        "streamed_ids": [event.token.id for event in events],
        "last_text": events[-1].generated_text,
        "last_finish_reason": events[-1].details.finish_reason.value,
    }


async def answer_later(url: str, prompt: str) -> dict[str, str]:
    """The same by the client for asyncio."""
    client = AsyncClient(url, timeout=60)
    whole = await client.generate(prompt, max_new_tokens=MAX_TOKENS)
    stream = client.generate_stream(prompt, max_new_tokens=MAX_TOKENS)
    pieces = [event.token.text async for event in stream if not event.token.special]
    return {"text": whole.generated_text, "streamed_text": "".join(pieces)}


def chat(client: Client, question: str) -> dict[str, object]:
    """Its chat, whole: what it makes of a stream is broken with every server."""
    messages = [Message(role="user", content=question)]
    answer = client.chat(messages, max_tokens=MAX_TOKENS, temperature=0)
    choice = answer.choices[0]
    return {
        "text": choice.message.content,
        "finish_reason": choice.finish_reason,
        "num_tokens": answer.usage["completion_tokens"],
    }


def refusals(client: Client) -> list[str]:
    """What the client's exception says of a limit that does not fit, whole and streamed."""
    said = []
    for ask in (client.generate, client.generate_stream):
        try:
            list(ask("hi", max_new_tokens=100000))
        except ValidationError as error:
            said.append(str(error))
    return said


if __name__ == "__main__":
    main()
