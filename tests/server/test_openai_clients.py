"""Unmodified OpenAI clients over loopback, against the engine's own answers."""

from __future__ import annotations

import base64
import io
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
import requests
from huggingface_hub import InferenceClient
from PIL import Image

import glimt
from glimt.demo.noise import write_noise_model
from glimt.inputs.request import RequestOptions
from glimt.server.config import ServerConfig
from glimt.types import SamplingParams
from openai_client import connect, said
from serving import Served, serving

EXAMPLES = Path(__file__).parents[2] / "examples"
HOUSE = EXAMPLES / "house.png"
GREEDY = {"temperature": 0, "max_tokens": 24}


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving("demo") as found:
        yield found


@pytest.fixture(scope="module")
def noise(tmp_path_factory) -> Iterator[Served]:
    """A model of random weights, whose text is full of half characters."""
    folder = tmp_path_factory.mktemp("noise") / "noise"
    write_noise_model(folder, "glm4v_9b")
    with serving(str(folder)) as found:
        yield found


@pytest.fixture(scope="module")
def visual(tmp_path_factory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("visual") / "noise"
    write_noise_model(folder, "visualglm")
    with serving(str(folder)) as found:
        yield found


def data_url(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def picture(color: str) -> str:
    file = io.BytesIO()
    Image.new("RGB", (40, 30), color).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def showing(urls: list[str], text: str) -> list[dict]:
    parts = [{"type": "image_url", "image_url": {"url": url, "detail": "high"}} for url in urls]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def own_answer(served: Served, messages, options=None, **sampling) -> glimt.RequestOutput:
    """What the engine says without a server: on the same engine, so by the same weights."""
    import asyncio

    return asyncio.run(served.engine.chat(messages, SamplingParams(**sampling), options))


# --- whole answers ---


@pytest.mark.parametrize(
    "messages",
    [
        said("你好"),
        showing([data_url(HOUSE)], "图里有什么？"),
        showing([data_url(HOUSE), picture("red")], "Describe both pictures."),
    ],
    ids=["text", "picture", "two pictures"],
)
def test_an_answer_is_the_engines_own_streamed_or_not(served, client, messages):
    """Catches a field lost on the way to the engine, a lost or doubled piece, wrong counts."""
    own = own_answer(served, messages, temperature=0, max_tokens=24)
    whole = client.chat.completions.create(model="demo", messages=messages, **GREEDY)
    options = {"include_usage": True}
    stream = list(
        client.chat.completions.create(
            model="demo", messages=messages, stream=True, stream_options=options, **GREEDY
        )
    )
    choice = whole.choices[0]
    assert (choice.message.content, choice.message.role) == (own.text, "assistant")
    assert choice.finish_reason == own.finish_reason
    assert "".join(c.choices[0].delta.content or "" for c in stream[:-1]) == own.text
    assert [c.choices[0].finish_reason for c in stream[:-1] if c.choices[0].finish_reason] == [
        own.finish_reason
    ]
    for usage in (whole.usage, stream[-1].usage):
        assert usage.prompt_tokens == own.usage.prompt_tokens
        assert usage.completion_tokens == own.usage.completion_tokens
        assert usage.total_tokens == own.usage.total_tokens
        details = usage.prompt_tokens_details
        assert details.image_tokens == own.usage.image_tokens == details.multimodal_tokens
        assert details.cached_tokens > 0  # the engine has just seen this prompt
    assert stream[-1].choices == []
    assert {c.id for c in stream} == {stream[0].id}
    assert all(c.usage is None for c in stream[:-1])


def test_the_role_comes_first_and_no_chunk_is_empty(client):
    """Catches clients that index choices[0] of a chunk nobody asked for."""
    chunks = list(
        client.chat.completions.create(model="demo", messages=said("hi"), stream=True, **GREEDY)
    )
    assert all(len(chunk.choices) == 1 for chunk in chunks)
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert (deltas[0].role, deltas[0].content) == ("assistant", "")
    assert all(delta.role is None for delta in deltas[1:])
    assert all(delta.content for delta in deltas[1:-1])


def test_running_counts_grow_to_the_last(client):
    """Catches counts that stand still, or that differ from the last chunk's."""
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(
        client.chat.completions.create(
            model="demo", messages=said("你好"), stream=True, stream_options=options, **GREEDY
        )
    )
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[0] >= 1
    assert counts[-2:] == [counts[-1]] * 2


def test_choices_have_seeds_of_their_own(served, client):
    """Catches n choices that are one, and a seed that is not passed on."""
    options = {"temperature": 1.0, "top_p": 1.0, "seed": 7, "n": 3, "max_tokens": 12}
    own = own_answer(served, said("Tell me something"), **options)
    whole = client.chat.completions.create(
        model="demo", messages=said("Tell me something"), **options
    )
    assert [c.message.content for c in whole.choices] == [c.text for c in own.completions]
    assert [c.index for c in whole.choices] == [0, 1, 2]
    assert whole.usage.completion_tokens == own.usage.completion_tokens
    texts = ["", "", ""]
    for chunk in client.chat.completions.create(
        model="demo", messages=said("Tell me something"), stream=True, **options
    ):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == [c.text for c in own.completions]


def test_a_stop_string_ends_the_text_wherever_chunks_end(noise):
    """Catches a stop string that is given in part because it began in an earlier chunk."""
    with connect(noise) as client:
        text = (
            client.chat.completions.create(
                model="demo", messages=said("a"), temperature=0, max_tokens=48
            )
            .choices[0]
            .message.content
        )
        for start in range(2, len(text) - 4, 5):
            stop = text[start : start + 4]
            at = text.find(stop)
            options = {"temperature": 0, "max_tokens": 48, "stop": [stop]}
            pieces = list(
                client.chat.completions.create(
                    model="demo", messages=said("a"), stream=True, **options
                )
            )
            streamed = "".join(p.choices[0].delta.content or "" for p in pieces)
            assert streamed == text[:at]
            assert pieces[-1].choices[0].finish_reason == "stop"
            assert pieces[-1].choices[0].stop_reason == stop
            kept = client.chat.completions.create(
                model="demo",
                messages=said("a"),
                extra_body={"include_stop_str_in_output": True},
                **options,
            )
            assert kept.choices[0].message.content == text[: at + len(stop)]


def test_half_characters_never_leave(noise):
    """Catches U+FFFD in a piece whose character was completed by the next one."""
    with connect(noise) as client:
        for seed in range(6):
            options = {"temperature": 1.5, "seed": seed, "max_tokens": 40, "top_p": 1}
            whole = client.chat.completions.create(model="demo", messages=said("你"), **options)
            stream = client.chat.completions.create(
                model="demo", messages=said("你"), stream=True, **options
            )
            pieces = [p.choices[0].delta.content or "" for p in stream]
            assert "".join(pieces) == whole.choices[0].message.content


@pytest.mark.parametrize("model", ["noise", "visual"])
def test_logprobs_tell_every_token_by_its_bytes(model, request):
    """Catches log-probabilities that are lost while text is held back, or told twice."""
    served = request.getfixturevalue(model)
    options = {"temperature": 0, "max_tokens": 30, "logprobs": True, "top_logprobs": 2}
    with connect(served) as client:
        whole = client.chat.completions.create(model="demo", messages=said("a"), **options)
        stream = client.chat.completions.create(
            model="demo", messages=said("a"), stream=True, **options
        )
        streamed = [
            token
            for chunk in stream
            if chunk.choices[0].logprobs
            for token in chunk.choices[0].logprobs.content
        ]
    own = own_answer(served, said("a"), temperature=0, max_tokens=30, logprobs=2)
    tokens = whole.choices[0].logprobs.content
    ids = own.token_ids[:-1] if own.finish_reason == "stop" else own.token_ids
    assert len(tokens) == len(ids)
    token_bytes = served.engine.engine.inputs.processor.tokenizer.token_bytes
    special = served.engine.engine.inputs.processor.tokenizer.special_ids.values()
    for token, token_id, sampled in zip(tokens, ids, own.completions[0].logprobs, strict=False):
        if token_id not in special:
            assert bytes(token.bytes) == token_bytes(token_id)
        assert token.token == bytes(token.bytes).decode("utf-8", "replace")
        assert token.logprob == pytest.approx(sampled.logprob, abs=1e-4)
        assert len(token.top_logprobs) == 2
    assert [t.bytes for t in streamed] == [t.bytes for t in tokens]


def test_special_tokens_show_only_when_asked_for(noise):
    """Catches skip_special_tokens accepted and never read."""
    special = noise.engine.engine.inputs.processor.tokenizer.special_ids["<|system|>"]
    options = {
        "temperature": 0,
        "max_tokens": 3,
        "logit_bias": {str(special): 100},
    }
    with connect(noise) as client:
        hidden = client.chat.completions.create(model="demo", messages=said("a"), **options)
        shown = client.chat.completions.create(
            model="demo",
            messages=said("a"),
            extra_body={"skip_special_tokens": False},
            **options,
        )
    assert hidden.choices[0].message.content == ""
    assert shown.choices[0].message.content == "<|system|>" * 3


def test_the_extensions_reach_the_engine(served, client):
    """Catches a vLLM field that is accepted and never read."""
    extra = {
        "top_k": 5,
        "min_p": 0.01,
        "repetition_penalty": 1.3,
        "min_tokens": 9,
        "ignore_eos": True,
        "stop_token_ids": [3, 2**40],
        "cache_salt": "me",
        "request_id": "my-own_1",
    }
    options = {"temperature": 0.9, "top_p": 0.9, "seed": 5, "max_tokens": 12}
    answer = client.chat.completions.create(
        model="demo",
        messages=said("Say it"),
        extra_body=extra,
        presence_penalty=0.5,
        frequency_penalty=0.2,
        **options,
    )
    own = own_answer(
        served,
        said("Say it"),
        **options,
        presence_penalty=0.5,
        frequency_penalty=0.2,
        **{name: extra[name] for name in list(extra)[:5]},
        stop_token_ids=[3],
    )
    assert answer.choices[0].message.content == own.text
    assert answer.usage.completion_tokens == own.usage.completion_tokens >= 9
    assert answer.id == "chatcmpl-my-own_1"


def test_the_last_message_may_be_gone_on_with(served, visual, client):
    """Catches an answer that starts anew, or whose first blank is lost."""
    begun = [*said("What is a cat?"), {"role": "assistant", "content": "I see no"}]
    whole = own_answer(served, said("What is a cat?"), temperature=0, max_tokens=24).text
    answer = client.chat.completions.create(
        model="demo",
        messages=begun,
        extra_body={"continue_final_message": True, "add_generation_prompt": False},
        **GREEDY,
    )
    assert answer.choices[0].message.content.startswith(" ")
    assert whole == "I see no" + answer.choices[0].message.content
    own = own_answer(
        visual,
        begun,
        RequestOptions(prompt_end="continue"),
        temperature=0,
        max_tokens=8,
    )
    with connect(visual) as other:
        answer = other.chat.completions.create(
            model="demo",
            messages=begun,
            temperature=0,
            max_tokens=8,
            extra_body={"continue_final_message": True},
        )
    assert answer.choices[0].message.content == own.text


def test_a_language_chooses_the_template(visual):
    """Catches chat_template_kwargs that are dropped."""
    with connect(visual) as client:
        texts = []
        for language in ("zh", "en"):
            own = own_answer(
                visual, said("hi"), RequestOptions(language=language), temperature=0, max_tokens=20
            )
            answer = client.chat.completions.create(
                model="demo",
                messages=said("hi"),
                temperature=0,
                max_tokens=20,
                extra_body={"chat_template_kwargs": {"language": language, "other": 1}},
            )
            assert answer.choices[0].message.content == own.text
            texts.append(answer.choices[0].message.content)
    assert texts[0] != texts[1]


def test_no_answer_at_all_is_an_empty_text(noise):
    """Catches content null, on which evaluation programs fail."""
    end = noise.engine.engine.inputs.processor.tokenizer.special_ids["<|user|>"]
    options = {"temperature": 0, "logit_bias": {str(end): 100}}
    with connect(noise) as client:
        whole = client.chat.completions.create(model="demo", messages=said("a"), **options)
        stream = list(
            client.chat.completions.create(model="demo", messages=said("a"), stream=True, **options)
        )
    assert (whole.choices[0].message.content, whole.choices[0].finish_reason) == ("", "stop")
    assert whole.choices[0].stop_reason is None
    assert whole.usage.completion_tokens == 1
    assert [c.choices[0].finish_reason for c in stream] == [None, "stop"]


# --- completions and models ---


def test_completions_of_several_prompts_keep_their_order(served, client):
    """Catches choices that change places, ids that are templated, and lost blanks."""
    import asyncio

    exact = RequestOptions(is_exact=True)
    plain = SamplingParams(temperature=0, max_tokens=5, min_tokens=0)
    prompts = ["The cat", "一只"]
    own = [asyncio.run(served.engine.generate(p, plain, exact)).text for p in prompts]
    whole = client.completions.create(model="demo", prompt=prompts, temperature=0, max_tokens=5)
    assert [c.text for c in whole.choices] == own
    texts = ["", ""]
    for chunk in client.completions.create(
        model="demo", prompt=prompts, temperature=0, max_tokens=5, stream=True
    ):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == own
    ids = served.engine.engine.inputs.processor.encode_text("The cat").token_ids
    by_ids = client.completions.create(
        model="demo", prompt=list(ids), temperature=0, max_tokens=5, logprobs=2
    )
    assert by_ids.choices[0].text == own[0]
    logprobs = by_ids.choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.text_offset)
    assert logprobs.text_offset[0] == 0
    assert by_ids.usage.prompt_tokens == len(ids)
    cut = client.completions.create(
        model="demo",
        prompt=[5, 6, *ids],
        temperature=0,
        max_tokens=5,
        extra_body={"truncate_prompt_tokens": len(ids)},
    )
    assert cut.choices[0].text == own[0]


def test_sixteen_tokens_are_the_default_of_a_completion(client):
    """Catches a completion that fills the context."""
    answer = client.completions.create(
        model="demo", prompt="a", extra_body={"ignore_eos": True}, temperature=0
    )
    assert answer.usage.completion_tokens == 16
    assert answer.choices[0].finish_reason == "length"


def test_the_model_is_listed(client):
    """Catches a path in the listing, and a model that cannot be asked for by its listed name."""
    (model,) = client.models.list().data
    assert (model.id, model.owned_by, model.object) == ("demo", "glimt", "model")
    assert client.models.retrieve("demo").id == "demo"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


# --- errors ---

REFUSED = [
    ({"temperature": 3}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"n": 2, "temperature": 0}, "n"),
    ({"n": 0}, "n"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"stop": [""]}, "stop[0]"),
    ({"stop": 3}, "stop"),
    ({"presence_penalty": 2.5}, "presence_penalty"),
    ({"logit_bias": {"cat": 1}}, "logit_bias"),
    ({"logit_bias": {"999999": 1}}, "logit_bias"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"extra_body": {"functions": [{"name": "f"}]}}, "functions"),
    ({"extra_body": {"echo": True}}, "echo"),
    ({"extra_body": {"chat_template": "{{ x }}"}}, "chat_template"),
    ({"extra_body": {"truncate_prompt_tokens": 4}}, "truncate_prompt_tokens"),
    ({"extra_body": {"use_beam_search": True}}, "use_beam_search"),
    ({"extra_body": {"request_id": "a b"}}, "request_id"),
    ({"extra_body": {"min_tokens": 9}, "max_tokens": 3}, "min_tokens"),
    ({"extra_body": {"chat_template_kwargs": {"language": "fr"}}}, "language"),
    ({"modalities": ["text", "audio"]}, "modalities"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"extra_body": {"continue_final_message": True}}, "messages"),
]


