"""vLLM's old /generate, upstream and as MindIE has it."""

from __future__ import annotations

import itertools
import json

import pytest
import requests

import glimt
from forms import DATA_URL, GREEDY, PARTS, QUESTION, call, chat
from glimt.errors import GlimtError
from glimt.server.config import ServerConfig
from glimt.server.vllm import parse
from serving import serving

UPSTREAM, MINDIE = ServerConfig(), ServerConfig(profile="mindie")
BODY = {"prompt": PARTS, "max_tokens": 24, "temperature": 0}


def read(config=UPSTREAM, **body):
    return parse({"prompt": "hi", **body}, config, "r")


@pytest.fixture(scope="module")
def answer(llm):
    return llm.chat(chat(PARTS), GREEDY).text


def test_the_specifications_example_is_read():
    """Catches a list of parts taken for a text."""
    picture = {"type": "image_url", "image_url": "https://img.example/cat.jpg"}
    prompt = [{"type": "text", "text": "描述这张图片"}, picture]
    asked = parse({"prompt": prompt, "max_tokens": 64, "model": "glm4v"}, UPSTREAM, "r")
    (message,) = asked.ask.messages
    assert (message.text, message.num_images) == ("描述这张图片", 1)
    assert asked.ask.sampling.max_tokens == 64


def test_a_text_is_continued_as_it_is():
    """Catches a chat template where vLLM had none, and the prompt 123 losing its prefix."""
    asked = read(prompt="123", config=MINDIE)
    assert (asked.ask.prompt, asked.ask.messages, asked.prefix) == ("123", None, "123 ")


def test_defaults_are_vllms():
    """Catches greedy answers, or long ones, where nothing was said."""
    sampling = read().ask.sampling
    assert (sampling.temperature, sampling.top_k, sampling.max_tokens) == (1.0, -1, 16)
    assert read(config=MINDIE).ask.sampling.max_tokens == 512
    own = ServerConfig(profile="mindie", max_output_tokens=7)
    assert read(config=own).ask.sampling.max_tokens == 7


@pytest.mark.parametrize(("given", "meant"), [(0, 0), (1e-6, 0), (0.001, 0.01), (0.5, 0.5)])
def test_small_temperatures_are_as_in_vllm(given, meant):
    """Catches a division by almost nothing."""
    assert read(temperature=given).ask.sampling.temperature == meant


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"use_beam_search": True}, "use_beam_search"),
        ({"temperature": 2.5}, "temperature"),
        ({"n": 2, "temperature": 0}, "n"),
        ({"n": 3, "best_of": 2}, "best_of"),
        ({"best_of": 2, "stream": True}, "best_of"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"repetition_penalty": 3}, "repetition_penalty"),
        ({"foo": 1}, "foo"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [{"type": "text", "text": ""}]}, "prompt"),
        ({"min_tokens": 20}, "min_tokens"),
    ],
)
def test_what_cannot_be_is_refused_by_name(body, field):
    """Catches an option that is ignored in silence."""
    with pytest.raises(GlimtError, match=field):
        read(**body)


def test_mindie_ignores_what_it_does_not_know():
    """Catches upstream's rule under MindIE's profile."""
    assert read(config=MINDIE, foo=1).ask == read(config=MINDIE).ask


def test_the_reply_repeats_the_prompt(upstream, mindie, answer, llm):
    """Catches a missing prefix, or MindIE's space upstream."""
    assert requests.post(f"{upstream.url}/generate", json=BODY).json() == {
        "text": [QUESTION + answer]
    }
    assert call(mindie.url, "/generate", BODY).json == {"text": [f"{QUESTION} {answer}"]}
    greedy = glimt.SamplingParams(temperature=0, max_tokens=8)
    body = {"prompt": "hello", "max_tokens": 8, "temperature": 0}
    expected = llm.generate("hello", greedy).text
    assert call(upstream.url, "/generate", body).json == {"text": [f"hello{expected}"]}


def test_a_stream_is_cumulative_upstream(upstream, answer):
    """Catches deltas, a missing prompt, and another delimiter than a line feed."""
    with requests.post(f"{upstream.url}/generate", json={**BODY, "stream": True}, stream=True) as r:
        assert "content-type" not in r.headers
        texts = [json.loads(line)["text"][0] for line in r.iter_lines(delimiter=b"\n") if line]
    assert texts[-1] == QUESTION + answer
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))
    assert len(texts) > 2


def test_a_mindie_stream_is_of_deltas_with_a_nul_behind_each(mindie, answer):
    """Catches upstream's prompt and line feeds under MindIE's profile."""
    reply = call(mindie.url, "/generate", {**BODY, "stream": True})
    assert reply.content.endswith(b"\0")
    objects = [json.loads(each) for each in reply.content.split(b"\0")[:-1]]
    assert "".join(each["text"][0] for each in objects) == answer
    assert len(objects) > 2


