"""Drafter: guesses what a sequence says next by looking up where it said the same before.

Owns one sequence's text as something that can be searched; knows no cache, no model and no other
sequence. A wrong guess costs a little time and never a token: sampling checks every one.
Source: prompt look-up decoding, huggingface/transformers `generation/candidate_generator.py`,
`PromptLookupCandidateGenerator`; the overlapping copy is that of LZ77, Ziv and Lempel, 1977.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from glimt.types import EncodedPrompt

MAX_NGRAM = 3  # longer ones are found less often and guess hardly better
MIN_NGRAM = 2  # one token alone is too common to say what follows
_PICTURE = chr(0x10FFFF)  # stands for a whole picture and is the id of no token


class Drafter:
    """The tokens of one sequence, pictures cut out, as a text of one character per token.

    Python has no faster search than str.rfind, and any id below 0x10FFFF is a character; the
    largest vocabulary here has 151,552.
    """

    def __init__(self, prompt: EncodedPrompt, stop_token_ids: Iterable[int]) -> None:
        """stop_token_ids: never guessed, since nothing follows them that a step could save."""
        self._text = _prompt_text(prompt)
        self._num_outputs = 0
        self._barred = {chr(token_id) for token_id in stop_token_ids}
        self._barred |= {chr(token_id) for token_id in _picture_ids(prompt)}
        self._barred.add(_PICTURE)

    def draft(self, output_ids: Sequence[int], count: int) -> tuple[int, ...]:
        """At most `count` tokens that may follow; none without a place that looks like the end.

        output_ids: all of the sequence's output; it only ever grows
        """
        self._text += "".join(map(chr, output_ids[self._num_outputs :]))
        self._num_outputs = len(output_ids)
        if count < 1:
            return ()
        guess = self._continuation(count)
        end = next((i for i, char in enumerate(guess) if char in self._barred), count)
        return tuple(map(ord, guess[:end]))

    def _continuation(self, count: int) -> str:
        """What followed the last earlier place of the longest n-gram that ends the text.

            text   … a b c d e … a b c
                         └──┘ guessed      "" where there is no such place

        Where that place overlaps the end, the text repeats itself, and so does the guess.
        """
        text = self._text
        for length in range(min(MAX_NGRAM, len(text) - 1), MIN_NGRAM - 1, -1):
            ngram = text[-length:]
            if _PICTURE in ngram:
                continue
            at = text.rfind(ngram, 0, len(text) - 1)
            if at >= 0:
                followed = text[at + length : at + length + count]
                return (followed * count)[:count]
        return ""


def _prompt_text(prompt: EncodedPrompt) -> str:
    parts = []
    at = 0
    for span in prompt.spans:
        parts += ["".join(map(chr, prompt.token_ids[at : span.start])), _PICTURE]
        at = span.start + span.length
    return "".join(parts) + "".join(map(chr, prompt.token_ids[at:]))


def _picture_ids(prompt: EncodedPrompt) -> set[int]:
    """Ids that stand for pictures in the prompt: guessed as text they could only be wrong."""
    spans = (prompt.token_ids[s.start : s.start + s.length] for s in prompt.spans)
    return set().union(*spans)
