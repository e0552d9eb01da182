"""The scheduler by hand for small cases, then random crowds against every request run alone.

A fake model stands for runner and sampler. Its cache entries depend on everything that a real
token's keys and values depend on, and its tokens on every entry they may see; so a lost token, a
stale block, a wrong picture row or a prefix shared by mistake shows as another token.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from glimt.config import EngineConfig
from glimt.sampling import verify
from glimt.scheduler.scheduler import Scheduler
from glimt.types import (
    EncodedPrompt,
    ImageInput,
    ImageSpan,
    Request,
    SampledToken,
    SamplingParams,
    StepPlan,
    TokenOutcome,
)

BLOCK = 4
VOCAB = 17  # small, so that stop ids come up
PLACEHOLDER = 0
NO_PIXELS = np.zeros((1, 1, 3), dtype=np.uint8)


# --- requests --------------------------------------------------------------------------------


def picture(name: str, length: int) -> ImageInput:
    return ImageInput(hashlib.sha256(name.encode()).digest(), length, (1, length), NO_PIXELS)


def make_prompt(
    parts: Sequence[Sequence[int] | ImageInput], bidirectional: bool = False
) -> tuple[EncodedPrompt, tuple[ImageInput, ...]]:
    """Text parts and pictures in order. Pictures share one position, as GLM-4v's patches do.

    bidirectional: all but the last token see each other, and there are two position channels, as
    in VisualGLM.
    """
    ids: list[int] = []
    channel: list[int] = []
    spans: list[ImageSpan] = []
    images = tuple(part for part in parts if isinstance(part, ImageInput))
    for part in parts:
        at = channel[-1] + 1 if channel else 0
        if isinstance(part, ImageInput):
            spans.append(ImageSpan(len(ids), part.num_tokens, len(spans)))
            ids += [PLACEHOLDER] * part.num_tokens
            channel += [at] * part.num_tokens
        else:
            ids += part
            channel += range(at, at + len(part))
    channels, step = [channel], (1,)
    if bidirectional:
        channel[-1] = len(ids) - 2
        channels, step = [channel, [*[0] * (len(ids) - 1), 1]], (0, 1)
    prompt = EncodedPrompt(
        token_ids=tuple(ids),
        original_token_ids=tuple(ids),
        spans=tuple(spans),
        positions=np.array(channels, dtype=np.int64),
        decode_start=tuple(c[-1] + s for c, s in zip(channels, step, strict=True)),
        decode_step=step,
        bidirectional_len=len(ids) - 1 if bidirectional else 0,
    )
    return prompt, images


def make_request(
    name: str,
    parts: Sequence[Sequence[int] | ImageInput],
    max_tokens: int = 1,
    *,
    n: int = 1,
    bidirectional: bool = False,
    stop: Iterable[int] = (),
    ignore_eos: bool = False,
    cache_salt: str = "",
) -> Request:
    prompt, images = make_prompt(parts, bidirectional)
    return Request(
        request_id=name,
        prompt=prompt,
        images=images,
        sampling=SamplingParams(n=n, ignore_eos=ignore_eos),
        stop_token_ids=frozenset(stop),
        seeds=tuple(range(n)),
        max_tokens=max_tokens,
        arrival_s=0.0,
        cache_salt=cache_salt,
    )


def text(name: str, length: int, max_tokens: int = 1, **options) -> Request:
    """A prompt of ids that no other name's prompt begins with."""
    first = 1 + int.from_bytes(name.encode(), "big") % (VOCAB - 1)
    return make_request(name, [[first, *range(1, length)]], max_tokens, **options)


# --- the fake model --------------------------------------------------------------------------

POISON = ("not finite",)


def digest(*values) -> int:
    return int.from_bytes(hashlib.blake2b(repr(values).encode(), digest_size=8).digest(), "big")


def choose(entries: Sequence, seed: int) -> int:
    """The token that follows these cache entries."""
    return digest(seed, *entries) % VOCAB


def seen_by(raws: Sequence, index: int, bidirectional_len: int) -> int:
    """What flows into the keys and values of one token from the tokens it may see."""
    return digest(*raws[: max(index + 1, bidirectional_len if index < bidirectional_len else 0)])


