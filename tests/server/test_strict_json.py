"""What a JSON body may hold, on its own and in every family that reads one."""

from __future__ import annotations

import gzip
import json

import pytest

from forms import call
from glimt.errors import RequestError
from glimt.server.failures import HttpFailure
from glimt.server.strict_json import parse_field, parse_json


def refused(content):
    with pytest.raises(HttpFailure) as caught:
        parse_json(content)
    return caught.value.failure


@pytest.mark.parametrize(
    "value",
    [
        {},
        [],
        None,
        "",
        {"a": {"a": 1}, "b": [{"a": 1}, {"a": 2}]},
        {"text": '图片 😀 \\ud800 "\n', "number": -1.5e-7, "zero": 0},
        10**39,
        1.7976931348623157e308,
    ],
)
@pytest.mark.parametrize("is_ascii", [True, False])
def test_what_json_can_say_is_read(value, is_ascii):
    """Catches a check that refuses honest bodies, such as an escaped emoji or equal inner keys."""
    assert parse_json(json.dumps(value, ensure_ascii=is_ascii).encode()) == value


@pytest.mark.parametrize(
    ("content", "key"),
    [
        (b'{"max_tokens":1,"max_tokens":2}', "max_tokens"),
        (b'{"a":1,"b":2,"c":3,"b":2}', "b"),
        (b'{"a":{"b":[{"seed":1,"seed":1}]}}', "seed"),
        (b'[[{"x":null,"x":null}]]', "x"),
        (b'{"top_p":0.1,"\\u0074op_p":0.9}', "top_p"),
        ('{"温度":1,"温度":1}'.encode(), "温度"),
    ],
)
def test_a_key_that_comes_twice_is_named(content, key):
    """Catches a body of which a proxy reads the first value and this server the last."""
    failure = refused(content)
    assert (failure.kind, failure.field) == ("malformed", key)
    assert f"the key {key!r} stands twice" in failure.message


def test_a_key_of_control_characters_is_escaped():
    """Catches a message that writes lines of its own into a log."""
    failure = refused(b'{"a\\nb":1,"a\\nb":1}')
    assert failure.field is None
    assert r"'a\nb'" in failure.message


def test_a_long_key_is_cut():
    """Catches an error as long as the body."""
    key = "k" * 10_000
    failure = refused(f'{{"{key}":1,"{key}":2}}'.encode())
    assert failure.field == "k" * 80
    failure = refused(f'{{"{key}":{{"{key}":["a","\\ud800"]}}}}'.encode())
    assert failure.field == "k" * 80
    assert len(failure.message) < 200


MALFORMED = {
    b"": "it is empty",
    b"\xff": "it is not UTF-8",
    b'"\xed\xa0\x80"': "it is not UTF-8",
    b"\xef\xbb\xbf{}": "byte order mark",
    '{"a": 1}'.encode("utf-16"): "byte order mark",
    '{"a": 1}'.encode("utf-16-be"): "Expecting value",
    '{"a": 1}'.encode("utf-16-le"): "Expecting property name",
    '{"a": 1}'.encode("utf-32"): "byte order mark",
    b'{"a": NaN}': "NaN is no JSON number",
    b'{"a": [-Infinity]}': "-Infinity is no JSON number",
    b'{"a": 1e999}': "64-bit float",
    b"-1e999": "64-bit float",
    b"1" * 41: "more than 40 digits",
    b"1" * 5000: "more than 40 digits",
    b"{} {}": "Extra data",
    b'{"a": 01}': "delimiter",
    b"{'a': 1}": "property name",
}


@pytest.mark.parametrize("content", MALFORMED)
def test_what_is_no_json_is_told_why(content):
    """Catches UTF-16 that is read though JSON is UTF-8, and numbers that become infinite."""
    failure = refused(content)
    assert failure.kind == "malformed"
    assert failure.message.startswith("the body is not JSON: ")
    assert MALFORMED[content] in failure.message


@pytest.mark.parametrize("depth", [33, 900, 100_000])
@pytest.mark.parametrize(("opening", "closing"), [(b"[", b"]"), (b'{"a":', b"}")])
def test_nesting_is_bounded(depth, opening, closing):
    """Catches a depth that only Python's own stack bounds."""
    failure = refused(opening * depth + b"1" + closing * depth)
    assert failure.kind == "invalid"
    assert "deeper than 32 levels" in failure.message


