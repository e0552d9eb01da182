"""TextStream: however a text is split into tokens, the same text is seen."""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Sequence
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from glimt.outputs.detokenizer import ExactDecoder, NamingDecoder, TextStream
from glimt.outputs.stop import find_stop, partial_stop

TAG = "[[训练时间]]"


class ChunkDecoder:
    """Token id i stands for chunks[i], any bytes; the rest is UTF-8 as in a real tokenizer."""

    def __init__(self, chunks: Sequence[bytes]) -> None:
        self.chunks = chunks
        self.utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token_id: int) -> str:
        return self.utf8.decode(self.chunks[token_id])

    def finish(self) -> str:
        return self.utf8.decode(b"", final=True)


def unchanged(raw: str) -> str:
    return raw


def mended(raw: str) -> str:
    """VisualGLM's way: strip, replace a tag, full-width punctuation next to Chinese."""
    text = raw.strip().replace(TAG, "2023年")
    for narrow, wide in ((",", "，"), ("!", "！"), (":", "："), (";", "；"), ("\\?", "？")):
        text = re.sub(rf"([\u4e00-\u9fff]){narrow}", rf"\1{wide}", text)
        text = re.sub(rf"{narrow}([\u4e00-\u9fff])", rf"{wide}\1", text)
    return text


def mended_length(raw: str) -> int:
    """All but what a later character may change: a begun tag, blanks, last punctuation."""
    settled = raw[: len(raw) - partial_stop(raw, (TAG,))]
    return len(settled.rstrip().rstrip(",!:;?"))


def stripped_length(raw: str) -> int:
    return len(raw.rstrip())


WAYS: list[tuple[Callable[[str], str], Callable[[str], int]]] = [
    (unchanged, len),
    (str.strip, stripped_length),
    (mended, mended_length),
]


def text_stream(chunks, way=(unchanged, len), stops: tuple[str, ...] = ()) -> TextStream:
    return TextStream(ChunkDecoder(chunks), way[0], way[1], stops)


def run(stream: TextStream, num_tokens: int) -> list[str]:
    """All deltas; the last one is close()'s."""
    return [*map(stream.feed, range(num_tokens)), stream.close()]


def split(data: bytes, cuts: Sequence[int]) -> list[bytes]:
    """A text's bytes as tokens, cut at any byte."""
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    return [data[a:b] for a, b in pairwise(edges)]


RAW = st.text("猫好a b,!:?\n。🦙", max_size=24) | st.lists(
    st.sampled_from(["猫", "a", ",", "? ", " ", "\n", TAG, TAG[:3], "🦙", "。"]), max_size=8
).map("".join)
STOPS = st.lists(st.text("猫a ,，！\n🦙", min_size=1, max_size=3) | st.just("23年"), max_size=3)
CUTS = st.lists(st.integers(0, 80), max_size=30)


@pytest.mark.parametrize("way", WAYS, ids=["unchanged", "stripped", "mended"])
@settings(max_examples=200, deadline=None)
@given(raw=RAW, stops=STOPS, cuts=CUTS)
@example(raw="猫," + TAG + ",a", stops=["，"], cuts=list(range(40)))
@example(raw=" aa,猫", stops=["aa，", "a,"], cuts=list(range(20)))
def test_all_deltas_are_the_finished_text_up_to_the_stop(way, raw: str, stops, cuts):
    """Whatever the tokens, the caller must see what a whole answer would have shown."""
    chunks = split(raw.encode(), cuts)
    stream = text_stream(chunks, way, tuple(stops))
    whole = way[0](raw)
    found = find_stop(whole, stops, 0)
    deltas = run(stream, len(chunks))
    assert "".join(deltas) == (whole[: found[0]] if found else whole)
    assert stream.stop_reason == (found[1] if found else None)
    assert stream.text == "".join(deltas)


@settings(max_examples=100, deadline=None)
@given(data=st.binary(max_size=24), cuts=CUTS)
def test_broken_bytes_are_marked_and_nothing_is_lost(data: bytes, cuts):
    """An answer cut inside a character, or a model that writes broken bytes."""
    chunks = split(data, cuts)
    assert "".join(run(text_stream(chunks), len(chunks))) == data.decode("utf-8", "replace")


