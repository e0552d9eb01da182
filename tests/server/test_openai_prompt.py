"""`echo` and `prompt_logprobs` over loopback, by the `openai` client, against the engine's own."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import openai
import pytest
import requests

import glimt
from forms import DATA_URL
from glimt.types import PromptLogprob, SamplingParams
from openai_client import connect
from serving import Served, serving

PROMPT = "The cat sat on the 猫"


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving("demo") as found:
        yield found


@pytest.fixture(scope="module")
def client(served: Served) -> openai.OpenAI:
    return connect(served)


@pytest.fixture(scope="module")
def ids(served: Served) -> list[int]:
    """The prompt with what the family puts before every text."""
    return list(text_output(served, PROMPT).prompt_token_ids)


def text_output(served: Served, text: str, num_top: int = 0) -> glimt.RequestOutput:
    """The engine's own answer to a bare text."""
    sampling = SamplingParams(temperature=0, max_tokens=3, logprobs=0, prompt_logprobs=num_top)

    async def ask() -> glimt.RequestOutput:
        request = await served.engine.prepare_text(text, sampling)
        return await served.engine.run(request)

    return asyncio.run(ask())


def figures(tokens: Any) -> list[float | None]:
    return [each.logprob for each in tokens]


def near(expected: list[float | None]) -> list[Any]:
    return [None if each is None else pytest.approx(each, abs=1e-4) for each in expected]


def test_a_prompt_stands_before_its_completion(served, client):
    """Catches a prompt that is left out, figures of one that has none, and a count too many."""
    whole = text_output(served, PROMPT)
    scores, answer = whole.prompt_logprobs, whole.completions[0]
    (choice,) = client.completions.create(
        model="demo", prompt=PROMPT, echo=True, logprobs=1, max_tokens=3, temperature=0
    ).choices
    assert choice.text.startswith(PROMPT)
    told = choice.logprobs
    assert told.token_logprobs[: len(scores)] == near(figures(scores))
    num_shown = len(told.tokens) - len(scores)
    assert told.token_logprobs[len(scores) :] == near(figures(answer.logprobs[:num_shown]))
    assert told.token_logprobs[0] is told.top_logprobs[0] is None
    entries = zip(told.tokens, told.token_logprobs, told.top_logprobs, strict=True)
    for name, own, top in list(entries)[1:]:
        # Halves of characters share one name, and the likelier of them counts.
        assert top[name] == own or ("\ufffd" in name and top[name] > own)
        assert top[name] <= max(top.values())
    # Each token stands where its text is; the family's two before it stand at the beginning.
    assert told.text_offset[:3] == [0, 0, 0]
    assert told.tokens[:2] == ["[gMASK]", "<sop>"]
    assert all(a <= b for a, b in pairwise(told.text_offset))
    for name, at in zip(told.tokens[2:], told.text_offset[2:], strict=True):
        if "\ufffd" in name:
            break  # half a character takes another width than the whole
        assert choice.text[at : at + len(name)] == name


def test_a_prompt_is_shown_without_figures_where_none_are_asked_for(client):
    """Catches logprobs that come with every echo."""
    (choice,) = client.completions.create(
        model="demo", prompt=PROMPT, echo=True, max_tokens=2, temperature=0
    ).choices
    assert choice.text.startswith(PROMPT)
    assert choice.logprobs is None


@pytest.mark.parametrize("num_tokens", [0, 1])
def test_evaluation_tools_score_token_ids(client, served, ids, num_tokens):
    """Catches ids that are encoded again, and a token of the completion where none is wanted."""
    expected = text_output(served, PROMPT).prompt_logprobs
    answer = client.completions.create(
        model="demo", prompt=[ids, ids[:5]], echo=True, logprobs=1, max_tokens=num_tokens,
        temperature=0,
    )  # fmt: skip
    assert [choice.index for choice in answer.choices] == [0, 1]
    for choice, num_prompt in zip(answer.choices, (len(ids), 5), strict=True):
        told = choice.logprobs.token_logprobs
        assert told[:num_prompt] == near(figures(expected[:num_prompt]))
        assert len(told) - num_prompt <= num_tokens
        assert choice.finish_reason == "length" or num_tokens
    if not num_tokens:
        assert answer.choices[0].text == f"[gMASK]<sop>{PROMPT}"
        assert (answer.usage.completion_tokens, answer.usage.total_tokens) == (0, len(ids) + 5)


def test_the_token_that_ends_an_answer_is_told_behind_a_prompt(served, client):
    """Catches evaluation tools that cut off one token and lose the prompt's last."""
    ended = text_output(served, PROMPT)
    end = ended.completions[0].token_ids[0]
    body = {
        "model": "demo", "prompt": PROMPT, "echo": True, "logprobs": 1, "max_tokens": 1,
        "temperature": 0, "extra_body": {"stop_token_ids": [end]},
    }  # fmt: skip
    (whole,) = client.completions.create(**body).choices
    (chunk, *_) = client.completions.create(**body, stream=True)
    assert (whole.finish_reason, whole.text) == ("stop", PROMPT)
    for choice in (whole, chunk.choices[0]):
        assert len(choice.logprobs.tokens) == len(ended.prompt_token_ids) + 1


