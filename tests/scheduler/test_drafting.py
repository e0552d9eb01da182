"""The drafter by examples and against a naive search; what the scheduler does with its guesses."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glimt.config import EngineConfig
from glimt.errors import ConfigError
from glimt.scheduler.drafting import MAX_NGRAM, MIN_NGRAM, Drafter
from glimt.scheduler.scheduler import Scheduler
from glimt.types import (
    EncodedPrompt,
    ImageSpan,
    Request,
    SampledToken,
    SamplingParams,
    StepPlan,
    StepRow,
)

PICTURE = "picture"
BEGIN, PATCH, END = 90, 91, 92


def make_prompt(*parts: int | str) -> EncodedPrompt:
    """Ids, and pictures of 4 places, begin and end included."""
    ids: list[int] = []
    spans = []
    for part in parts:
        if isinstance(part, str):
            spans.append(ImageSpan(len(ids), 4, len(spans)))
            ids += [BEGIN, PATCH, PATCH, END]
        else:
            ids.append(part)
    return EncodedPrompt(
        token_ids=tuple(ids),
        original_token_ids=tuple(ids),
        spans=tuple(spans),
        positions=np.arange(len(ids), dtype=np.int64)[None],
        decode_start=(len(ids),),
        decode_step=(1,),
    )


def guess(
    *parts: int | str, output: Sequence[int] = (), count: int = 4, stop: Sequence[int] = ()
) -> tuple[int, ...]:
    return Drafter(make_prompt(*parts), stop).draft(output, count)


# --- the drafter by examples -----------------------------------------------------------------


def test_what_followed_the_same_words_is_guessed():
    """Would catch a copy that begins a place too early or too late, or is longer than asked."""
    assert guess(1, 2, 3, 4, 5, 6, 7, output=[1, 2], count=3) == (3, 4, 5)


def test_the_longest_match_wins_over_a_later_shorter_one():
    """Would catch a search that is content with two equal words where there are three."""
    assert guess(1, 2, 3, 4, 9, 2, 3, 5, output=[1, 2, 3], count=1) == (4,)


def test_of_equal_matches_the_latest_wins():
    """Would catch a search from the front: the topic at hand stands nearer."""
    assert guess(1, 2, 3, 1, 2, 4, output=[1, 2], count=1) == (4,)


def test_a_match_spans_prompt_and_output():
    """Would catch prompt and output searched apart."""
    assert guess(1, 2, 3, 4, 9, 2, output=[3], count=2) == (4, 9)


def test_a_repeating_text_is_repeated_to_the_full_length():
    """Would catch a guess that stops where the text stops, one token ahead at most."""
    assert guess(output=[7, 7, 7], count=5) == (7,) * 5
    assert guess(5, 6, output=[5, 6, 5, 6], count=7) == (5, 6, 5, 6, 5, 6, 5)


def test_nothing_is_guessed_without_an_earlier_place():
    """Would catch the end found as its own earlier place."""
    assert guess(1, 2, 3, 4, output=[5]) == ()
    assert guess(1) == guess(1, 1) == guess(1, output=[2]) == ()
    assert guess(3, 1, 2, output=[3]) == ()  # one token alone is no reason


def test_no_room_means_no_guess_and_the_text_is_kept():
    """Would catch output that is lost when the answer is about to end."""
    drafter = Drafter(make_prompt(1, 2, 3), ())
    assert drafter.draft([1], 0) == drafter.draft([1, 2], -1) == ()
    assert drafter.draft([1, 2], 1) == (3,)


def test_a_guess_ends_before_a_stop_id():
    """Would catch a step spent on what follows the end."""
    assert guess(1, 2, 3, 8, 5, output=[1, 2], stop=[8]) == (3,)
    assert guess(1, 2, 8, 5, output=[1, 2], stop=[8]) == ()


def test_a_guess_ends_before_a_picture():
    """Would catch placeholders guessed as words."""
    assert guess(1, 2, 3, PICTURE, 4, output=[1, 2]) == (3,)
    assert guess(1, 2, PICTURE, 4, output=[1, 2]) == ()


def test_a_picture_is_no_part_of_a_match():
    """Would catch two pictures taken for the same word, and words joined over a picture."""
    assert guess(PICTURE, 1, 5, 6, PICTURE, output=[1]) == ()
    assert guess(1, 2, 5, 6, 1, PICTURE, output=[2]) == ()
    assert guess(1, PICTURE, 2, 5, 6, 1, output=[2]) == ()
    assert guess(PICTURE, 1, 2, 5, 6, PICTURE, output=[1, 2], count=2) == (5, 6)


@pytest.mark.parametrize("token", [BEGIN, PATCH, END])
def test_the_ids_of_pictures_are_never_guessed_even_if_they_were_said(token):
    """Would catch a special id of pictures taken from the text of the answer."""
    assert guess(PICTURE, 1, 2, 3, token, 4, output=[1, 2]) == (3,)
    assert guess(1, 2, 3, token, 4, output=[1, 2]) == (3, token, 4, 1)  # a text's own id


def test_large_and_strange_ids_are_only_numbers():
    """Would catch ids that are surrogates, or of which one byte equals another's."""
    ids = [0, 0xD800, 0xDFFF, 151_551, 256, 1, 65_536]
    assert guess(*ids, output=ids[:2], count=5) == tuple(ids[2:])


