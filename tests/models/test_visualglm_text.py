"""VisualGLM's answers: the original's clean-up and punctuation, also when streamed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glimt.errors import RequestError
from glimt.models.visualglm import VisualGlmProcessor, _query, _rounds
from glimt.types import ImagePart, Message, TextPart

PROCESSOR = object.__new__(VisualGlmProcessor)  # the text rules need neither config nor tokenizer


@pytest.mark.parametrize(
    ("raw", "finished"),
    [
        ("  你好,世界 ", "你好，世界"),
        ("图,text", "图，text"),
        ("text,图", "text，图"),
        ("Hello, world!", "Hello, world!"),
        ("这是什么?yes:no;是!", "这是什么？yes:no；是！"),
        ("中文.English. 句号.", "中文.English. 句号."),
        ("I do n't know , it 's a dog .", "I don't know, it's a dog."),
        ("He 's here ? Yes ! I 'm , you 're , we 've", "He's here? Yes! I'm, you're, we've"),
        ("the dog ' s", "the dog's"),
        ("截至[[训练时间]],我", "截至2023年，我"),
        ("", ""),
        ("\n\n答案\n", "答案"),
    ],
)
def test_answers_are_finished_as_the_original_does(raw: str, finished: str) -> None:
    """Catches a rule that is missing, in another order, or touches full stops."""
    assert PROCESSOR.finish_text(raw) == finished


PIECES = st.lists(
    st.sampled_from(
        [*"中文 a.,!?:;'ns[]\n", "[[训练时间]]", "[[训", " n't", " '", " 'm", " 's", "  ", "' "]
    ),
    max_size=24,
)


@settings(max_examples=600, deadline=None)
@given(PIECES, PIECES)
def test_what_was_streamed_is_never_taken_back(before: list[str], after: list[str]) -> None:
    """Catches a mark given out before its right neighbour was known."""
    raw, more = "".join(before), "".join(after)
    length = PROCESSOR.stable_length(raw)
    assert 0 <= length <= len(raw)
    assert PROCESSOR.finish_text(raw + more).startswith(PROCESSOR.finish_text(raw[:length]))


@pytest.mark.parametrize("mark", [*",!:;?"])
def test_a_mark_waits_for_its_right_neighbour(mark: str) -> None:
    """Catches one of the marks that is given out before a Chinese character changes it."""
    assert PROCESSOR.stable_length(f"a{mark}") == 1
    assert PROCESSOR.stable_length(f"a{mark}b") == 3


def test_plain_words_are_streamed_at_once() -> None:
    """Catches a held-back tail so long that streaming stutters."""
    for raw in ("图片里是一只猫", "a cat on the mat", "第一行\n第二行"):
        assert PROCESSOR.stable_length(raw) == len(raw)


def test_the_query_alone_chooses_the_template() -> None:
    """Catches a Chinese system text, or an earlier question, that makes an English one Chinese."""
    turns = [("system", "规则"), ("user", "甲"), ("assistant", "乙"), ("user", "What is it?")]
    messages = [Message(role, (TextPart(text),)) for role, text in turns]  # type: ignore[arg-type]
    assert _query(messages) == "What is it?"
    assert _query(messages[:2]) == "甲"
    assert _query([*messages, messages[0]]) == "What is it?"


def say(*turns: tuple[str, str]) -> list[tuple[str, str]]:
    return _rounds([Message(role, (TextPart(text),)) for role, text in turns])  # type: ignore[arg-type]


def test_messages_become_rounds() -> None:
    """Catches a system text that is dropped, and two questions in a row that lose one."""
    assert say(("user", "甲"), ("assistant", "乙"), ("user", "丙")) == [("甲", "乙"), ("丙", "")]
    assert say(("system", "规则"), ("user", "甲")) == [("规则\n甲", "")]
    assert say(("user", "甲"), ("user", "乙")) == [("甲\n乙", "")]
    with pytest.raises(RequestError, match="last message is the assistant's"):
        say(("user", "甲"), ("assistant", "乙"))


class Words:
    """A tokenizer that only remembers what it was asked to encode, one id each."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def encode(self, text: str) -> list[int]:
        self.texts.append(text)
        return [100 + len(self.texts)]


def test_a_prompt_by_hand() -> None:
    """Catches a line feed that is missing, a picture out of place, and texts encoded apart."""
    words = Words()
    config = SimpleNamespace(image_length=3, gmask_token_id=7, bos_token_id=8)
    processor = object.__new__(VisualGlmProcessor)
    processor.config, processor.tokenizer = config, words  # type: ignore[assignment]
    processor._placeholder = 0
    picture = ImagePart(None)
    messages = [
        Message("user", (picture, TextPart("甲"))),
        Message("assistant", (TextPart("乙"),)),
        Message("user", (picture, TextPart("丙"))),
    ]
    prompt = processor.encode_chat(messages, [(4, 4)] * 2, "auto")
    last = "</img>问：甲\n答：乙\n问：丙\n答："
    assert words.texts == ["<img>", "</img>", "<img>", last]
    assert prompt.token_ids == (101, 0, 0, 0, 102, 103, 0, 0, 0, 104, 7, 8)
    assert [(span.start, span.length, span.image) for span in prompt.spans] == [
        (1, 3, 0),
        (6, 3, 1),
    ]
    assert prompt.positions.tolist() == [[*range(11), 10], [0] * 11 + [1]]
    assert (prompt.decode_start, prompt.decode_step) == ((10, 2), (0, 1))
    assert prompt.bidirectional_len == 11
    words.texts.clear()
    processor.encode_chat([Message("user", (TextPart("a"),))], [], "auto")
    assert words.texts == ["Q:a\nA:"]
