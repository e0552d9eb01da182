"""CLIP's text -> token ids: byte-level BPE whose words end in `</w>`, from open_clip's vocabulary
file or a Hugging Face folder's.

Source: Radford et al., arXiv 2103.00020, section 2.4; mlfoundations/open_clip `tokenizer.py` for
the file's layout and the cut at the context's end.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import regex

from glimt.errors import ConfigError
from glimt.evaluate.clip_text import clean_as_hub, clean_as_open_clip
from glimt.models.config_reader import read_json

_END_OF_WORD = "</w>"
_HUB_START, _HUB_END = "<|startoftext|>", "<|endoftext|>"
_WORD = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", regex.IGNORECASE)
_WITHOUT_MERGES = 2 * 256 + 2  # every byte inside and at the end of a word; start and end of text

Merges = Sequence[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Tokens:
    """A text as the model gets it.

    ids:    start of text, the text, end of text; at most the context's length
    is_cut: whether the text was longer, so that its tail is not seen
    """

    ids: tuple[int, ...]
    is_cut: bool


class ClipTokenizer:
    """Encodes; what it is made of is read by `of_open_clip` and `of_hub_folder`."""

    def __init__(
        self,
        ids: Mapping[str, int],
        merges: Merges,
        ends: tuple[int, int],
        clean: Callable[[str], str],
    ) -> None:
        """ids: of every token; ends: those of the start and the end of a text."""
        self.start_id, self.end_id = ends
        self._ids = ids
        self._ranks = {pair: rank for rank, pair in enumerate(merges)}
        self._clean = clean
        self._letters = _byte_letters()

    def encode(self, text: str, context: int) -> Tokens:
        """A text with its ends, cut to `context` tokens, of which the last is the end of text.

        What spells the name of an end is text like any other.
        """
        found = _WORD.findall(self._clean(text))
        inner = [token_id for word in found for token_id in self._word_ids(word)]
        room = context - 2
        ids = (self.start_id, *inner[:room], self.end_id)
        return Tokens(ids, len(inner) > room)

    def _word_ids(self, word: str) -> list[int]:
        letters = [self._letters[byte] for byte in word.encode("utf-8", "replace")]
        letters[-1] += _END_OF_WORD
        return [self._ids[part] for part in self._merged(letters)]

    def _merged(self, parts: list[str]) -> list[str]:
        """Merge the pair of the lowest rank wherever it stands, until none is left."""
        while len(parts) > 1:
            best = min(pairwise(parts), key=self._rank)
            if best not in self._ranks:
                break
            parts = _joined(parts, best)
        return parts

    def _rank(self, pair: tuple[str, str]) -> int:
        return self._ranks.get(pair, len(self._ranks))


def _joined(parts: Sequence[str], pair: tuple[str, str]) -> list[str]:
    joined: list[str] = []
    i = 0
    while i < len(parts):
        width = 2 if tuple(parts[i : i + 2]) == pair else 1
        joined.append("".join(parts[i : i + width]))
        i += width
    return joined


def _byte_letters() -> dict[int, str]:
    """A printable letter for each byte, in the vocabulary's order.

    Bytes that are printable in Latin-1 stand for themselves and come first; the others are
    U+0100 and what follows.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    letters = {byte: chr(byte) for byte in printable}
    return letters | {byte: chr(256 + i) for i, byte in enumerate(others)}


# --- files -----------------------------------------------------------------------------------


def of_open_clip(path: Path, vocab_size: int) -> ClipTokenizer:
    """Read open_clip's vocabulary file: gzip, a line of comment, then a merge a line.

    vocab_size: the model's; so many merges of the file are used as make it up
    Raises ConfigError.
    """
    lines = _gzip_text(path).split("\n")[1:]
    wanted = vocab_size - _WITHOUT_MERGES
    merges = [_pair(line) for line in lines[: max(0, wanted)]]
    if wanted < 0 or len(merges) < wanted or None in merges:
        said = f"{path} has {len(lines)} lines of merges, and the model's {vocab_size} tokens need"
        raise ConfigError(
            "tokenizer", [f"{said} {wanted} of two words each; is it the model's own file?"]
        )
    pairs = [pair for pair in merges if pair]
    letters = list(_byte_letters().values())
    tokens = [
        *letters,
        *(letter + _END_OF_WORD for letter in letters),
        *("".join(p) for p in pairs),
    ]
    ids = {token: i for i, token in enumerate(tokens)}
    return ClipTokenizer(ids, pairs, (vocab_size - 2, vocab_size - 1), clean_as_open_clip)


def _gzip_text(path: Path) -> str:
    try:
        return gzip.decompress(path.read_bytes()).decode("utf-8")
    except gzip.BadGzipFile as error:
        said = f"{path} is not gzip: bpe_simple_vocab_16e6.txt.gz of open_clip's wheel is needed"
        raise ConfigError("tokenizer", [said]) from error
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise ConfigError("tokenizer", [f"{path} cannot be read: {why}"]) from error


def _pair(line: str) -> tuple[str, str] | None:
    parts = line.split()
    return (parts[0], parts[1]) if len(parts) == 2 else None


def of_hub_folder(folder: Path) -> ClipTokenizer:
    """Read vocab.json and merges.txt, or the two in tokenizer.json. Raises ConfigError."""
    if (folder / "vocab.json").exists():
        return _of_hub(folder, read_json(folder / "vocab.json"), _merges_txt(folder / "merges.txt"))
    if (folder / "tokenizer.json").exists():
        model = read_json(folder / "tokenizer.json").get("model")
        given = model if isinstance(model, dict) else {}
        return _of_hub(folder, given.get("vocab"), given.get("merges"))
    said = "has neither vocab.json with merges.txt nor tokenizer.json: no CLIP tokenizer"
    raise ConfigError(str(folder), [said])


def _merges_txt(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), [f"cannot be read: {error}"]) from error
    return [line for line in lines if line.strip() and not line.startswith("#version")]


def _of_hub(folder: Path, ids: Any, merges: Any) -> ClipTokenizer:
    if not isinstance(ids, dict) or not isinstance(merges, list):
        raise ConfigError(str(folder), ["its tokenizer has no vocabulary or no merges"])
    pairs = [_pair(m) if isinstance(m, str) else tuple(m) for m in merges]
    letters = _byte_letters().values()
    needed = {*letters, *(letter + _END_OF_WORD for letter in letters), _HUB_START, _HUB_END}
    needed |= {"".join(pair) for pair in pairs if pair}
    if missing := needed - ids.keys():
        said = f"its vocabulary lacks {len(missing)} tokens that CLIP's BPE needs"
        raise ConfigError(str(folder), [f"{said}, {min(missing)!r} for one"])
    ends = ids[_HUB_START], ids[_HUB_END]
    return ClipTokenizer(ids, [(p[0], p[1]) for p in pairs if p], ends, clean_as_hub)