@pytest.mark.parametrize(("fields", "param"), REFUSED, ids=[str(f)[:40] for f, _ in REFUSED])
def test_what_is_not_done_is_refused_by_name(client, fields, param):
    """Catches a field that is accepted and ignored, streamed or not."""
    for more in ({}, {"stream": True}):
        if "stream_options" in fields and more:
            continue
        with pytest.raises(openai.BadRequestError) as refused:
            client.chat.completions.create(model="demo", messages=said("a"), **fields, **more)
        assert refused.value.param == param
        assert str(refused.value.code) == "400"  # the client makes it text
        assert refused.value.type == "BadRequestError"


def test_what_changes_nothing_is_accepted(client):
    """Catches a client turned away for a field that asks for nothing."""
    answer = client.chat.completions.create(
        model="tgi",
        messages=said("a"),
        max_completion_tokens=2,
        max_tokens=100000,
        user="me",
        store=False,
        metadata={"a": "b"},
        tools=[{"type": "function", "function": {"name": "f"}}],
        tool_choice="none",
        extra_body={
            "unknown": 1,
            "echo": False,
            "stream_options": None,
            "bad_words": [],
            "top_k": -1,
            "logit_bias": None,
        },
    )
    assert answer.usage.completion_tokens <= 2


BROKEN = [
    ([], "messages"),
    ([{"role": "user", "content": ""}], "messages[0].content"),
    ([{"role": "user", "content": []}], "messages[0].content"),
    ([{"role": "king", "content": "a"}], "messages[0].role"),
    (showing(["data:image/png;base64,AAAA"], "a"), "messages[0].content[0]"),
    (showing(["file:///etc/passwd"], "a"), "messages[0].content[0]"),
    (showing(["/9j/4AAQ"], "a"), "messages[0].content[0]"),
    (showing(["https://example.com/a.png"], "a"), "messages[0].content[0]"),
    (showing([picture("red")] * 9, "a"), "messages"),
    (
        [{"role": "system", "content": showing([picture("red")], "a")[0]["content"]}, *said("a")],
        "messages[0].content[0]",
    ),
    (
        [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}],
        "messages[0].content[0].type",
    ),
    (
        [{"role": "user", "content": [{"image_url": picture("red"), "detail": "huge"}]}],
        "messages[0].content[0].detail",
    ),
]


