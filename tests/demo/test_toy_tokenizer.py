"""The toy tokenizers: well formed, repeatable, quiet, and with merges that really happen."""

from __future__ import annotations

import base64
import json
from itertools import pairwise
from pathlib import Path

import pytest
import sentencepiece

from glimt.demo.toy_tokenizer import write_toy_sentencepiece, write_toy_tiktoken

SPECIALS = [
    *("<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>"),
    *("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
    *("<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>"),
]


@pytest.fixture(scope="module")
def tiktoken_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy") / "made" / "by the writer"
    write_toy_tiktoken(folder)
    return folder


@pytest.fixture(scope="module")
def pieces_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy") / "made" / "by the writer"
    write_toy_sentencepiece(folder)
    return folder


@pytest.fixture(scope="module")
def pieces(pieces_folder: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(pieces_folder / "ice_text.model"))


def read_tokens(folder: Path) -> list[bytes]:
    lines = (folder / "tokenizer.model").read_text().splitlines()
    entries = [line.split(" ") for line in lines]
    assert [int(rank) for _, rank in entries] == list(range(len(entries)))
    return [base64.b64decode(token) for token, _ in entries]


def merge_by_rank(data: bytes, rank_of: dict[bytes, int]) -> list[bytes]:
    """Naive BPE without any shortcut: join the pair of lowest rank until none is left."""
    parts = [bytes([byte]) for byte in data]
    while True:
        pairs = [(rank_of.get(a + b), i) for i, (a, b) in enumerate(pairwise(parts))]
        known = [(rank, i) for rank, i in pairs if rank is not None]
        if not known:
            return parts
        at = min(known)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


def test_single_bytes_come_first_then_at_least_200_merged_ranks(tiktoken_folder: Path):
    """A toy of single bytes alone would exercise no merge."""
    tokens = read_tokens(tiktoken_folder)
    assert tokens[:256] == [bytes([byte]) for byte in range(256)]
    assert len(tokens) >= 456
    assert len(set(tokens)) == len(tokens)
    assert all(len(token) > 1 for token in tokens[256:])


def test_every_merged_rank_is_reached_by_merges_of_lower_ranks(tiktoken_folder: Path):
    """A rank that no merge can make is dead: the model would never see its id."""
    tokens = read_tokens(tiktoken_folder)
    rank_of = {token: rank for rank, token in enumerate(tokens)}
    assert [t for t in tokens if merge_by_rank(t, rank_of) != [t]] == []


def test_some_merged_ranks_are_parts_of_a_character(tiktoken_folder: Path):
    """Streaming tests need tokens that end within a character, as the real ranks have."""
    broken = [
        t for t in read_tokens(tiktoken_folder)[256:] if "\ufffd" in t.decode("utf-8", "replace")
    ]
    assert len(broken) > 10


def test_the_14_specials_follow_the_ranks_in_order(tiktoken_folder: Path):
    """A special id inside the ranks would also come out of text."""
    config = json.loads((tiktoken_folder / "tokenizer_config.json").read_text())
    num_ranks = len(read_tokens(tiktoken_folder))
    listed = {int(i): entry["content"] for i, entry in config["added_tokens_decoder"].items()}
    assert listed == {num_ranks + i: name for i, name in enumerate(SPECIALS)}


def test_pieces_have_the_original_names_and_kinds(
    pieces: sentencepiece.SentencePieceProcessor, pieces_folder: Path
):
    """A blank or control piece of the wrong kind would test a format that does not exist."""
    numbers = range(pieces.GetPieceSize())
    control = {pieces.IdToPiece(i) for i in numbers if pieces.IsControl(i)}
    assert control == {"<s>", "</s>", "<pad>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>"}
    assert [pieces.IdToPiece(i) for i in range(4)] == ["<unk>", "<s>", "</s>", "<pad>"]
    assert sum(pieces.IsByte(i) for i in numbers) == 256
    assert 600 <= pieces.GetPieceSize() <= 1000
    blanks = ["<n>", "<|tab|>", *(f"<|blank_{k}|>" for k in range(2, 81))]
    assert all(pieces.IdToPiece(pieces.PieceToId(name)) == name for name in blanks)
    config = json.loads((pieces_folder / "tokenizer_config.json").read_text())
    assert config["num_image_tokens"] == 0


def test_toy_pieces_normalise_prefix_and_split_as_the_original(
    pieces: sentencepiece.SentencePieceProcessor,
):
    """A toy with other settings would let a mistake in our reading of ice_text.model pass."""
    assert pieces.EncodeAsPieces("１２") == ["▁", "1", "2"]
    assert pieces.EncodeAsPieces("🦙") == ["▁", "<0xF0>", "<0x9F>", "<0xA6>", "<0x99>"]
    assert pieces.EncodeAsPieces(" a   cat ") == ["▁a", "▁cat"]
    assert pieces.EncodeAsPieces("a<n><|blank_3|>b") == ["▁a", "<n>", "<|blank_3|>", "b"]


@pytest.mark.parametrize("write", [write_toy_tiktoken, write_toy_sentencepiece])
def test_writing_twice_gives_the_same_bytes_and_prints_nothing(
    write, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    """A tokenizer that differs from run to run would make every golden of the demo worthless."""
    write(tmp_path / "a")
    write(tmp_path / "b")
    first, second = ({p.name: p.read_bytes() for p in (tmp_path / x).iterdir()} for x in "ab")
    assert first == second
    assert capfd.readouterr() == ("", "")
