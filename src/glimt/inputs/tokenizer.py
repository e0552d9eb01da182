"""Text to token ids and back, from the tokenizer files of the original checkpoints.

Owns the two file formats: tiktoken ranks (GLM-4v) and a SentencePiece model (VisualGLM). Knows
nothing of prompts, templates or roles: a family puts its special ids around encoded text itself.
Text never becomes a special id, so a user who types `<|user|>` or `[gMASK]` cannot forge a turn.
"""

from __future__ import annotations

import base64
import codecs
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import sentencepiece
import tiktoken

from glimt.errors import CheckpointError, RequestError
from glimt.models.config_reader import LFS_HEAD, LFS_SAID

if TYPE_CHECKING:
    from glimt.models.base import TokenDecoder, Tokenizer, TokenizerSpec

_CONFIG_FILE = "tokenizer_config.json"


def load_tokenizer(folder: Path, spec: TokenizerSpec) -> Tokenizer:
    """Read the tokenizer of a model folder.

    Raises CheckpointError naming the file that is missing, damaged or only a Git LFS pointer.
    """
    if spec.load is not None:
        return spec.load(folder)
    if spec.kind == "tiktoken":
        token_bytes = _read_ranks(folder / spec.file)
        special_ids = _read_special_ids(folder, spec.special_names, len(token_bytes))
        return TiktokenTokenizer(token_bytes, spec.pattern, special_ids)
    num_image_tokens = _read_num_image_tokens(folder)
    return SentencePieceTokenizer(_read_pieces(folder / spec.file), num_image_tokens)


# --- tiktoken --------------------------------------------------------------------------------


class TiktokenTokenizer:
    """Byte-level BPE: a pattern splits the text, each part is merged by lowest rank."""

    special_ids: Mapping[str, int]

    def __init__(
        self, token_bytes: Sequence[bytes], pattern: str, special_ids: Mapping[str, int]
    ) -> None:
        """Build from token_bytes[rank]; a rank is the token's id."""
        self.special_ids = MappingProxyType(dict(special_ids))
        self._token_bytes = tuple(token_bytes)
        # The BPE is told of no special tokens, so no text can ever match one.
        self._encoding = tiktoken.Encoding(
            "glimt",
            pat_str=pattern,
            mergeable_ranks={token: rank for rank, token in enumerate(token_bytes)},
            special_tokens={},
        )

    @property
    def num_ids(self) -> int:
        """One more than the highest id, special ones included."""
        return max(len(self._token_bytes), *(i + 1 for i in self.special_ids.values()))

    def encode(self, text: str) -> list[int]:
        """Ids of a text. Raises RequestError if it holds a lone surrogate."""
        _check_unicode(text)
        parts = (self._encoding.encode_ordinary(part) for part in _cut_long_blanks(text))
        return [token_id for part in parts for token_id in part]

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of ids, broken characters as U+FFFD; ids that are no ranks are skipped."""
        return b"".join(map(self.token_bytes, token_ids)).decode("utf-8", "replace")

    def decoder(self) -> TokenDecoder:
        """A fresh incremental decoder."""
        return _ByteDecoder(self.token_bytes)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of a rank; b"" for any other id."""
        is_rank = 0 <= token_id < len(self._token_bytes)
        return self._token_bytes[token_id] if is_rank else b""


class _ByteDecoder:
    """Joins the tokens' bytes and gives each character when its last byte has come."""

    def __init__(self, bytes_of: Callable[[int], bytes]) -> None:
        self._bytes_of = bytes_of
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token_id: int) -> str:
        """Text that became certain with this token."""
        return self._utf8.decode(self._bytes_of(token_id))

    def finish(self) -> str:
        """An incomplete last character as U+FFFD."""
        return self._utf8.decode(b"", final=True)


_MAX_BLANK_RUN = 2**16
_BLANK_RUN = re.compile(r"\s{2,}")


def _cut_long_blanks(text: str) -> Iterator[str]:
    """Cut a text inside runs of more than 65,536 white-space characters; nothing is dropped.

    tiktoken's regex engine keeps one entry per character while it tries `\\s+(?!\\S)` and panics
    past a million of them (tiktoken 0.14 fails at 999,200 spaces). Other classes do not do this.
    """
    start = 0
    for run in _BLANK_RUN.finditer(text) if len(text) > _MAX_BLANK_RUN else ():
        for cut in range(run.start() + _MAX_BLANK_RUN, run.end(), _MAX_BLANK_RUN):
            yield text[start:cut]
            start = cut
    yield text[start:]


def _read_ranks(path: Path) -> list[bytes]:
    """Read a ranks file, `<base64 of the token's bytes> <rank>` per line, as bytes by rank."""
    lines = enumerate(_read_file(path).splitlines(), start=1)
    entries = [_parse_rank(path, number, line) for number, line in lines if line.strip()]
    if problems := _rank_problems(entries):
        raise CheckpointError(str(path), [*problems, "download the file again"])
    return [token for _, token in sorted(entries)]


