"""ClipTokenizer: against transformers' own with the same toy vocabulary, and the cut at the end."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.oracles import clip_oracle as oracle

from glimt.errors import ConfigError
from glimt.evaluate.clip_text import clean_as_hub, clean_as_open_clip
from glimt.evaluate.clip_tokenizer import ClipTokenizer, of_hub_folder, of_open_clip

VOCAB = oracle.SHAPE.vocab
START, END = VOCAB - 2, VOCAB - 1
ALL = 10**9  # a context that cuts nothing

TEXTS = [
    "the cat that sat on the mat",
    "The RED dog,  on\tthe\n cat!?",
    "it's they'll we've i'd i'm you're don't 'tis",
    "12 dogs and 3.5 cats in 2024",
    "你好，世界。你们的猫",
    "😀👍🏽 a cat 👨‍👩‍👧",
    "naïve café e\u0301 Ærø ﬁ",
    "x" * 300,
    "a_b-c/d\\e (f) [g] {h}",
    "   ",
    "",
    "\u00a0 the\u3000cat \u2028 dog",
]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    ids = oracle.hub_vocabulary()
    (folder / "vocab.json").write_text(json.dumps(ids), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in oracle.MERGES)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def ours(hub: Path) -> ClipTokenizer:
    return of_hub_folder(hub)


@pytest.fixture(scope="module")
def theirs():
    from transformers import CLIPTokenizer

    pairs = [tuple(pair) for pair in oracle.MERGES]
    return CLIPTokenizer(vocab=oracle.hub_vocabulary(), merges=pairs)


@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_the_librarys_own(ours, theirs, text):
    """Catches merges in the wrong order, a lost end of word, another cut into words."""
    assert list(ours.encode(text, ALL).ids) == theirs(text)["input_ids"]


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet=st.characters(codec="utf-8", categories=["L", "N", "P", "S", "Zs"])))
def test_ids_of_any_text_are_the_librarys_own(ours, theirs, text):
    """Catches characters that nobody thought of."""
    if text.lower() != "".join(map(str.lower, text)):
        return  # a final sigma, which Python knows and the library does not
    if oracle.START in text or oracle.END in text:
        return  # text like any other here, and there an end: the test after the next
    assert list(ours.encode(text, ALL).ids) == theirs(text)["input_ids"]


def test_merges_are_applied_by_rank(ours):
    """Catches merging from the left: `the` is t+h and then th+e, `red` needs three merges."""
    ids = oracle.hub_vocabulary()
    assert ours.encode("The red", ALL).ids == (START, ids["the</w>"], ids["red</w>"], END)
    assert ours.encode("at", ALL).ids == (START, ids["at</w>"], END)
    assert ours.encode("ta", ALL).ids == (START, ids["t"], ids["a</w>"], END)


@pytest.mark.parametrize("spelt", [oracle.START, oracle.END])
def test_an_end_spelt_in_a_text_is_text(ours, spelt):
    """Catches an answer that ends its own judgement; the library takes both for ends."""
    ids = ours.encode(f"cat {spelt} dog", ALL).ids
    assert (ids.count(START), ids.count(END)) == (1, 1)
    assert (ids[0], ids[-1]) == (START, END)


def test_a_long_text_is_cut_and_keeps_its_end(ours):
    """Catches a cut that loses the end of text, where the features are taken from."""
    exact = ours.encode("the " * 75, 77)
    assert (len(exact.ids), exact.is_cut, exact.ids[-1]) == (77, False, END)
    cut = ours.encode("the " * 76, 77)
    assert (len(cut.ids), cut.is_cut, cut.ids[-1]) == (77, True, END)
    assert cut.ids == exact.ids


# --- open_clip's file ------------------------------------------------------------------------


def test_open_clips_file_gives_the_same_ids(ours, tmp_path):
    """Catches another order of the bytes, or merges counted from the comment line."""
    tokenizer = of_open_clip(oracle.write_vocabulary(tmp_path / "bpe.gz"), VOCAB)
    for text in TEXTS[:4]:
        assert tokenizer.encode(text, ALL) == ours.encode(text, ALL)
    assert (tokenizer.start_id, tokenizer.end_id) == (START, END)


BAD_FILES = [
    (b"a b\n", "is not gzip"),
    (gzip.compress(b"#\na b\n"), "lines of merges"),
    (gzip.compress(("#\n" + "a b c\n" * 20).encode()), "two words each"),
    (gzip.compress(b"#\n" + b"\xff\xfe\n" * 20), "cannot be read"),
    (gzip.compress(b"#\na b\n" * 20)[:18], "cannot be read"),
]


@pytest.mark.parametrize(("content", "said"), BAD_FILES, ids=range(len(BAD_FILES)))
def test_a_file_of_another_kind_is_refused(tmp_path, content, said):
    """Catches ids that are shifted because some merges are missing."""
    path = tmp_path / "bpe.gz"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=said):
        of_open_clip(path, VOCAB)


def test_a_missing_file_is_named(tmp_path):
    """Catches a traceback for a mistyped name."""
    with pytest.raises(ConfigError, match=r"nowhere.gz cannot be read: No such file"):
        of_open_clip(tmp_path / "nowhere.gz", VOCAB)


# --- a hub folder ----------------------------------------------------------------------------


def test_tokenizer_json_is_read_where_vocab_json_is_not_there(ours, theirs, tmp_path):
    """Catches folders that newer releases of transformers write."""
    theirs.save_pretrained(tmp_path)
    assert not (tmp_path / "vocab.json").exists()
    again = of_hub_folder(tmp_path)
    for text in TEXTS:
        assert again.encode(text, 77) == ours.encode(text, 77)


def test_a_folder_without_a_tokenizer_is_told(tmp_path):
    """Catches a KeyError at the first text."""
    with pytest.raises(ConfigError, match="has neither vocab"):
        of_hub_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": {"vocab": {}, "merges": []}}')
    with pytest.raises(ConfigError, match="lacks 514 tokens"):
        of_hub_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": null}')
    with pytest.raises(ConfigError, match="no vocabulary or no merges"):
        of_hub_folder(tmp_path)


# --- cleaning --------------------------------------------------------------------------------

# What open_clip 3.3.0's own tokenizer, with ftfy 6.3.1, makes of them.
CLEANED = [
    ("你好，世界！（１２）", "你好,世界!(12)"),
    ("“A” ‘b’ don\u2019t", "\"a\" 'b' don't"),
    ("ﬁsh ﬂat ĳ ŉ", "fish flat ij 'n"),
    ("Tom &amp; Jerry &lt;3", "tom & jerry <3"),
    ("&amp;lt;", "<"),
    ("e\u0301", "é"),
    ("\x1b[31mRed\x1b[0m", "red"),
    ("a\ufeffb\x00c", "abc"),
    ("a\u2028b\r\nc", "a b c"),
    ("\x85", "…"),
]


@pytest.mark.parametrize(("text", "cleaned"), CLEANED, ids=[repr(text) for text, _ in CLEANED])
def test_open_clips_cleaning(text, cleaned):
    """Catches Chinese punctuation, curly quotes and entities that cost other tokens than there."""
    assert clean_as_open_clip(text) == cleaned


def test_the_hubs_cleaning_leaves_quotes_and_widths_alone():
    """Catches one cleaning used for both, which the library's own tokenizer does not do."""
    assert clean_as_hub(" “Ａ”，\n &amp; e\u0301 ") == "“ａ”， &amp; é"