class FakeModel:
    """slots: cache slot -> (what stands there, what it saw); broken: request id -> outputs."""

    def __init__(self, block_size: int, broken: Mapping[str, int] | None = None) -> None:
        self.block_size = block_size
        self.broken = broken or {}
        self.slots: dict[int, tuple] = {}

    def run(self, plan: StepPlan) -> list[SampledToken]:
        """Compute a step's tokens as the runner and the sampler would."""
        written: set[int] = set()
        tokens = []
        # All entries are written before any is read, as layer by layer in one batch: a row that
        # needs an entry which this very step writes in another row would get away with it here.
        readable = dict(self.slots)
        for row in plan.rows:
            stop = row.start + len(row.token_ids)
            places = [
                row.block_table[i // self.block_size] * self.block_size + i % self.block_size
                for i in range(stop)
            ]
            entries = [readable[slot] for slot in places[: row.start]]
            assert POISON not in entries, "a cache entry that is not finite was read"
            raws = [raw for raw, _ in entries] + self._raws(row)
            entries += [
                (raws[i], seen_by(raws, i, row.bidirectional_len)) for i in range(row.start, stop)
            ]
            assert not written & set(places[row.start :]), "two rows write one slot"
            written |= set(places[row.start :])
            broken_from = self._broken_from(row, stop)
            for i in range(row.start, stop):
                self.slots[places[i]] = POISON if i >= broken_from else entries[i]
            for i in range(max(broken_from, stop - len(row.drafts)), stop):
                del self.slots[places[i]]  # the runner takes back drafts that are not finite
            for i in range(stop - len(row.drafts), stop + 1) if row.samples else ():
                tokens.append(
                    SampledToken(row.sequence_id, -1, error="not finite")
                    if i > broken_from
                    else SampledToken(row.sequence_id, choose(entries[:i], row.seed))
                )
        return verify(tokens, plan)

    def _broken_from(self, row, stop: int) -> int:
        """The first cache index of the row whose values are not finite."""
        after = self.broken.get(row.request_id)
        num_outputs = len(row.output_ids)
        if not row.samples or after is None or not 0 <= after - num_outputs <= len(row.drafts):
            return stop
        known = stop - len(row.drafts)
        return row.start if after == num_outputs else known + after - num_outputs - 1

    def _raws(self, row) -> list[tuple]:
        features = [None] * len(row.token_ids)
        for part in row.images:
            for k in range(part.length):
                features[part.offset + k] = (part.image.digest, part.feature_start + k)
        positions = map(tuple, row.positions.T.tolist())
        return list(zip(row.token_ids, positions, features, strict=True))


def alone(request: Request, index: int = 0) -> tuple[list[int], str]:
    """Output ids and finish reason of one choice without cache, batch or scheduler."""
    prompt = request.prompt
    features: list = [None] * len(prompt.token_ids)
    for span in prompt.spans:
        for k in range(span.length):
            features[span.start + k] = (request.images[span.image].digest, k)
    raws = list(
        zip(prompt.token_ids, map(tuple, prompt.positions.T.tolist()), features, strict=True)
    )
    entries = [(raw, seen_by(raws, i, prompt.bidirectional_len)) for i, raw in enumerate(raws)]
    output: list[int] = []
    while True:
        token = choose(entries, request.seeds[index])
        output.append(token)
        if token in request.stop_token_ids:
            return output, "stop"
        if len(output) == request.max_tokens:
            return output, "length"
        k = len(output) - 1
        rule = zip(prompt.decode_start, prompt.decode_step, strict=True)
        raws.append((token, tuple(start + k * step for start, step in rule), None))
        entries.append((raws[-1], seen_by(raws, len(raws) - 1, prompt.bidirectional_len)))


class FakeTower:
    """A picture is ready when it was waited for in so many steps, one after the other.

    It keeps no more than the plan says, as a runner without a feature cache.
    """

    def __init__(self, num_steps: int) -> None:
        self.num_steps = num_steps
        self.ready: frozenset[bytes] = frozenset()
        self._left: dict[bytes, int] = {}

    def run(self, plan: StepPlan) -> None:
        """Whatever rows lack is run through at once; of those who wait, the first goes on."""
        shown = (row.images_by_digest.keys() for row in plan.rows)
        self.ready = self.ready.union(*shown) & plan.open_images
        self._left = {d: left for d, left in self._left.items() if d in plan.open_images}
        wanted = [i.digest for w in plan.waits for i in w.images if i.digest not in self.ready]
        if wanted:
            left = self._left.pop(wanted[0], self.num_steps) - 1
            if left:
                self._left[wanted[0]] = left
            else:
                self.ready |= {wanted[0]}


class KnowingDrafter:
    """Guesses the answer that the request gets alone, but for a wrong token now and then."""

    def __init__(self, request: Request, index: int) -> None:
        self.answer = alone(request, index)[0]
        self.seed = request.seeds[index]

    def draft(self, output_ids: Sequence[int], count: int) -> tuple[int, ...]:
        place = len(output_ids)
        known = [*self.answer[place:], 1, 2, 3][: max(count, 0)]  # goes on behind the end
        wrong = digest("wrong", self.seed, place) % 8
        return tuple((t + 1) % VOCAB if k == wrong else t for k, t in enumerate(known))


# --- driving it ------------------------------------------------------------------------------


class Bench:
    """A scheduler with a fake model, checked at every step.

    tower: steps that a picture takes while others run; None when nobody is ever to wait for one
    """

    def __init__(
        self,
        num_blocks: int,
        *,
        budget: int = 64,
        max_num_seqs: int = 8,
        block_size: int = BLOCK,
        prefix_cache: bool = True,
        num_draft_tokens: int = 0,
        broken: Mapping[str, int] | None = None,
        tower: int | None = None,
    ) -> None:
        config = EngineConfig(
            model="",
            max_num_batched_tokens=budget,
            max_num_seqs=max_num_seqs,
            block_size=block_size,
            enable_prefix_cache=prefix_cache,
            num_draft_tokens=num_draft_tokens,
        )
        self.scheduler = Scheduler(config, num_blocks)
        self.config = config
        self.model = FakeModel(block_size, broken)
        self.tower = None if tower is None else FakeTower(tower)
        self.output: dict[tuple[str, int], list[int]] = {}
        self.reasons: dict[tuple[str, int], str] = {}
        self.num_computed = 0
        self.prefill_tokens: int | None = None  # beside decodes

    def add(self, *requests: Request) -> None:
        for request in requests:
            for sequence in self.scheduler.add(request):
                sequence._drafter = KnowingDrafter(request, sequence.index)
                self.output[request.request_id, sequence.index] = []

    def step(self) -> list[tuple[str, int, int]]:
        """One step. Returns (request, start, count) of every row, in order."""
        before = {sequence.id for sequence in self.scheduler.running}
        plan = self.scheduler.plan_step(
            self.tower.ready if self.tower else None, self.prefill_tokens
        )
        self._check_plan(plan)
        if self.tower:
            self._check_pictures(plan, self.tower.ready, before)
            self.tower.run(plan)
        outcomes = self.scheduler.commit(plan, self.model.run(plan))
        self.scheduler.pool.check()
        self.num_computed += plan.num_tokens
        self._collect(outcomes)
        return [(row.request_id, row.start, len(row.token_ids)) for row in plan.rows]

    def abort(self, name: str) -> None:
        for sequence in self.scheduler.sequences_of(name):
            self.scheduler.finish(sequence.id)
            self.scheduler.pool.check()
            self._end((name, sequence.index), "abort")

    def run(self) -> dict[tuple[str, int], tuple[list[int], str]]:
        steps = 0
        while self.scheduler.has_work:
            self.step()
            steps += 1
            assert steps < 5000, "the scheduler goes round in circles"
        return self.results()

    def results(self) -> dict[tuple[str, int], tuple[list[int], str]]:
        return {choice: (self.output[choice], reason) for choice, reason in self.reasons.items()}

    def table(self, name: str, index: int = 0) -> list[int]:
        return list(self.sequence(name, index).block_table)

    def sequence(self, name: str, index: int = 0):
        return next(s for s in self.scheduler.sequences_of(name) if s.index == index)

    def _check_plan(self, plan: StepPlan) -> None:
        pool, running = self.scheduler.pool, self.scheduler.running
        assert plan.rows or not self.scheduler.has_work, "nothing runs although there is work"
        assert plan.num_tokens <= self.config.max_num_batched_tokens
        assert len(running) <= self.config.max_num_seqs
        assert [row.is_decode for row in plan.rows] == sorted(
            (row.is_decode for row in plan.rows), reverse=True
        )
        assert len({row.sequence_id for row in plan.rows}) == len(plan.rows)
        for queue in (running, self.scheduler.waiting):
            assert queue == sorted(queue, key=lambda sequence: sequence.id), "not by age"
        for sequence in self.scheduler.waiting:
            assert (len(sequence.block_table), sequence.num_computed) == (0, 0), "waits with blocks"
        held = Counter(block for sequence in running for block in sequence.block_table)
        assert all(pool.ref_count(b) == held[b] for b in range(pool.num_blocks))
        for row in plan.rows:
            stop = row.start + len(row.token_ids)
            assert row.token_ids, "a row without tokens"
            assert stop >= row.bidirectional_len, "a bidirectional context was split"
            assert len(row.block_table) * self.config.block_size >= stop
            written = range(row.start // self.config.block_size, -(-stop // self.config.block_size))
            assert all(held[row.block_table[b]] == 1 for b in written), "a shared block is written"

    def _check_pictures(self, plan: StepPlan, ready: frozenset[bytes], before: set[int]) -> None:
        """before: the sequences that ran already when the step was planned."""
        lacking = [row for row in plan.rows if row.images_by_digest.keys() - ready]
        if any(row.sequence_id in before for row in plan.rows):
            assert not lacking, "running sequences wait for the tower"
        assert not plan.waits or plan.rows, "a slice although nothing else runs"
        waiting = {sequence.id for sequence in self.scheduler.waiting}
        for wait in plan.waits:
            digests = {image.digest for image in wait.images}
            assert digests, "a wait for nothing"
            assert not digests & ready, "a wait for what is there"
            assert digests <= plan.open_images, "what is waited for is not kept"
            assert wait.sequence_id in waiting

    def _collect(self, outcomes: Sequence[TokenOutcome]) -> None:
        for outcome in outcomes:
            choice = outcome.request_id, outcome.index
            if outcome.sampled.error is None:
                self.output[choice].append(outcome.sampled.token_id)
            if outcome.finish_reason:
                self._end(choice, outcome.finish_reason)

    def _end(self, choice: tuple[str, int], reason: str) -> None:
        assert choice not in self.reasons, "a choice ended twice"
        self.reasons[choice] = reason


# --- by hand: chunks, order, budget ----------------------------------------------------------


def test_a_prompt_is_computed_in_chunks_of_the_budget():
    """Would catch a chunk beyond the budget, a gap between chunks, or a sample in mid-prompt."""
    bench = Bench(num_blocks=5, budget=4)
    bench.add(text("a", 10, max_tokens=2))
    plan = bench.scheduler.plan_step()
    assert [row.samples for row in plan.rows] == [False]
    assert list(plan.rows[0].block_table) == [0, 1, 2]  # 11 tokens: the prompt and the first output
    assert plan.rows[0].positions.tolist() == [[0, 1, 2, 3]]
    bench.scheduler.commit(plan, bench.model.run(plan))
    assert bench.step() == [("a", 4, 4)]
    assert bench.output["a", 0] == []
    assert bench.step() == [("a", 8, 2)]
    assert len(bench.output["a", 0]) == 1
    assert bench.step() == [("a", 10, 1)]
    assert bench.results() == {("a", 0): alone(text("a", 10, max_tokens=2))}


def test_prompts_beside_decodes_get_only_their_share():
    """Catches a long prompt that holds up a running answer, and one that is slowed for nobody."""
    scene = Bench(64, budget=64)
    scene.prefill_tokens = 5
    scene.add(text("a", 20, max_tokens=4))
    assert scene.step() == [("a", 0, 20)]  # nobody decodes yet
    scene.add(text("b", 12))
    assert scene.step() == [("a", 20, 1), ("b", 0, 5)]
    assert scene.step() == [("a", 21, 1), ("b", 5, 5)]
    assert scene.step() == [("a", 22, 1), ("b", 10, 2)]


def test_decodes_run_before_chunks_and_keep_their_pace():
    """Would catch a long prompt that stalls the answers already being written."""
    bench = Bench(num_blocks=9, budget=5)
    bench.add(text("a", 3, max_tokens=9))
    assert bench.step() == [("a", 0, 3)]
    bench.add(text("b", 10))
    assert bench.step() == [("a", 3, 1), ("b", 0, 4)]
    assert bench.step() == [("a", 4, 1), ("b", 4, 4)]
    assert bench.step() == [("a", 5, 1), ("b", 8, 2)]


def test_decodes_come_first_in_the_plan_even_when_younger():
    """Would catch rows in order of age: the runner takes the first rows for decodes.

    Of c all but one token is cached, and one token on a cached context is a decode to the runner.
    """
    bench = Bench(num_blocks=12)
    bench.add(text("c", 5))
    bench.run()
    bench.add(text("a", 3), text("b", 4), replace(text("c", 5), request_id="again"))
    assert bench.step() == [("again", 4, 1), ("a", 0, 3), ("b", 0, 4)]


def test_the_budget_is_shared_in_order_of_arrival():
    """Would catch a budget counted per sequence instead of per step."""
    bench = Bench(num_blocks=12, budget=6)
    bench.add(text("a", 4), text("b", 4), text("c", 4))
    assert bench.step() == [("a", 0, 4), ("b", 0, 2)]
    assert bench.step() == [("b", 2, 2), ("c", 0, 4)]


def test_no_more_sequences_run_than_allowed():
    """Would catch max_num_seqs being ignored, or counted in requests instead of sequences."""
    bench = Bench(num_blocks=12, max_num_seqs=2, prefix_cache=False)
    bench.add(text("a", 2, max_tokens=2, n=2), text("b", 2))
    assert bench.step() == [("a", 0, 2), ("a", 0, 2)]
    assert bench.step() == [("a", 2, 1), ("a", 2, 1)]
    assert bench.step() == [("b", 0, 2)]


def test_admission_is_first_come_first_served():
    """Would catch a small request overtaking a big one, which could then wait for ever."""
    bench = Bench(num_blocks=4)
    bench.add(text("a", 6, max_tokens=2), text("big", 10, max_tokens=2), text("small", 2))
    assert bench.step() == [("a", 0, 6)]
    assert bench.step() == [("a", 6, 1)]
    assert bench.step() == [("big", 0, 10), ("small", 0, 2)]


def test_admission_keeps_room_for_the_first_output():
    """Would catch a prompt that just fits and is preempted in its very next step."""
    bench = Bench(num_blocks=3)
    bench.add(text("a", 4, max_tokens=4), text("b", 4, max_tokens=4))
    assert bench.step() == [("a", 0, 4)]  # 5 tokens: 2 blocks; b would need 2 as well


def test_a_request_as_large_as_the_cache_runs():
    """Would catch an off-by-one that leaves a request waiting for a block that does not exist."""
    request = text("a", 9, max_tokens=7)
    bench = Bench(num_blocks=4)
    bench.add(request)
    assert bench.run() == {("a", 0): alone(request)}


# --- by hand: preemption ---------------------------------------------------------------------


def crowded() -> Bench:
    """Two sequences of 7 prompt tokens fill four blocks; both want a third block in step 3."""
    bench = Bench(num_blocks=4)
    bench.add(text("a", 7, max_tokens=4), text("b", 7, max_tokens=4))
    assert bench.step() == [("a", 0, 7), ("b", 0, 7)]
    assert (bench.table("a"), bench.table("b")) == ([0, 1], [2, 3])
    assert bench.step() == [("a", 7, 1), ("b", 7, 1)]
    return bench


def test_the_youngest_is_preempted_and_its_tail_taken_first():
    """Would catch the oldest being put back, or the head of the victim's prefix being reused."""
    bench = crowded()
    assert bench.step() == [("a", 8, 1)]
    assert bench.table("a") == [0, 1, 3]
    assert bench.table("b") == []
    assert bench.scheduler.counters.preemptions == 1
    assert [s.request.request_id for s in bench.scheduler.waiting] == ["b"]


def test_a_preempted_sequence_repeats_its_tokens():
    """Would catch lost output tokens, or a recompute that stands at other positions.

    b finds its first block (4 tokens) still cached and computes the other 5 in one chunk.
    """
    bench = crowded()
    assert bench.step() == [("a", 8, 1)]
    assert bench.step() == [("a", 9, 1)]  # its 4th token: a is done, b did not fit beside it
    assert bench.step() == [("b", 4, 5)]
    assert bench.scheduler.counters.prefix_hit_tokens == 4
    results = bench.run()
    assert results["b", 0] == alone(text("b", 7, max_tokens=4))
    assert bench.scheduler.pool.num_free == 4


def test_nobody_is_admitted_in_a_step_that_preempts():
    """Would catch a freed block going to a newcomer that the next step preempts again."""
    bench = crowded()
    bench.add(text("c", 1))
    assert bench.step() == [("a", 8, 1)]
    assert [s.request.request_id for s in bench.scheduler.waiting] == ["b", "c"]


def test_a_preempted_sequence_waits_before_those_that_came_later():
    """Would catch a preempted sequence sent to the end of the queue."""
    bench = Bench(num_blocks=4)
    bench.add(text("a", 7, max_tokens=4), text("b", 7, max_tokens=4), text("c", 3))
    assert [bench.step() for _ in range(3)][-1] == [("a", 8, 1)]
    assert [s.request.request_id for s in bench.scheduler.waiting] == ["b", "c"]


def test_the_oldest_never_loses_its_blocks():
    """Would catch two sequences that preempt each other in turn and never end."""
    requests = [text(name, 6, max_tokens=10) for name in "abcd"]
    bench = Bench(num_blocks=4)
    bench.add(*requests)
    assert bench.run() == {(r.request_id, 0): alone(r) for r in requests}
    assert list(bench.reasons) == [(name, 0) for name in "abcd"]


# --- by hand: shared prefixes ----------------------------------------------------------------


def run_after(first: Request, second: Request, **options) -> int:
    """Tokens that `second` finds cached once `first` has finished; both must be right."""
    bench = Bench(num_blocks=32, **options)
    bench.add(first)
    bench.run()
    bench.add(replace(second, request_id="second"))
    rows = bench.step()
    results = bench.run()
    assert results["second", 0] == alone(second)
    assert rows[0][0] == "second"
    return rows[0][1]


def test_an_equal_prompt_is_found_but_never_its_last_token():
    """Would catch a hit that covers the whole prompt and leaves no logits to sample from."""
    assert run_after(text("a", 8), text("a", 8)) == 4  # two full blocks, the second not used
    assert run_after(text("a", 9), text("a", 9)) == 8
    assert run_after(text("a", 3), text("a", 3)) == 2  # a partly written block, taken over
    assert run_after(text("a", 4), text("a", 4)) == 0


def test_a_common_beginning_is_found_in_whole_blocks():
    """Would catch sharing beyond the first difference, or none at all."""
    common = list(range(1, 11))
    first = make_request("a", [[*common, 15, 15, 15]])
    second = make_request("b", [[*common, 16, 16, 16, 16]])
    assert run_after(first, second) == 8


def test_an_answer_is_found_when_it_is_part_of_the_next_prompt():
    """Would catch output blocks that are never made findable: a second turn recomputes them."""
    first = text("a", 6, max_tokens=7)  # 12 of 13 tokens are computed: 3 full blocks
    output, _ = alone(first)
    follow = make_request("b", [[*first.prompt.token_ids, *output, 3, 3]])
    assert run_after(first, follow) == 12


def test_the_last_token_of_an_answer_is_never_found():
    """Would catch a slot that claims the token which ended the answer: nothing is written there."""
    first = text("a", 6, max_tokens=6)  # 11 of 12 tokens are computed: the last block has 3
    output, _ = alone(first)
    follow = make_request("b", [[*first.prompt.token_ids, *output, 3, 3]])
    assert run_after(first, follow) == 11


def test_without_the_prefix_cache_nothing_is_found():
    """Would catch the option being ignored."""
    assert run_after(text("a", 9), text("a", 9), prefix_cache=False) == 0


def test_equal_ids_of_different_pictures_never_share():
    """Would catch a hash of token ids alone: one user would see another user's picture."""
    cat, dog = picture("cat", 9), picture("dog", 9)
    ask = [5, 6, 7, 8, 9]
    first, second = make_request("a", [[1, 2], cat, ask]), make_request("b", [[1, 2], dog, ask])
    assert first.prompt.token_ids == second.prompt.token_ids
    assert run_after(first, first) == 12
    assert run_after(first, second) == 0


def test_what_stands_before_a_different_picture_is_still_shared():
    """Would catch a picture's digest spoiling the blocks before it."""
    start = [1, 2, 3, 4, 5]
    first = make_request("a", [start, picture("cat", 6), [7]])
    second = make_request("b", [start, picture("dog", 6), [7]])
    assert run_after(first, second) == 4


def test_a_picture_is_not_its_placeholder_ids():
    """Would catch text that spells the placeholder id being served a cached picture."""
    first = make_request("a", [[1], picture("cat", 8), [7]])
    second = make_request("b", [[1], [PLACEHOLDER] * 8, [7]])
    assert run_after(first, second) == run_after(second, first) == 0


def test_a_picture_one_place_further_is_another_prompt():
    """Would catch a hash that says which picture a block holds but not where it begins."""
    cat = picture("cat", 8)
    first = make_request("a", [[PLACEHOLDER], cat, [PLACEHOLDER], [7]])
    second = make_request("b", [cat, [PLACEHOLDER, PLACEHOLDER], [7]])
    assert first.prompt.token_ids == second.prompt.token_ids
    assert run_after(first, second) == 0


def test_equal_prompts_of_different_salts_never_share():
    """Would catch one tenant learning from response times what another one asked."""
    first, second = text("a", 9), text("a", 9, cache_salt="tenant")
    assert run_after(first, second) == run_after(second, first) == 0
    assert run_after(second, second) == 8


def test_a_salt_cannot_stand_for_tokens():
    """Would catch a salt and the context hashed as one run of bytes: moved by one token, both
    prompts would have the same bytes, and the shorter one would find keys of the longer.
    """
    long = make_request("a", [[0] * 10], bidirectional=True)
    short = make_request("b", [[0] * 9], bidirectional=True, cache_salt="\0" * 8)
    assert run_after(long, short) == run_after(short, long) == 0


def test_bidirectional_prompts_share_only_equal_contexts():
    """Would catch a shared beginning of contexts that differ later: every token sees the end."""
    start, cat, dog = [1, 2, 3, 4, 5], picture("cat", 6), picture("dog", 6)
    first = make_request("a", [start, cat, [6, 7, 8]], bidirectional=True)
    other_end = make_request("b", [start, cat, [6, 9, 8]], bidirectional=True)
    longer = make_request("c", [start, cat, [6, 7, 7, 8]], bidirectional=True)
    other_picture = make_request("d", [start, dog, [6, 7, 8]], bidirectional=True)
    salted = make_request("e", [start, cat, [6, 7, 8]], bidirectional=True, cache_salt="x")
    assert run_after(first, first) == 13
    assert [run_after(first, r) for r in (other_end, longer, other_picture, salted)] == [0] * 4


def test_a_bidirectional_context_waits_for_a_step_that_holds_it_whole():
    """Would catch a chunk that ends inside the context and misses the later tokens."""
    bench = Bench(num_blocks=12, budget=10)
    bench.add(text("a", 3, max_tokens=3, bidirectional=True))
    bench.step()
    bench.add(text("b", 11, bidirectional=True))  # context 10; a's decode leaves 9
    assert bench.step() == [("a", 3, 1)]
    assert bench.step() == [("a", 4, 1)]
    assert bench.step() == [("b", 0, 10)]  # all of the context; the last token is causal
    assert bench.step() == [("b", 10, 1)]


def test_the_rest_of_a_found_bidirectional_context_runs_at_once():
    """Would catch a hit after which the remaining context is chunked."""
    request = text("a", 12, bidirectional=True)
    bench = Bench(num_blocks=12, budget=11)
    bench.add(request)
    bench.run()
    again = replace(request, request_id="again")
    bench.add(text("long", 8, max_tokens=9, bidirectional=True), again)
    assert bench.step() == [("long", 0, 8), ("again", 8, 3)]
    assert bench.step() == [("long", 8, 1), ("again", 11, 1)]
    assert bench.reasons["again", 0] == "length"
    assert bench.output["again", 0] == alone(request)[0]


# --- by hand: several choices ----------------------------------------------------------------


def test_siblings_wait_for_the_first_choice_and_then_share_its_prompt():
    """Would catch n prefills of one prompt where one would do."""
    request = text("a", 9, max_tokens=2, n=3)
    bench = Bench(num_blocks=12, budget=6)
    bench.add(request)
    assert bench.step() == [("a", 0, 6)]
    assert bench.step() == [("a", 6, 3)]
    assert bench.step() == [("a", 9, 1), ("a", 8, 1), ("a", 8, 1)]
    assert bench.table("a", 1)[:2] == bench.table("a", 2)[:2] == [0, 1]
    results = bench.run()
    assert results == {("a", i): alone(request, i) for i in range(3)}
    assert bench.scheduler.counters.prefix_hit_tokens == 16


def test_waiting_siblings_do_not_hold_up_the_next_request():
    """Would catch an idle budget while siblings wait for their first choice."""
    bench = Bench(num_blocks=12, budget=12)
    bench.add(text("a", 9, n=2), text("b", 3))
    assert bench.step() == [("a", 0, 9), ("b", 0, 3)]
    assert bench.step() == [("a", 8, 1)]


def test_siblings_go_on_when_the_first_choice_is_gone():
    """Would catch choices that wait for ever for a first choice that was ended."""
    request = text("a", 9, n=2)
    bench = Bench(num_blocks=12, budget=4)
    bench.add(request)
    bench.step()
    bench.scheduler.finish(bench.sequence("a", 0).id)
    assert bench.step() == [("a", 4, 4)]
    assert bench.run()["a", 1] == alone(request, 1)


def test_choices_sample_with_their_own_seeds():
    """Would catch n equal answers."""
    request = text("a", 5, max_tokens=6, n=4)
    bench = Bench(num_blocks=20)
    bench.add(request)
    results = bench.run()
    assert results == {("a", i): alone(request, i) for i in range(4)}
    assert len({tuple(output) for output, _ in results.values()}) == 4


# --- by hand: how a sequence ends ------------------------------------------------------------


def only_outcome(request: Request, token_id: int) -> TokenOutcome:
    scheduler = Bench(num_blocks=4).scheduler
    sequence = scheduler.add(request)[0]
    (outcome,) = scheduler.commit(scheduler.plan_step(), [SampledToken(sequence.id, token_id)])
    assert scheduler.is_open(sequence.id) == (outcome.finish_reason is None)
    assert scheduler.has_work == scheduler.is_open(sequence.id)
    assert (scheduler.pool.num_free == 4) == (outcome.finish_reason is not None)
    return outcome


def test_a_stop_id_ends_a_sequence_and_is_not_text():
    """Would catch a stop id that is shown, or not named as the reason."""
    outcome = only_outcome(text("a", 3, max_tokens=5, stop=[7, 8]), 8)
    assert (outcome.finish_reason, outcome.stop_reason, outcome.is_text) == ("stop", 8, False)


def test_a_stop_id_as_the_last_token_allowed_is_a_stop():
    """Would catch "length" for an answer that ended by itself."""
    outcome = only_outcome(text("a", 3, max_tokens=1, stop=[7]), 7)
    assert (outcome.finish_reason, outcome.stop_reason) == ("stop", 7)


def test_max_tokens_ends_a_sequence_with_its_last_token_shown():
    """Would catch one token too many, or the last one swallowed."""
    outcome = only_outcome(text("a", 3, max_tokens=1, stop=[7]), 9)
    assert (outcome.finish_reason, outcome.stop_reason, outcome.is_text) == ("length", None, True)


def test_any_other_token_ends_nothing():
    """Would catch a sequence that ends with its first token."""
    outcome = only_outcome(text("a", 3, max_tokens=5, stop=[7]), 6)
    assert (outcome.finish_reason, outcome.stop_reason, outcome.is_text) == (None, None, True)


@pytest.mark.parametrize("steps", range(6))
def test_a_sequence_can_be_ended_at_any_moment(steps):
    """Would catch blocks leaked, or other sequences disturbed, by an abort.

    0: waiting; 1, 2: in mid-prompt; 3: decoding beside b; 4, 5: preempted, and b too.
    """
    other = text("b", 8, max_tokens=6)
    bench = Bench(num_blocks=5, budget=4)
    bench.add(text("a", 9, max_tokens=8), other)
    for _ in range(steps):
        bench.step()
    bench.abort("a")
    assert bench.scheduler.sequences_of("a") == []
    assert bench.run() == {("a", 0): (bench.output["a", 0], "abort"), ("b", 0): alone(other)}
    assert bench.scheduler.pool.num_free == 5


def test_a_preempted_sequence_can_be_ended_while_it_waits():
    """Would catch a look in the wrong queue."""
    bench = crowded()
    bench.step()
    bench.abort("b")
    assert bench.scheduler.waiting == []
    bench.run()
    assert bench.scheduler.pool.num_free == 4


# --- by hand: values that are not finite -----------------------------------------------------


def test_a_poisoned_sequence_is_never_found_again():
    """Would catch one bad request that spoils every later one with the same beginning."""
    bench = Bench(num_blocks=8, broken={"a": 0})
    bench.add(text("a", 9))
    assert bench.step() == [("a", 0, 9)]
    assert bench.reasons == {("a", 0): "error"}
    assert bench.scheduler.pool.num_cached == 0
    bench.add(replace(text("a", 9), request_id="again"))
    assert bench.step() == [("again", 0, 9)]
    assert bench.results()["again", 0] == alone(text("a", 9))


def test_poisoned_blocks_are_not_made_findable_again_by_another_holder():
    """Would catch a shared block that comes back under its hash when its other holder goes on."""
    request = text("a", 9, max_tokens=4, n=2)
    bench = Bench(num_blocks=8)
    bench.add(request)
    bench.step()
    bench.step()
    scheduler = bench.scheduler
    assert (bench.table("a", 0), bench.table("a", 1)) == ([0, 1, 2], [0, 1, 3])
    scheduler.finish(bench.sequence("a", 1).id, is_poisoned=True)
    assert scheduler.pool.num_cached == 0
    assert bench.run()["a", 0] == alone(request)
    bench.add(replace(request, request_id="again"))
    assert bench.step() == [("again", 0, 9)]  # blocks 0 and 1 were not made findable again


def test_an_error_ends_only_its_own_sequence():
    """Would catch one bad row that ends or changes its neighbours in the same step."""
    requests = [text(name, 5, max_tokens=6) for name in "abc"]
    bench = Bench(num_blocks=20, broken={"b": 2})
    bench.add(*requests)
    results = bench.run()
    assert results["b", 0] == (alone(requests[1])[0][:2], "error")
    assert [results[name, 0] for name in "ac"] == [alone(requests[0]), alone(requests[2])]


def test_what_an_ordinary_sequence_leaves_behind_stays_findable():
    """Would catch good blocks forgotten after an abort."""
    bench = Bench(num_blocks=8)
    bench.add(text("a", 9, max_tokens=3))
    bench.step()
    bench.abort("a")
    assert bench.scheduler.pool.num_cached == 2


# --- by hand: rows ---------------------------------------------------------------------------


def test_a_row_carries_the_parts_of_pictures_that_it_computes():
    """Would catch picture rows shifted by a chunk border."""
    cat, dog = picture("cat", 5), picture("dog", 3)
    request = make_request("a", [[1, 2], cat, [3], dog, [4]])
    bench = Bench(num_blocks=8, budget=5)
    bench.add(request)
    seen = []
    while bench.scheduler.has_work:
        plan = bench.scheduler.plan_step()
        seen.append(
            [(p.image is cat, p.offset, p.feature_start, p.length) for p in plan.rows[0].images]
        )
        bench.scheduler.commit(plan, bench.model.run(plan))
    assert seen == [
        [(True, 2, 0, 3)],  # 1 2 c c c
        [(True, 0, 3, 2), (False, 3, 0, 2)],  # c c 3 d d
        [(False, 0, 2, 1)],  # d 4
    ]


def test_a_row_names_what_its_sampling_needs():
    """Would catch a row with another choice's seed, or without its own past."""
    request = text("a", 5, max_tokens=4, n=2, stop=[99])
    bench = Bench(num_blocks=8)
    bench.add(request)
    bench.step()
    bench.step()
    first, second = bench.scheduler.plan_step().rows
    assert (first.index, first.seed, second.index, second.seed) == (0, 0, 1, 1)
    assert list(first.output_ids) == bench.output["a", 0]
    assert tuple(first.prompt_ids) == request.prompt.original_token_ids
    assert first.stop_token_ids == {99}
    assert first.sampling is request.sampling


# --- by hand: waiting for pictures -----------------------------------------------------------


def test_a_sequence_waits_for_its_picture_while_others_run_and_is_passed_over():
    """Would catch a running sequence that stands still for another one's picture, and a text that
    waits behind it although there is room.
    """
    bench = Bench(num_blocks=16, tower=3)
    bench.add(text("a", 3, max_tokens=20))
    bench.step()
    bench.add(make_request("b", [[1], picture("cat", 5), [2]], max_tokens=20), text("c", 2, 20))
    assert bench.step() == [("a", 3, 1), ("c", 0, 2)]
    assert bench.step() == [("a", 4, 1), ("c", 2, 1)]
    assert bench.step() == [("a", 5, 1), ("c", 3, 1)]
    assert bench.step() == [("a", 6, 1), ("c", 4, 1), ("b", 0, 7)]


def test_nobody_waits_for_a_picture_when_nothing_else_runs():
    """Would catch an idle step, or a wait that goes on when those that ran have finished."""
    bench = Bench(num_blocks=16, tower=9)
    shown = [[1], picture("cat", 5), [2]]
    bench.add(text("a", 3, max_tokens=3), make_request("b", shown, max_tokens=3))
    assert bench.step() == [("a", 0, 3), ("b", 0, 7)]
    bench.add(make_request("c", [[3], picture("dog", 5), [2]]))
    assert [len(bench.step()) for _ in range(2)] == [2, 2]  # a and b to their ends
    assert bench.step() == [("c", 0, 7)]


def test_who_waits_for_a_picture_finds_its_blocks_when_it_is_there():
    """Would catch those who are let past taking the room, again and again."""
    bench = Bench(num_blocks=5, tower=2)
    bench.add(text("a", 3, max_tokens=5))  # one block, and soon a second one
    bench.step()
    bench.add(make_request("b", [[1], picture("cat", 9), [2]], max_tokens=1))  # three blocks
    bench.add(text("c", 7))  # two, of which one is free
    bench.add(text("d", 3))  # one, but nobody overtakes c
    assert bench.step() == [("a", 3, 1)]
    assert bench.step() == [("a", 4, 1)]
    assert bench.step()[:2] == [("a", 5, 1), ("b", 0, 11)]


def test_drafts_leave_the_blocks_of_those_who_wait_for_a_picture():
    """Would catch a draft that takes the room which a waiting sequence was promised."""
    bench = Bench(num_blocks=5, tower=2, num_draft_tokens=4)
    bench.add(text("a", 3, max_tokens=12))  # one block now, two when it decodes
    bench.step()
    bench.add(make_request("b", [[1], picture("cat", 10), [2]], max_tokens=1))  # four blocks
    ((_, start, count),) = bench.step()
    assert (start, count) == (3, 1)  # the block is full, and the four that are free are not for a
    ((_, start, count), *_) = bench.step()
    assert start == 4
    assert count <= 4  # within the block that the decoded token needs
    assert len(bench.table("a")) == 2
    assert bench.run()["a", 0] == alone(text("a", 3, max_tokens=12))


def test_no_more_wait_for_pictures_than_may_run():
    """Would catch features kept for a whole queue, while few of it can run."""
    bench = Bench(num_blocks=64, max_num_seqs=3, tower=9)
    bench.add(text("a", 3, max_tokens=9))
    bench.step()
    shown = [picture("cat", 5), picture("dog", 5), picture("fox", 2)]
    bench.add(*(make_request(str(i), [[1], each, [2]]) for i, each in enumerate(shown)))
    plan = bench.scheduler.plan_step(frozenset())
    assert [wait.request_id for wait in plan.waits] == ["0", "1"]
    assert plan.open_images == {shown[0].digest, shown[1].digest}


def test_a_wait_is_for_what_no_cache_has():
    """Would catch a tower run for a picture whose keys and values are all in the prefix cache."""
    bench = Bench(num_blocks=32, tower=2)
    cat, dog = picture("cat", 5), picture("dog", 5)
    bench.add(make_request("a", [[1], cat, [2, 3]]))  # two full blocks
    bench.run()
    bench.add(text("b", 3, max_tokens=9))
    bench.step()
    bench.add(make_request("c", [[1], cat, [2, 3], dog, [4]]))
    plan = bench.scheduler.plan_step(frozenset())
    assert [[image.digest for image in wait.images] for wait in plan.waits] == [[dog.digest]]
    bench.scheduler.commit(plan, bench.model.run(plan))
    plan = bench.scheduler.plan_step(frozenset({dog.digest}))
    assert [(row.request_id, row.start) for row in plan.rows] == [("b", 4), ("c", 8)]


def test_a_row_tells_which_pictures_come_after_it():
    """Would catch features that are let go between two chunks of one prompt."""
    cat, dog = picture("cat", 5), picture("dog", 3)
    bench = Bench(num_blocks=8, budget=5)
    bench.add(make_request("a", [[1, 2], cat, [3], dog, [4]]))
    seen = []
    while bench.scheduler.has_work:
        plan = bench.scheduler.plan_step()
        seen.append(([p is cat for p in plan.rows[0].upcoming], len(plan.open_images)))
        bench.scheduler.commit(plan, bench.model.run(plan))
    assert seen == [([True, False], 2), ([False], 1), ([], 0)]


# --- properties ------------------------------------------------------------------------------

# Few and short, so that random prompts often begin alike; two pictures of one length have equal
# ids, and so has the text of as many placeholders.
PARTS: list[list[int] | ImageInput] = [
    [1],
    [1, 2, 3],
    [2, 2, 2, 2],
    [1, 2, 3, 4, 5],
    [PLACEHOLDER] * 5,
    picture("cat", 5),
    picture("dog", 5),
    picture("fox", 2),
]


@dataclass(frozen=True)
class Story:
    """A crowd of requests and what happens to them, by step number."""

    requests: tuple[Request, ...]
    arrivals: tuple[int, ...]
    aborts: dict[str, int] = field(default_factory=dict)
    broken: dict[str, int] = field(default_factory=dict)
    options: dict = field(default_factory=dict)


@st.composite
def requests_of(draw, name: str, bidirectional: bool) -> Request:
    return make_request(
        name,
        [[draw(st.integers(1, 2))], *draw(st.lists(st.sampled_from(PARTS), max_size=3)), [9]],
        max_tokens=draw(st.integers(1, 14)),
        n=draw(st.sampled_from([1, 1, 2, 3])),
        bidirectional=bidirectional,
        stop=draw(st.sampled_from([(), (), (7,), (7, 11)])),
        ignore_eos=draw(st.booleans()),
        cache_salt=draw(st.sampled_from(["", "", "salt"])),
    )


@st.composite
def stories(draw) -> Story:
    bidirectional = draw(st.booleans())
    names = [f"r{i}" for i in range(draw(st.integers(2, 6)))]
    requests = tuple(draw(requests_of(name, bidirectional)) for name in names)
    block_size = draw(st.sampled_from([1, 2, 3, 4, 8]))
    longest = max(len(r.prompt.token_ids) + r.max_tokens for r in requests)
    least_budget = max(1, *(r.prompt.bidirectional_len for r in requests))
    few = st.sampled_from([0, 0, 0, 1, 2])
    return Story(
        requests=requests,
        arrivals=tuple(draw(st.sampled_from([0, 0, 1, 2, 5, 9])) for _ in names),
        aborts={name: draw(st.integers(0, 14)) for name in names[: draw(few)]},
        broken={name: draw(st.integers(0, 5)) for name in names[len(names) - draw(few) :]},
        options={
            "num_blocks": -(-longest // block_size) + draw(st.sampled_from([0, 0, 1, 2, 4, 12])),
            "budget": least_budget + draw(st.sampled_from([0, 1, 3, 12, 50])),
            "max_num_seqs": draw(st.sampled_from([8, 6, 3, 2, 1])),
            "block_size": block_size,  # small ones fill up in the middle of an answer
            "prefix_cache": draw(st.sampled_from([True, True, False])),
            "tower": draw(st.sampled_from([None, 1, 2, 5])),
            "num_draft_tokens": draw(st.sampled_from([0, 1, 4, 7])),
        },
    )


def play(story: Story) -> Bench:
    """Run a story to its end; Bench checks the invariants at every step."""
    bench = Bench(**story.options, broken=story.broken)
    step = 0
    last = max([*story.arrivals, *story.aborts.values()])
    while step <= last or bench.scheduler.has_work:
        for request, arrival in zip(story.requests, story.arrivals, strict=True):
            if arrival == step:
                bench.add(request)
        for name, moment in story.aborts.items():
            if moment == step:
                bench.abort(name)
        bench.step()
        step += 1
        assert step < 5000, "the scheduler goes round in circles"
    return bench


def expected(story: Story, request: Request, index: int) -> tuple[list[int], str]:
    output, reason = alone(request, index)
    after = story.broken.get(request.request_id)
    return (
        (output[:after], "error")
        if after is not None and after < len(output)
        else (
            output,
            reason,
        )
    )


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(stories())
def test_any_crowd_gets_what_each_request_gets_alone(story):
    """Would catch any effect of arrival, batch, chunks, cache hits, preemption, drafts, aborts or
    errors on another request's tokens, a request that never ends or ends twice, blocks that leak.
    """
    bench = play(story)
    results = bench.results()
    choices = {(r.request_id, i): r for r in story.requests for i in range(r.sampling.n)}
    assert results.keys() == choices.keys()
    for (name, index), request in choices.items():
        output, reason = results[name, index]
        wanted, wanted_reason = expected(story, request, index)
        if reason == "abort":
            assert name in story.aborts
            assert output == wanted[: len(output)]
        else:
            assert (output, reason) == (wanted, wanted_reason)
    scheduler, counters = bench.scheduler, bench.scheduler.counters
    assert (scheduler.running, scheduler.waiting, scheduler.has_work) == ([], [], False)
    assert scheduler.pool.num_free == scheduler.pool.num_blocks
    refused = counters.drafted_tokens - counters.accepted_tokens
    assert counters.prefill_tokens + counters.decode_tokens + refused == bench.num_computed
    if not story.options["prefix_cache"]:
        assert counters.prefix_hit_tokens == scheduler.pool.num_cached == 0
    event(f"preempted: {counters.preemptions > 0}, hits: {counters.prefix_hit_tokens > 0}")
    event(f"drafts accepted: {counters.accepted_tokens > 0}, refused: {refused > 0}")


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from(PARTS), min_size=1, max_size=4),
    st.lists(st.sampled_from(PARTS), min_size=1, max_size=4),
    st.sampled_from(["", "salt"]),
    st.booleans(),
)
def test_only_what_is_equal_is_shared(first, second, salt, bidirectional):
    """Would catch a hit beyond the true common beginning, or a block more or less than it holds.

    A naive comparison of what stands at each place says how far two prompts are equal.
    """
    a = make_request("a", [*first, [9]], bidirectional=bidirectional)
    b = make_request("b", [*second, [9]], bidirectional=bidirectional, cache_salt=salt)

    def places(request: Request) -> list[tuple]:
        features: list = [None] * len(request.prompt.token_ids)
        for span in request.prompt.spans:
            for k in range(span.length):
                features[span.start + k] = (request.images[span.image].digest, k)
        return list(zip(request.prompt.token_ids, features, strict=True))

    ours, theirs = places(b), places(a)
    common = next(
        (i for i, (x, y) in enumerate(zip(ours, theirs, strict=False)) if x != y),
        min(len(ours), len(theirs)),
    )
    # The last token is never covered; a block that is not full is taken over, a full one not cut.
    shared = min(common, len(theirs), len(ours) - 1)
    full = shared // BLOCK * BLOCK
    if full != len(theirs) // BLOCK * BLOCK:
        shared = full
    if salt or (bidirectional and ours[:-1] != theirs[:-1]):
        shared = 0
    assert run_after(a, b) == shared
