"""Triton's and KServe's forms, by their own client and as plain HTTP."""

from __future__ import annotations

import json
import threading
import time

import numpy as np
import pytest

from forms import BASE64, DATA_URL, GREEDY, PARTS, PNG, QUESTION, call, chat
from glimt.errors import GlimtError
from glimt.server.config import ServerConfig
from glimt.server.triton_body import parse_generate

http = pytest.importorskip("tritonclient.http", reason="needs tritonclient[http]")

MODEL = "/v2/models/demo"
UPSTREAM, MINDIE = ServerConfig(), ServerConfig(profile="mindie")


@pytest.fixture(scope="module")
def answer(llm):
    return llm.chat(chat(PARTS), GREEDY)


@pytest.fixture
def client(upstream):
    with http.InferenceServerClient(upstream.url.removeprefix("http://")) as client:
        yield client


def tensor(name, values, datatype="BYTES", shape=None, binary=True):
    types = {"BYTES": np.object_, "BOOL": np.bool_, "INT64": np.int64, "UINT32": np.uint32}
    array = np.array(values, dtype=types[datatype]).reshape(shape or [len(values)])
    made = http.InferInput(name, list(array.shape), datatype)
    made.set_data_from_numpy(array, binary_data=binary)
    return made


def read(text="hi", config=UPSTREAM, **body):
    return parse_generate({"text_input": text, **body}, config, "r")


# --- parsing ---------------------------------------------------------------------------------


def test_parameters_may_stand_beside_the_text():
    """Catches one of the two places, and the inner one winning."""
    body = {"parameters": {"max_tokens": 5, "top_k": 7}, "max_tokens": 6}
    sampling = read(**body).ask.sampling
    assert (sampling.max_tokens, sampling.top_k) == (6, 7)


def test_every_sender_of_the_specification_is_read():
    """Catches genai-perf's list of texts taken for parts, and litellm's stream key refused."""
    docs = read("a", parameters={"stream": False, "temperature": 0})
    assert docs.ask.sampling.temperature == 0
    perf = read(["a ", "b"], max_tokens=64, stream=True)
    assert perf.ask.messages[0].text == "a b"
    assert read("a", parameters={"max_tokens": 64}, stream=True).ask.sampling.max_tokens == 64
    mindie = read(PARTS, parameters={"details": True, "max_new_tokens": 20, "batch_size": 1})
    assert mindie.ask.messages[0].num_images == 1
    assert mindie.parameters.details


def test_an_image_beside_the_text_is_one_or_a_list():
    """Catches the second picture being dropped."""
    assert read(image=BASE64).ask.messages[0].num_images == 1
    assert read(image=[BASE64, DATA_URL]).ask.messages[0].num_images == 2


def test_reserved_names_are_no_sampling_parameters():
    """Catches Triton's own timeout, in microseconds, taken for MindIE's."""
    reserved = {"priority": 0, "timeout": 10**9, "sequence_id": 3, "triton_x": 1, "headers": {}}
    assert read(parameters=reserved).ask.timeout_s is None
    assert read(config=MINDIE, parameters={"timeout": 5, "priority": 1}).ask.timeout_s == 5
    with pytest.raises(GlimtError, match="timeout"):
        read(config=MINDIE, parameters={"timeout": 10**9})


def test_defaults_are_the_profiles():
    """Catches the backend's 16 tokens in MindIE, and sampling where nothing asks for it."""
    assert read().ask.sampling.max_tokens == 16
    assert read(config=MINDIE).ask.sampling.max_tokens == 20
    assert read().ask.sampling.temperature == 0
    assert read(top_p=0.9).ask.sampling.temperature == 1


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"typical_p": 0.5}, "typical_p"),
        ({"use_beam_search": True}, "use_beam_search"),
        ({"n": 2}, "n"),
        ({"best_of": 2}, "best_of"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"batch_size": 0}, "batch_size"),
        ({"image": 5}, "image"),
        ({"image": ["/etc/passwd"]}, "image"),
        ({"parameters": []}, "parameters"),
        ({"text_input": ""}, "text_input"),
        ({"text_input": []}, "text_input"),
        ({"text_input": ["a", 5]}, "text_input"),
    ],
)
def test_what_cannot_be_is_refused_by_name(body, field):
    """Catches an option that is ignored in silence."""
    with pytest.raises(GlimtError, match=field):
        read(**body)