def test_as_deep_as_it_may_be_is_read():
    """Catches a limit that is off by one."""
    assert parse_json(b"[" * 32 + b"1" + b"]" * 32)
    assert "deeper than 32" in refused(b"[" * 33 + b"1" + b"]" * 33).message


def test_a_body_of_very_many_values_is_refused_unread():
    """Catches 3 bytes that become 60 in memory, sixteen million times."""
    assert "more than 500,000 values" in refused(b"[" + b"[]," * 600_000 + b"[]]").message
    assert len(parse_json(b"[" + b"[]," * 100_000 + b"[]]")) == 100_001


@pytest.mark.parametrize(
    ("content", "field"),
    [
        (rb'{"a": ["x", "\ud800"]}', "a.1"),
        (rb'{"messages": [{"content": "a\uDfFfb"}]}', "messages.0.content"),
        (rb'{"a": "\udc00\ud800"}', "a"),
        (rb'"\ud800"', "the body"),
        (rb'{"k\ud800": 1}', None),
    ],
)
def test_half_a_surrogate_pair_is_refused_by_its_place(content, field):
    """Catches half a character that no tokenizer, log or reply can write."""
    failure = refused(content)
    assert (failure.kind, failure.field) == ("invalid", field)
    assert "half a surrogate pair" in failure.message
    failure.message.encode()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is not JSON: Expecting property name"),
        ('{"a":1,"a":2}', "is not JSON: the key 'a' stands twice"),
        ("\ud800", "is not JSON: it is not UTF-8"),
        ("[" * 33 + "1" + "]" * 33, "is nested deeper than 32 levels"),
        ("[" + "[]," * 500_001 + "[]]", "holds more than 500,000 values"),
        (r'"\ud800"', "holds half a surrogate pair"),
        (r'{"a": ["\ud800"]}', "a.0: holds half a surrogate pair"),
    ],
    ids=range(7),
)
def test_json_in_a_field_is_told_of_by_the_field(content, said):
    """Catches a schema that is called no JSON because it is deep, and a body that is blamed."""
    with pytest.raises(RequestError) as caught:
        parse_field(content, "guided_json")
    assert caught.value.field == "guided_json"
    assert str(caught.value).startswith(f"guided_json: {said}")
    assert "body" not in str(caught.value)


# --- over HTTP -------------------------------------------------------------------------------

# Path -> the status of a malformed body in its family's form, upstream and under mindie.
PATHS = {
    "/v1/chat/completions": (400, 400),
    "/v1/completions": (400, 400),
    "/generate": (422, 422),
    "/generate_stream": (422, 422),
    "/": (422, 422),
    "/tokenize": (422, 422),
    "/detokenize": (400, 400),
    "/infer": (400, 400),
    "/infer_token": (400, 400),
    "/v1/tokenizer": (400, 400),
    "/v2/models/demo/generate": (400, 400),
    "/v2/models/demo/generate_stream": (400, 400),
    "/v2/models/demo/infer": (400, 400),
    "/v2/models/demo/versions/1/infer": (400, 400),
    "/v2/models/demo/stopInfer": (422, 422),
}


def message(reply):
    """What the error says, in whichever form."""
    error = reply.json["error"]
    return error if isinstance(error, str) else error["message"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("profile", ["upstream", "mindie"])
def test_every_family_refuses_a_repeated_key_by_its_name(request, profile, path):
    """Catches a route that reads its body by itself, and so otherwise."""
    url = request.getfixturevalue(profile).url
    reply = call(url, path, b'{"parameters": {"seed": 1, "seed": 2}, "max_tokens": 1}')
    assert reply.status == PATHS[path][profile == "mindie"]
    assert "the key 'seed' stands twice" in message(reply)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "content", [*(each for each in MALFORMED if len(each) < 1000), b"[" * 100_000, rb'{"\ud800":1}']
)
def test_every_family_refuses_what_is_no_json(upstream, path, content):
    """Catches a 500, and a wrong value that passes."""
    reply = call(upstream.url, path, content)
    assert reply.status in (400, 422)
    assert message(reply)


def test_openai_names_the_key_as_its_param(upstream):
    """Catches an error whose field is lost on the way."""
    error = call(upstream.url, "/v1/completions", b'{"prompt":"a","prompt":"b"}').json["error"]
    assert (error["param"], error["type"], error["code"]) == ("prompt", "BadRequestError", 400)


