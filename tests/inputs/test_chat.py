"""Message dictionaries: what they become, and which path an error names."""

import collections
import io
import json
import logging
from pathlib import Path
from types import MappingProxyType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from glimt.config import ImageLimits
from glimt.errors import RequestError
from glimt.inputs.chat import load_messages_file, parse_messages
from glimt.types import ImagePart, Message, TextPart

LIMITS = ImageLimits(max_images=3)
URL = "data:image/png;base64,iVBORw0KGgo="


def parse(*raw):
    return parse_messages(list(raw), LIMITS)


def parse_content(content, role="user"):
    (message,) = parse({"role": role, "content": content})
    return message.parts


def text(value):
    return {"type": "text", "text": value}


def picture(url=URL):
    return {"type": "image_url", "image_url": {"url": url}}


# --- what is accepted ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given_role", "role"),
    [
        ("system", "system"),
        ("developer", "system"),
        ("user", "user"),
        ("assistant", "assistant"),
        ("observation", "observation"),
        ("tool", "observation"),
    ],
)
def test_roles_are_those_of_the_models(given_role, role):
    """Catches a role that OpenAI's clients send and the templates do not know."""
    assert parse({"role": given_role, "content": "x"}) == (Message(role, (TextPart("x"),)),)


def test_text_and_pictures_keep_their_order():
    """Catches pictures gathered in front of the text, which changes the prompt."""
    parts = parse_content([picture("a"), text("one"), picture("b"), text("two")])
    assert parts == (ImagePart("a"), TextPart("one"), ImagePart("b"), TextPart("two"))


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": URL}},
        {"type": "image_url", "image_url": {"url": URL, "detail": "high"}},
        {"type": "image_url", "image_url": URL},
        {"type": "input_image", "image_url": URL, "detail": "auto"},
        {"type": "input_image", "image_url": {"url": URL}},
        {"type": "image", "image": URL},
    ],
)
def test_every_spelling_of_a_picture_is_the_same_picture(part):
    """Catches a client library whose form is refused."""
    assert parse_content([part]) == (ImagePart(URL),)


@pytest.mark.parametrize("part", [text("x"), {"type": "input_text", "text": "x"}])
def test_both_spellings_of_a_text_part_are_taken(part):
    """Catches the form of OpenAI's newer interface being refused."""
    assert parse_content([part]) == (TextPart("x"),)


@pytest.mark.parametrize(
    "source",
    [
        "a.png",
        Path("a.png"),
        b"bytes",
        bytearray(b"bytes"),
        memoryview(b"bytes"),
        Image.new("RGB", (2, 2)),
    ],
    ids=lambda source: type(source).__name__,
)
def test_an_image_part_hands_its_source_on_untouched(source):
    """Catches a picture opened, copied or turned to text while messages are parsed."""
    (part,) = parse_content([{"type": "image", "image": source}])
    assert part.source is source


def test_an_assistant_without_content_said_nothing():
    """Catches the word None in the prompt."""
    assert parse_content(None, role="assistant") == ()
    assert parse({"role": "assistant", "content": None})[0].text == ""


@pytest.mark.parametrize(
    "content", ["", " ", "\0", "a\0b", "<|endoftext|>", "你好\n", "\U0001f600"]
)
def test_text_is_passed_on_exactly(content):
    """Catches trimming, and refusing what is only unusual."""
    assert parse_content(content) == (TextPart(content),)
    assert parse_content([text(content)]) == (TextPart(content),)


def test_text_parts_are_joined_by_line_feeds():
    """Catches parts that run into each other, or a picture between them that leaves a trace."""
    picture = {"type": "image", "image": b"y"}
    (message,) = parse({"role": "user", "content": [text("a b"), picture, text("c")]})
    assert message.text == "a b\nc"


def test_message_objects_pass_through():
    """Catches a copy, or a Message taken for a dictionary without keys."""
    message = Message("user", (TextPart("x"), ImagePart(b"y")))
    mixed = parse(message, {"role": "user", "content": "z"})
    assert mixed[0] is message
    assert mixed[1].text == "z"


def test_any_sequence_of_any_mappings_is_taken():
    """Catches a test for exactly list and dict."""
    raw = collections.deque([MappingProxyType({"role": "user", "content": (text("x"),)})])
    assert parse_messages(raw, LIMITS)[0].text == "x"


@pytest.mark.parametrize("none", [None, []])
@pytest.mark.parametrize("key", ["tool_calls", "function_call"])
def test_an_answer_that_says_it_called_no_tool_is_taken(key, none):
    """Catches refusing an answer of ours that a client sends back as it got it."""
    assert parse({"role": "assistant", "content": "x", key: none})[0].text == "x"