# --- the official client ---------------------------------------------------------------------


def test_the_client_finds_server_and_model(client):
    """Catches a status or an object that tritonclient does not take."""
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("demo")
    assert client.is_model_ready("demo", "1")
    assert client.get_server_metadata()["extensions"][0] == "binary_tensor_data"
    assert client.get_model_metadata("demo")["outputs"][0]["name"] == "text_output"
    assert client.get_model_config("demo")["model_transaction_policy"] == {"decoupled": True}
    assert client.get_model_repository_index()[0]["state"] == "READY"
    with pytest.raises(http.InferenceServerException, match="not served"):
        client.get_model_metadata("other")


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("picture", [PNG, BASE64.encode(), DATA_URL.encode()])
def test_the_client_infers_with_a_picture(client, answer, binary, picture):
    """Catches a tensor that is read wrong, in one of the two forms."""
    if not binary and picture == PNG:
        pytest.skip("bytes that are no text have no JSON form")
    inputs = [
        tensor("text_input", [QUESTION.encode()], binary=binary),
        tensor("image", [picture], binary=binary),
        tensor("sampling_parameters", [b'{"temperature": "0", "max_tokens": 24}'], binary=binary),
        tensor("return_num_output_tokens", [True], "BOOL", binary=binary),
    ]
    names = ("text_output", "num_output_tokens")
    outputs = [http.InferRequestedOutput(name, binary_data=binary) for name in names]
    result = client.infer("demo", inputs, outputs=outputs, request_id="q-1")
    told = result.as_numpy("text_output")[0]
    assert (told.decode() if binary else told) == answer.text
    assert result.as_numpy("num_output_tokens").tolist() == [len(answer.token_ids)]
    assert result.get_response()["id"] == "q-1"


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
def test_the_client_may_compress_both_ways(client, answer, coding):
    """Catches a body that is read as it came."""
    inputs = [
        tensor("text_input", [QUESTION.encode()]),
        tensor("image", [PNG]),
        tensor("sampling_parameters", [b'{"max_tokens": 24}']),
    ]
    result = client.infer(
        "demo", inputs, request_compression_algorithm=coding, response_compression_algorithm=coding
    )
    told = result.as_numpy("text_output")[0]
    assert (told if isinstance(told, str) else told.decode()) == answer.text


@pytest.mark.parametrize("datatype", ["UINT32", "INT64"])
def test_the_client_infers_token_ids(client, llm, datatype):
    """Catches MindIE's form by Triton's client."""
    ids = list(llm.engine.prepare_chat(chat("hello")).prompt.token_ids)
    expected = llm.chat(chat("hello"), GREEDY).token_ids
    result = client.infer(
        "demo", [tensor("input0", ids, datatype, [1, len(ids)])], parameters={"max_new_tokens": 24}
    )
    assert result.as_numpy("output0").tolist() == [list(expected)]


def test_errors_are_the_clients_exception(client):
    """Catches a body that the client cannot read an error from."""
    with pytest.raises(http.InferenceServerException, match="'other' is no input"):
        client.infer("demo", [tensor("text_input", [b"a"]), tensor("other", [b"a"])])
    with pytest.raises(http.InferenceServerException, match="must be false here"):
        client.infer("demo", [tensor("text_input", [b"a"]), tensor("stream", [True], "BOOL")])


