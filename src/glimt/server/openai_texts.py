"""Tokens and their log-probabilities in OpenAI's two forms, of a chat and of a completion."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from glimt.models.base import Tokenizer
from glimt.server.tokens import LEAST_LOGPROB, finite
from glimt.types import PromptLogprob, SampledToken, TokenLogprob


class TokenTexts:
    """What single tokens are called in log-probabilities."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._token_bytes = tokenizer.token_bytes
        self._names = {i: name for name, i in tokenizer.special_ids.items()}

    def is_special(self, token_id: int) -> bool:
        """Whether it has a name in place of a text."""
        return token_id in self._names

    def content(self, token_id: int) -> bytes:
        """The token's bytes, of a special one its name's."""
        if token_id in self._names:
            return self._names[token_id].encode()
        return self._token_bytes(token_id)

    def text(self, token_id: int) -> str:
        """The token decoded alone: half a character is U+FFFD."""
        return self.content(token_id).decode("utf-8", "replace")

    def whole(self, token_ids: Sequence[int]) -> str:
        """Tokens decoded together."""
        return b"".join(map(self.content, token_ids)).decode("utf-8", "replace")

    def entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        """One token of a chat's log-probabilities."""
        content = self.content(token_id)
        return {
            "token": content.decode("utf-8", "replace"),
            "logprob": max(logprob, LEAST_LOGPROB),
            "bytes": list(content),
        }


def chat_logprobs(tokens: Sequence[SampledToken], texts: TokenTexts) -> dict[str, Any]:
    """`logprobs` of a chat's choice."""
    content = [
        {
            **texts.entry(token.token_id, token.logprob or 0.0),
            "top_logprobs": [texts.entry(top.token_id, top.logprob) for top in token.top_logprobs],
        }
        for token in tokens
    ]
    return {"content": content, "refusal": None}


@dataclass(frozen=True, slots=True)
class ToldTokens:
    """Tokens of a completion, one item each in every list; None for what nothing predicted.

    widths: characters of the text that each takes
    """

    names: list[str]
    logprobs: list[float | None]
    tops: list[dict[str, float] | None]
    widths: list[int]

    def __add__(self, other: ToldTokens) -> ToldTokens:
        return ToldTokens(
            self.names + other.names,
            self.logprobs + other.logprobs,
            self.tops + other.tops,
            self.widths + other.widths,
        )

    def body(self, offset: int) -> dict[str, Any]:
        """`logprobs` of a completion's choice; offset: of the first token in the text."""
        *starts, _ = accumulate(self.widths, initial=offset)
        return {
            "tokens": self.names,
            "token_logprobs": self.logprobs,
            "top_logprobs": self.tops,
            "text_offset": starts,
        }


def told_tokens(
    tokens: Sequence[SampledToken] | Sequence[PromptLogprob], texts: TokenTexts
) -> ToldTokens:
    """Tokens of a completion or of its prompt."""
    names = [texts.text(token.token_id) for token in tokens]
    return ToldTokens(
        names=names,
        logprobs=[finite(token.logprob) for token in tokens],
        tops=[_top(token, texts) for token in tokens],
        widths=[len(name) for name in names],
    )


def _top(token: SampledToken | PromptLogprob, texts: TokenTexts) -> dict[str, float] | None:
    """By text; of two tokens with one text, the likelier counts. The token itself is there."""
    if token.logprob is None:
        return None
    found: dict[str, float] = {}
    for each in (*token.top_logprobs, TokenLogprob(token.token_id, token.logprob)):
        found.setdefault(texts.text(each.token_id), max(each.logprob, LEAST_LOGPROB))
    return found