@pytest.mark.parametrize("num_tokens", [0, 3])
def test_a_stream_begins_with_the_prompt(client, num_tokens):
    """Catches a prompt that is repeated in every chunk, and offsets that begin anew behind it."""
    body = {
        "model": "demo", "prompt": PROMPT, "echo": True, "logprobs": 2, "temperature": 0,
        "max_tokens": num_tokens,
    }  # fmt: skip
    (whole,) = client.completions.create(**body).choices
    chunks = list(
        client.completions.create(**body, stream=True, stream_options={"include_usage": True})
    )
    *chunks, last = chunks
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.text
    assert chunks[-1].choices[0].finish_reason == whole.finish_reason
    told = [chunk.choices[0].logprobs for chunk in chunks]
    for name in ("tokens", "token_logprobs", "text_offset"):
        joined = [each for part in told if part is not None for each in getattr(part, name)]
        assert joined == near(getattr(whole.logprobs, name)) or joined == getattr(
            whole.logprobs, name
        )
    assert last.usage.completion_tokens == (0 if not num_tokens else last.usage.completion_tokens)
    assert last.usage.completion_tokens <= num_tokens


def test_every_choice_has_the_prompt(client):
    """Catches figures that only the first choice has."""
    body = {"model": "demo", "prompt": PROMPT, "echo": True, "logprobs": 0, "n": 3, "seed": 3}
    whole = client.completions.create(**body, max_tokens=2)
    streamed: dict[int, list[Any]] = {0: [], 1: [], 2: []}
    for chunk in client.completions.create(**body, max_tokens=2, stream=True):
        streamed[chunk.choices[0].index].append(chunk.choices[0])
    first = whole.choices[0].logprobs.token_logprobs[1]
    for choice in whole.choices:
        begun = streamed[choice.index][0]
        assert choice.text.startswith(PROMPT)
        assert begun.text.startswith(PROMPT)
        assert choice.logprobs.token_logprobs[1] == first
        assert begun.logprobs.token_logprobs[1] == pytest.approx(first, abs=1e-4)


# --- vLLM's field ----------------------------------------------------------------------------


def check_form(told: list[Any], scores: tuple[PromptLogprob, ...], num_top: int) -> None:
    assert len(told) == len(scores)
    for entry, score in zip(told, scores, strict=True):
        if score.logprob is None:
            assert entry is None
            continue
        own = entry[str(score.token_id)]
        assert own["logprob"] == pytest.approx(score.logprob, abs=1e-4)
        assert own["rank"] == score.rank
        assert next(iter(entry)) == str(score.token_id)
        assert len(entry) == num_top + (score.rank > num_top)
        ranks = sorted(each["rank"] for each in entry.values())
        assert ranks[:num_top] == list(range(1, num_top + 1))
        assert all(isinstance(each["decoded_token"], str) for each in entry.values())


def test_a_completions_prompt_is_told_by_token_id(client, served):
    """Catches another form than vLLM's, and top tokens without their ranks."""
    answer = client.completions.create(
        model="demo", prompt=PROMPT, max_tokens=1, extra_body={"prompt_logprobs": 2}
    )
    (choice,) = answer.choices
    check_form(choice.prompt_logprobs, text_output(served, PROMPT, 2).prompt_logprobs, 2)
    assert choice.logprobs is None
    assert not choice.text.startswith(PROMPT)


def test_a_chats_prompt_has_nothing_of_its_pictures(client, served):
    """Catches figures that slip by the length of a picture."""
    parts = [{"type": "image_url", "image_url": {"url": DATA_URL}}, {"type": "text", "text": "?"}]
    messages = [{"role": "user", "content": parts}]
    sampling = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1)
    own = asyncio.run(served.engine.chat(messages, sampling))
    answer = client.chat.completions.create(
        model="demo", messages=messages, max_tokens=1, temperature=0,
        extra_body={"prompt_logprobs": 1},
    )  # fmt: skip
    check_form(answer.prompt_logprobs, own.prompt_logprobs, 1)
    assert answer.usage.prompt_tokens == len(answer.prompt_logprobs)
    num_null = sum(entry is None for entry in answer.prompt_logprobs)
    assert num_null == 1 + own.usage.image_tokens


# --- what is refused -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 0, "echo": False}, "max_tokens"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"prompt_logprobs": -1}, "prompt_logprobs"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"echo": True, "logprobs": 6}, "logprobs"),
    ],
)
def test_what_cannot_be_told_is_refused_by_name(served, fields, field):
    """Catches a limit that is not kept, and a stream that leaves out what was asked for."""
    reply = requests.post(
        f"{served.url}/v1/completions", json={"prompt": "a", **fields}, timeout=60
    )
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == field


def test_a_bidirectional_model_scores_no_prompt(tmp_path):
    """Catches figures of tokens that the model sees while it predicts them."""
    with serving("demo-visualglm") as visual:
        client = connect(visual)
        for more, field in (
            ({"echo": True, "logprobs": 1}, "echo"),
            ({"extra_body": {"prompt_logprobs": 0}}, "prompt_logprobs"),
        ):
            for stream in (False, field == "echo"):
                with pytest.raises(openai.BadRequestError) as refused:
                    client.completions.create(model="demo", prompt="a", stream=stream, **more)
                assert refused.value.param == field
        # The text alone can be shown, and TGI's list of tokens has no figures.
        (choice,) = client.completions.create(
            model="demo", prompt="a", echo=True, max_tokens=0
        ).choices
        assert choice.text == "a"
        body = {"inputs": "a", "parameters": {"max_new_tokens": 1, "decoder_input_details": True}}
        reply = requests.post(f"{visual.url}/generate", json=body, timeout=60).json()
        assert {each["logprob"] for each in reply["details"]["prefill"]} == {None}
