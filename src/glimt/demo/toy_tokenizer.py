"""Small tokenizers in the formats of the original ones, made in a second, every time the same.

For the demo models and for tests that must not need a download. Owns their training text and
nothing of how they are read: that is inputs/tokenizer.py.
"""

from __future__ import annotations

import base64
import io
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import sentencepiece

_NUM_MERGES = 256
_NUM_PIECES = 640
_CONFIG_FILE = "tokenizer_config.json"

_GLM4_SPECIALS = (
    "<|endoftext|>",
    "[MASK]",
    "[gMASK]",
    "[sMASK]",
    "<sop>",
    "<eop>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|observation|>",
    "<|begin_of_image|>",
    "<|end_of_image|>",
    "<|begin_of_video|>",
    "<|end_of_video|>",
)

# Sentences that a small picture model would say and hear; common words come back often, so that
# merges have something to learn. No digits: the patterns of BPE and of `_words` differ on them.
_TEXT = (
    "描述这张图片。",
    "这张图片里有什么？",
    "这张图片里有一只猫。",
    "这张图片里有一只狗和一只猫。",
    "图片中有一个红色的圆形。",
    "图片中有一个蓝色的方形和一个黄色的三角形。",
    "图片的左边是一个绿色的圆形，右边是一个红色的方形。",
    "图片的上面有三个白色的圆形，下面有两个黑色的方形。",
    "猫坐在红色的椅子上，狗在椅子下面。",
    "这只猫是什么颜色的？这只猫是白色的。",
    "图片里有几个圆形？图片里有两个圆形。",
    "背景是蓝色的，中间有一个大的黄色圆形。",
    "背景是白色的，左边有一个小的黑色三角形。",
    "你好！有什么可以帮助你的吗？",
    "你好，请介绍一下你自己。我是一个可以看图片的小模型。",
    "我不知道，图片里没有这个东西。",
    "一个人在路上走，旁边有一辆红色的车。",
    "天上有白色的云，地上有绿色的树。",
    "问：图片里有什么？答：图片里有一只猫。",
    "桌子上放着一个苹果、一本书和一杯水。",
    "孩子们在公园里玩球，天气很好。",
    "一只小鸟站在树上唱歌。",
    "图片的右边是一座高山，山下有一条河。",
    "请用一句话回答：图片里的人在做什么？",
    "他穿着一件灰色的衣服，手里拿着一把伞。",
    "这是一张晚上拍的照片，街上的灯很亮。",
    "图片里没有文字，也没有数字。",
    "Describe the image.",
    "What is in this picture? Answer in one sentence.",
    "There is a cat in the picture.",
    "There is a dog and a cat in the picture.",
    "The picture shows a red circle.",
    "The picture shows a blue square and a yellow triangle.",
    "There is a green circle on the left and a red square on the right.",
    "There are three white circles above and two black squares below.",
    "The cat is sitting on a red chair, and the dog is under the chair.",
    "What colour is the cat? The cat is white.",
    "How many circles are there? There are two circles.",
    "The background is blue, with a large yellow circle in the middle.",
    "The background is white, with a small black triangle on the left.",
    "Hello! How can I help you?",
    "Hello, I am a small model that can see pictures.",
    "I do not know. There is no such thing in the image.",
    "A man is walking on the street, next to a red car.",
    "There are white clouds in the sky and green trees on the ground.",
    "Question: what is in the image? Answer: there is a cat in the image.",
    "An apple, a book and a glass of water are on the table.",
    "Children are playing with a ball in the park, and the weather is fine.",
    "A little bird sits in a tree and sings.",
    "On the right is a high mountain, with a river below it.",
    "Please say in one sentence what the people are doing.",
    "He wears grey clothes and holds an umbrella in his hand.",
    "This photo was taken at night; the lights of the street are bright.",
    "There are no words and no numbers in the picture.",
)


def write_toy_tiktoken(folder: Path) -> None:
    """Write `tokenizer.model` (512 ranks) and a config that lists GLM-4's 14 special tokens.

    Ids: 0 … 255 the single bytes, 256 … 511 merged ranks, 512 … 525 the special tokens.
    """
    tokens = _train_ranks("\n".join(_TEXT), _NUM_MERGES)
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"{base64.b64encode(t).decode()} {rank}\n" for rank, t in enumerate(tokens)]
    (folder / "tokenizer.model").write_text("".join(lines), encoding="ascii")
    special = {str(len(tokens) + i): _added_token(n) for i, n in enumerate(_GLM4_SPECIALS)}
    _write_config(folder, {"added_tokens_decoder": special})


def write_toy_sentencepiece(folder: Path) -> None:
    """Write `ice_text.model` (640 pieces) with the special pieces of ChatGLM-6B, and a config.

    Ids of control pieces and blanks differ from the original's: look them up by name.
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_TEXT),
        model_writer=model,
        vocab_size=_NUM_PIECES,
        model_type="unigram",
        character_coverage=1.0,
        required_chars="0123456789",
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="nmt_nfkc",
        add_dummy_prefix=True,
        pad_id=3,
        control_symbols=["[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>"],
        user_defined_symbols=["<n>", "<|tab|>", *(f"<|blank_{k}|>" for k in range(2, 81))],
        # More threads would add up their counts in any order, and so differ from run to run.
        num_threads=1,
        minloglevel=2,
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "ice_text.model").write_bytes(model.getvalue())
    _write_config(folder, {"num_image_tokens": 0})


def _train_ranks(text: str, num_merges: int) -> list[bytes]:
    """Byte-pair training: the 256 bytes, then `num_merges` times the most frequent pair, joined.

    Source: Sennrich et al., arXiv 1508.07909, algorithm 1.
    """
    tokens = [bytes([byte]) for byte in range(256)]
    words = _words(text)
    while len(tokens) < 256 + num_merges:
        joined = _most_frequent_pair(words)
        words = [_merge(word, joined) for word in words]
        # The same bytes may meet again by other halves; they are one token all the same.
        if joined not in tokens:
            tokens.append(joined)
    return tokens


def _words(text: str) -> list[list[bytes]]:
    """A text's words with their leading space, as single bytes: no merge crosses a word."""
    words = re.findall(r" ?\w+|[^\w\s]", text)
    return [[bytes([byte]) for byte in word.encode()] for word in words]


def _most_frequent_pair(words: Sequence[Sequence[bytes]]) -> bytes:
    """The neighbours that occur most often, joined; of equals the greatest bytes."""
    pairs = (a + b for word in words for a, b in pairwise(word))
    counts = Counter(pairs)
    return max(counts, key=lambda joined: (counts[joined], joined))


def _merge(word: Sequence[bytes], joined: bytes) -> list[bytes]:
    """Join every two neighbours that make `joined`, from the left."""
    merged: list[bytes] = []
    for token in word:
        # A token already joined is longer than any half of it, so it cannot be joined twice.
        if merged and merged[-1] + token == joined:
            merged[-1] = joined
        else:
            merged.append(token)
    return merged


def _added_token(name: str) -> dict[str, object]:
    """An entry of added_tokens_decoder, as the original config writes it."""
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    return {"content": name, **flags, "special": True}


def _write_config(folder: Path, config: Mapping[str, object]) -> None:
    text = json.dumps(config, ensure_ascii=False, indent=2)
    (folder / _CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
