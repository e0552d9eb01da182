"""Every example of the protocols: what it means to the engine, and the form of what comes back."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from forms import BASE64, DATA_URL, Reply, call
from glimt.server.app import create_management_app
from glimt.server.config import ServerConfig
from glimt.server.service import Ask, Service
from serving import running, serving

FORMS = yaml.safe_load(Path(__file__).with_name("wire_forms.yaml").read_text(encoding="utf-8"))
EXCHANGES: list[dict[str, Any]] = FORMS["exchanges"]
DELIMITERS = {"newline": "\n", "nul": "\0"}


@pytest.fixture(scope="module")
def visualglm_url() -> Iterator[str]:
    with serving("demo-visualglm", ServerConfig(num_decoders=0, visualglm_api=True)) as served:
        yield served.url


@pytest.fixture(scope="module")
def management_url(mindie) -> Iterator[str]:
    with running(create_management_app(mindie.context)) as url:
        yield url


def url_of(server: str, request: pytest.FixtureRequest) -> str:
    """The address of one of the servers that exchanges name."""
    if server in ("upstream", "mindie"):
        return request.getfixturevalue(server).url
    return request.getfixturevalue(f"{server}_url")


def filled(body: Any) -> Any:
    """The body with the picture in its places."""
    text = json.dumps(body).replace("$DATA_URL", DATA_URL).replace("$BASE64", BASE64)
    return json.loads(text)


def meant(ask: Ask) -> dict[str, Any]:
    """What the engine is asked, as plain data; a turn is its role, text and number of pictures."""
    fields = asdict(ask)
    grammar = ask.sampling.grammar
    turns = [[each.role, each.text, each.num_images] for each in ask.messages or ()]
    fields |= {**fields.pop("sampling"), "turns": turns}
    fields["grammar"] = grammar and [grammar.kind, grammar.text]
    return {key: list(v) if isinstance(v, tuple) else v for key, v in fields.items()}


def check(value: Any, name: str) -> None:
    schema = {"$defs": FORMS["$defs"], "$ref": f"#/$defs/{name}"}
    jsonschema.validate(value, schema, jsonschema.Draft202012Validator)


def streamed(reply: Reply, framing: str) -> list[Any]:
    """The objects of a stream, whose framing is checked to the last byte."""
    if framing in DELIMITERS:
        *objects, rest = reply.content.decode().split(DELIMITERS[framing])
        assert rest == ""
        return [json.loads(each) for each in objects]
    assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
    last = b"data: [DONE]\n\n"
    assert reply.content.endswith(last) is (framing == "done")
    return Reply(reply.status, reply.headers, reply.content.removesuffix(last)).events


def check_stream(objects: list[Any], schemas: dict[str, Any]) -> None:
    begin, end = schemas.get("begin", []), schemas["end"]
    num_between = len(objects) - len(begin) - len(end)
    assert (num_between > 0) is ("each" in schemas)
    names = [*begin, *[schemas.get("each")] * num_between, *end]
    for value, name in zip(objects, names, strict=True):
        check(value, name)


def check_reply(reply: Reply, exchange: dict[str, Any]) -> None:
    """Its status, and every byte of its body."""
    assert reply.status == exchange.get("status", 200), reply.content
    if "stream" in exchange:
        check_stream(streamed(reply, exchange["stream"]["framing"]), exchange["stream"])
    elif "reply" in exchange:
        assert reply.headers["content-type"] == "application/json"
        check(reply.json, exchange["reply"])
    else:
        assert reply.content == b""


@pytest.fixture
def asked(monkeypatch) -> list[Ask]:
    """What the engine is asked while the test runs, by whatever path it came."""
    found: list[Ask] = []
    answer = Service.answer

    def noted(self: Service, ask: Ask) -> Any:
        found.append(ask)
        return answer(self, ask)

    monkeypatch.setattr(Service, "answer", noted)
    return found


@pytest.mark.parametrize("exchange", EXCHANGES, ids=lambda each: each["what"])
def test_an_example_is_understood_and_answered_in_its_form(exchange, asked, request):
    """Catches a field that is dropped or taken for another, and a key too many or too few."""
    url = url_of(exchange.get("server", "upstream"), request)
    check_reply(call(url, exchange["path"], filled(exchange.get("body"))), exchange)
    assert bool(asked) is ("means" in exchange)
    if asked:
        wanted = exchange["means"]
        assert {key: meant(asked[0])[key] for key in wanted} == wanted


def texts_in(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for each in value:
            yield from texts_in(each)
    elif isinstance(value, str):
        yield value.removeprefix("#/$defs/")


def test_every_schema_is_held_against_something():
    """Catches a form that is kept up and that no reply has."""
    assert set(FORMS["$defs"]) - set(texts_in(FORMS)) == set()