@pytest.mark.parametrize(("messages", "param"), BROKEN, ids=[p for _, p in BROKEN])
def test_a_broken_message_is_refused_by_its_path(client, messages, param):
    """Catches a picture from the server's disk, and an error that repeats the picture."""
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="demo", messages=messages, stream=True)
    assert refused.value.param == param
    assert len(str(refused.value)) < 600


def test_a_bare_picture_part_and_joined_texts(served, client):
    """Catches vLLM's shortest part form refused, and a blank between text parts."""
    parts = [{"image_url": data_url(HOUSE)}, {"type": "input_text", "text": "图里有什么？"}]
    own = own_answer(
        served, showing([data_url(HOUSE)], "图里有什么？"), temperature=0, max_tokens=24
    )
    answer = client.chat.completions.create(
        model="demo", messages=[{"role": "user", "content": parts}], **GREEDY
    )
    assert answer.choices[0].message.content == own.text
    texts = [{"type": "text", "text": "你"}, {"type": "text", "text": "好"}]
    joined = client.chat.completions.create(
        model="demo", messages=[{"role": "user", "content": texts}], max_tokens=1
    )
    whole = client.chat.completions.create(model="demo", messages=said("你好"), max_tokens=1)
    assert joined.usage.prompt_tokens == whole.usage.prompt_tokens


