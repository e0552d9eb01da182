"""The older forms over VisualGLM, and over an engine that gives several tokens at once."""

from __future__ import annotations

import json

import pytest

import glimt
from forms import GREEDY, PARTS, call, chat
from glimt.server.config import ServerConfig
from serving import serving

REPEATING = "a b c a b c a b c a b c a b c a b c"


@pytest.fixture(
    scope="module", params=[("demo-visualglm", 0), ("demo", 4)], ids=["visualglm", "drafts"]
)
def both(request):
    """A served model, and what it answers."""
    model, num_drafts = request.param
    config = ServerConfig(num_decoders=0, served_model_names=("demo",))
    with serving(model, config, num_draft_tokens=num_drafts) as served:
        llm = glimt.LLM(model)
        answers = {name: llm.chat(chat(prompt), GREEDY) for name, prompt in PROMPTS.items()}
        yield served, answers


PROMPTS = {"picture": PARTS, "text": [{"type": "text", "text": REPEATING}]}


@pytest.mark.parametrize("name", PROMPTS)
def test_every_form_gives_the_engines_answer(both, name):
    """Catches a template, a default or a count that one family of models has and the other not."""
    served, answers = both
    answer, parts = answers[name], PROMPTS[name]
    inputs = {"inputs": parts, "parameters": {"max_new_tokens": 24, "details": True}}
    tgi = call(served.url, "/generate", inputs).json
    assert tgi["generated_text"] == answer.text
    assert [token["id"] for token in tgi["details"]["tokens"]] == list(answer.token_ids)
    assert call(served.url, "/infer", inputs).json["generated_text"] == answer.text
    body = {"text_input": parts, "max_tokens": 24}
    assert call(served.url, "/v2/models/demo/generate", body).json["text_output"] == answer.text
    body = {"prompt": parts, "max_tokens": 24, "temperature": 0}
    text = "".join(part.get("text", "") for part in parts)
    assert call(served.url, "/generate", body).json == {"text": [text + answer.text]}


@pytest.mark.parametrize("name", PROMPTS)
def test_every_stream_adds_up(both, name):
    """Catches tokens of one step that share an event, an index, or a text."""
    served, answers = both
    answer, parts = answers[name], PROMPTS[name]
    inputs = {"inputs": parts, "parameters": {"max_new_tokens": 24}, "stream": True}
    events = call(served.url, "/generate_stream", inputs).events
    assert [event["index"] for event in events] == list(range(1, len(answer.token_ids) + 1))
    assert [event["token"]["id"] for event in events] == list(answer.token_ids)
    shown = [event["token"]["text"] for event in events if not event["token"]["special"]]
    assert "".join(shown) == events[-1]["generated_text"] == answer.text
    events = call(served.url, "/infer", inputs).events
    assert [i for event in events for i in event["token"]["id"]] == list(answer.token_ids)
    assert "".join(event["token"]["text"] or "" for event in events) == answer.text
    body = {"text_input": parts, "max_tokens": 24}
    events = call(served.url, "/v2/models/demo/generate_stream", body).events
    assert "".join(event["text_output"] for event in events) == answer.text
    body = {"prompt": parts, "max_tokens": 24, "temperature": 0, "stream": True}
    last = call(served.url, "/generate", body).content.splitlines()[-1]
    assert json.loads(last)["text"][0].endswith(answer.text)
