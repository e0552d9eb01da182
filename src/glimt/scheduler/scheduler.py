"""Scheduler: which tokens of which sequences run in the next step. Never touches a tensor.

First come, first served, under a token budget per step: running sequences go on, then waiting
ones are admitted while the budget and the cache last. When the cache is full the youngest
running sequence gives its blocks back and is recomputed later. While others run, a sequence whose
pictures are not through the tower waits for them, and the step has a bounded slice of the tower.
Drafts of coming tokens get what budget and blocks are left when everybody has been
served.
"""

from __future__ import annotations

from array import array
from bisect import insort
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from itertools import chain, groupby

from glimt.config import EngineConfig
from glimt.scheduler.block_pool import BlockPool
from glimt.scheduler.prefix_cache import CachedPrefix, PrefixCache
from glimt.scheduler.sequence import Sequence
from glimt.types import (
    FinishReason,
    ImageInput,
    ImageWait,
    Request,
    SampledToken,
    StepPlan,
    TokenOutcome,
)


@dataclass(slots=True)
class SchedulerCounters:
    """Totals since start, in tokens or events."""

    prefill_tokens: int = 0
    decode_tokens: int = 0
    prefix_hit_tokens: int = 0
    preemptions: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0


class Scheduler:
    """Owns the waiting and running sequences and the block pool."""

    def __init__(self, config: EngineConfig, num_blocks: int) -> None:
        self.config = config
        self.pool = BlockPool(num_blocks)
        self.prefixes = PrefixCache(self.pool, config.block_size, config.enable_prefix_cache)
        self.counters = SchedulerCounters()
        self.waiting: list[Sequence] = []  # both lists are sorted by age
        self.running: list[Sequence] = []
        self._by_id: dict[int, Sequence] = {}
        self._next_id = 0

    # --- requests come and go ---

    @property
    def has_work(self) -> bool:
        """Some sequence is not finished."""
        return bool(self._by_id)

    def add(self, request: Request) -> list[Sequence]:
        """Queue one sequence per choice of a request that was checked to fit."""
        added = []
        for index in range(request.sampling.n):
            sequence = Sequence(self._next_id, request, index, self.config.block_size)
            self._by_id[sequence.id] = sequence
            self._next_id += 1
            self.waiting.append(sequence)
            added.append(sequence)
        return added

    def sequences_of(self, request_id: str) -> list[Sequence]:
        """The unfinished sequences of a request."""
        return [s for s in self._by_id.values() if s.request.request_id == request_id]

    def is_open(self, sequence_id: int) -> bool:
        """Whether the sequence is known and not finished."""
        return sequence_id in self._by_id

    def finish(self, sequence_id: int, is_poisoned: bool = False) -> Sequence:
        """Forget a sequence and free its blocks, at any moment between steps.

        is_poisoned: its cached values may not be finite, so nobody may find them again.
        """
        sequence = self._by_id.pop(sequence_id)
        queue = self.running if sequence in self.running else self.waiting
        queue.remove(sequence)
        if is_poisoned:
            for block in sequence.block_table:
                self.pool.forget(block)
        else:
            self.prefixes.keep_partial(sequence)
        self._free(sequence)
        return sequence

    # --- one step ---

    def plan_step(
        self, ready: Set[bytes] | None = None, prefill_tokens: int | None = None
    ) -> StepPlan:
        """Choose the rows of the next step and give them their cache blocks.

        ready: digests of the pictures whose features are there. None, or nobody else running:
            nobody waits for a picture, and the step that needs it first runs it through the tower
        prefill_tokens: of all prompts together, where a sequence decodes beside; None: no limit
        """
        planned: dict[int, int] = {}
        budget = self._plan_running(planned, self._budget(prefill_tokens))
        if not planned:
            ready = None
        budget, reserved = self._plan_waiting(planned, budget, ready)
        drafts = self._plan_drafts(planned, budget, reserved)
        rows = [s.row(planned[s.id], drafts.get(s.id, ())) for s in self.running if s.id in planned]
        return StepPlan(
            rows=tuple(sorted(rows, key=lambda row: not row.is_decode)),
            open_images=self.open_images(planned),
            waits=() if ready is None else self._waits(ready),
        )

    def _budget(self, prefill_tokens: int | None) -> int:
        """Tokens of the step. Where some decode, prompts get no more than prefill_tokens of it."""
        if prefill_tokens is None:
            return self.config.max_num_batched_tokens
        num_decoding = sum(sequence.is_decoding for sequence in self.running)
        if not num_decoding:
            return self.config.max_num_batched_tokens
        return min(self.config.max_num_batched_tokens, num_decoding + prefill_tokens)

    def open_images(self, planned: Mapping[int, int] | None = None) -> frozenset[bytes]:
        """Digests of the pictures that steps after this one need.

        planned: tokens that this step computes, by sequence id
        """
        done = planned or {}
        running = (s.images_from(s.num_computed + done.get(s.id, 0)) for s in self.running)
        waiting = (s.request.images for s in self.waiting if s.awaits_images)
        return frozenset(i.digest for images in chain(running, waiting) for i in images)

    def commit(self, plan: StepPlan, sampled: Iterable[SampledToken]) -> list[TokenOutcome]:
        """Advance every row of the step, append the sampled tokens, finish what is complete.

        sampled: by row, for one with drafts a token more than were accepted
        """
        for row in plan.rows:
            num_drafts = len(row.drafts)
            self._advance(self._by_id[row.sequence_id], len(row.token_ids) - num_drafts)
            self.counters.drafted_tokens += num_drafts
        by_row = groupby(sampled, key=lambda token: token.sequence_id)
        return [outcome for _, tokens in by_row for outcome in self._extend(tokens)]

    def _plan_running(self, planned: dict[int, int], budget: int) -> int:
        """Next tokens of running sequences, oldest first. Returns the budget that is left."""
        at = 0
        while at < len(self.running):
            sequence = self.running[at]
            count = _chunk(sequence, budget)
            if count and not self._make_room(sequence, sequence.num_computed + count):
                break  # it was preempted itself, being the youngest
            if count:
                planned[sequence.id] = count
                budget -= count
            at += 1
        return budget

    def _plan_waiting(
        self, planned: dict[int, int], budget: int, ready: Set[bytes] | None
    ) -> tuple[int, int]:
        """Admit waiting sequences in order until one does not fit.

        Those that wait for a picture are passed over, but keep their place and their blocks free.
        Returns the budget that is left and the number of blocks that are reserved for these.
        """
        num_passed = reserved = 0
        for sequence in list(self.waiting):
            if budget < 1 or len(self.running) + num_passed >= self.config.max_num_seqs:
                break
            if self._waits_for_sibling(sequence):
                continue
            if ready is not None and self._lacking(sequence, ready):
                reserved += self._blocks_to_admit(sequence)
                if not sequence.awaits_images and reserved > self.pool.num_free:
                    break
                sequence.awaits_images = True
                num_passed += 1
                continue
            count = self._admit(sequence, budget, reserved)
            if not count:
                break
            planned[sequence.id] = count
            budget -= count
        return budget, reserved

    def _plan_drafts(
        self, planned: dict[int, int], budget: int, reserved: int
    ) -> dict[int, tuple[int, ...]]:
        """Drafts for decoding sequences, oldest first, within the budget and the free blocks."""
        drafts: dict[int, tuple[int, ...]] = {}
        for sequence in self.running:
            most = min(self.config.num_draft_tokens, budget)
            if most < 1:
                break
            if sequence.id in planned and sequence.is_decoding:
                drafts[sequence.id] = self._draft(sequence, most, reserved)
                budget -= len(drafts[sequence.id])
        return drafts

    def _draft(self, sequence: Sequence, most: int, reserved: int) -> tuple[int, ...]:
        """Draft at most so many tokens and give them slots; nobody is preempted for it.

        reserved: free blocks that are not for it
        """
        num_spare = max(0, self.pool.num_free - reserved)
        num_slots = (len(sequence.block_table) + num_spare) * self.config.block_size
        drafts = sequence.draft(min(most, num_slots - sequence.num_tokens))
        has_room = self._make_room(sequence, sequence.num_tokens + len(drafts))
        assert has_room, "a draft was longer than the free blocks"
        return drafts

    def _waits(self, ready: Set[bytes]) -> tuple[ImageWait, ...]:
        """Who waits for which pictures. Whoever once did goes on, even if he would not fit now."""
        waiting = [s for s in self.waiting if s.awaits_images]
        lacking = [(s, self._lacking(s, ready)) for s in waiting]
        return tuple(ImageWait(s.id, s.request.request_id, i) for s, i in lacking if i)

    def _lacking(self, sequence: Sequence, ready: Set[bytes]) -> tuple[ImageInput, ...]:
        """The pictures after a waiting sequence's cached prefix whose features are not there."""
        if all(image.digest in ready for image in sequence.request.images):
            return ()
        needed = sequence.images_from(self.prefixes.find(sequence).num_tokens)
        return tuple(image for image in needed if image.digest not in ready)

    def _blocks_to_admit(self, sequence: Sequence) -> int:
        """Free blocks that a waiting sequence takes when it is admitted."""
        cached = self.prefixes.find(sequence).blocks
        shared = sum(self.pool.ref_count(block) > 0 for block in cached)
        return sequence.blocks_for(sequence.num_tokens + 1) - shared

    def _waits_for_sibling(self, sequence: Sequence) -> bool:
        """Choices 1 … n-1 start once choice 0 has filled the cache with their prompt."""
        if sequence.index == 0 or sequence.output_ids or not self.prefixes.is_enabled:
            return False
        first = self._by_id.get(sequence.id - sequence.index)
        return first is not None and first.is_prefilling

    def _admit(self, sequence: Sequence, budget: int, reserved: int) -> int:
        """Move a sequence to running if its tokens fit the cache. Returns its first chunk, or 0.

        reserved: free blocks that are not for it
        """
        cached = self.prefixes.find(sequence)
        self.pool.hold(cached.blocks)
        sequence.num_computed = cached.num_tokens
        count = _chunk(sequence, budget)
        # One more token than is known, so that it is not preempted in its very next step.
        missing = sequence.blocks_for(sequence.num_tokens + 1) - len(cached.blocks)
        if not count or missing > self.pool.num_free - reserved:
            sequence.num_computed = 0
            self.pool.release(cached.blocks)
            return 0
        sequence.block_table = array("q", self._take(cached, missing))
        self.counters.prefix_hit_tokens += cached.num_tokens
        self.waiting.remove(sequence)
        sequence.awaits_images = False
        insort(self.running, sequence, key=lambda s: s.id)
        return count

    def _take(self, cached: CachedPrefix, missing: int) -> list[int]:
        """The blocks of a sequence that is admitted: those held, the partial one, and new ones."""
        if cached.partial is None:
            return cached.blocks + self.pool.allocate(missing)
        self.pool.take_over(cached.partial)
        return [*cached.blocks, cached.partial, *self.pool.allocate(missing - 1)]

    def _make_room(self, sequence: Sequence, num_tokens: int) -> bool:
        """Give a running sequence blocks for so many tokens, preempting younger ones.

        False when the sequence itself had to go.
        """
        missing = sequence.blocks_for(num_tokens) - len(sequence.block_table)
        while missing > self.pool.num_free:
            victim = self.running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
        if missing > 0:
            sequence.block_table.extend(self.pool.allocate(missing))
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Take a sequence's blocks; it keeps its tokens and will recompute them."""
        self.running.remove(sequence)
        self._free(sequence)
        sequence.num_computed = 0
        self.counters.preemptions += 1
        insort(self.waiting, sequence, key=lambda s: s.id)

    def _free(self, sequence: Sequence) -> None:
        self.pool.release(sequence.block_table)
        sequence.block_table = array("q")

    def _advance(self, sequence: Sequence, count: int) -> None:
        """Count computed tokens and make the blocks that became full findable."""
        # By where it stands and not by its length: a prompt's last chunk may be one token.
        if sequence.is_prefilling or count > 1:
            self.counters.prefill_tokens += count
        else:
            self.counters.decode_tokens += count
        num_before = sequence.num_computed
        sequence.num_computed += count
        self.prefixes.keep_full(sequence, num_before)

    def _extend(self, tokens: Iterable[SampledToken]) -> list[TokenOutcome]:
        """Append one sequence's tokens as if each had had a step of its own, until one is the last.

        Each but the first stands on a draft that was right: computed in this step, and since the
        token before was appended, a token like any other.
        """
        first, *others = tokens
        sequence = self._by_id[first.sequence_id]
        outcomes = [self._append(first)]
        for token in others:
            if outcomes[-1].finish_reason:
                break
            self._advance(sequence, 1)
            self.counters.accepted_tokens += 1
            outcomes.append(self._append(token))
        return outcomes

    def _append(self, token: SampledToken) -> TokenOutcome:
        """Add a sampled token and finish its sequence when it was the last."""
        sequence = self._by_id[token.sequence_id]
        if token.error is None:
            sequence.output_ids.append(token.token_id)
        reason, stop_id = _finish_reason(sequence, token)
        if reason:
            self.finish(sequence.id, is_poisoned=reason == "error")
        return TokenOutcome(
            request_id=sequence.request.request_id,
            index=sequence.index,
            sampled=token,
            is_text=token.error is None and stop_id is None,
            finish_reason=reason,
            stop_reason=stop_id,
        )


def _chunk(sequence: Sequence, budget: int) -> int:
    """How many tokens the sequence computes next; 0 when its least does not fit the budget."""
    if sequence.least_chunk > budget:
        return 0
    return min(sequence.num_tokens - sequence.num_computed, budget)


def _finish_reason(
    sequence: Sequence, token: SampledToken
) -> tuple[FinishReason | None, int | None]:
    """Why the sequence ends with this token, if it does, and the stop id that ended it."""
    request = sequence.request
    if token.error is not None:
        return "error", None
    if token.token_id in request.stop_token_ids:
        return "stop", token.token_id
    if len(sequence.output_ids) >= request.max_tokens:
        return "length", None
    return None, None