def test_statistics_count(client):
    """Catches figures that perf_analyzer divides by and that never move."""
    before = client.get_inference_statistics("demo")["model_stats"][0]
    client.infer("demo", [tensor("text_input", [b"hi"])])
    after = client.get_inference_statistics("demo")["model_stats"][0]
    assert after["inference_count"] == before["inference_count"] + 1
    assert after["inference_stats"]["success"]["ns"] > before["inference_stats"]["success"]["ns"]
    assert after["last_inference"] > before["last_inference"]


# --- the generate extension ------------------------------------------------------------------


def test_generate_gives_one_object(upstream, answer):
    """Catches the prompt in the text, an id nobody gave, and fields nobody asked for."""
    body = {"text_input": PARTS, "max_tokens": 24}
    assert call(upstream.url, f"{MODEL}/generate", body).json == {
        "model_name": "demo",
        "model_version": "1",
        "text_output": answer.text,
    }
    more = {
        **body,
        "id": "a123",
        "exclude_input_in_output": False,
        "return_finish_reason": True,
        "return_num_input_tokens": True,
    }
    assert call(upstream.url, f"{MODEL}/versions/1/generate", more).json == {
        "id": "a123",
        "model_name": "demo",
        "model_version": "1",
        "text_output": QUESTION + answer.text,
        "finish_reason": "eos_token",
        "num_input_tokens": answer.usage.prompt_tokens,
    }


@pytest.mark.parametrize("profile", ["upstream", "mindie"])
def test_a_stream_adds_up(request, answer, profile):
    """Catches cumulative texts, [DONE], and the other profile's prefix."""
    served = request.getfixturevalue(profile)
    body = {"id": "s1", "text_input": PARTS, "max_tokens": 24, "parameters": {"details": True}}
    reply = call(served.url, f"{MODEL}/generate_stream", body)
    assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert reply.content.startswith(b'data: {"id"' if profile == "upstream" else b'data:{"id"')
    events = reply.events
    assert "".join(event["text_output"] for event in events) == answer.text
    assert all("details" not in event for event in events[:-1])
    details = events[-1]["details"]
    assert (details["finish_reason"], details["batch_size"]) == ("eos_token", 1)
    assert details["generated_tokens"] == len(answer.token_ids)
    if profile == "mindie":
        assert all(event["model_version"] is None for event in events)
        assert events[0]["prefill_time"] > 0
        assert [event["prefill_time"] for event in events[1:]] == [None] * (len(events) - 1)
        assert all(event["decode_time"] > 0 for event in events[1:])


def test_a_streams_status_is_that_of_its_beginning(upstream):
    """Catches a 200 for a request that was refused."""
    body = {"text_input": "hi", "max_tokens": 100000}
    reply = call(upstream.url, f"{MODEL}/generate_stream", body)
    assert reply.status == 400
    assert reply.json["error"].startswith("max_tokens: ")


def test_details_and_times_of_mindie(mindie, answer):
    """Catches MindIE's extras."""
    parameters = {"details": True, "perf_stat": True, "max_new_tokens": 24}
    body = {"id": "a123", "text_input": PARTS, "parameters": parameters}
    told = call(mindie.url, f"{MODEL}/generate", body).json
    assert (told["id"], told["model_version"]) == ("a123", None)
    assert [pair[0] for pair in told["perf_stat"]] == list(answer.token_ids)
    assert set(told["details"]) == {
        "finish_reason",
        "generated_tokens",
        "first_token_cost",
        "decode_cost",
        "batch_size",
        "queue_wait_time",
    }


# --- MindIE's tokens and stopInfer -----------------------------------------------------------


def test_the_token_example_of_the_specification(upstream, llm):
    """Catches parameters that are read from one of their two places only."""
    tensor0 = {"name": "input0", "shape": [1, 5], "datatype": "UINT32", "data": [1, 2, 3, 4, 5]}
    expected = llm.engine.prepare_tokens([1, 2, 3, 4, 5]).prompt.token_ids
    assert len(expected) == 5
    for shape, inner, outer in (
        ([1, 5], {}, {"max_new_tokens": 3}),
        ([5], {"max_new_tokens": 3}, {}),
    ):
        body = {
            "id": "t",
            "inputs": [{**tensor0, "shape": shape, "parameters": inner}],
            "outputs": [{"name": "output0"}],
            "parameters": outer,
        }
        told = call(upstream.url, f"{MODEL}/infer", body).json
        (output,) = told["outputs"]
        assert (output["name"], output["datatype"], output["shape"]) == (
            "output0",
            "UINT32",
            [1, 3],
        )
        assert told["id"] == "t"


