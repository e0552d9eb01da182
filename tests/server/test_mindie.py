"""MindIE's own request form, and the bytes that its specification shows."""

from __future__ import annotations

import json
import re

import pytest
import requests

import glimt
from forms import BASE64, DATA_URL, GREEDY, PARTS, PNG, QUESTION, call, chat
from glimt.errors import GlimtError
from glimt.server.config import ServerConfig
from glimt.server.failures import Failure
from glimt.server.mindie import InferWriter, parse
from glimt.types import StepOutput
from serving import serving

CONFIG = ServerConfig(profile="mindie")


def read(inputs="hi", **parameters):
    return parse({"inputs": inputs, "parameters": parameters}, CONFIG, "r", False)


@pytest.fixture(scope="module")
def answer(llm):
    return llm.chat(chat(PARTS), GREEDY)


@pytest.fixture(params=["upstream", "mindie"])
def served(request):
    return request.getfixturevalue(request.param)


def test_defaults_are_mindies():
    """Catches more than 20 tokens, and sampling that nobody asked for."""
    asked = read()
    assert (asked.ask.sampling.max_tokens, asked.ask.sampling.temperature) == (20, 0)
    assert read(temperature=1.0).ask.sampling.temperature == 1
    assert read(temperature=0.5, do_sample=False).ask.sampling.temperature == 0
    assert read(timeout=7).ask.timeout_s == 7
    assert read(typical_p=1.0, watermark=True, priority=1).ask.sampling.max_tokens == 20


@pytest.mark.parametrize(
    ("parameters", "field"),
    [
        ({"temperature": 0}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 1}, "top_p"),
        ({"typical_p": 0.5}, "typical_p"),
        ({"typical_p": 2}, "typical_p"),
        ({"max_new_tokens": 2**31}, "max_new_tokens"),
        ({"seed": -(2**64)}, "seed"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"priority": 6}, "priority"),
        ({"timeout": 0}, "timeout"),
        ({"timeout": 65536}, "timeout"),
        ({"details": 1}, "details"),
    ],
)
def test_what_is_out_of_range_is_refused_by_name(parameters, field):
    """Catches a range that was softened."""
    with pytest.raises(GlimtError, match=field):
        read(**parameters)


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": DATA_URL, "detail": "low"}},
        {"type": "image_url", "image_url": DATA_URL},
        {"image_url": DATA_URL},
        {"type": "input_image", "image_url": DATA_URL},
        {"type": "image_url", "image_url": BASE64},
    ],
)
def test_every_way_to_write_a_picture_is_read(served, answer, part):
    """Catches one row of the grammar of parts."""
    body = {"inputs": [PARTS[0], part], "parameters": {"max_new_tokens": 24}}
    assert call(served.url, "/infer", body).json == {"generated_text": answer.text}


def test_text_parts_are_joined_without_anything(llm):
    """Catches a line feed between two pieces of one text."""
    parts = [{"type": "text", "text": "a"}, {"type": "input_text", "text": "b"}]
    assert read(parts).ask.messages[0].text == "ab"


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": None},
        {"type": "image_url", "image_url": ""},
        {"type": "image_url", "image_url": {"url": DATA_URL, "detail": "huge"}},
        {"type": "image_url", "image_url": "ftp://x/y.png"},
        {"type": "video_url", "video_url": "x"},
        {"type": "text", "text": 5},
        {"type": "audio_url"},
        {},
        "text",
    ],
)
def test_what_is_no_part_is_refused(served, part):
    """Catches a crash, or a part that is dropped in silence."""
    assert call(served.url, "/infer", {"inputs": [PARTS[0], part]}).status == 422


def test_more_than_twenty_pictures_are_refused():
    """Catches MindIE's own limit being the server's only."""
    with pytest.raises(GlimtError, match="21 pictures"):
        read([PARTS[1]] * 21)


def test_details_tell_the_ids(served, answer):
    """Catches a list that lacks the end, or a seed of a greedy answer."""
    body = {"inputs": PARTS, "parameters": {"max_new_tokens": 24, "details": True}}
    told = requests.post(f"{served.url}/infer", json=body).json()
    assert told["generated_text"] == answer.text
    assert told["details"] == {
        "finish_reason": "eos_token",
        "generated_tokens": len(answer.token_ids),
        "generated_token_ids": list(answer.token_ids),
        "seed": None,
    }


def test_a_stream_adds_up_to_its_last_event(served, answer):
    """Catches the tail that MindIE leaves out, and times in the wrong field."""
    body = {"inputs": PARTS, "stream": True, "parameters": {"max_new_tokens": 24, "details": True}}
    events = call(served.url, "/infer", body).events
    assert "".join(event["token"]["text"] or "" for event in events) == answer.text
    assert [i for event in events for i in event["token"]["id"]] == list(answer.token_ids)
    assert events[-1]["generated_text"] == answer.text
    assert events[-1]["details"]["generated_tokens"] == len(answer.token_ids)
    assert events[0]["prefill_time"] > 0
    assert events[0]["decode_time"] is None
    assert all(event["prefill_time"] is None for event in events[1:])
    assert all("generated_text" not in event for event in events[:-1])


class FixedAnswer:
    """What a writer needs of an answer."""

    arrival_s = 10.0

    def __init__(self, request):
        self.request = request


