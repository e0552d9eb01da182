"""Both tokenizers, on toy files always and on the original files where they are present."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from glimt.demo.toy_tokenizer import write_toy_sentencepiece, write_toy_tiktoken
from glimt.errors import CheckpointError, RequestError
from glimt.inputs.tokenizer import SentencePieceTokenizer, TiktokenTokenizer, load_tokenizer
from glimt.models.base import Tokenizer, TokenizerSpec

ORIGINALS = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "tokenizers"

GLM_SPECIALS = (
    *("<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>"),
    *("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
    *("<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>"),
)
GLM_SPEC = TokenizerSpec(
    kind="tiktoken",
    file="tokenizer.model",
    pattern=(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    special_names=GLM_SPECIALS,
)
ICE_SPEC = TokenizerSpec(kind="sentencepiece", file="ice_text.model")

moderate = settings(max_examples=60, deadline=None)


@dataclass(frozen=True)
class Loaded:
    """A tokenizer with the folder it was read from."""

    folder: Path
    tokenizer: Tokenizer


def toy(folder: Path, write: Callable[[Path], None], spec: TokenizerSpec) -> Loaded:
    write(folder)
    return Loaded(folder, load_tokenizer(folder, spec))


def original(name: str, spec: TokenizerSpec) -> Loaded:
    folder = ORIGINALS / name
    if not (folder / spec.file).exists():
        pytest.skip(f"the original tokenizer file {name}/{spec.file} is not on this machine")
    return Loaded(folder, load_tokenizer(folder, spec))


@pytest.fixture(scope="module")
def toy_glm(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return toy(tmp_path_factory.mktemp("glm"), write_toy_tiktoken, GLM_SPEC)


@pytest.fixture(scope="module")
def toy_ice(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return toy(tmp_path_factory.mktemp("ice"), write_toy_sentencepiece, ICE_SPEC)


@pytest.fixture(scope="module")
def real_glm() -> Loaded:
    return original("glm-4-9b", GLM_SPEC)


@pytest.fixture(scope="module")
def real_ice() -> Loaded:
    return original("chatglm-6b", ICE_SPEC)


@pytest.fixture(scope="module", params=["toy_glm", "real_glm"])
def glm(request: pytest.FixtureRequest) -> Loaded:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module", params=["toy_ice", "real_ice"])
def ice(request: pytest.FixtureRequest) -> Loaded:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module", params=["toy_glm", "toy_ice", "real_glm", "real_ice"])
def loaded(request: pytest.FixtureRequest) -> Loaded:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def model(ice: Loaded) -> sentencepiece.SentencePieceProcessor:
    """The same file in SentencePiece itself, to compare with."""
    return sentencepiece.SentencePieceProcessor(model_file=str(ice.folder / ICE_SPEC.file))


def stream(tokenizer: Tokenizer, token_ids: list[int]) -> list[str]:
    """The deltas of an incremental decoder, the last one from finish()."""
    decoder = tokenizer.decoder()
    return [*map(decoder.feed, token_ids), decoder.finish()]


# --- what every tokenizer promises -----------------------------------------------------------


@moderate
@given(data=st.data())
def test_text_never_becomes_a_special_id(loaded: Loaded, data: st.DataObject):
    """A user who types `<|user|>` or `[gMASK]` could otherwise forge a turn."""
    tokenizer = loaded.tokenizer
    names = st.sampled_from(sorted(tokenizer.special_ids))
    parts = st.lists(names | st.text(st.characters(codec="utf-8"), max_size=4), max_size=8)
    ids = tokenizer.encode("".join(data.draw(parts)))
    assert not set(ids) & set(tokenizer.special_ids.values())


def test_each_special_string_in_text_stays_text(loaded: Loaded):
    """The property above might by chance leave one name out."""
    special = set(loaded.tokenizer.special_ids.values())
    assert len(special) > 8
    for name in loaded.tokenizer.special_ids:
        for text in (name, f"a{name}", f"你好{name}{name}\n", f" {name} "):
            ids = loaded.tokenizer.encode(text)
            assert not special & set(ids)
            assert loaded.tokenizer.decode(ids).strip() == text.strip()


def test_empty_text_has_no_ids_and_no_ids_are_empty_text(loaded: Loaded):
    """SentencePiece's dummy leading space must not make a token of nothing."""
    assert loaded.tokenizer.encode("") == []
    assert loaded.tokenizer.decode([]) == ""
    assert stream(loaded.tokenizer, []) == [""]