def test_unknown_keys_are_ignored_and_logged(caplog):
    """Catches dropping them in silence, and their values in the log."""
    caplog.set_level(logging.DEBUG, logger="glimt")
    parse({"role": "user", "content": [text("x") | {"extra": 1}], "name": "secret"})
    assert "messages[0]: ignored keys" in caplog.text
    assert "'name'" in caplog.text
    assert "messages[0].content[0]: ignored keys" in caplog.text
    assert "secret" not in caplog.text


def test_known_keys_are_not_logged(caplog):
    """Catches noise that hides what was really ignored."""
    caplog.set_level(logging.DEBUG, logger="glimt")
    parse({"role": "user", "content": [text("x"), picture()], "tool_calls": None})
    assert caplog.text == ""


# --- what is refused, and under which path ---------------------------------------------------


@pytest.mark.parametrize(
    ("field", "raw"),
    [
        ("messages", None),
        ("messages", "hello"),
        ("messages", b"hello"),
        ("messages", 7),
        ("messages", {"role": "user", "content": "x"}),
        ("messages", []),
        ("messages", ()),
        ("messages[0]", [None]),
        ("messages[0]", ["hello"]),
        ("messages[0]", [["user", "hello"]]),
        ("messages[0].role", [{"content": "x"}]),
        ("messages[0].role", [{}]),
        ("messages[0].content", [{"role": "user"}]),
        ("messages[0].content", [{"role": "assistant"}]),
    ],
    ids=repr,
)
def test_a_conversation_of_the_wrong_shape_names_its_path(field, raw):
    """Catches AttributeError and KeyError, and an error without a path."""
    with pytest.raises(RequestError) as caught:
        parse_messages(raw, LIMITS)
    assert caught.value.field == field


@pytest.mark.parametrize("role", ["", "User", "function", "bot", None, 7, True, ["user"], {}])
def test_unknown_roles_are_refused(role):
    """Catches an unhashable role, and a role written into the prompt as it came."""
    with pytest.raises(RequestError, match="must be one of system") as caught:
        parse({"role": "user", "content": "x"}, {"role": role, "content": "x"})
    assert caught.value.field == "messages[1].role"


@pytest.mark.parametrize("content", [7, 1.5, True, {}, text("x"), b"x", set()])
def test_content_of_a_wrong_type_is_refused(content):
    """Catches a number written into the prompt."""
    with pytest.raises(RequestError, match="a text or a list of parts") as caught:
        parse_content(content)
    assert caught.value.field == "messages[0].content"


@pytest.mark.parametrize("role", ["system", "user", "observation", "tool"])
def test_only_an_assistant_may_say_nothing(role):
    """Catches a forgotten question answered anyway."""
    with pytest.raises(RequestError, match="null"):
        parse_content(None, role=role)


@pytest.mark.parametrize(
    ("suffix", "part"),
    [
        ("", None),
        ("", "hello"),
        ("", [text("x")]),
        (".type", {}),
        (".type", {"text": "x"}),
        (".type", {"type": None}),
        (".type", {"type": ["text"]}),
        (".type", {"type": "video_url", "video_url": {"url": URL}}),
        (".type", {"type": "input_audio", "input_audio": {}}),
        (".type", {"type": "refusal", "refusal": "no"}),
        (".text", {"type": "text"}),
        (".text", {"type": "text", "text": None}),
        (".text", {"type": "text", "text": 7}),
        (".text", {"type": "input_text", "text": ["x"]}),
        (".image_url", {"type": "image_url"}),
        (".image_url", {"type": "image_url", "image_url": None}),
        (".image_url", {"type": "image_url", "image_url": 7}),
        (".image_url", {"type": "image_url", "image_url": ""}),
        (".image_url", {"type": "image_url", "image_url": b"bytes"}),
        (".image_url", {"type": "input_image", "file_id": "file-1"}),
        (".image_url.url", {"type": "image_url", "image_url": {}}),
        (".image_url.url", {"type": "image_url", "image_url": {"detail": "low"}}),
        (".image_url.url", {"type": "image_url", "image_url": {"url": None}}),
        (".image_url.url", {"type": "image_url", "image_url": {"url": ""}}),
        (".image_url.url", {"type": "image_url", "image_url": {"url": {"url": URL}}}),
        (".image", {"type": "image"}),
        (".image", {"type": "image", "image": None}),
        (".image", {"type": "image", "image": 7}),
        (".image", {"type": "image", "image": {"url": URL}}),
        (".image", {"type": "image", "image": io.BytesIO()}),
    ],
)
def test_a_wrong_part_names_its_exact_path(suffix, part):
    """Catches an error that leaves the caller searching a long conversation."""
    good = {"role": "user", "content": [text("x"), picture()]}
    bad = {"role": "user", "content": [text("x"), part]}
    with pytest.raises(RequestError) as caught:
        parse(good, good, bad)
    assert caught.value.field == f"messages[2].content[1]{suffix}"
    assert str(caught.value).startswith(f"messages[2].content[1]{suffix}: ")


