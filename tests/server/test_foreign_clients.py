"""Clients in an environment of their own, unmodified, against the engine's own answers."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

import glimt
from forms import DATA_URL, GREEDY, QUESTION, chat
from serving import Served

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv/clients/bin/python"
pytestmark = pytest.mark.skipif(
    not PYTHON.exists(), reason="needs .venv/clients: make .venv/clients/installed"
)

GREETING = "你好"
PICTURE = {"type": "image_url", "image_url": {"url": DATA_URL}}
MESSAGES = {"text": chat(GREETING), "picture": chat([{"type": "text", "text": QUESTION}, PICTURE])}
PROMPTS = {"text": GREETING, "picture": f"![]({DATA_URL}){QUESTION}"}


@pytest.fixture(scope="module")
def answers(llm) -> dict[str, glimt.RequestOutput]:
    """What the engine says without a server."""
    return {name: llm.chat(messages, GREEDY) for name, messages in MESSAGES.items()}


def told_by(client: str, served: Served) -> dict[str, Any]:
    """What a client made of the server's answers, in a process that knows nothing of glimt."""
    asked = {"url": served.url, "messages": MESSAGES, "prompts": PROMPTS, "question": GREETING}
    done = subprocess.run(
        [PYTHON, "-I", ROOT / f"tests/clients/ask_{client}.py"],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        # Without it litellm asks the web for prices when it is imported.
        env={"PATH": os.environ["PATH"], "LITELLM_LOCAL_MODEL_COST_MAP": "True"},
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def as_openai_clients_tell(answer: glimt.RequestOutput) -> dict[str, Any]:
    """One answer in the words of the scripts."""
    return {
        "text": answer.text,
        "finish_reason": answer.finish_reason,
        "num_prompt_tokens": answer.usage.prompt_tokens,
        "num_tokens": answer.usage.completion_tokens,
        "streamed_text": answer.text,
        "last_finish_reason": answer.finish_reason,
    }


@pytest.fixture(scope="module")
def text_generation(upstream) -> dict[str, Any]:
    return told_by("text_generation", upstream)


def test_text_generation_gets_the_engines_answers(text_generation, answers):
    """Catches what its pydantic models refuse, and [DONE], on which it fails."""
    told = text_generation
    for name, answer in answers.items():
        assert told[name] == {
            "text": answer.text,
            "ids": list(answer.token_ids),
            "num_tokens": answer.usage.completion_tokens,
            "num_prompt_tokens": len(answer.prompt_token_ids),
            "finish_reason": "eos_token",
            "streamed_text": answer.text,
            "streamed_ids": list(answer.token_ids),
            "last_text": answer.text,
            "last_finish_reason": "eos_token",
        }
    text = answers["picture"].text
    assert told["async"] == {"text": text, "streamed_text": text}
    assert told["chat"] == {
        "text": answers["text"].text,
        "finish_reason": answers["text"].finish_reason,
        "num_tokens": answers["text"].usage.completion_tokens,
    }


def test_text_generation_raises_its_own_exception(text_generation):
    """Catches an error_type that it does not know, and a stream's error that is no event."""
    assert len(text_generation["refused"]) == 2
    for each in text_generation["refused"]:
        assert each.startswith("Input validation error: parameters.max_new_tokens: is 100000")


def test_litellm_gets_the_engines_answers_by_every_provider(upstream, answers):
    """Catches a finish word or a chunk that one of its ways to ask does not take."""
    told = told_by("litellm", upstream)
    expected = {name: as_openai_clients_tell(answer) for name, answer in answers.items()}
    for provider in ("openai/demo", "hosted_vllm/demo", "huggingface/demo"):
        assert told[provider] == expected, provider
    text = answers["text"].text
    assert told["triton/demo"] == {"text": {"text": text, "streamed_text": text}}
    # It goes by the message's words alone; by this exception its users fall back to other models.
    assert told["refused"] == {"kind": "ContextWindowExceededError", "status": 400}


def test_langchain_gets_the_engines_answers(upstream, answers):
    """Catches the chunk of counts, whose list of choices is empty."""
    told = told_by("langchain", upstream)
    for name, answer in answers.items():
        counted = {"streamed_num_tokens": answer.usage.completion_tokens}
        assert told[name] == as_openai_clients_tell(answer) | counted