def test_the_specifications_bytes(llm):
    """Catches another order of keys, or a number that is rounded away."""
    request = llm.engine.prepare_chat(chat("hi"), glimt.SamplingParams(seed=42, max_tokens=2))
    asked = read(max_new_tokens=2, details=True)
    times = iter([10.0455, 10.0576])
    writer = InferWriter(FixedAnswer(request), asked, lambda: next(times))
    first = writer.add(StepOutput("r", 0, "am", (626,)))
    last = writer.add(StepOutput("r", 0, " here", (1234,), finish_reason="length"))
    assert first == (
        b'data: {"prefill_time":45.5,"decode_time":null,"token":{"id":[626],"text":"am"}}\n\n'
    )
    assert last == (
        b'data: {"prefill_time":null,"decode_time":12.1,"generated_text":"am here","details":'
        b'{"finish_reason":"length","generated_tokens":2,"seed":42},'
        b'"token":{"id":[1234],"text":" here"}}\n\n'
    )
    error = json.loads(writer.failed(Failure("timeout", "m")).removeprefix(b"data: "))
    assert error == {"error": "m", "error_type": "Generation Error"}


def test_token_ids_are_continued(served, llm):
    """Catches a template around ids."""
    ids = list(llm.engine.prepare_chat(chat("hello")).prompt.token_ids)
    body = {"input_id": ids, "parameters": {"max_new_tokens": 24}}
    expected = llm.chat(chat("hello"), GREEDY).text
    assert call(served.url, "/infer_token", body).json == {"generated_text": expected}
    events = call(served.url, "/infer_token", {**body, "stream": True}).events
    assert events[-1]["generated_text"] == expected


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/infer", {"inputs": "a", "input_id": [1]}),
        ("/infer_token", {"inputs": "a"}),
        ("/infer_token", {"input_id": []}),
        ("/infer_token", {"input_id": [-1]}),
        ("/infer_token", {"input_id": [10**9]}),
        ("/infer_token", {"input_id": [True]}),
        ("/infer", {"input_id": [1]}),
        ("/infer", {"inputs": ""}),
        ("/infer", []),
    ],
)
def test_one_of_the_two_inputs_is_needed(served, path, body):
    """Catches ids beyond the vocabulary, and a body with both."""
    reply = call(served.url, path, body)
    assert reply.status == 422
    assert set(reply.json) == {"error", "error_type"}


def test_the_tokenizer_counts(served, llm):
    """Catches template tokens in a count of a text."""
    told = call(served.url, "/v1/tokenizer", {"inputs": "hello 你好", "do_decode": True}).json
    ids = llm.engine.opened.processor.tokenizer.encode("hello 你好")
    assert told["token_number"] == len(ids) == len(told["tokens"])
    assert "".join(told["tokens"]) == "hello 你好"
    told = call(served.url, "/v1/tokenizer", {"inputs": "a", "do_decode": False}).json
    assert told == {"token_number": 1}


def test_files_are_read_from_one_folder_only(tmp_path, answer):
    """Catches a link or dots that lead out of the media folder."""
    folder = tmp_path / "media"
    folder.mkdir()
    (folder / "cat.png").write_bytes(PNG)
    (tmp_path / "secret.png").write_bytes(PNG)
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    config = ServerConfig(num_decoders=0, media_path=folder)
    parameters = {"max_new_tokens": 24}
    with serving("demo", config) as served:

        def ask(name):
            inputs = [PARTS[0], {"type": "image_url", "image_url": name}]
            return call(served.url, "/infer", {"inputs": inputs, "parameters": parameters})

        for name in (f"file://{folder}/cat.png", f"{folder}/cat.png"):
            assert ask(name).json == {"generated_text": answer.text}
        for name in ("../secret.png", "link.png", "none.png", ".", "cat.png/x"):
            reply = ask(f"{folder}/{name}")
            assert reply.status == 422
            assert "secret" not in reply.json["error"]


def test_files_are_not_read_unless_told(served):
    """Catches a server that reads what it may read."""
    inputs = [{"type": "image_url", "image_url": "/etc/hostname"}]
    reply = call(served.url, "/infer", {"inputs": inputs})
    assert reply.status == 422
    assert re.search(r"inputs\[0\].*names a file", reply.json["error"])


def test_a_request_of_any_content_type_is_json(served):
    """Catches curl -d, which says that it sends a form."""
    body = json.dumps({"inputs": QUESTION, "parameters": {"max_new_tokens": 1}}).encode()
    for kind in ("application/x-www-form-urlencoded", "text/plain", ""):
        assert call(served.url, "/infer", body, {"Content-Type": kind}).status == 200
    assert call(served.url, "/infer", body).status == 200


def test_an_answer_ends_where_the_context_does(served):
    """Catches a refusal where MindIE takes the minimum."""
    body = {"inputs": "hello", "parameters": {"max_new_tokens": 2**31 - 1}}
    assert call(served.url, "/infer", body).status == 200


def test_a_timeout_is_a_generation_error():
    """Catches a timeout in the request that is read and not kept."""
    with serving("demo", ServerConfig(num_decoders=0)) as served:
        parameters = {"max_new_tokens": 100, "timeout": 0.001}
        reply = call(served.url, "/infer", {"inputs": "hello", "parameters": parameters})
        assert reply.status == 424
        assert reply.json["error_type"] == "Generation Error"


def test_replies_carry_mindies_id(mindie, upstream):
    """Catches the header by which MindIE's logs are searched."""
    for served, is_there in ((mindie, True), (upstream, False)):
        headers = call(served.url, "/infer", {"inputs": ""}, {"X-Request-Id": "my-1"}).headers
        assert (headers.get("requestuuid") == "my-1") is is_there
        assert headers["x-request-id"] == "my-1"