def test_an_empty_list_of_parts_is_refused():
    """Catches a turn that says nothing at all."""
    with pytest.raises(RequestError, match="empty list") as caught:
        parse_content([])
    assert caught.value.field == "messages[0].content"


@pytest.mark.parametrize("broken", ["\ud800", "a\udfff", "\ud83d x", "\ude00\ud83d"])
def test_half_a_surrogate_pair_is_refused_wherever_text_stands(broken):
    """Catches UnicodeEncodeError in the tokenizer: JSON can write what UTF-8 cannot."""
    for raw, field in [
        ({"role": "user", "content": broken}, "messages[0].content"),
        ({"role": "user", "content": [text("x"), text(broken)]}, "messages[0].content[1].text"),
        (Message("user", (TextPart("x"), TextPart(broken))), "messages[0].parts[1].text"),
    ]:
        with pytest.raises(RequestError, match=r"half a surrogate pair \(U\+D") as caught:
            parse(raw)
        assert caught.value.field == field
        str(caught.value).encode()  # the error itself can be sent


def test_pictures_are_counted_over_the_whole_request():
    """Catches a limit per message, and the first picture blamed for the fourth."""
    three = {"role": "user", "content": [picture(), text("x"), picture(), picture()]}
    assert parse(three)[0].num_images == 3
    with pytest.raises(RequestError, match="picture number 4 of the request; at most 3") as caught:
        parse(three, {"role": "user", "content": [text("x"), picture(), picture()]})
    assert caught.value.field == "messages[1].content[1]"
    with pytest.raises(RequestError, match="at most 3") as caught:
        parse(three, Message("user", (ImagePart(URL),)))
    assert caught.value.field == "messages[1].parts[0]"


@pytest.mark.parametrize(
    "raw",
    [
        {"role": "r" * 10**6, "content": "x"},
        {"role": "user", "content": [{"type": "t" * 10**6}]},
        {"role": ["user"] * 10**5, "content": "x"},
    ],
)
def test_errors_do_not_repeat_megabytes(raw):
    """Catches a reply as long as the request."""
    with pytest.raises(RequestError) as caught:
        parse(raw)
    assert len(str(caught.value)) < 300


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "type", "text", "image_url", "url", "image", "x"]),
            inner | st.sampled_from(["user", "text", "image_url", "image"]),
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(JSON)
@settings(max_examples=300, deadline=None)
def test_any_json_is_parsed_or_refused_by_path(raw):
    """Catches TypeError and the like for shapes that nobody thought of."""
    try:
        messages = parse_messages(raw, LIMITS)
    except RequestError as error:
        refused = error.field
    else:
        refused = None
        assert messages
    assert refused is None or refused.startswith("messages")


# --- files -----------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_messages_file_is_read_as_it_stands(tmp_path, encoding):
    """Catches a file from an editor that writes a byte order mark."""
    raw = [{"role": "user", "content": "你好"}]
    path = tmp_path / "messages.json"
    path.write_text(json.dumps(raw, ensure_ascii=False), encoding=encoding)
    assert load_messages_file(path) == raw
    assert parse(*load_messages_file(path))[0].text == "你好"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not JSON in UTF-8"),
        (b'[{"role": "user",]', "is not JSON in UTF-8"),
        (b"\xff\xfe[", "is not JSON in UTF-8"),
        (b"[" * 100_000, "is not JSON in UTF-8"),
        (b'{"messages": []}', "holds an object; a JSON array of messages is needed"),
        (b'"hello"', "holds a text"),
        (b"null", "holds null"),
        (b"7", "holds a number"),
        (b"true", "holds true or false"),
    ],
)
def test_a_file_of_anything_else_is_refused_by_name(tmp_path, content, message):
    """Catches an error of the JSON reader that does not say which file."""
    path = tmp_path / "messages.json"
    path.write_bytes(content)
    with pytest.raises(RequestError, match=message) as caught:
        load_messages_file(path)
    assert caught.value.field == str(path)


def test_a_file_that_cannot_be_read_is_refused_by_name(tmp_path):
    """Catches OSError reaching the user."""
    for path, message in [(tmp_path / "none.json", "No such file"), (tmp_path, "directory")]:
        with pytest.raises(RequestError, match=message) as caught:
            load_messages_file(path)
        assert caught.value.field == str(path)