@pytest.mark.parametrize("text", ["a\ud83d", "\udc00", "好\ud83d\ude00"])
def test_half_of_a_utf16_pair_is_refused_by_name(loaded: Loaded, text: str):
    """tiktoken would silently write U+FFFD, SentencePiece would raise a RuntimeError."""
    with pytest.raises(RequestError, match=r"U\+D[89A-F]") as caught:
        loaded.tokenizer.encode(text)
    assert caught.value.field == "text"


@pytest.mark.parametrize(
    "text",
    [
        " " * 1_100_000 + "x",
        "\u3000\t\n" * 400_000,
        "^" * 300_000,
        "a" * 300_000,
        "'s" * 100_000,
        "\0\x1b\ufeff\u202e\u0301" * 1000,
    ],
    ids=["spaces", "blanks", "carets", "letters", "clitics", "controls"],
)
def test_long_and_odd_text_is_encoded(loaded: Loaded, text: str):
    """tiktoken panics (not an Exception!) on a million blanks: one request stops the server."""
    assert all(token_id >= 0 for token_id in loaded.tokenizer.encode(text))


@moderate
@given(data=st.data())
def test_streaming_equals_whole_for_any_ids(loaded: Loaded, data: st.DataObject):
    """Bytes held back across special, padding and unknown ids could be lost or doubled."""
    most = max(loaded.tokenizer.special_ids.values()) + 300
    ids = data.draw(st.lists(st.integers(-3, most) | st.integers(0, 255), max_size=20))
    assert "".join(stream(loaded.tokenizer, ids)) == loaded.tokenizer.decode(ids)


def test_streaming_gives_no_half_character(loaded: Loaded):
    """An emoji of several tokens would appear as U+FFFD and then change."""
    text = "一🦙二𠮷三😀😀四"
    ids = loaded.tokenizer.encode(text)
    deltas = stream(loaded.tokenizer, ids)
    assert "".join(deltas) == text
    assert "" in deltas[:-1]
    assert not any("\ufffd" in delta for delta in deltas)


def test_an_incomplete_character_at_the_end_is_marked_once_finished(loaded: Loaded):
    """Cutting at max_tokens inside a character must not lose its bytes in silence."""
    ids = loaded.tokenizer.encode("a🦙")[:-1]
    *deltas, last = stream(loaded.tokenizer, ids)
    assert "".join(deltas) == "a"
    assert set(last) == {"\ufffd"}


def test_special_and_padding_ids_decode_to_nothing(loaded: Loaded):
    """`<eop>` or a row of the padded vocabulary in the answer would crash or show."""
    tokenizer = loaded.tokenizer
    silent = [i for name, i in tokenizer.special_ids.items() if name != "<unk>"]
    text_ids = tokenizer.encode("cat")
    assert tokenizer.decode([*silent, -1, *text_ids, 10**6, *silent]) == "cat"


# --- tiktoken --------------------------------------------------------------------------------


@moderate
@given(text=st.text(st.characters(codec="utf-8")))
def test_any_text_survives_the_ranks(glm: Loaded, text: str):
    """A token id that is off by one, or a stripped blank, would show in no golden."""
    assert glm.tokenizer.decode(glm.tokenizer.encode(text)) == text


def test_cutting_a_long_blank_loses_nothing(glm: Loaded):
    """The cut that keeps tiktoken from panicking must give back every character."""
    text = "a" + " \u3000\n" * 50_000 + "b" + " " * 70_000 + "c"
    assert glm.tokenizer.decode(glm.tokenizer.encode(text)) == text


