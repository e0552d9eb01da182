"""What lmms-eval and VLMEvalKit send is understood, and answered as LLM.chat answers it.

The bodies are in tests/golden/adapters, each with the source that was read for it.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

import glimt
from glimt.config import ImageLimits
from glimt.inputs.chat import parse_messages
from glimt.types import ImagePart, SamplingParams, TextPart
from openai_server import MODEL, engine_app, serving

FOLDER = Path(__file__).parents[1] / "golden" / "adapters"
BODIES = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in FOLDER.glob("*.json")}
SETTINGS = {"num_blocks": 128, "num_threads": 1}

each_body = pytest.mark.parametrize("name", sorted(BODIES))


@pytest.fixture(scope="module", params=["glm4v_9b", "visualglm"])
def model(request: pytest.FixtureRequest, folders: dict[str, Path]) -> str:
    return str(folders[request.param])


@pytest.fixture(scope="module")
def llm(model: str) -> glimt.LLM:
    return glimt.LLM(model, **SETTINGS)


@pytest.fixture(scope="module")
def server(model: str) -> Iterator[str]:
    engine = glimt.AsyncEngine.load(glimt.EngineConfig(model=model, **SETTINGS))
    with serving(engine_app(engine)) as url:
        yield url
    engine.close()


def post(url: str, *bodies: Any) -> list[tuple[int, dict[str, Any]]]:
    """Send bodies one after another as the adapters do: JSON, with a key; status and reply."""
    headers = {"Content-Type": "application/json", "Authorization": "Bearer sk-admin"}

    async def go() -> list[tuple[int, dict[str, Any]]]:
        replies = []
        async with aiohttp.ClientSession(headers=headers) as session:
            for body in bodies:
                address = f"{url}/v1/chat/completions"
                async with session.post(address, data=json.dumps(body)) as reply:
                    replies.append((reply.status, await reply.json()))
        return replies

    return asyncio.run(go())


def sampling_of(body: dict[str, Any]) -> SamplingParams:
    return SamplingParams(
        temperature=body["temperature"],
        max_tokens=body["max_tokens"],
        top_p=body.get("top_p"),
        n=body.get("n", 1),
    )


def shortened(name: str) -> dict[str, Any]:
    """The body, asking for few tokens: a noise model's answer has no end."""
    body = BODIES[name]["body"]
    return body | {"max_tokens": min(16, body["max_tokens"])}


def test_a_body_is_answered_as_it_stands(llm, server):
    """Catches 256 tokens, as MindIE asks for, that do not fit or do not come."""
    body = BODIES["lmms_eval_simple"]["body"]
    [(status, reply)] = post(server, body)
    assert status == 200
    expected = llm.chat(body["messages"], sampling_of(body))
    assert reply["choices"][0]["message"]["content"] == expected.text
    assert reply["usage"]["completion_tokens"] == expected.usage.completion_tokens


def test_every_file_names_what_was_read():
    """Catches a fixture nobody can check again, and an empty folder that tests nothing."""
    assert len(BODIES) == 13
    for name, whole in BODIES.items():
        program = "lmms-eval 0.7.3" if name.startswith("lmms_eval") else "VLMEvalKit at "
        assert program in whole["source"]
        assert whole["says"]
        assert whole["body"]["model"] == MODEL


@each_body
def test_messages_are_parsed_part_by_part(name):
    """Catches detail, a foreign key or a list of texts that is refused, and a part that is lost."""
    raw = BODIES[name]["body"]["messages"]
    parsed = parse_messages(raw, ImageLimits())
    assert [message.role for message in parsed] == [message["role"] for message in raw]
    for message, given in zip(parsed, raw, strict=True):
        parts = given["content"] if isinstance(given["content"], list) else [given["content"]]
        kinds = [ImagePart if "image_url" in part else TextPart for part in parts]
        assert [type(part) for part in message.parts] == kinds


@each_body
def test_the_answer_is_that_of_chat(name, llm, server):
    """Catches a server's request that becomes another prompt, picture or sampling than chat's."""
    body = shortened(name)
    (status, reply), (again, same) = post(server, body, body)
    assert (status, again) == (200, 200), reply
    expected = llm.chat(body["messages"], sampling_of(body))
    choice = reply["choices"][0]
    assert choice["message"]["content"] == expected.text
    assert choice["finish_reason"] == expected.finish_reason
    assert reply["usage"]["prompt_tokens"] == expected.usage.prompt_tokens
    assert reply["usage"]["completion_tokens"] == expected.usage.completion_tokens
    assert len(reply["choices"]) == 1
    assert same["choices"] == reply["choices"], "a retry asks the same and is told the same"


def test_pictures_in_both_forms_are_seen(llm):
    """Catches a picture that is taken for text: the answers would be right all the same."""
    for name in ("lmms_eval_simple", "vlmevalkit_gpt4v"):
        body = BODIES[name]["body"]
        texts = [part for part in body["messages"][-1]["content"] if part["type"] == "text"]
        without = [{"role": "user", "content": texts}]
        sampling = sampling_of(shortened(name))
        assert llm.chat(body["messages"], sampling).usage.image_tokens > 0
        assert llm.chat(without, sampling).usage.image_tokens == 0


def test_more_tokens_than_fit_are_refused_with_the_number_that_does(server):
    """Catches an answer cut in silence for VLMEvalKit's default of 32768 tokens."""
    body = BODIES["vlmevalkit_lmdeploy"]["body"] | {"max_tokens": 32768}
    [(status, reply)] = post(server, body)
    assert status == 400
    assert "max_tokens: is 32768 but only" in reply["error"]["message"]