def test_a_character_of_several_tokens_comes_whole():
    """A client would show U+FFFD and never take it back."""
    deltas = run(text_stream([b"a", b"\xf0", b"\x9f", b"\xa6", b"\x99", b"b"]), 6)
    assert deltas == ["a", "", "", "", "🦙", "b", ""]


def test_punctuation_waits_for_its_neighbour():
    """`,` given early cannot become `，` when a Chinese character follows."""
    deltas = run(text_stream([b"a", b",", "猫".encode()], WAYS[2]), 3)
    assert deltas == ["a", "", "，猫", ""]


def test_text_that_only_may_begin_a_stop_string_is_held_and_then_given():
    """Held text must come out once it is known to begin nothing, and at the end."""
    stream = text_stream([b"one<", b"/", b"b>", b"<"], stops=("</s>",))
    assert run(stream, 4) == ["one", "", "</b>", "", "<"]
    assert stream.stop_reason is None


def test_a_stop_string_across_tokens_cuts_the_text_before_it():
    """Parts of a stop string must never be seen."""
    stream = text_stream([b"one <", b"/s", b"> two"], stops=("</s>",))
    assert [stream.feed(i) for i in range(3)] == ["one ", "", ""]
    assert stream.stop_reason == "</s>"
    assert stream.text == "one "


def test_the_text_before_a_stop_string_in_the_same_token_is_given():
    """The token that holds the stop string may also hold the last words."""
    stream = text_stream([b"one two</s>three"], stops=("</s>",))
    assert stream.feed(0) == "one two"
    assert stream.stop_reason == "</s>"


def test_nothing_is_given_after_a_stop_string():
    """The engine may feed tokens that it had already computed."""
    stream = text_stream([b"a.", b"b", b"\xf0"], stops=(".",))
    assert run(stream, 3) == ["a", "", "", ""]


def test_a_stop_string_that_only_the_end_completes_is_found():
    """The last punctuation becomes certain when nothing follows."""
    stream = text_stream(["猫?".encode()], WAYS[2], ("？",))
    assert stream.feed(0) == "猫"
    assert stream.stop_reason is None
    assert stream.close() == ""
    assert stream.stop_reason == "？"


def test_closing_twice_gives_nothing_twice():
    """A finished and then aborted request closes its stream again."""
    stream = text_stream([b"a "], WAYS[2], ("ab",))
    assert stream.feed(0) == ""
    assert (stream.close(), stream.close()) == ("a", "")


def test_stop_strings_are_searched_only_where_a_new_one_may_begin(monkeypatch):
    """Searching the whole text at every token makes a long answer quadratic."""
    starts = []

    def watched(text, stops, start):
        starts.append((start, len(text)))
        return find_stop(text, stops, start)

    monkeypatch.setattr("glimt.outputs.detokenizer.find_stop", watched)
    run(text_stream([b"abcdefgh"] * 50, stops=("ghost",)), 50)
    assert all(length - start <= 8 + len("ghost") for start, length in starts)


def test_a_shown_stop_string_ends_the_text():
    """Catches text behind the stop string, or half of it given twice."""
    for cut in range(1, 6):
        text = "abSTOPcd"
        chunks = [text[:cut].encode(), text[cut:].encode()]
        stream = TextStream(ChunkDecoder(chunks), str, len, ("STOP",), shows_stop=True)
        given = stream.feed(0) + stream.feed(1) + stream.close()
        assert (given, stream.stop_reason) == ("abSTOP", "STOP")


def test_names_of_special_tokens_stand_between_whole_characters():
    """Catches a name inside the bytes of a character, and bytes that are lost."""
    cat = "猫".encode()
    decoder = NamingDecoder(ExactDecoder(lambda i: bytes([i])), {300: "<|user|>"})
    pieces = [decoder.feed(i) for i in (*cat, 300, cat[0], 300, 32)]
    assert "".join(pieces) + decoder.finish() == "猫<|user|>\ufffd<|user|> "