def test_original_ranks_and_specials(real_glm: Loaded):
    """Specification, sections 4.1 and 4.2: the ids that the checkpoint was trained with."""
    tokenizer = real_glm.tokenizer
    assert tokenizer.special_ids == {name: 151329 + i for i, name in enumerate(GLM_SPECIALS)}
    assert tokenizer.special_ids["<|user|>"] == 151336
    assert tokenizer.encode("\n") == [198]
    assert max(tokenizer.encode("你好, world! 12345\n\n  x")) < 151329
    assert tokenizer.decode([151328]) != ""


def test_prompt_ids_of_the_original_tokenizer(real_glm: Loaded):
    """The prompts stored with the reference outputs, encoded by the published code."""
    golden = Path(__file__).resolve().parents[1] / "golden" / "glm-4v-tiny.golden.npz"
    if not golden.exists():
        pytest.skip("tests/golden/glm-4v-tiny.golden.npz is not in this checkout")
    numpy = pytest.importorskip("numpy")
    with numpy.load(golden) as arrays:
        chinese = arrays["text_zh.input_ids"].ravel().tolist()
        english = arrays["text_en.input_ids"].ravel().tolist()
    encode = real_glm.tokenizer.encode
    # [gMASK] <sop> <|user|> "\n" text <|assistant|>
    assert chinese[4:-1] == encode("你好，请介绍一下你自己。")
    assert english[4:-1] == encode("Write a haiku about the sea.")


def test_specials_follow_the_ranks_when_the_config_lists_none(toy_glm: Loaded, tmp_path: Path):
    """Older copies of the checkpoint have no added_tokens_decoder."""
    shutil.copy(toy_glm.folder / GLM_SPEC.file, tmp_path)
    assert load_tokenizer(tmp_path, GLM_SPEC).special_ids == toy_glm.tokenizer.special_ids
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert load_tokenizer(tmp_path, GLM_SPEC).special_ids == toy_glm.tokenizer.special_ids


def test_special_ids_are_taken_from_the_config(toy_glm: Loaded, tmp_path: Path):
    """The listed ids win: the fallback is only a guess."""
    shutil.copy(toy_glm.folder / GLM_SPEC.file, tmp_path)
    listed = {str(900 + i): {"content": name} for i, name in enumerate(GLM_SPECIALS)}
    config = {"added_tokens_decoder": listed}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_tokenizer(tmp_path, GLM_SPEC).special_ids["[MASK]"] == 901


def first_line_again(lines: list[str]) -> list[str]:
    return [*lines, f"{lines[0].split()[0]} {len(lines)}"]


def first_rank_again(lines: list[str]) -> list[str]:
    return [*lines, f"{'QUFBQUE='} 0"]


def without_rank_300(lines: list[str]) -> list[str]:
    return lines[:300] + lines[301:]


def without_byte_65(lines: list[str]) -> list[str]:
    return [line if not line.endswith(" 65") else "QUFBQUE= 65" for line in lines]


def with_a_broken_line(lines: list[str]) -> list[str]:
    return [*lines[:7], "not a rank at all", *lines[7:]]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (first_line_again, "1 of 513 tokens are listed twice"),
        (first_rank_again, "1 of 513 ranks are given twice"),
        (without_rank_300, "missing, 300 first"),
        (without_byte_65, "no token for 1 of 256 single bytes, 0x41 first"),
        (with_a_broken_line, "line 8 is not"),
    ],
)
def test_damaged_ranks_are_refused(toy_glm: Loaded, tmp_path: Path, damage, said: str):
    """tiktoken takes such a file, and then maps ids to wrong text or panics."""
    lines = (toy_glm.folder / GLM_SPEC.file).read_text().splitlines()
    path = tmp_path / GLM_SPEC.file
    path.write_text("\n".join(damage(lines)))
    with pytest.raises(CheckpointError, match=re.escape(said)) as caught:
        load_tokenizer(tmp_path, GLM_SPEC)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("listed", "said"),
    [
        ({"600": {"content": "<sop>"}}, "lacks <|user|>"),
        ({str(i): {"content": n} for i, n in enumerate(GLM_SPECIALS, 500)}, "500, which is a rank"),
        ({"600": "<sop>"}, "added_tokens_decoder is not"),
        (["<sop>"], "added_tokens_decoder is not"),
        ({"many": {"content": "<sop>"}}, "added_tokens_decoder is not"),
    ],
)
def test_wrong_added_tokens_are_refused(toy_glm: Loaded, tmp_path: Path, listed, said: str):
    """A missing name would fail only at the first request, with a bare KeyError."""
    shutil.copy(toy_glm.folder / GLM_SPEC.file, tmp_path)
    config = {"added_tokens_decoder": listed}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=re.escape(said)):
        load_tokenizer(tmp_path, GLM_SPEC)


