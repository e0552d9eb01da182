"""Texts that bring their own chat template: role markers become the ids that they name.

Only where the caller is known to write whole prompts; in a chat a marker stays plain text.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from glimt.models.base import Processor

_MARKER = re.compile(r"(\[gMASK\]|<sop>|<\|(?:system|user|assistant|observation)\|>)")
_ROUND = re.compile(r"\[Round \d{1,4}\]")


def has_own_template(text: str) -> bool:
    """Whether a text is a whole prompt of GLM-4v or VisualGLM, turns and all."""
    if "<|user|>" in text or "<|assistant|>" in text or _ROUND.match(text):
        return True
    return text.startswith("问：") and text[-8:].rstrip().endswith("答：")


def marked_ids(text: str, processor: Processor) -> list[int] | None:
    """The ids of a whole prompt; None for a family whose template is plain text."""
    special = processor.tokenizer.special_ids
    if "<|user|>" not in special:
        return None
    ids: list[int] = []
    for piece in _MARKER.split(text):
        known = _MARKER.fullmatch(piece) and special.get(piece)
        ids += [known] if known else processor.tokenizer.encode(piece)
    prefix = list(processor.encode_text("").original_token_ids)
    return ids if ids[: len(prefix)] == prefix else [*prefix, *ids]
