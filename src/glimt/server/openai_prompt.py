"""What OpenAI's forms say of a prompt: `echo` before a completion, vLLM's `prompt_logprobs`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from glimt.server.openai_texts import TokenTexts, ToldTokens, told_tokens
from glimt.server.tokens import LEAST_LOGPROB
from glimt.types import PromptLogprob, Request


@dataclass(frozen=True, slots=True)
class PromptReport:
    """What is told of one prompt.

    echo:     the prompt stands before its completion
    is_alone: nothing of the completion is shown: the prompt was only to be scored
    text:     the prompt as it was sent; None: as token ids
    num_top:  of `prompt_logprobs`; None: not asked for
    echo_top: of the completion's logprobs, where the prompt's own are told with them
    """

    echo: bool = False
    is_alone: bool = False
    text: str | None = None
    num_top: int | None = None
    echo_top: int | None = None

    @property
    def wanted(self) -> int | None:
        """What the engine is asked for."""
        told = [each for each in (self.num_top, self.echo_top) if each is not None]
        return max(told, default=None)

    def shown_text(self, request: Request, texts: TokenTexts) -> str:
        """What stands before a completion."""
        if not self.echo:
            return ""
        return texts.whole(request.prompt.token_ids) if self.text is None else self.text

    def shown_tokens(
        self, scores: Sequence[PromptLogprob] | None, texts: TokenTexts
    ) -> ToldTokens | None:
        """The prompt's part of a completion's `logprobs`.

        Every token of the prompt is told, as vLLM does. The family's own before a text that was
        sent are no part of that text, so the tokens behind stand where they would without.
        """
        if self.echo_top is None or scores is None:
            return None
        told = told_tokens(_cut(scores, self.echo_top), texts)
        if self.text is None:
            return told
        widths = [
            0 if texts.is_special(score.token_id) else width
            for score, width in zip(scores, told.widths, strict=True)
        ]
        return ToldTokens(told.names, told.logprobs, told.tops, widths)

    def logprobs(
        self, scores: Sequence[PromptLogprob] | None, texts: TokenTexts
    ) -> list[dict[str, Any] | None] | None:
        """vLLM's `prompt_logprobs`: by token id, the prompt's own token first; None if not asked.

        null stands for the first token, which nothing predicts, and for those of pictures.
        """
        if self.num_top is None or scores is None:
            return None
        return [_by_id(score, texts) for score in _cut(scores, self.num_top)]


NOTHING = PromptReport()


def _cut(scores: Sequence[PromptLogprob], num_top: int) -> list[PromptLogprob]:
    return [
        PromptLogprob(each.token_id, each.logprob, each.rank, each.top_logprobs[:num_top])
        for each in scores
    ]


def _by_id(score: PromptLogprob, texts: TokenTexts) -> dict[str, Any] | None:
    if score.logprob is None:
        return None
    own = score.token_id, score.logprob, score.rank
    tops = [(top.token_id, top.logprob, rank) for rank, top in enumerate(score.top_logprobs, 1)]
    told: dict[str, Any] = {}
    for token_id, logprob, rank in (own, *tops):
        entry = {"logprob": max(logprob, LEAST_LOGPROB), "rank": rank}
        told.setdefault(str(token_id), {**entry, "decoded_token": texts.text(token_id)})
    return told