def naive(text: Sequence[int], barred: set[int], count: int) -> tuple[int, ...]:
    """The same by comparing lists; pictures are None."""
    for length in range(MAX_NGRAM, MIN_NGRAM - 1, -1):
        ngram = text[-length:]
        for at in range(len(text) - length - 1, -1, -1):
            if None not in ngram and text[at : at + length] == ngram:
                grown = list(text)
                for k in range(count):
                    token = grown[at + length + k]
                    if token is None or token in barred:
                        break
                    grown.append(token)
                return tuple(grown[len(text) :])
    return ()


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.sampled_from([1, 2, 3, PICTURE]), max_size=12),
    st.lists(st.integers(1, 4), min_size=1, max_size=12),
    st.sampled_from([(), (3,), (4,)]),
    st.integers(1, 6),
)
def test_every_guess_is_that_of_a_naive_search(parts, output, stop, count):
    """Would catch a place overlooked, and output taken twice when it is handed over bit by bit."""
    drafter = Drafter(make_prompt(*parts), stop)
    barred = {*stop, BEGIN, PATCH, END}
    for length in range(1, len(output) + 1):
        text = [None if part == PICTURE else part for part in parts] + output[:length]
        assert drafter.draft(output[:length], count) == naive(text, barred, count)


# --- the scheduler ---------------------------------------------------------------------------

REPEATS = [1, 2, 3, 4, 5, 6, 7, 8, 1]  # an answer that begins with 2 is expected to go on with 3


def make_request(name: str, ids: Sequence[int], max_tokens: int = 20, stop=(), n=1) -> Request:
    return Request(
        request_id=name,
        prompt=make_prompt(*ids),
        images=(),
        sampling=SamplingParams(n=n),
        stop_token_ids=frozenset(stop),
        seeds=tuple(range(n)),
        max_tokens=max_tokens,
        arrival_s=0.0,
    )


def make_scheduler(num_blocks: int = 20, **options) -> Scheduler:
    settings = {"block_size": 4, "num_draft_tokens": 4} | options
    return Scheduler(EngineConfig(model="", **settings), num_blocks)


def commit(scheduler: Scheduler, plan: StepPlan, *said: Sequence[int]) -> list[list[int]]:
    """Commit what each sampling row said, in order; the tokens that were taken, by row."""
    rows = [row for row in plan.rows if row.samples]
    tokens = [
        SampledToken(row.sequence_id, token_id)
        for row, ids in zip(rows, said, strict=True)
        for token_id in ids
    ]
    outcomes = scheduler.commit(plan, tokens)
    scheduler.pool.check()
    return [
        [o.sampled.token_id for o in outcomes if o.sampled.sequence_id == row.sequence_id]
        for row in rows
    ]