# --- SentencePiece ---------------------------------------------------------------------------

ICE_GOLDENS = {
    "<img>": [46, 2265, 33],
    "</img>问：描述这张图片。\n答：": [
        98,
        2265,
        33,
        64286,
        12,
        67194,
        74366,
        65842,
        63823,
        4,
        67342,
        12,
    ],
    "</img>Q:Describe the image.\nA:": [98, 2265, 33, 867, 12, 19169, 100, 490, 7, 4, 135, 12],
    "你好": [5, 74874],
    "问：你好\n答：": [5, 64286, 12, 74874, 4, 67342, 12],
    "a  b   c\td\n\ne": [104, 130009, 178, 130010, 169, 130008, 138, 4, 4, 150],
    "  leading and trailing  ": [5, 130009, 17644, 102, 16335, 130009],
    "１２３ＡＢＣ（全角）：，？！": [5, 9, 10, 13, 12139, 20, 64080, 65061, 125662, 6, 125950],
    "emoji 😀🦙 和 𠮷": [
        *(33742, 5, 129891, 130328, 130247, 130254, 130241, 5, 63826, 5),
        *(130328, 130248, 130262, 130271),
    ],
    "[gMASK]<sop><eop>[MASK]": [
        *(53, 199, 15475, 42, 60, 106, 2823, 125685, 150, 2823, 33, 52, 15475, 42),
    ],
    "xxx" + " " * 85 + "y": [30468, 130087, 130012, 186],
}


@pytest.mark.parametrize("text", ICE_GOLDENS)
def test_ids_of_the_original_encoder(real_ice: Loaded, text: str):
    """Specification, section 4.2: ids that the published tokenizer gives."""
    assert real_ice.tokenizer.encode(text) == ICE_GOLDENS[text]


def test_all_stored_goldens_encode_and_decode(real_ice: Loaded):
    """The wider list beside the file, with what each text becomes after a round trip."""
    stored = real_ice.folder / "golden_tokens.json"
    if not stored.exists():
        pytest.skip("golden_tokens.json is not on this machine")
    for case in json.loads(stored.read_text(encoding="utf-8"))["encode"]:
        assert real_ice.tokenizer.encode(case["text"]) == case["ids"]
        assert real_ice.tokenizer.decode(case["ids"]) == case["roundtrip"]


def test_original_special_pieces(real_ice: Loaded):
    """Specification, section 4.3. `<n>` and the blanks are text, not special."""
    special_ids = real_ice.tokenizer.special_ids
    expected = {"<unk>": 0, "<s>": 1, "</s>": 2, "<pad>": 3}
    expected |= {"[MASK]": 130000, "[gMASK]": 130001, "[sMASK]": 130002, "<unused_0>": 130003}
    expected |= {"<sop>": 130004, "<eop>": 130005, "<ENC>": 130006, "<dBLOCK>": 130007}
    assert special_ids == expected


WORDS = st.text("abXYZ019你好吗的😀🦙𠮷éñ.,!?", min_size=1, max_size=6)
GAPS = st.sampled_from([" ", "  ", " " * 79, " " * 80, " " * 82, " " * 163, "\n", "\n\n", "\t"])


@moderate
@given(words=st.lists(WORDS, min_size=1, max_size=6), data=st.data())
def test_words_and_blanks_survive_the_pieces(ice: Loaded, words: list[str], data: st.DataObject):
    """Runs of blanks are where an indented program or a table would be damaged."""
    text = words[0] + "".join(data.draw(GAPS) + word for word in words[1:])
    assert ice.tokenizer.decode(ice.tokenizer.encode(text)) == text


