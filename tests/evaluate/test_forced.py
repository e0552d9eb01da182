"""Teacher forcing gives the logits of a plain run, and the divergence is what it is defined as."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from glimt.demo.noise import write_noise_model
from glimt.errors import RequestError
from glimt.evaluate.forced import PerToken, compare, forced_logits, summary
from glimt.llm import LLM
from glimt.sampling import Sampler
from glimt.types import SampledToken, SamplingParams, StepPlan

SAME_SUMS = 2e-5  # other batch sizes add floats in another order
SIZES = {"num_blocks": 96, "enable_prefix_cache": False}


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    return LLM(str(folder), **SIZES)


def conversations() -> list[list[dict[str, Any]]]:
    """One with a picture, one without, one of several turns."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    picture = {"type": "image", "image": Image.fromarray(pixels)}
    seen = {"role": "user", "content": [picture, {"type": "text", "text": "图片里有什么？"}]}
    said = {"role": "assistant", "content": "一只猫。"}
    return [
        [seen],
        [{"role": "user", "content": "Hello, who are you?"}],
        [seen, said, {"role": "user", "content": "它是什么颜色的？"}],
    ]


class WatchingSampler(Sampler):
    """Samples as always and keeps what it was given."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__(vocab_size)
        self.rows: dict[str, list[Tensor]] = {}

    def sample(self, logits: Tensor, plan: StepPlan) -> list[SampledToken]:
        for i, row in enumerate(plan.sampled_rows):
            self.rows.setdefault(row.request_id, []).append(logits[i].float().clone())
        return super().sample(logits, plan)


def plain_run(llm: LLM, conversation: Any) -> tuple[tuple[int, ...], Tensor]:
    """A greedy answer and the logits that it was chosen by."""
    watching = WatchingSampler(llm.engine.opened.config.vocab_size)
    ours, llm.engine.sampler = llm.engine.sampler, watching
    try:
        sampling = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)
        output = llm.chat(conversation, sampling)
    finally:
        llm.engine.sampler = ours
    return output.token_ids, torch.stack(watching.rows[output.request_id])


def test_forced_logits_are_those_of_a_plain_run(llm):
    """Catches a token given one place too early or late, and logits of the wrong row."""
    for conversation in conversations():
        answer, expected = plain_run(llm, conversation)
        (forced,) = forced_logits(llm, [conversation], [answer])
        torch.testing.assert_close(forced, expected, rtol=0, atol=SAME_SUMS)
        assert forced.argmax(-1).tolist() == list(answer)


def test_a_batch_gives_the_logits_of_each_alone(llm):
    """Catches rows that are handed to the wrong request when answers end at different times."""
    answers = [[5, 6, 7, 8], [9], [30, 31]]
    together = forced_logits(llm, conversations(), answers)
    for conversation, answer, logits in zip(conversations(), answers, together, strict=True):
        assert logits.shape == (len(answer), llm.engine.opened.config.vocab_size)
        (alone,) = forced_logits(llm, [conversation], [answer])
        torch.testing.assert_close(logits, alone, rtol=0, atol=SAME_SUMS)


def test_chunked_prompts_give_the_same_logits(tmp_path):
    """Catches a chunk that is sampled though its prompt goes on."""
    write_noise_model(tmp_path, "glm4v_9b")
    whole = LLM(str(tmp_path), **SIZES)
    chunked = LLM(str(tmp_path), max_num_batched_tokens=7, max_num_seqs=4, **SIZES)
    answers = [[5, 6, 7, 8], [9], [30, 31]]
    pairs = (forced_logits(each, conversations(), answers) for each in (whole, chunked))
    for one, other in zip(*pairs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=SAME_SUMS)


def test_preempted_answers_give_the_same_logits(folder):
    """Catches a place that is kept twice, or lost, when a sequence begins again."""
    roomy, tight = LLM(str(folder), **SIZES), LLM(str(folder), **SIZES | {"num_blocks": 7})
    answers = [list(range(20, 60)), list(range(60, 100)), list(range(100, 140))]
    pairs = [forced_logits(each, conversations(), answers) for each in (roomy, tight)]
    assert tight.stats().preemptions > 0
    for one, other in zip(*pairs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=SAME_SUMS)


def test_drafts_give_the_same_logits(folder):
    """Catches a place kept though the draft before it was refused."""
    plain, drafting = LLM(str(folder), **SIZES), LLM(str(folder), num_draft_tokens=4, **SIZES)
    answers = [[5, 6, 7, 5, 6, 8, 5, 6, 7, 5, 6], [9], [30, 31] * 8]
    pairs = [forced_logits(each, conversations(), answers) for each in (plain, drafting)]
    assert 0 < drafting.stats().accepted_tokens < drafting.stats().drafted_tokens
    for one, other in zip(*pairs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=SAME_SUMS)


def test_the_engine_answers_as_before_afterwards(llm):
    """Catches a sampler that is not put back, also after an error."""
    (conversation, *_) = conversations()
    before = plain_run(llm, conversation)[0]
    forced_logits(llm, [conversation], [[1, 2, 3]])
    assert plain_run(llm, conversation)[0] == before
    with pytest.raises(RequestError):
        forced_logits(llm, [conversation, conversation], [[1], [1] * 100_000])
    assert not llm.engine.has_work
    assert plain_run(llm, conversation)[0] == before


# --- the measure -----------------------------------------------------------------------------


def test_a_model_does_not_diverge_from_itself(llm):
    """Catches a comparison of different places."""
    answers = [[5, 6, 7, 8], [9], [30, 31]]
    one, other = (forced_logits(llm, conversations(), answers) for _ in range(2))
    found = summary([compare(*both) for both in zip(one, other, strict=True)])
    assert found.num_tokens == 7
    assert found.top1 == 1.0
    assert found.mean_kl == pytest.approx(0, abs=1e-12)
    assert found.p99_kl == pytest.approx(0, abs=1e-12)


def test_kl_is_that_of_the_definition():
    """Catches the reverse direction, another logarithm, and logits taken for probabilities."""
    p, q = [0.5, 0.25, 0.25], [0.25, 0.25, 0.5]
    shifted = [math.log(x) + 3 for x in q]  # a constant on all logits says nothing
    places = compare(torch.tensor([p]).log(), torch.tensor([shifted]))
    by_hand = 0.5 * math.log(2) + 0.25 * math.log(1) + 0.25 * math.log(0.5)
    assert places.kl.tolist() == pytest.approx([by_hand], abs=1e-7)
    assert places.same_top.tolist() == [False]
    p, q = [0.9, 0.05, 0.05], [0.6, 0.2, 0.2]
    one_way, other_way = (
        compare(torch.tensor([a]).log(), torch.tensor([b]).log()) for a, b in ((p, q), (q, p))
    )
    assert one_way.kl.item() == pytest.approx(0.9 * math.log(1.5) + 0.1 * math.log(0.25), abs=1e-7)
    assert other_way.kl.item() != pytest.approx(one_way.kl.item(), abs=1e-3)
    assert one_way.same_top.item()


def test_the_summary_weighs_every_place_alike():
    """Catches a mean of means, which a short answer would dominate."""
    parts = [
        PerToken(torch.tensor([0.0, 0.0, 0.0]).double(), torch.tensor([True, True, False])),
        PerToken(torch.tensor([4.0]).double(), torch.tensor([False])),
    ]
    found = summary(parts)
    assert (found.num_tokens, found.mean_kl, found.top1) == (4, 1.0, 0.5)
    assert found.p99_kl == pytest.approx(4.0 * 0.97)  # linear between the sorted places