def after_first_token(scheduler: Scheduler, *requests: Request) -> StepPlan:
    """The plan of the step after every request has said its first token, 2."""
    for request in requests:
        scheduler.add(request)
    plan = scheduler.plan_step()
    commit(scheduler, plan, *[[2]] * len([row for row in plan.rows if row.samples]))
    return scheduler.plan_step()


def test_a_row_with_drafts_computes_them_after_the_last_known_token():
    """Would catch a position, id or block that is missing for a draft."""
    (row,) = after_first_token(make_scheduler(), make_request("a", REPEATS)).rows
    assert list(row.token_ids) == [2, 3, 4, 5, 6]
    assert row.drafts == (3, 4, 5, 6)
    assert row.positions.tolist() == [[9, 10, 11, 12, 13]]
    assert (row.start, row.samples, row.is_decode) == (9, True, False)
    assert len(row.block_table) == 4


def test_no_drafts_are_planned_unless_asked_for_nor_for_a_prompt():
    """Would catch drafting that is on by default, or guesses behind a chunk."""
    plan = after_first_token(make_scheduler(num_draft_tokens=0), make_request("a", REPEATS))
    assert plan.rows[0].drafts == ()
    scheduler = make_scheduler(max_num_batched_tokens=8)
    scheduler.add(make_request("a", [1, 2, 3, 1, 2, 3, 1, 2, 3, 1, 2, 3]))
    plans = [scheduler.plan_step()]
    commit(scheduler, plans[0])
    plans.append(scheduler.plan_step())
    assert [row.drafts for plan in plans for row in plan.rows] == [(), ()]


@pytest.mark.parametrize(("max_tokens", "num_drafts"), [(2, 0), (3, 1), (5, 3), (6, 4), (9, 4)])
def test_drafts_never_go_beyond_max_tokens(max_tokens, num_drafts):
    """Would catch a place or rotary position that the request was not checked to have."""
    plan = after_first_token(make_scheduler(), make_request("a", REPEATS, max_tokens))
    assert len(plan.rows[0].drafts) == num_drafts


def test_drafts_count_against_the_budget_after_everybody_else():
    """Would catch guesses that make an answer or a prompt wait."""
    scheduler = make_scheduler(max_num_batched_tokens=18)
    requests = [make_request(name, REPEATS) for name in "ab"]
    for request in requests:
        scheduler.add(request)
    commit(scheduler, scheduler.plan_step(), [2], [2])
    scheduler.add(make_request("late", range(20, 33)))
    plan = scheduler.plan_step()
    counts = {row.request_id: (len(row.token_ids), len(row.drafts)) for row in plan.rows}
    assert counts == {"b": (1, 0), "a": (4, 3), "late": (13, 0)}
    assert plan.num_tokens == 18
    assert [row.is_decode for row in plan.rows] == [True, False, False]


def test_drafts_take_free_blocks_and_nobody_elses():
    """Would catch a sequence that is preempted for a guess."""
    scheduler = make_scheduler(num_blocks=6, enable_prefix_cache=False)
    plan = after_first_token(scheduler, *[make_request(name, REPEATS) for name in "ab"])
    assert [(len(row.drafts), len(row.block_table)) for row in plan.rows] == [(2, 3), (2, 3)]
    assert scheduler.counters.preemptions == scheduler.pool.num_free == 0


def test_accepted_drafts_advance_the_sequence_and_are_counted():
    """Would catch a token that is computed again or never, and wrong counters."""
    scheduler = make_scheduler()
    plan = after_first_token(scheduler, make_request("a", REPEATS))
    assert commit(scheduler, plan, [3, 4, 9]) == [[3, 4, 9]]  # two drafts and the next token
    (sequence,) = scheduler.running
    assert sequence.output_ids == [2, 3, 4, 9]
    assert sequence.num_computed == sequence.num_tokens - 1 == 12
    counters = scheduler.counters
    assert (counters.drafted_tokens, counters.accepted_tokens) == (4, 2)
    assert (counters.prefill_tokens, counters.decode_tokens) == (9, 3)
    (row,) = scheduler.plan_step().rows
    assert (row.start, list(row.token_ids)) == (12, [9])