@pytest.mark.parametrize("length", [*range(1, 8), 79, 80, 81, 82, 160, 161, 163, 400])
def test_blanks_are_written_longest_first(ice: Loaded, model, length: int):
    """The original replaces runs of 80, then 79, …, then 2; another order gives other ids."""
    written = " " * length
    for k in range(80, 1, -1):
        written = written.replace(" " * k, f"<|blank_{k}|>")
    names = re.findall(r"<\|blank_\d+\|>", written)
    blank_ids = [model.PieceToId(name) for name in names]
    tokens = ice.tokenizer.encode(f"b{' ' * length}b")
    assert [i for i in tokens if i in blank_ids] == blank_ids


def shown(text: str) -> str:
    """The published last step of decoding: blanks restored by searching the text."""
    text = text.replace("<n>", "\n").replace("<|tab|>", "\t")
    return re.sub(r"<\|blank_(\d+)\|>", lambda blank: " " * int(blank[1]), text)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_decoding_is_sentencepieces_own(ice: Loaded, model, data: st.DataObject):
    """Leading spaces, broken bytes and silent pieces, each at any place of an answer."""
    size = model.GetPieceSize()
    names = [
        "▁",
        "▁a",
        "<unk>",
        "<s>",
        "<pad>",
        "[gMASK]",
        "<eop>",
        "<n>",
        "<|tab|>",
        "<|blank_2|>",
    ]
    names += [f"<0x{byte:02X}>" for byte in (*"好🦙".encode(), 0, 0x20, 0xED, 0xA0, 0xFF, 0xC0)]
    often = st.sampled_from([model.PieceToId(name) for name in names])
    ids = data.draw(st.lists(often | st.integers(0, size - 1) | st.integers(size, size + 9)))
    kept = [i for i in ids if i < size and i != model.PieceToId("<pad>")]
    expected = shown(model.DecodeIds(kept))
    assert ice.tokenizer.decode(ids) == expected
    assert "".join(stream(ice.tokenizer, ids)) == expected


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (["<0xE4>", "<0xBD>", "<0xA0>"], "你"),
        (["<0xE4>", "<pad>", "<0xBD>", "<0xA0>"], "你"),
        (["<0xE4>", "<0xBD>", "<eop>", "<0xA0>"], "\ufffd\ufffd\ufffd"),
        (["<0xE4>", "<0xBD>", "<n>", "▁a"], "\ufffd\ufffd\n a"),
        (["<eop>", "▁", "▁", "▁a", "▁a"], "a a"),
        (["<unk>", "▁a"], " ⁇  a"),
    ],
)
def test_runs_of_bytes_and_leading_spaces(ice: Loaded, model, names: list[str], text: str):
    """The cases by hand that random ids may miss; `<pad>` is dropped before all else."""
    ids = [model.PieceToId(name) for name in names]
    assert ice.tokenizer.decode(ids) == text


def test_every_piece_decodes_as_in_sentencepiece(ice: Loaded, model):
    """One piece of a kind that the random ids seldom meet."""
    start = model.PieceToId("<0x41>")
    pads = model.PieceToId("<pad>")
    numbers = [i for i in range(model.GetPieceSize()) if i != pads]
    wrong = [
        i for i in numbers if ice.tokenizer.decode([start, i]) != shown(model.DecodeIds([start, i]))
    ]
    assert wrong == []


def test_a_newline_spelled_by_other_pieces_stays_as_spelled(ice: Loaded, model):
    """Blanks are restored by piece: text that merely looks like one needs no holding back."""
    ids = [model.PieceToId(name) for name in ("<0x3C>", "n", "<0x3E>")]
    assert stream(ice.tokenizer, ids)[0] == "<"
    assert ice.tokenizer.decode(ids) == "<n>"


