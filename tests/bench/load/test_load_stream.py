"""An answer's stream: bytes to events to a recording."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glimt.bench.load.outcome import Counts
from glimt.bench.load.recording import Recording, StreamFailure, message_of_body
from glimt.bench.load.sse import EventReader

STREAM = (
    ': wait\n\ndata: {"a": "猫"}\n\nevent: x\r\ndata: 1\r\ndata:2\r\n\r\ndata: [DONE]\n\n'.encode()
)
EVENTS = ['{"a": "猫"}', "1\n2", "[DONE]"]


@given(st.lists(st.integers(0, len(STREAM)), max_size=12))
def test_events_do_not_depend_on_where_the_bytes_are_cut(cuts):
    """Catches a character, a line end or an event that a packet's end cuts in two."""
    reader, ends = EventReader(), [0, *sorted(cuts), len(STREAM)]
    pieces = [STREAM[start:end] for start, end in pairwise(ends)]
    assert [data for piece in pieces for data in reader.feed(piece)] == EVENTS
    assert reader.finish() is None


def test_the_end_of_the_stream_ends_an_event():
    """Catches a last event lost because no blank line follows."""
    reader = EventReader()
    assert reader.feed(b"data: [DONE]") == []
    assert reader.finish() == "[DONE]"
    assert reader.finish() is None


def chat(text: str | None, finish: str | None = None, **more: str) -> str:
    delta = {} if text is None else {"content": text}
    return json.dumps({"choices": [{"delta": {**delta, **more}, "finish_reason": finish}]})


def test_only_events_with_text_are_tokens():
    """Catches a role, an empty delta or a usage that counts as the first token."""
    recording = Recording()
    recording.add(chat("", role="assistant"), 1.0)
    recording.add(chat("a"), 2.0)
    recording.add(chat("b"), 3.0)
    recording.add(chat(None, "stop"), 3.5)
    recording.add(json.dumps({"choices": [], "usage": {"completion_tokens": 3}}), 4.0)
    recording.add("[DONE]", 5.0)
    recording.check_whole()
    assert recording.event_s == [2.0, 3.0]
    assert recording.text == "ab"
    assert recording.end_s == 3.5, "the end token has no text, its finish reason is its time"
    assert recording.counts == Counts(output_tokens=3)


@pytest.mark.parametrize(
    "choice",
    [{"text": "a"}, {"delta": {"reasoning_content": "a"}}, {"delta": {"reasoning": "a"}}],
)
def test_text_may_stand_elsewhere(choice):
    """Catches completions and thinking aloud, which are tokens as well."""
    recording = Recording()
    recording.add(json.dumps({"choices": [choice]}), 1.0)
    assert recording.text == "a"


def test_usage_in_every_chunk_is_taken_last():
    """Catches running usage read at its first value, and a null one as no usage."""
    recording = Recording()
    for count in (1, 2):
        recording.add(json.dumps({"choices": [], "usage": {"completion_tokens": count}}), 1.0)
    recording.add(json.dumps({"choices": [], "usage": None}), 1.0)
    assert recording.counts.output_tokens == 2


def test_details_of_the_prompt_are_read():
    """Catches cached and picture tokens that get lost, and details that are null."""
    recording = Recording()
    details = {"cached_tokens": 4, "image_tokens": 5}
    usage = {"prompt_tokens": 9, "completion_tokens": 1, "prompt_tokens_details": details}
    recording.add(json.dumps({"usage": usage}), 1.0)
    assert recording.counts == Counts(9, 1, 4, 5)
    recording.add(json.dumps({"usage": usage | {"prompt_tokens_details": None}}), 1.0)
    assert recording.counts == Counts(9, 1)


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        ('{"error": {"message": "the engine failed"}}', "server"),
        ('{"error": "the engine failed"}', "server"),
        ("{", "broken"),
        ("[1]", "broken"),
        ("[" * 100_000, "broken"),
    ],
)
def test_what_is_no_event_fails_by_its_kind(data, kind):
    """Catches a traceback for a server that speaks another protocol."""
    with pytest.raises(StreamFailure) as failure:
        Recording().add(data, 1.0)
    assert failure.value.kind == kind


@pytest.mark.parametrize("data", ['{"choices": null}', '{"choices": [1, null]}', "{}"])
def test_odd_events_are_passed_over(data):
    """Catches an index into what is not there."""
    recording = Recording()
    recording.add(data, 1.0)
    assert recording.event_s == []


def test_a_stream_that_ends_early_is_broken():
    """Catches an answer cut in two that counts as a short one."""
    recording = Recording()
    recording.add(chat("a"), 1.0)
    with pytest.raises(StreamFailure, match="without a finish reason") as failure:
        recording.check_whole()
    assert failure.value.kind == "broken"


def test_an_answer_without_text_is_none():
    """Catches a first token time of nothing."""
    recording = Recording()
    recording.add(chat(None, "stop"), 1.0)
    with pytest.raises(StreamFailure) as failure:
        recording.check_whole()
    assert failure.value.kind == "empty"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ('{"error": {"message": "too long", "code": 400}}', "too long"),
        ('{"error": "too long", "error_type": "validation"}', "too long"),
        ('{"detail": "too long"}', "too long"),
        ("<p>too\n long</p>", "<p>too long</p>"),
        ("", ""),
        ('"too long"', "too long"),
    ],
)
def test_an_error_is_read_in_any_form(body, said):
    """Catches errors told as a dictionary, or not at all."""
    assert message_of_body(body) == said


def test_half_characters_are_joined_or_replaced():
    """Catches a result file that cannot be written because a server cut a character in two."""
    recording = Recording()
    for half in ("\ud83d", "\ude00", "a\ud83d"):
        recording.add(json.dumps({"choices": [{"text": half}]}), 1.0)
    assert recording.text == "😀a\ufffd"
    assert message_of_body('{"error": "\\ud83d"}') == "\ufffd"