def test_only_blocks_of_accepted_tokens_can_be_found():
    """Would catch a block hashed while it holds a draft that was refused."""
    scheduler = make_scheduler()
    plan = after_first_token(scheduler, make_request("a", REPEATS))  # 9 tokens and drafts to 14
    assert scheduler.pool.num_cached == 2
    commit(scheduler, plan, [3, 9])
    assert scheduler.pool.num_cached == 2  # 11 tokens
    (row,) = scheduler.plan_step().rows
    assert row.start == 11
    commit(scheduler, StepPlan((row,)), [8])
    assert scheduler.pool.num_cached == 3
    (sequence,) = scheduler.running
    assert scheduler.pool.find(sequence.hashes(3)) == list(sequence.block_table[:3])
    other = make_request("b", [*REPEATS, 2, 3, 9, 8, 8])
    assert scheduler.pool.find(scheduler.add(other)[0].hashes(3)) == list(sequence.block_table[:3])


@pytest.mark.parametrize(
    ("options", "reason"), [({"stop": [4]}, "stop"), ({"max_tokens": 3}, "length")]
)
def test_what_follows_the_last_token_is_dropped(options, reason):
    """Would catch tokens behind a stop id or beyond max_tokens, and a sequence finished twice."""
    scheduler = make_scheduler()
    plan = after_first_token(scheduler, make_request("a", REPEATS, **options))
    row = plan.rows[0]
    plan = StepPlan((row,))
    tokens = [SampledToken(row.sequence_id, token_id) for token_id in (3, 4, 5)]
    outcomes = scheduler.commit(plan, tokens)
    assert [(o.sampled.token_id, o.finish_reason) for o in outcomes] == [(3, None), (4, reason)]
    assert not scheduler.has_work
    assert scheduler.pool.num_free == scheduler.pool.num_blocks
    assert scheduler.counters.accepted_tokens == 1


def test_an_error_behind_accepted_drafts_ends_the_sequence_poisoned():
    """Would catch blocks that can be found though a draft in them was not finite."""
    scheduler = make_scheduler(block_size=2)
    plan = after_first_token(scheduler, make_request("a", REPEATS))
    (row,) = plan.rows
    broken = SampledToken(row.sequence_id, -1, error="not finite")
    outcomes = scheduler.commit(plan, [SampledToken(row.sequence_id, 3), broken])
    assert [outcome.finish_reason for outcome in outcomes] == [None, "error"]
    assert scheduler.pool.num_cached == 0
    assert scheduler.pool.num_free == scheduler.pool.num_blocks


def test_choices_of_one_request_draft_from_their_own_output():
    """Would catch one drafter for several answers."""
    scheduler = make_scheduler(enable_prefix_cache=False)
    scheduler.add(make_request("a", REPEATS, n=2))
    commit(scheduler, scheduler.plan_step(), [2], [9])
    drafts = {row.index: row.drafts for row in scheduler.plan_step().rows}
    assert drafts == {0: (3, 4, 5, 6), 1: ()}


@pytest.mark.parametrize("value", [-1, 17, True, 2.0, None, "4"])
def test_a_number_of_drafts_out_of_range_is_refused(value):
    """Would catch a setting that is taken for off, or memory for guesses that are never right."""
    with pytest.raises(ConfigError, match=r"num_draft_tokens is .* from 0 to 16 is needed"):
        EngineConfig(model="", num_draft_tokens=value)
    assert [EngineConfig(model="", num_draft_tokens=n).num_draft_tokens for n in (0, 16)] == [0, 16]


def test_places_of_a_row_see_the_drafts_before_them_as_output():
    """Would catch a penalty, ban or random number of another place."""
    (row,) = after_first_token(make_scheduler(), make_request("a", REPEATS)).rows
    assert [list(place.output_ids) for place in row.sampled_rows] == [
        [2], [2, 3], [2, 3, 4], [2, 3, 4, 5], [2, 3, 4, 5, 6],
    ]  # fmt: skip
    assert all(isinstance(place, StepRow) and place.seed == row.seed for place in row.sampled_rows)
    assert StepPlan((row,)).sampled_rows[0] is row
