"""VisualGLM's answers: the original's clean-up and punctuation, also when streamed."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glimt.errors import RequestError
from glimt.models.visualglm import VisualGlmProcessor, _query, _rounds
from glimt.types import Message, TextPart

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


def say(*turns: tuple[str, str]) -> list[tuple[str, str]]:
    return _rounds([Message(role, (TextPart(text),)) for role, text in turns])  # type: ignore[arg-type]


def test_messages_become_rounds() -> None:
    """Catches a system text that is dropped, and two questions in a row that lose one."""
    assert say(("user", "甲"), ("assistant", "乙"), ("user", "丙")) == [("甲", "乙"), ("丙", "")]
    assert say(("system", "规则"), ("user", "甲")) == [("规则\n甲", "")]
    assert say(("user", "甲"), ("user", "乙")) == [("甲\n乙", "")]
    with pytest.raises(RequestError, match="last message is the assistant's"):
        say(("user", "甲"), ("assistant", "乙"))