def test_image_codes_before_the_pieces_shift_every_id(toy_ice: Loaded, tmp_path: Path):
    """The first release of ChatGLM-6B put 20000 image codes in front."""
    shutil.copy(toy_ice.folder / ICE_SPEC.file, tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"num_image_tokens": 20000}')
    shifted = load_tokenizer(tmp_path, ICE_SPEC)
    text = "图片 里有\n\n  a cat 🦙"
    plain_ids = toy_ice.tokenizer.encode(text)
    assert shifted.encode(text) == [i + 20000 for i in plain_ids]
    assert shifted.decode([7, *shifted.encode(text), shifted.special_ids["<pad>"]]) == text
    assert shifted.special_ids["<sop>"] == toy_ice.tokenizer.special_ids["<sop>"] + 20000
    (tmp_path / "tokenizer_config.json").unlink()
    assert load_tokenizer(tmp_path, ICE_SPEC).encode(text) == plain_ids


def test_blanks_without_a_piece_are_left_to_sentencepiece(tmp_path: Path):
    """Writing `<|blank_5|>` to a model that lacks it would put that very text in the prompt."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a cat on a mat", "b c d"]),
        model_writer=(model := (tmp_path / ICE_SPEC.file).open("wb")),
        vocab_size=290,
        byte_fallback=True,
        hard_vocab_limit=False,
        user_defined_symbols=["<|blank_3|>", "<|blank_4|>"],
        minloglevel=2,
    )
    model.close()
    tokenizer = load_tokenizer(tmp_path, ICE_SPEC)
    assert isinstance(tokenizer, SentencePieceTokenizer)
    assert tokenizer.decode(tokenizer.encode("a" + " " * 11 + "c")) == "a" + " " * 11 + "c"
    assert tokenizer.decode(tokenizer.encode("a  c")) == "a c"
    assert "<" not in tokenizer.decode(tokenizer.encode("a\tb\nc     d"))


@pytest.mark.parametrize("value", ["-1", '"0"', "true", "null", "1.5"])
def test_an_impossible_number_of_image_tokens_is_refused(
    toy_ice: Loaded, tmp_path: Path, value: str
):
    """A negative offset would turn pieces into other pieces."""
    shutil.copy(toy_ice.folder / ICE_SPEC.file, tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(f'{{"num_image_tokens": {value}}}')
    with pytest.raises(CheckpointError, match="num_image_tokens is"):
        load_tokenizer(tmp_path, ICE_SPEC)


# --- files -----------------------------------------------------------------------------------

LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 2623634\n"


@pytest.mark.parametrize("spec", [GLM_SPEC, ICE_SPEC], ids=lambda spec: spec.kind)
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "is missing; copy it"),
        (b"", "is empty; download"),
        (b"\n\n", "is empty; download"),
        (LFS_POINTER, "Git LFS pointer, not the file itself; run git lfs pull"),
        (b"<html>not found</html>", "download the file again"),
    ],
    ids=["missing", "empty", "blank", "lfs", "html"],
)
def test_an_unusable_tokenizer_file_is_named(tmp_path: Path, spec, content, said: str):
    """A clone without LFS is the most common broken checkpoint; a traceback explains nothing."""
    if content is not None:
        (tmp_path / spec.file).write_bytes(content)
    with pytest.raises(CheckpointError, match=re.escape(said)) as caught:
        load_tokenizer(tmp_path, spec)
    assert str(tmp_path / spec.file) in str(caught.value)


def test_a_folder_in_place_of_the_file_is_named(tmp_path: Path):
    """Any other trouble of the file system is the checkpoint's too."""
    (tmp_path / ICE_SPEC.file).mkdir()
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_tokenizer(tmp_path, ICE_SPEC)


@pytest.mark.parametrize("content", ["{", "[1]", ""])
def test_a_broken_config_is_named(toy_ice: Loaded, tmp_path: Path, content: str):
    """Reading a damaged config as absent would shift every id of an old checkpoint."""
    shutil.copy(toy_ice.folder / ICE_SPEC.file, tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json"):
        load_tokenizer(tmp_path, ICE_SPEC)


def test_the_kind_decides_the_class(toy_glm: Loaded, toy_ice: Loaded):
    """The spec, not the file's name, says how a file is read."""
    assert isinstance(toy_glm.tokenizer, TiktokenTokenizer)
    assert isinstance(toy_ice.tokenizer, SentencePieceTokenizer)