def test_sampling_parameters_in_a_tensor_are_as_strict(upstream):
    """Catches JSON inside JSON that is read by looser rules."""
    for inner in ('{"seed": 1, "seed": 2}', '{"temperature": NaN}', '{"top_p": 1e999}'):
        body = {
            "inputs": [
                {"name": "text_input", "datatype": "BYTES", "shape": [1], "data": ["hi"]},
                {
                    "name": "sampling_parameters",
                    "datatype": "BYTES",
                    "shape": [1],
                    "data": [inner],
                },
            ]
        }
        reply = call(upstream.url, "/v2/models/demo/infer", body)
        assert reply.status == 400
        assert reply.json["error"].startswith("sampling_parameters: is not JSON")


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/v1/completions", {"prompt": "hi", "guided_json": "SCHEMA"}, "guided_json"),
        (
            "/generate",
            {"inputs": "hi", "parameters": {"grammar": {"type": "json", "value": "SCHEMA"}}},
            "parameters.grammar.value",
        ),
    ],
)
def test_a_schema_as_text_is_as_strict(upstream, path, body, field):
    """Catches a schema of which the last of two types counts, unnoticed."""
    inner = {"type": "object", "SECOND": "array"}
    schema = json.dumps(json.dumps(inner).replace("SECOND", "type"))
    reply = call(upstream.url, path, json.dumps(body).replace('"SCHEMA"', schema).encode())
    assert reply.status in (400, 422)
    assert f"{field}: is not JSON: the key 'type' stands twice" in message(reply)


BODY = b'{"prompt": "hi", "max_tokens": 1, "temperature": 0}'


@pytest.mark.parametrize(
    "content",
    [
        BODY,
        b"",
        gzip.compress(BODY)[:-4],
        gzip.compress(BODY) + b"more",
        gzip.compress(BODY) + gzip.compress(BODY),
        b"\x1f\x8b" + b"\0" * 40,
    ],
    ids=["plain", "empty", "cut", "more", "two", "zeros"],
)
def test_a_body_that_is_not_the_gzip_it_says_is_refused(upstream, content):
    """Catches a second half that is dropped in silence, and a broken one that ends in a 500."""
    reply = call(upstream.url, "/v1/completions", content, {"Content-Encoding": "gzip"})
    assert reply.status == 400


def test_what_is_inside_gzip_is_as_strict(upstream):
    """Catches checks that a coding gets around."""
    body = gzip.compress(b'{"prompt": "hi", "prompt": "ho"}')
    coded = {"Content-Encoding": "gzip"}
    reply = call(upstream.url, "/v1/completions", body, coded)
    assert "the key 'prompt' stands twice" in message(reply)
    assert call(upstream.url, "/v1/completions", gzip.compress(BODY), coded).status == 200


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "hi", "max_tokens": 1}),
        ("/generate", {"prompt": "hi", "max_tokens": 1}),
        ("/v2/models/demo/generate", {"text_input": "hi", "max_tokens": 1}),
    ],
)
@pytest.mark.parametrize("field", ["seed", "top_k", "min_tokens", "stop_token_ids", "max_tokens"])
@pytest.mark.parametrize("number", [2**31, 2**63, 2**64, 10**39, -(10**39)])
def test_huge_integers_are_taken_or_refused(upstream, path, body, field, number):
    """Catches a number that a tensor of 64 bits cannot hold, met in the middle of a step."""
    value = [number] if field == "stop_token_ids" else number
    reply = call(upstream.url, path, {**body, field: value})
    assert reply.status in (200, 400, 422)


@pytest.mark.parametrize("penalty", [5e-324, 1e-30, 1e-7, 0.0, -1.0, 101.0])
def test_a_penalty_that_would_make_scores_infinite_is_refused(upstream, penalty):
    """Catches a caller's number that ends as the server's own failure."""
    body = {"prompt": "hi", "max_tokens": 2, "repetition_penalty": penalty}
    reply = call(upstream.url, "/v1/completions", body)
    assert reply.status == 400
    assert reply.json["error"]["param"] == "repetition_penalty"
    least = {**body, "repetition_penalty": 1e-6}
    assert call(upstream.url, "/v1/completions", least).status == 200
