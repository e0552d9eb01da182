"""Log-probabilities of a prompt's own tokens: against the plain logits, however the prompt runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from conftest import Oracle, step_row
from glimt.engine import Engine
from glimt.errors import RequestError
from glimt.outputs.assembler import OutputAssembler
from glimt.sampling import Sampler
from glimt.types import (
    PromptLogprob,
    PromptTarget,
    Request,
    RequestOutput,
    SamplingDefaults,
    SamplingParams,
    StepPlan,
)

CLOSE = 2e-5  # float32 sums in another order
TOP = 3
PLAIN = SamplingDefaults()


def run(engine: Engine, *requests: Request) -> list[RequestOutput]:
    """The answers of requests that run side by side."""
    assemblers = {each.request_id: OutputAssembler(each) for each in requests}
    for each in requests:
        engine.add_request(each)
    done = {}
    while engine.has_work:
        for output in engine.step():
            assert output.error is None
            if (whole := assemblers[output.request_id].add(output)) is not None:
                done[output.request_id] = whole
    return [done[each.request_id] for each in requests]


def plain_logprobs(oracle: Oracle, request: Request) -> np.ndarray:
    """[tokens, vocab_size] of one pass over the whole prompt, in float64."""
    engine = oracle.engine(enable_prefix_cache=False)
    kept: list[torch.Tensor] = []
    engine.runner.model.register_forward_hook(lambda module, args, output: kept.append(output))
    engine.add_request(
        replace(request, sampling=SamplingParams().with_defaults(PLAIN, 0), seeds=(0,))
    )
    engine.step()
    with torch.inference_mode():
        logits = engine.runner.model.logits(kept[0]).double()
    assert len(logits) == len(request.prompt.token_ids)
    return torch.log_softmax(logits, dim=-1).numpy()


def check(oracle: Oracle, request: Request, found: Sequence[PromptLogprob] | None) -> None:
    """Against the plain pass: each text token by the row before it, and nothing of pictures."""
    assert found is not None
    expected, prompt = plain_logprobs(oracle, request), request.prompt
    assert tuple(each.token_id for each in found) == prompt.token_ids
    for at, each in enumerate(found):
        if at == 0 or not prompt.is_text(at):
            assert (each.logprob, each.rank, each.top_logprobs) == (None, None, ())
            continue
        row = expected[at - 1]
        own = row[each.token_id]
        assert each.logprob == pytest.approx(own, abs=CLOSE)
        # A rank may differ only by tokens that are as likely but for rounding.
        assert each.rank is not None
        assert 1 + (row > own + CLOSE).sum() <= each.rank <= 1 + (row > own - CLOSE).sum()
        best = np.sort(np.partition(row, -TOP)[-TOP:])[::-1]
        assert [top.logprob for top in each.top_logprobs] == pytest.approx(best, abs=CLOSE)
        assert [row[top.token_id] for top in each.top_logprobs] == pytest.approx(best, abs=CLOSE)


def scored(oracle: Oracle, case: str, **sampling: Any) -> Request:
    return oracle.request(case, max_tokens=3, prompt_logprobs=TOP, **sampling)


def picture_case(oracle: Oracle) -> str:
    return next(case for case in oracle.cases if oracle.prompt(case).spans)


def test_likeliest_tokens_are_the_originals(glm4v_oracle: Oracle) -> None:
    """Catches places that are off by one, and text scored by the middle of a picture."""
    engine = glm4v_oracle.engine()
    for case in glm4v_oracle.cases:
        request = scored(glm4v_oracle, case)
        [output] = run(engine, request)
        check(glm4v_oracle, request, output.prompt_logprobs)
        best = glm4v_oracle.arrays[f"{case}.logits_all_positions_argmax"]
        assert output.prompt_logprobs is not None
        for at, each in enumerate(output.prompt_logprobs):
            if each.logprob is not None:
                assert each.top_logprobs[0].token_id == best[at - 1]


@pytest.mark.parametrize("budget", [1, 7, 64])
def test_chunks_give_what_the_whole_gives(glm4v_oracle: Oracle, budget: int) -> None:
    """Catches the token at a chunk's border, which the chunk before predicts."""
    engine = glm4v_oracle.engine(max_num_batched_tokens=budget, max_num_seqs=1)
    request = scored(glm4v_oracle, picture_case(glm4v_oracle))
    [output] = run(engine, request)
    check(glm4v_oracle, request, output.prompt_logprobs)


def test_a_cached_prefix_is_scored_again(glm4v_oracle: Oracle) -> None:
    """Catches first tokens without figures because another request left them in the cache."""
    engine = glm4v_oracle.engine()
    request = scored(glm4v_oracle, picture_case(glm4v_oracle))
    plain = replace(request, sampling=replace(request.sampling, prompt_logprobs=None))
    [first], [output], [third] = run(engine, plain), run(engine, request), run(engine, plain)
    check(glm4v_oracle, request, output.prompt_logprobs)
    assert (first.prompt_logprobs, third.prompt_logprobs) == (None, None)
    assert output.usage.cached_tokens == 0
    assert third.usage.cached_tokens > 0  # what was scored is found by others
    assert output.token_ids == first.token_ids == third.token_ids