def _parse_rank(path: Path, number: int, line: bytes) -> tuple[int, bytes]:
    try:
        token, rank = line.split()
        return int(rank), base64.b64decode(token, validate=True)
    except ValueError as error:
        said = f"line {number} is not `<base64> <rank>`: {line[:40]!r}; download the file again"
        raise CheckpointError(str(path), [said]) from error


def _rank_problems(entries: Sequence[tuple[int, bytes]]) -> list[str]:
    """What is wrong with the ranks: each 0 … n-1 once, each token once, every single byte."""
    ranks = {rank for rank, _ in entries}
    tokens = {token for _, token in entries}
    problems = []
    if missing := sorted(set(range(len(entries))) - ranks):
        problems.append(
            f"{len(missing)} of ranks 0 … {len(entries) - 1} missing, {missing[0]} first"
        )
    if repeated := len(entries) - len(ranks):
        problems.append(f"{repeated} of {len(entries)} ranks are given twice")
    if repeated := len(entries) - len(tokens):
        problems.append(f"{repeated} of {len(entries)} tokens are listed twice")
    if lost := [byte for byte in range(256) if bytes([byte]) not in tokens]:
        problems.append(f"no token for {len(lost)} of 256 single bytes, {lost[0]:#04x} first")
    return problems


def _read_special_ids(folder: Path, names: Sequence[str], num_ranks: int) -> dict[str, int]:
    """Ids by name: as tokenizer_config.json lists them, else following the ranks in order."""
    listed = _read_config(folder).get("added_tokens_decoder")
    if not listed:
        return {name: num_ranks + index for index, name in enumerate(names)}
    where = str(folder / _CONFIG_FILE)
    try:
        ids = {str(entry["content"]): int(number) for number, entry in listed.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        said = 'added_tokens_decoder is not {"<id>": {"content": "<name>"}, …}'
        raise CheckpointError(where, [said]) from error
    problems = [f"added_tokens_decoder lacks {name}" for name in names if name not in ids]
    taken = [f"{name} has id {i}, which is a rank" for name, i in ids.items() if i < num_ranks]
    if problems + taken:
        raise CheckpointError(where, problems + taken)
    return ids


# --- SentencePiece ---------------------------------------------------------------------------


class SentencePieceTokenizer:
    """Unigram pieces with byte fallback, and pieces of their own for line ends and blanks.

    Line ends are `<n>`, tabs `<|tab|>`, k = 2 … 80 spaces `<|blank_k|>`; those that the model
    file lacks are left to SentencePiece. A piece's token id is its number + num_image_tokens.
    """

    special_ids: Mapping[str, int]

    def __init__(
        self, model: sentencepiece.SentencePieceProcessor, num_image_tokens: int = 0
    ) -> None:
        self._model = model
        self._offset = num_image_tokens
        self._num_pieces = model.GetPieceSize()
        self.special_ids = MappingProxyType(
            {name: piece_id + num_image_tokens for piece_id, name in _special_pieces(model)}
        )
        self._pad_id = self.special_ids.get("<pad>")
        self._piece_of_blank = _known_blanks(model)
        self._space_runs = [text for text in self._piece_of_blank if text[0] == " "]
        self._blank_of_id = {model.PieceToId(p): text for text, p in self._piece_of_blank.items()}
        self._unknown_text = str(model.DecodeIds([model.unk_id()]))

    @property
    def num_ids(self) -> int:
        """One more than the highest id."""
        return self._offset + self._num_pieces

    def encode(self, text: str) -> list[int]:
        """Ids of a text. Raises RequestError if it holds a lone surrogate."""
        _check_unicode(text)
        written = _BLANK.sub(self._write_blank, text)
        return [piece_id + self._offset for piece_id in self._model.EncodeAsIds(written)]

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of ids as SentencePiece gives it, with line ends and blanks restored.

        `<pad>` and ids without a piece are dropped, other CONTROL pieces are silent, `<unk>`
        shows as ` ⁇ `. The transformers clean-up (" ." to ".") is the family's.
        """
        decoder = _PieceDecoder(self._content)
        return "".join([decoder.feed(token_id) for token_id in token_ids]) + decoder.finish()

    def decoder(self) -> TokenDecoder:
        """A fresh incremental decoder."""
        return _PieceDecoder(self._content)

    def token_bytes(self, token_id: int) -> bytes:
        """A piece's text with its leading space, or its one byte; b"" for control and no piece."""
        content = self._content(token_id)
        if isinstance(content, bytes):
            return content
        is_unknown = token_id == self._offset + self._model.unk_id()
        return b"" if content is None or is_unknown else content.replace("▁", " ").encode()

    def _write_blank(self, blank: re.Match[str]) -> str:
        """A line end, a tab or a run of spaces as its pieces, the longest first."""
        text = blank.group()
        if text[0] != " ":
            return self._piece_of_blank.get(text, text)
        written, left = "", len(text)
        for run in self._space_runs:
            count, left = divmod(left, len(run))
            written += count * self._piece_of_blank[run]
        return written + " " * left

    def _content(self, token_id: int) -> str | bytes | None:
        """What a token stands for: text, a byte of a character, or None for nothing at all."""
        piece_id = token_id - self._offset
        if token_id == self._pad_id or not 0 <= piece_id < self._num_pieces:
            return None
        if piece_id in self._blank_of_id:
            return self._blank_of_id[piece_id]
        if self._model.IsControl(piece_id):
            return ""
        if self._model.IsUnknown(piece_id):
            return self._unknown_text
        piece = self._model.IdToPiece(piece_id)
        return bytes.fromhex(piece[3:5]) if self._model.IsByte(piece_id) else piece


class _PieceDecoder:
    """SentencePiece decoding, token by token.

    Differs from one call of SentencePiece in nothing but time: the tests hold it to that.
    """

    def __init__(self, content: Callable[[int], str | bytes | None]) -> None:
        self._content = content
        # Unlike "replace", this marks every byte of a broken character by itself, and so does
        # SentencePiece: `<0xE4><0xBD>` is two U+FFFD.
        self._utf8 = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._at_start = True

    def feed(self, token_id: int) -> str:
        """Text that became certain with this token."""
        content = self._content(token_id)
        if content is None:
            return ""
        if isinstance(content, bytes):
            return self._give(self._utf8.decode(content))
        # Any other piece, even a silent one, ends a run of bytes.
        broken = self.finish()
        return broken + self._give(self._plain(content))

    def finish(self) -> str:
        """Bytes that were held back, each as U+FFFD: they make no character."""
        return self._give(self._utf8.decode(b"", final=True))

    def _plain(self, piece: str) -> str:
        # Pieces lose their leading space until the first text: the encoder put one there.
        return (piece.removeprefix("▁") if self._at_start else piece).replace("▁", " ")

    def _give(self, text: str) -> str:
        self._at_start = self._at_start and not text
        return _BROKEN_BYTE.sub("\ufffd", text)


_BROKEN_BYTE = re.compile("[\udc80-\udcff]")
_BLANK = re.compile(r"\n|\t| {2,}")
_LONGEST_BLANK = 80


def _known_blanks(model: sentencepiece.SentencePieceProcessor) -> dict[str, str]:
    """The blanks that have a piece in this model, with it; longest runs of spaces first."""
    runs = {" " * k: f"<|blank_{k}|>" for k in range(_LONGEST_BLANK, 1, -1)}
    wanted = {"\n": "<n>", "\t": "<|tab|>", **runs}
    # PieceToId answers an unknown piece with the id of <unk>, so ask back.
    return {t: p for t, p in wanted.items() if model.IdToPiece(model.PieceToId(p)) == p}


def _special_pieces(
    model: sentencepiece.SentencePieceProcessor,
) -> list[tuple[int, str]]:
    """Number and name of every CONTROL piece and of `<unk>`."""
    numbers = range(model.GetPieceSize())
    special = [i for i in numbers if model.IsControl(i) or model.IsUnknown(i)]
    return [(i, model.IdToPiece(i)) for i in special]


def _read_pieces(path: Path) -> sentencepiece.SentencePieceProcessor:
    model = sentencepiece.SentencePieceProcessor()
    data = _read_file(path)
    try:
        model.LoadFromSerializedProto(data)
    except RuntimeError as error:
        said = f"is no SentencePiece model, or damaged ({error}); download the file again"
        raise CheckpointError(str(path), [said]) from error
    return model


def _read_num_image_tokens(folder: Path) -> int:
    """Ids that stand before the first piece. 0 except in the first release of ChatGLM-6B."""
    value = _read_config(folder).get("num_image_tokens", 0)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        said = f"num_image_tokens is {value!r}; a whole number >= 0 is needed"
        raise CheckpointError(str(folder / _CONFIG_FILE), [said])
    return value


# --- both ------------------------------------------------------------------------------------


def _check_unicode(text: str) -> None:
    """Refuse halves of UTF-16 pairs: they are no characters and have no bytes to encode."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        said = f"character {error.start} is U+{ord(text[error.start]):04X}, half of a UTF-16 pair"
        raise RequestError("text", f"{said}; send the whole character") from error


def _read_config(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json as a dictionary; empty when there is no such file."""
    path = folder / _CONFIG_FILE
    if not path.exists():
        return {}
    try:
        config = json.loads(_read_file(path))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(str(path), [f"is not readable as JSON: {error}"]) from error
    if not isinstance(config, dict):
        raise CheckpointError(str(path), [f"holds a {type(config).__name__}, not an object"])
    return config


def _read_file(path: Path) -> bytes:
    """A file's bytes. Raises CheckpointError if there are none worth reading."""
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        said = "is missing; copy it from the original checkpoint"
        raise CheckpointError(str(path), [said]) from error
    except OSError as error:
        raise CheckpointError(str(path), [f"cannot be read: {error.strerror}"]) from error
    if not data.strip():
        raise CheckpointError(str(path), ["is empty; download the file again"])
    if data.startswith(LFS_HEAD):
        raise CheckpointError(str(path), [LFS_SAID])
    return data