def test_other_errors_have_their_own_exception(client, served):
    """Catches a status or code that clients do not know."""
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt-4", messages=said("a"))
    with pytest.raises(openai.BadRequestError) as long:
        client.chat.completions.create(model="demo", messages=said("a" * 60000))
    assert long.value.code == "context_length_exceeded"
    # What litellm and others look for, who read the message and not the code.
    assert "this model's maximum context length is 4096 tokens" in long.value.message
    for content in (b"{", b'{"messages": [], "temperature": NaN}', b"\xff", b"[]", b""):
        reply = requests.post(f"{served.url}/v1/chat/completions", data=content)
        assert reply.status_code == 400
        assert set(reply.json()["error"]) == {"message", "type", "param", "code"}


def test_json_is_read_whatever_it_is_called(served):
    """Catches curl users turned away: -d calls everything a form."""
    body = json.dumps({"messages": said("a"), "max_tokens": 1})
    for kind in ("application/x-www-form-urlencoded", "text/plain", ""):
        reply = requests.post(
            f"{served.url}/v1/chat/completions", data=body, headers={"content-type": kind}
        )
        assert reply.status_code == 200
        assert reply.headers["content-type"] == "application/json"


def test_an_error_after_the_first_byte_is_an_event(noise, monkeypatch):
    """Catches a stream that just ends when the engine fails in the middle."""
    sampler = noise.engine.engine.sampler
    sample, calls = sampler.sample, []

    def fail(logits, plan):
        calls.append(1)
        if len(calls) > 3:
            raise RuntimeError("secret /path")
        return sample(logits, plan)

    monkeypatch.setattr(sampler, "sample", fail)
    with connect(noise) as client:
        stream = client.chat.completions.create(
            model="demo", messages=said("a"), stream=True, temperature=0
        )
        assert next(stream).choices[0].delta.role == "assistant"
        with pytest.raises(openai.APIError) as failed:
            list(stream)
        assert failed.value.type == "InternalServerError"
        calls.clear()
        body = {"messages": said("a"), "stream": True, "temperature": 0}
        raw = requests.post(f"{noise.url}/v1/chat/completions", json=body)
        assert raw.text.endswith("data: [DONE]\n\n")
        calls.clear()
        with pytest.raises(openai.InternalServerError):
            client.chat.completions.create(model="demo", messages=said("a"), temperature=0)