def test_several_choices_score_once(glm4v_oracle: Oracle) -> None:
    """Catches a prompt that is computed again for each choice, or told by each."""
    engine = glm4v_oracle.engine()
    request = scored(glm4v_oracle, picture_case(glm4v_oracle), n=3)
    request = replace(request, seeds=(1, 2, 3))
    before = engine.stats().prefill_tokens
    engine.add_request(request)
    told, outputs = [], []
    while engine.has_work:
        outputs += engine.step()
    told = [each for each in outputs if each.prompt_logprobs is not None]
    assert [each.index for each in told] == [0]
    check(glm4v_oracle, request, told[0].prompt_logprobs)
    num_prompt = len(request.prompt.token_ids)
    assert engine.stats().prefill_tokens - before < 2 * num_prompt


def test_a_preempted_prompt_is_scored_whole(glm4v_oracle: Oracle) -> None:
    """Catches figures that are lost, or told twice, when a prompt gives its blocks back."""
    case, size = picture_case(glm4v_oracle), 4
    blocks = -(-(len(glm4v_oracle.prompt(case).token_ids) + 1) // size)
    engine = glm4v_oracle.engine(
        block_size=size, num_blocks=2 * blocks, kv_bytes=None, max_num_batched_tokens=3
    )
    old = replace(glm4v_oracle.request(case, max_tokens=12), request_id="old")
    young = replace(scored(glm4v_oracle, case), request_id="young", cache_salt="another")
    engine.add_request(old)
    engine.add_request(young)
    outputs, was_preempted = [], False
    while engine.has_work:
        outputs += engine.step()
        # Its second chunk at the earliest: the old one had to begin answering first.
        has_begun = any(each.request_id == "young" for each in outputs)
        was_preempted |= engine.stats().preemptions > 0 and not has_begun
    assert was_preempted
    told = [each for each in outputs if each.prompt_logprobs is not None]
    assert [each.request_id for each in told] == ["young"]
    check(glm4v_oracle, young, told[0].prompt_logprobs)


def test_neighbours_and_drafts_change_nothing(glm4v_oracle: Oracle) -> None:
    """Catches rows of several requests in one step that are told apart by the wrong offsets."""
    engine = glm4v_oracle.engine(num_draft_tokens=3)
    requests = [
        replace(scored(glm4v_oracle, case, ignore_eos=True), request_id=case)
        for case in glm4v_oracle.cases
    ]
    requests[1] = replace(requests[1], sampling=replace(requests[1].sampling, prompt_logprobs=None))
    for request, output in zip(requests, run(engine, *requests), strict=True):
        if request.sampling.prompt_logprobs is None:
            assert output.prompt_logprobs is None
        else:
            check(glm4v_oracle, request, output.prompt_logprobs)


def test_an_aborted_prompt_tells_nothing(glm4v_oracle: Oracle) -> None:
    """Catches half a prompt's figures in the output of a request that ended before its end."""
    engine = glm4v_oracle.engine(max_num_batched_tokens=7, max_num_seqs=1)
    engine.add_request(scored(glm4v_oracle, picture_case(glm4v_oracle)))
    engine.step()
    [output] = engine.abort(picture_case(glm4v_oracle))
    assert output.prompt_logprobs is None


def test_a_bidirectional_prompt_is_refused(folders: Any) -> None:
    """Catches figures that say how well a token is told by itself."""
    from glimt.config import EngineConfig

    engine = Engine.load(EngineConfig(model=str(folders["visualglm"]), kv_bytes=2**26))
    with pytest.raises(RequestError, match=r"prompt_logprobs: are not possible with this model"):
        engine.prepare_text("a cat", SamplingParams(prompt_logprobs=0))


@pytest.mark.parametrize("value", [-1, 101, True, 1.5])
def test_a_count_out_of_range_is_refused(value: Any) -> None:
    """Catches a vocabulary's worth of tokens for each token of a prompt."""
    with pytest.raises(RequestError, match=r"^prompt_logprobs"):
        SamplingParams(prompt_logprobs=value)


# --- the figures -----------------------------------------------------------------------------


def score(logits: Sequence[float], token_id: int, num_top: int) -> PromptLogprob:
    sampling = SamplingParams(prompt_logprobs=num_top)
    row = step_row(token_ids=(0, 0), sampling=sampling, targets=(PromptTarget(1, token_id),))
    [found] = Sampler(len(logits)).score([torch.tensor([logits])], StepPlan((row,)))
    return found


def test_ranks_and_ties() -> None:
    """Catches a rank from zero, or one that depends on where an equal token stands."""
    log_sum = math.log(2 * math.e**2 + math.e + 1)
    first, second = score([2, 1, 2, 0], 2, 2), score([2, 1, 2, 0], 1, 0)
    assert (first.rank, second.rank) == (1, 3)
    assert first.logprob == pytest.approx(2 - log_sum)
    assert [top.token_id for top in first.top_logprobs] == [0, 2]
    assert (second.logprob, second.top_logprobs) == (pytest.approx(1 - log_sum), ())


def test_a_token_without_a_chance_and_a_model_without_a_number() -> None:
    """Catches a crash, or a NaN that JSON cannot say."""
    impossible = score([0, -math.inf], 1, 2)
    assert (impossible.logprob, impossible.rank) == (-math.inf, 2)
    assert [top.token_id for top in impossible.top_logprobs] == [0]
    assert score([0, math.nan], 0, 1) == PromptLogprob(0)
    assert score([-math.inf, -math.inf], 0, 1) == PromptLogprob(0)
