"""Texts that bring their own template, and those that only look like it."""

from __future__ import annotations

import pytest

import glimt
from glimt.server.markers import has_own_template, marked_ids


@pytest.mark.parametrize(
    ("text", "is_whole"),
    [
        ("<|user|>\nhi<|assistant|>", True),
        ("hi<|assistant|>", True),
        ("[Round 0]\n问：a\n答：", True),
        ("问：a\n答：", True),
        ("问：a", False),
        ("Q: what? A:", False),
        ("see [Round 1]", False),
        ("<|system|>", False),
        ("", False),
    ],
)
def test_a_whole_prompt_is_told_by_its_turns(text, is_whole):
    """Catches an ordinary question that goes to the model without its template."""
    assert has_own_template(text) is is_whole


def test_megabytes_are_looked_through_once():
    """Catches an expression that tries every beginning with every end."""
    for text in ("Q:" * 2_000_000, "问：" * 2_000_000, "[Round " * 600_000, "答： " * 1_000_000):
        assert not has_own_template(text)


def test_markers_become_their_ids_and_the_prefix_is_there_once():
    """Catches markers that stay text, a doubled prefix, and image markers that make a slot."""
    processor = glimt.LLM("demo").engine.opened.processor
    chat = [glimt.Message("user", (glimt.TextPart("hi"),))]
    expected = list(processor.encode_chat(chat, [], "auto").original_token_ids)
    for text in ("<|user|>\nhi<|assistant|>", "[gMASK]<sop><|user|>\nhi<|assistant|>"):
        assert marked_ids(text, processor) == expected
    image = processor.tokenizer.special_ids["<|begin_of_image|>"]
    assert image not in (marked_ids("<|user|><|begin_of_image|>", processor) or [])


def test_a_family_without_markers_has_none():
    """Catches VisualGLM's plain template cut into ids."""
    processor = glimt.LLM("demo-visualglm").engine.opened.processor
    assert marked_ids("问：a\n答：", processor) is None
