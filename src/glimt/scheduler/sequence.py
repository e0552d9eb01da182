"""Sequence: one choice of one request on its way. Owns the counters; knows no other sequence."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence as Seq

from glimt.scheduler.drafting import Drafter
from glimt.types import ImageInput, ImageSlice, PromptTarget, Request, StepRow


class Sequence:
    """Tokens, cache blocks and progress of one choice.

    num_computed counts cache entries; rotary positions come from the prompt alone.
    """

    def __init__(self, sequence_id: int, request: Request, index: int, block_size: int) -> None:
        self.id = sequence_id
        self.request = request
        self.index = index
        self.block_size = block_size
        self.num_prompt = len(request.prompt.token_ids)  # pictures expanded
        self.output_ids: list[int] = []
        self.num_computed = 0
        self.awaits_images = False  # it would run, but the tower is not done with its pictures
        self.block_table = array("q")
        self._filter = request.constraint.start() if request.constraint else None
        self._drafter: Drafter | None = None
        self._root: bytes | None = None
        self._hashes: list[bytes] = []

    @property
    def num_tokens(self) -> int:
        """Tokens known so far."""
        return self.num_prompt + len(self.output_ids)

    @property
    def is_prefilling(self) -> bool:
        """Some prompt token is not in the cache yet."""
        return self.num_computed < self.num_prompt

    @property
    def scores_prompt(self) -> bool:
        """Its prompt's tokens are still to be scored, all of them, so none may come from a cache.

        One choice scores for all. Preempted before its first token, it begins again.
        """
        wants = self.request.sampling.prompt_logprobs is not None
        return wants and self.index == 0 and not self.output_ids

    @property
    def least_chunk(self) -> int:
        """The fewest tokens that can be computed next: a bidirectional prompt goes whole."""
        return max(1, self.request.prompt.bidirectional_len - self.num_computed)

    def blocks_for(self, num_tokens: int) -> int:
        """Cache blocks that so many tokens need."""
        return -(-num_tokens // self.block_size)

    def tokens_between(self, start: int, stop: int) -> list[int]:
        """Token ids of cache indices start … stop-1."""
        n = self.num_prompt
        prompt = self.request.prompt.token_ids[start:stop]
        return [*prompt, *self.output_ids[max(start - n, 0) : max(stop - n, 0)]]

    @property
    def is_decoding(self) -> bool:
        """Only the newest token is not in the cache yet, and it is an output token."""
        return bool(self.output_ids) and self.num_computed == self.num_tokens - 1

    def draft(self, count: int) -> tuple[int, ...]:
        """Draft at most `count` of the tokens that follow, fewer where the answer must end."""
        if self._drafter is None:
            self._drafter = Drafter(self.request.prompt, self.request.stop_token_ids)
        # The step gives one token beside those that its drafts turn out to be.
        room = self.request.max_tokens - len(self.output_ids) - 1
        return self._drafter.draft(self.output_ids, min(count, room))

    def row(self, count: int, drafts: tuple[int, ...] = ()) -> StepRow:
        """The next `count` tokens, and drafts of what follows them, as one row of a step."""
        start, stop = self.num_computed, self.num_computed + count
        request = self.request
        return StepRow(
            sequence_id=self.id,
            request_id=request.request_id,
            index=self.index,
            token_ids=[*self.tokens_between(start, stop), *drafts],
            positions=request.prompt.positions_between(start, stop + len(drafts)),
            start=start,
            block_table=self.block_table[:],
            bidirectional_len=request.prompt.bidirectional_len,
            images=self._image_slices(start, stop),
            samples=stop == self.num_tokens,
            sampling=request.sampling,
            stop_token_ids=request.stop_token_ids,
            seed=request.seeds[self.index],
            prompt_ids=request.prompt.original_token_ids,
            output_ids=self.output_ids,
            upcoming=self.images_from(stop),
            drafts=drafts,
            filter=self._filter,
            targets=self._targets(start, stop) if self.scores_prompt else (),
        )

    def _targets(self, start: int, stop: int) -> tuple[PromptTarget, ...]:
        """The prompt's text tokens that the tokens of cache indices start … stop-1 predict."""
        prompt = self.request.prompt
        places = range(start + 1, min(stop + 1, self.num_prompt))
        return tuple(PromptTarget(at, prompt.token_ids[at]) for at in places if prompt.is_text(at))

    def _image_slices(self, start: int, stop: int) -> tuple[ImageSlice, ...]:
        """The parts of pictures that stand between two cache indices."""
        if start >= self.num_prompt:
            return ()
        slices = []
        seen: set[int] = set()
        for span in self.request.prompt.spans:
            is_first = span.image not in seen and start <= span.start
            seen.add(span.image)
            first, last = max(start, span.start), min(stop, span.start + span.length)
            if first < last:
                image = self.request.images[span.image]
                row = span.feature_start + first - span.start
                slices.append(ImageSlice(image, first - start, row, last - first, is_first))
        return tuple(slices)

    def images_from(self, start: int) -> tuple[ImageInput, ...]:
        """The pictures with a place at or after a cache index, in order."""
        if start >= self.num_prompt:
            return ()
        spans = self.request.prompt.spans
        numbers = [span.image for span in spans if span.start + span.length > start]
        return tuple(self.request.images[number] for number in dict.fromkeys(numbers))

    # --- block hashes ---

    def hashes(self, num_blocks: int) -> Seq[bytes]:
        """Content hashes of the first full blocks; each covers all before it."""
        while len(self._hashes) < num_blocks:
            self._hashes.append(self._hash_block(len(self._hashes)))
        return self._hashes[:num_blocks]

    def hash_before(self, number: int) -> bytes:
        """Hash of everything before block `number`."""
        if number:
            return self.hashes(number)[-1]
        if self._root is None:
            self._root = self._root_hash()
        return self._root

    def content_between(self, start: int, stop: int) -> tuple[tuple[int, bytes], ...]:
        """What cache indices start … stop-1 hold, one comparable item each."""
        tokens = enumerate(self.tokens_between(start, stop), start)
        return tuple((token_id, self._image_bytes(at, at + 1)) for at, token_id in tokens)

    def _hash_block(self, number: int) -> bytes:
        start = number * self.block_size
        stop = start + self.block_size
        digest = hashlib.sha256(self.hash_before(number))
        digest.update(array("q", self.tokens_between(start, stop)).tobytes())
        digest.update(self._image_bytes(start, stop))
        return digest.digest()

    def _image_bytes(self, start: int, stop: int) -> bytes:
        """Every picture expands to the same placeholder ids, so equal ids do not mean equal
        pictures: without the digest, one user would get another user's cached picture.
        """
        parts = b""
        for span in self.request.prompt.spans:
            if span.start < stop and span.start + span.length > start:
                places = array("q", (span.start - start, span.feature_start)).tobytes()
                parts += places + self.request.images[span.image].digest
        return parts

    def _root_hash(self) -> bytes:
        """In a bidirectional prompt every token depends on the whole context."""
        salt = self.request.cache_salt.encode("utf-8", "surrogatepass")
        # Hashed by itself, or a longer salt could stand for a shorter one and the first tokens.
        digest = hashlib.sha256(hashlib.sha256(salt).digest())
        context = self.request.prompt.bidirectional_len
        if context:
            digest.update(array("q", self.request.prompt.token_ids[:context]).tobytes())
            digest.update(self._image_bytes(0, context))
        return digest.digest()