def test_several_choices_are_shown_together(upstream):
    """Catches choices that overwrite each other, and more texts than n."""
    body = {"prompt": "hi", "max_tokens": 6, "temperature": 1.0, "n": 2, "seed": 1}
    whole = call(upstream.url, "/generate", body).json["text"]
    lines = call(upstream.url, "/generate", {**body, "stream": True}).content.splitlines()
    assert json.loads(lines[-1])["text"] == whole
    assert len(call(upstream.url, "/generate", {**body, "best_of": 4}).json["text"]) == 2


def test_the_delimiter_can_be_nul_and_texts_cumulative():
    """Catches options that are declared and not used."""
    config = ServerConfig(num_decoders=0, vllm_stream_delimiter="nul")
    with serving("demo", config) as served:
        body = {"prompt": "hi", "max_tokens": 4, "temperature": 0, "stream": True}
        assert call(served.url, "/generate", body).content.endswith(b"\0")
    config = ServerConfig(num_decoders=0, profile="mindie", full_text_streams=True)
    with serving("demo", config) as served:
        texts = [
            json.loads(each)["text"][0]
            for each in call(served.url, "/generate", body).content.split(b"\0")[:-1]
        ]
        assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))


@pytest.mark.parametrize("model", ["demo", "glm4v", "None", None])
def test_the_model_may_be_named_or_not(upstream, model):
    """Catches MindIE's default, the word None, taken for a name."""
    body = {"prompt": "hi", "max_tokens": 1, "model": model}
    assert call(upstream.url, "/generate", body).status == 200
    assert call(upstream.url, "/generate", {**body, "model": "other"}).status == 404


def test_errors_are_400_upstream_and_422_in_mindie(upstream, mindie):
    """Catches TGI's status for vLLM's form, which has the same path."""
    body = {"prompt": "hi", "temperature": 9}
    assert call(upstream.url, "/generate", body).status == 400
    reply = call(mindie.url, "/generate", body)
    assert reply.status == 422
    assert reply.json["error_type"] == "Input Validation Error"


def test_a_prompt_comes_before_inputs(upstream):
    """Catches TGI's form for a body that has both, where MindIE looks for the prompt first."""
    both = {"prompt": "hi", "max_tokens": 1}
    assert "text" in call(upstream.url, "/generate", both).json
    assert (
        call(
            upstream.url,
            "/generate",
            {"prompt": None, "inputs": "hi", "parameters": {"max_new_tokens": 1}},
        ).status
        == 200
    )


def test_tokenize_counts_with_and_without_template(upstream, llm):
    """Catches ids without the template, or one where a bare text was sent."""
    tokens = call(upstream.url, "/tokenize", {"prompt": "hello"}).json
    assert tokens["tokens"] == list(llm.engine.prepare_text("hello").prompt.token_ids)
    assert tokens["count"] == len(tokens["tokens"])
    bare = call(upstream.url, "/tokenize", {"prompt": "hello", "add_special_tokens": False}).json
    assert bare["tokens"] == llm.engine.opened.processor.tokenizer.encode("hello")
    content = [{"type": "image_url", "image_url": {"url": DATA_URL}}, PARTS[0]]
    told = call(upstream.url, "/tokenize", {"messages": chat(content)}).json
    expected = len(llm.engine.prepare_chat(chat(content)).prompt.token_ids)
    assert told["count"] == len(told["tokens"]) == expected


def test_detokenize_is_the_way_back(upstream, llm):
    """Catches ids that come back as another text, and one of no token that ends in a 500."""
    text = "a 猫 in the house"
    tokens = call(upstream.url, "/tokenize", {"prompt": text}).json["tokens"]
    told = call(upstream.url, "/detokenize", {"tokens": tokens}).json
    assert told == {"prompt": f"[gMASK]<sop>{text}"}
    assert call(upstream.url, "/detokenize", {"tokens": []}).json == {"prompt": ""}
    for wrong in ([-1], [10**9], ["a"], None, [True]):
        reply = call(upstream.url, "/detokenize", {"tokens": wrong})
        assert reply.status == 400
        assert reply.json["error"]["param"].startswith("tokens")


def test_the_tokenizer_tells_how_much_fits(upstream, llm):
    """Catches a limit that is not the engine's, and names that /tokenize takes for text."""
    told = call(upstream.url, "/tokenizer_info").json
    assert told.pop("model_max_length") == llm.engine.inputs.limits.max_model_len
    assert told.pop("tokenizer_class") == type(llm.engine.inputs.processor.tokenizer).__name__
    assert told == dict.fromkeys(["bos_token", "eos_token", "pad_token", "chat_template"])
