"""Trains the vocabularies of the demo models: tiktoken ranks and a sentencepiece model.

Both come from one corpus (questions, answers and the project's own README files). A character
that pictures may show must stay a token of its own, or the model would have to learn to read
pairs: merges between two such characters, and of digits or capitals, are left out.
"""

from __future__ import annotations

import base64
import io
import json
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from itertools import pairwise
from pathlib import Path

import regex
import sentencepiece

from glimt.models import glm4v_9b
from training.configs import IMAGE_SIZE

NUM_RANKS = 2034  # with 14 special tokens: 2,048
NUM_PIECES = 2048
_MAX_MERGED_CHARACTERS = 3  # of Chinese: whole phrases as one token would not recombine

Word = tuple[bytes, ...]


def write_tiktoken(folder: Path, corpus: Iterable[str], alone: Collection[str]) -> None:
    """Write `tokenizer.model` and tokenizer_config.json of the GLM-4v demo model.

    alone: characters that are read one by one
    """
    tokens = train_ranks(corpus, alone)
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"{base64.b64encode(t).decode()} {rank}\n" for rank, t in enumerate(tokens)]
    (folder / "tokenizer.model").write_text("".join(lines), encoding="ascii")
    added = {
        str(len(tokens) + i): {"content": name, "special": True}
        for i, name in enumerate(glm4v_9b.TOKENIZER.special_names)
    }
    config = {"added_tokens_decoder": added, "image_size": IMAGE_SIZE, "padding_side": "left"}
    _write_json(folder / "tokenizer_config.json", config)


def train_ranks(corpus: Iterable[str], alone: Collection[str]) -> list[bytes]:
    """Byte-pair ranks: 256 bytes, then the most frequent allowed pair, again and again."""
    pattern = regex.compile(glm4v_9b.TOKENIZER.pattern)
    words: Counter[Word] = Counter()
    for text in corpus:
        words.update(tuple(bytes([b]) for b in w.encode()) for w in pattern.findall(text))
    # What occurs once teaches no merge, and most of it is texts invented for pictures.
    words = Counter({word: count for word, count in words.items() if count > 1})
    tokens = [bytes([b]) for b in range(256)]
    known = set(tokens)
    while len(tokens) < NUM_RANKS:
        merged = _best_pair(words, frozenset(alone), known)
        if merged is None:
            raise ValueError(f"the corpus gives only {len(tokens)} of {NUM_RANKS} ranks")
        tokens.append(merged)
        known.add(merged)
        words = _merged_words(words, merged)
    return tokens


def _best_pair(words: Counter[Word], alone: frozenset[str], known: set[bytes]) -> bytes | None:
    pairs: Counter[bytes] = Counter()
    for word, count in words.items():
        for left, right in pairwise(word):
            if _may_merge(left, right, alone):
                pairs[left + right] += count
    ranked = [(count, pair) for pair, count in pairs.items() if pair not in known]
    return max(ranked)[1] if ranked else None


def _may_merge(left: bytes, right: bytes, alone: frozenset[str]) -> bool:
    """Parts of one character always may; characters that are read alone never may."""
    try:
        a, b = left.decode(), right.decode()
    except UnicodeDecodeError:
        return not _is_whole(left)  # a whole character never swallows half of the next
    if len(a + b) > _MAX_MERGED_CHARACTERS and not (a + b).isascii():
        return False
    return not (set(a + b) & alone)


def _is_whole(token: bytes) -> bool:
    try:
        token.decode()
    except UnicodeDecodeError:
        return False
    return True


def _merged_words(words: Counter[Word], merged: bytes) -> Counter[Word]:
    out: Counter[Word] = Counter()
    for word, count in words.items():
        out[_merge(word, merged)] += count
    return out


def _merge(word: Word, merged: bytes) -> Word:
    parts: list[bytes] = []
    at = 0
    while at < len(word):
        is_pair = at + 1 < len(word) and word[at] + word[at + 1] == merged
        parts.append(merged if is_pair else word[at])
        at += 2 if is_pair else 1
    return tuple(parts)


def write_sentencepiece(folder: Path, corpus: Iterable[str], alone: Sequence[str]) -> None:
    """Write `ice_text.model` and tokenizer_config.json of the VisualGLM demo model."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus),
        model_writer=model,
        vocab_size=NUM_PIECES,
        model_type="unigram",
        character_coverage=1.0,
        required_chars="".join(sorted(alone)),
        byte_fallback=True,
        split_digits=True,
        max_sentencepiece_length=12,
        normalization_rule_name="nmt_nfkc",
        add_dummy_prefix=True,
        hard_vocab_limit=False,
        pad_id=3,
        control_symbols=["[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>"],
        user_defined_symbols=["<n>", "<|tab|>", *(f"<|blank_{k}|>" for k in range(2, 81))],
        num_threads=1,  # more would add up their counts in any order
        minloglevel=2,
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "ice_text.model").write_bytes(model.getvalue())
    _write_json(folder / "tokenizer_config.json", {"num_image_tokens": 0})


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