# --- other clients, and clients that leave ---


def test_huggingface_hub_gets_the_same_answer(served):
    """Catches what that client alone needs: the exact [DONE] line, and names of its own."""
    own = own_answer(served, said("你好"), temperature=0, max_tokens=24)
    hub = InferenceClient(base_url=f"{served.url}/v1")
    whole = hub.chat_completion(said("你好"), temperature=0, max_tokens=24)
    assert whole.choices[0].message.content == own.text
    stream = hub.chat_completion(said("你好"), temperature=0, max_tokens=24, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == own.text
    shown = showing([data_url(HOUSE)], "图里有什么？")
    own = own_answer(served, shown, temperature=0, max_tokens=24)
    answer = hub.chat_completion(shown, temperature=0, max_tokens=24)
    assert answer.choices[0].message.content == own.text


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_blocks(served, stream):
    """Catches a request that goes on for nobody."""
    host, port = served.url.removeprefix("http://").split(":")
    body = {"messages": said("a"), "stream": stream, "ignore_eos": True, "max_tokens": 4000}
    content = json.dumps(body).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head.encode() + content)
        wait_for(lambda: served.engine.stats().num_running == 1)
        if stream:
            assert connection.recv(100)
    wait_for(lambda: served.engine.stats().num_running == 0)
    stats = served.engine.stats()
    assert stats.num_free_blocks == stats.num_blocks
    wait_for(lambda: served.context.service.num_open == 0)


def wait_for(is_so, timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_mindie_has_its_counts_in_the_last_choice():
    """Catches the habit that its clients go by."""
    config = ServerConfig(num_decoders=0, profile="mindie")
    with serving("demo", config) as served:
        body = {"messages": said("a"), "stream": True, "max_tokens": 3}
        text = requests.post(f"{served.url}/v1/chat/completions", json=body).text
        events = [json.loads(e[6:]) for e in text.split("\n\n") if e.startswith("data: {")]
        assert events[-1]["choices"][0]["finish_reason"] == "length"
        assert events[-1]["usage"]["completion_tokens"] == 3
        assert all("usage" not in event for event in events[:-1])
        refused = requests.post(f"{served.url}/v1/chat/completions", json={"messages": []})
        assert set(refused.json()) == {"error", "error_type"}