@pytest.mark.parametrize(
    "inputs",
    [
        [{"name": "input0", "shape": [5, 1], "datatype": "UINT32", "data": [1, 2, 3, 4, 5]}],
        [{"name": "input0", "shape": [1], "datatype": "UINT32", "data": [2**31]}],
        [{"name": "input0", "shape": [0], "datatype": "UINT32", "data": []}],
        [{"name": "input0", "shape": [1], "datatype": "FP32", "data": [1.0]}],
    ],
)
def test_tokens_that_are_none_are_refused(upstream, inputs):
    """Catches an id outside the vocabulary, which would read another row."""
    assert call(upstream.url, f"{MODEL}/infer", {"inputs": inputs}).status == 400


def test_stop_infer_ends_a_request_with_what_it_has(mindie):
    """Catches a stop that is an error for the one who is stopped, or that does nothing."""
    body = {
        "id": "long-1",
        "text_input": "hello",
        "parameters": {"max_new_tokens": 4000, "ignore_eos": True, "details": True},
    }
    replies = []
    thread = threading.Thread(
        target=lambda: replies.append(call(mindie.url, f"{MODEL}/generate", body))
    )
    thread.start()
    for _ in range(500):
        stopped = call(mindie.url, f"{MODEL}/stopInfer", {"id": "long-1"})
        if stopped.status == 200:
            break
        assert stopped.status == 404
        time.sleep(0.01)
    thread.join(30)
    assert stopped.json == {"id": "long-1"}
    (reply,) = replies
    assert reply.status == 200
    assert reply.json["details"]["finish_reason"] == "stop_sequence"
    assert reply.json["details"]["generated_tokens"] < 4000


@pytest.mark.parametrize("body", [{}, {"id": ""}, {"id": "a b"}, {"id": 5}, [], {"id": "x" * 257}])
def test_a_bad_id_is_422(mindie, body):
    """Catches Triton's 400 where MindIE says 422."""
    assert call(mindie.url, f"{MODEL}/stopInfer", body).status == 422


@pytest.mark.parametrize("path", ["/v2/models/other", f"{MODEL}/versions/2", "/v2/models/a%20b"])
def test_another_model_or_version_is_404(upstream, path):
    """Catches a typo that is answered by whatever is there."""
    for suffix in ("", "/ready", "/config", "/stats"):
        reply = call(upstream.url, path + suffix)
        assert reply.status == 404
        assert set(reply.json) == {"error"}
    assert call(upstream.url, f"{path}/generate", {"text_input": "a"}).status == 404


def test_queries_of_mindie(mindie):
    """Catches KServe's array of extensions under MindIE's profile."""
    told = call(mindie.url, "/v2").json
    assert told["name"] == "MindIE Server"
    assert set(told["extensions"]) == {
        "max_iter_times",
        "prefill_policy_type",
        "decode_policy_type",
        "max_prefill_batch_size",
        "max_prefill_tokens",
    }
    ids = {"shape": [-1], "datatype": "UINT32"}
    assert call(mindie.url, MODEL).json == {
        "name": "demo",
        "platform": "MindIE Server",
        "inputs": [{"name": "input0", **ids}],
        "outputs": [{"name": "output0", **ids}],
    }
    config = call(mindie.url, f"{MODEL}/config").json
    assert {"model_name", "max_seq_len", "npu_mem_size", "world_size", "model_weight_path"} <= set(
        config
    )
    assert "/" not in config["model_weight_path"]
    assert json.dumps(config)
