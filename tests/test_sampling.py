"""Every control by hand, the order of the stages, the fast path against the plain one."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import glimt.sampling
from conftest import step_row
from glimt.sampling import Sampler, uniform, verify
from glimt.types import SampledToken, SamplingParams, StepPlan, StepRow

NEUTRAL: dict[str, Any] = {
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "min_tokens": 0,
}
INF = math.inf

# Sums of float64 probabilities in different orders agree far better than this; a boundary missed
# by a whole token is far worse.
ROUNDING = 1e-9


def _load_oracle() -> ModuleType:
    path = Path(__file__).parent / "oracles" / "sampling_oracle.py"
    spec = importlib.util.spec_from_file_location("sampling_oracle", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


oracle = _load_oracle()


def _row(
    *,
    seed: int = 0,
    prompt: Sequence[int] = (),
    output: Sequence[int] = (),
    stops: Sequence[int] = (),
    samples: bool = True,
    sequence_id: int = 0,
    **sampling: Any,
) -> StepRow:
    return step_row(
        sequence_id=sequence_id,
        request_id=f"request-{sequence_id}",
        samples=samples,
        sampling=SamplingParams(**{**NEUTRAL, **sampling}),
        stop_token_ids=frozenset(stops),
        seed=seed,
        prompt_ids=prompt,
        output_ids=output,
    )


def _sample(
    logits: Tensor | Sequence[Sequence[float]], rows: Sequence[StepRow], **sampler: Any
) -> list[SampledToken]:
    logits = logits if isinstance(logits, Tensor) else torch.tensor(logits)
    return Sampler(logits.shape[1], **sampler).sample(logits, StepPlan(tuple(rows)))


def _ids(tokens: Sequence[SampledToken]) -> list[int]:
    return [token.token_id for token in tokens]


def _greedy(logits: Sequence[float], **row: Any) -> int:
    return _sample([logits], [_row(temperature=0.0, **row)])[0].token_id


def _support(logits: Sequence[float], **row: Any) -> set[int]:
    """The tokens that 200 seeds draw: all that have a probability worth the name."""
    rows = [_row(seed=seed, **row) for seed in range(200)]
    return set(_ids(_sample([logits] * len(rows), rows)))


def _logs(*probs: float) -> list[float]:
    return [math.log(p) for p in probs]


@pytest.fixture
def fixed_number(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Replaces the random number by one that the test sets."""

    def fix(number: float) -> None:
        monkeypatch.setattr(glimt.sampling, "uniform", lambda seed, position: number)

    return fix


# --- greedy ----------------------------------------------------------------------------------


@pytest.mark.parametrize("greedy", [{"temperature": 0.0}, {"top_k": 1}])
def test_greedy_takes_the_largest_logit_and_the_lowest_id_on_ties(greedy: dict[str, Any]) -> None:
    """Catches a draw among ties, which bfloat16 logits have often."""
    logits = [[0.0, 3.0, 1.0, 3.0], [-1.0, -2.0, -1.0, -3.0], [-0.0, 0.0, -1.0, -INF]]
    rows = [_row(seed=seed, **greedy) for seed in range(3)]
    assert _ids(_sample(logits, rows)) == [1, 0, 0]


def test_greedy_ignores_the_cuts_and_the_seed() -> None:
    """Catches temperature 0 falling into the drawing path, a division by zero."""
    cuts = {"top_k": 5, "top_p": 0.1, "min_p": 0.9}
    assert {_greedy([0.0, 1.0, 0.5], seed=seed, **cuts) for seed in range(20)} == {1}


# --- edits of few ids ------------------------------------------------------------------------


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits() -> None:
    """Catches the SAT rule (always divide), which makes negative logits more likely."""
    assert _greedy([2.0, 1.5], prompt=[0], repetition_penalty=2.0) == 1
    assert _greedy([-1.0, -1.5], prompt=[0], repetition_penalty=2.0) == 1
    assert _greedy([-1.0, -3.0], prompt=[0], repetition_penalty=2.0) == 0


def test_repetition_penalty_covers_prompt_and_output_and_counts_an_id_once() -> None:
    """Catches penalising only one of them, and squaring the penalty of an id seen twice."""
    assert _greedy([4.0, 4.0, 3.0], prompt=[0], output=[1], repetition_penalty=2.0) == 2
    assert _greedy([4.0, 1.5], prompt=[0, 0], output=[0, 0], repetition_penalty=2.0) == 0


def test_presence_penalty_counts_an_output_id_once_and_never_the_prompt() -> None:
    """Catches a presence penalty that grows with each occurrence or sees the prompt."""
    assert _greedy([2.0, 0.5], output=[0, 0, 0], presence_penalty=1.0) == 0
    assert _greedy([2.0, 1.5], output=[0, 0, 0], presence_penalty=1.0) == 1
    assert _greedy([2.0, 1.5], prompt=[0, 0], presence_penalty=1.0) == 0


def test_frequency_penalty_counts_every_occurrence_in_the_output() -> None:
    """Catches indexed subtraction that keeps only one of several equal ids."""
    assert _greedy([2.0, 0.0], output=[0], frequency_penalty=1.0) == 0
    assert _greedy([2.0, 0.0], output=[0, 0, 0], frequency_penalty=1.0) == 1
    assert _greedy([2.0, 0.0], prompt=[0, 0, 0], frequency_penalty=1.0) == 0
    assert _greedy([2.0, 1.0], output=[1, 1], frequency_penalty=-1.0) == 1


def test_logit_bias_is_added_and_can_forbid_or_force() -> None:
    """Catches a bias that replaces the logit, or is applied to a probability."""
    assert _greedy([2.0, 1.0], logit_bias={1: 0.5}) == 0
    assert _greedy([2.0, 1.0], logit_bias={1: 1.5}) == 1
    assert _greedy([2.0, 1.0], logit_bias={0: -100.0}) == 1
    assert _greedy([2.0, -INF], logit_bias={1: 100.0}) == 0


def test_stop_ids_are_banned_until_min_tokens_are_out() -> None:
    """Catches an off-by-one: with min_tokens 2 the third token may be a stop id, not the second."""
    choices = [
        _greedy([3.0, 2.0, 1.0], stops=[0, 1], output=[2] * length, min_tokens=2)
        for length in range(4)
    ]
    assert choices == [2, 2, 0, 0]


def test_repetition_comes_before_presence_and_before_bias() -> None:
    """Catches another order: it would scale the additive terms too."""
    assert _greedy([2.0, 0.6], output=[0], repetition_penalty=2.0, presence_penalty=0.5) == 1
    assert _greedy([2.0, 1.75], output=[0], repetition_penalty=2.0, logit_bias={0: 1.0}) == 0


# --- cuts ------------------------------------------------------------------------------------


def test_top_k_keeps_exactly_k_tokens_and_the_lower_ids_on_ties() -> None:
    """Catches keeping every token equal to the k-th, which makes top_k 1 random."""
    assert _support([1.0, 2.0, 1.0, 1.0], top_k=3) == {0, 1, 2}
    assert _support([0.0, 0.0, 0.0], top_k=2) == {0, 1}


@pytest.mark.parametrize("top_k", [0, -1, 4, 1000])
def test_top_k_without_effect_keeps_all_tokens(top_k: int) -> None:
    """Catches 0 or -1 read as a count, and a k beyond the vocabulary."""
    assert _support([0.0, 0.0, 0.0, 0.0], top_k=top_k) == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(0.2, 1), (0.25, 1), (0.26, 2), (0.5, 2), (0.51, 3), (0.75, 3), (0.76, 4), (1.0, 4)],
)
def test_top_p_keeps_the_smallest_set_that_reaches_p(top_p: float, kept: int) -> None:
    """Catches the boundary: four tokens of 0.25 and p 0.5 leave two, as Hugging Face drops <=."""
    assert _support([0.0] * 4, top_p=top_p) == set(range(kept))


def test_top_p_always_keeps_one_token() -> None:
    """Catches an empty set when the best token alone is above p."""
    assert _support(_logs(0.9, 0.1), top_p=1e-9) == {0}


def test_min_p_is_relative_to_the_largest_probability_after_temperature() -> None:
    """Catches an absolute limit, and one taken before the temperature."""
    probs = _logs(0.5, 0.25, 0.1)
    assert _support(probs, min_p=0.4) == {0, 1}
    assert _support(probs, min_p=0.4, temperature=2.0) == {0, 1, 2}
    assert _support([0.0, 0.0, -1.0], min_p=1.0) == {0, 1}


def test_edits_come_before_top_k() -> None:
    """Catches cutting first: a banned or penalised token would take a place among the k."""
    assert _support([3.0, 2.0, 1.0], top_k=2, prompt=[0], repetition_penalty=4.0) == {1, 2}
    assert _support([3.0, 2.0, 1.0], top_k=2, stops=[0], min_tokens=1) == {1, 2}
    assert _support([3.0, 2.0, 1.0, 0.0], top_k=2, logit_bias={3: 2.5}) == {0, 3}


def test_temperature_comes_before_top_p() -> None:
    """Catches top-p on the raw distribution: 0.6 + 0.3 reach 0.85, but not once flattened."""
    assert _support(_logs(0.6, 0.3, 0.1), top_p=0.85) == {0, 1}
    assert _support(_logs(0.6, 0.3, 0.1), top_p=0.85, temperature=3.0) == {0, 1, 2}


def test_top_k_comes_before_top_p() -> None:
    """Catches top-p over tokens that top-k drops: of 0.4 and 0.3 alone, the first has 0.57."""
    assert _support(_logs(0.4, 0.3, 0.2, 0.1), top_p=0.5) == {0, 1}
    assert _support(_logs(0.4, 0.3, 0.2, 0.1), top_p=0.5, top_k=2) == {0}


def test_logit_bias_comes_before_temperature() -> None:
    """Catches a bias added after the division: 2 / 2 is e in the odds, 2 is e squared."""
    rows = [_row(seed=seed, temperature=2.0, logit_bias={0: 2.0}) for seed in range(3000)]
    share = _ids(_sample([[0.0, 0.0]] * 3000, rows)).count(0) / 3000
    assert share == pytest.approx(math.e / (1 + math.e), abs=0.03)  # e squared: 0.88


# --- the draw --------------------------------------------------------------------------------


def _chi_square(counts: np.ndarray, probs: np.ndarray) -> float:
    expected = probs * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("varied", ["seed", "position"])
def test_draws_follow_the_distribution(varied: str) -> None:
    """Catches a biased inversion, and numbers that are alike for near seeds or near positions.

    The bound is the 99.9 % quantile of chi-square with 5 degrees of freedom; seeds are fixed.
    """
    logits = [0.3, 2.0, -1.0, 1.1, 0.0, 1.9]
    number = range(4000)
    if varied == "seed":
        rows = [_row(seed=i, temperature=0.7) for i in number]
    else:
        rows = [_row(seed=7, output=range(i), temperature=0.7) for i in number]
    counts = np.bincount(_ids(_sample([logits] * 4000, rows)), minlength=6)
    assert _chi_square(counts, oracle.kept(np.array(logits), temperature=0.7)) < 20.5


def test_draws_follow_the_distribution_left_by_the_cuts() -> None:
    """Catches kept tokens whose probabilities are not scaled up to one. 2 degrees of freedom."""
    cuts = {"temperature": 1.3, "top_k": 4, "top_p": 0.95, "min_p": 0.3}
    logits = [0.3, 2.0, -1.0, 1.1, 0.0, 1.9]
    rows = [_row(seed=i, **cuts) for i in range(4000)]
    counts = np.bincount(_ids(_sample([logits] * 4000, rows)), minlength=6)
    probs = oracle.kept(np.array(logits), **cuts)
    assert set(np.flatnonzero(counts)) == set(np.flatnonzero(probs)) == {1, 3, 5}
    assert _chi_square(counts[probs > 0], probs[probs > 0]) < 13.8


def test_the_number_inverts_the_distribution_from_the_likeliest_down(fixed_number: Any) -> None:
    """Catches another order of the tokens, which would change every seeded answer."""
    logits = _logs(0.2, 0.5, 0.2, 0.1)
    for number, token_id in [(0.0, 1), (0.49, 1), (0.51, 0), (0.69, 0), (0.71, 2), (0.91, 3)]:
        fixed_number(number)
        assert _ids(_sample([logits], [_row()])) == [token_id]


def test_a_number_on_a_boundary_draws_the_next_token(fixed_number: Any) -> None:
    """Catches intervals closed at the wrong end: the first token would own its end too."""
    for number, token_id in [(0.0, 0), (0.25, 1), (0.5, 2), (0.75, 3)]:
        fixed_number(number)
        assert _ids(_sample([[0.0] * 4], [_row()])) == [token_id]


@pytest.mark.parametrize("number", [0.0, 1 - 2**-53])
@pytest.mark.parametrize("cuts", [{}, {"top_p": 0.999}, {"top_k": 3}, {"min_p": 1e-9}])
def test_the_ends_of_the_interval_draw_only_possible_tokens(
    number: float, cuts: dict[str, Any], fixed_number: Any
) -> None:
    """Catches a sum that stays below the number, and tokens of probability zero at either end."""
    fixed_number(number)
    logits = [[-INF, -2000.0, 0.1, 0.2, 0.3, -2000.0, -INF]]
    assert _ids(_sample(logits, [_row(**cuts)])) == [4 if number == 0.0 else 2]


def test_rounding_at_the_end_of_the_sum_draws_no_token_of_probability_zero(
    fixed_number: Any,
) -> None:
    """Catches taking the last of the sorted tokens when two ways of summing differ by a bit."""
    fixed_number(1 - 2**-53)
    logits = torch.randn(20, 3000, generator=torch.Generator().manual_seed(0))
    logits[:, ::100] = -2000.0
    tokens = _sample(logits, [_row()] * 20)
    assert all(token.token_id % 100 for token in tokens)


@pytest.mark.parametrize("temperature", [5e-324, 1e-30, 1e-3])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    """Catches an overflow to infinity or NaN when logits are divided by almost zero."""
    assert _support([30.0, 31.0, -INF, -30.0], temperature=temperature) == {1}


def test_a_large_temperature_leaves_forbidden_tokens_forbidden() -> None:
    """Catches -inf turning into something possible."""
    assert _support([3.0, -INF, -3.0, -INF], temperature=100.0) == {0, 2}


# --- random numbers --------------------------------------------------------------------------


def test_oracle_philox_gives_the_published_answer() -> None:
    """The known answer of Random123 (kat_vectors) for philox4x64-10, counter 0 and key 0."""
    assert oracle.philox4x64(0, 0) == (
        0x16554D9ECA36314C,
        0xDB20FE9D672D0FDC,
        0xD7E772CEE186176B,
        0x7E68B68AEC7BA23B,
    )


@pytest.mark.parametrize("seed", [0, 1, 42, 2**64 - 1, -1, -(2**63)])
@pytest.mark.parametrize("position", [0, 1, 2**31])
def test_uniform_is_philox_of_seed_and_position(seed: int, position: int) -> None:
    """Catches a change of generator, which would change every seeded answer between releases."""
    assert uniform(seed, position) == oracle.uniform(seed, position)


def test_numbers_differ_between_seeds_and_between_positions() -> None:
    """Catches a seed or position that is not used, or is cut to a few bits."""
    seeds = [0, 1, 2, 2**32, 2**63, -1]
    numbers = {uniform(seed, position) for seed in seeds for position in range(100)}
    assert len(numbers) == 100 * len(seeds)
    assert all(0.0 <= number < 1.0 for number in numbers)


def test_a_seed_repeats_its_tokens_and_another_seed_draws_others() -> None:
    """Catches hidden state: the same sequence, recomputed, must draw the same tokens."""
    logits = torch.zeros(50, 100)
    runs = [
        _ids(_sample(logits, [_row(seed=seed, output=range(i)) for i in range(50)]))
        for seed in (5, 5, 6)
    ]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]
    assert len(set(runs[0])) > 25  # of 100 tokens, 50 draws


# --- rows do not see each other --------------------------------------------------------------

KINDS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.0, "repetition_penalty": 1.3},
    {"top_p": 0.8, "temperature": 0.8},
    {"top_p": 0.4, "top_k": 100, "repetition_penalty": 1.2},
    {},
    {"min_p": 0.3, "presence_penalty": 1.0, "logprobs": 3},
    {"top_k": 1500, "temperature": 2.0},
    {"temperature": 30.0, "top_p": 0.95},
    {"logit_bias": {5: 30.0, -1: 9.0}, "min_tokens": 9, "logprobs": 0},
]


def _mixed_rows() -> list[StepRow]:
    return [
        _row(seed=i, prompt=range(i, 40), output=[i, 3, 3], stops=[1, 2], sequence_id=i, **kind)
        for i, kind in enumerate(KINDS)
    ]


def _mixed_logits(vocab_size: int = 3001) -> Tensor:
    """Each row lies 30 below the one before: what is taken from another row cannot fit."""
    logits = torch.randn(len(KINDS), vocab_size, generator=torch.Generator().manual_seed(0)) * 3
    return logits - 30 * torch.arange(len(KINDS))[:, None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_gets_the_same_token_alone_and_in_any_company(dtype: torch.dtype) -> None:
    """Catches sums, candidates or edits that depend on the batch or on an earlier step."""
    rows, logits = _mixed_rows(), _mixed_logits().to(dtype)
    sampler = Sampler(logits.shape[1])
    together = sampler.sample(logits, StepPlan(tuple(rows)))
    order = [4, 8, 1, 0, 7, 2, 6, 3, 5]
    shuffled = sampler.sample(logits[order], StepPlan(tuple(rows[i] for i in order)))
    alone = [sampler.sample(logits[i : i + 1], StepPlan((row,)))[0] for i, row in enumerate(rows)]
    assert [token.sequence_id for token in together] == list(range(len(KINDS)))
    assert shuffled == [together[i] for i in order]
    assert alone == together


def test_only_rows_that_sample_are_answered() -> None:
    """Catches logits paired with the wrong row when a chunked prefill stands between."""
    rows = [
        _row(sequence_id=7, temperature=0.0),
        _row(sequence_id=8, samples=False),
        _row(sequence_id=9, temperature=0.0),
    ]
    tokens = _sample([[1.0, 0.0], [0.0, 1.0]], rows)
    assert [(token.sequence_id, token.token_id) for token in tokens] == [(7, 0), (9, 1)]
    assert _sample(torch.empty(0, 5), [_row(samples=False)]) == []


@pytest.mark.parametrize("kind", range(len(KINDS)))
def test_each_place_of_a_row_with_drafts_is_sampled_as_in_a_step_of_its_own(kind: int) -> None:
    """Catches a penalty, ban or number that does not count the drafts before the place."""
    row = replace(_mixed_rows()[kind], output_ids=[5, 6], drafts=(7, 5, 9))
    logits = torch.randn(4, 64, generator=torch.Generator().manual_seed(3))
    together = _sample(logits, [row])
    for k, token in enumerate(together):
        single = replace(row, output_ids=[5, 6, 7, 5, 9][: 2 + k], drafts=())
        assert _sample(logits[k : k + 1], [single]) == [token]


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        ([4, 5, 6, 7], [4, 5, 6, 7]),
        ([4, 5, 9, 7], [4, 5, 9]),
        ([9, 5, 6, 7], [9]),
        ([4, -1, 6, 7], [4, -1]),
    ],
)
def test_tokens_are_kept_up_to_the_first_that_differs_from_its_draft(
    said: list[int], kept: list[int]
) -> None:
    """Catches a token kept that stands on a wrong one, and rows paired with others' tokens."""
    rows = (
        _row(sequence_id=1),
        replace(_row(sequence_id=2), drafts=(4, 5, 6)),
        _row(sequence_id=3, samples=False),
        _row(sequence_id=4),
    )
    plan = StepPlan(rows)
    ids = [row.sequence_id for row in plan.sampled_rows]
    assert ids == [1, 2, 2, 2, 2, 4]
    tokens = [SampledToken(i, token) for i, token in zip(ids, [8, *said, 9], strict=True)]
    assert _ids(verify(tokens, plan)) == [8, *kept, 9]


def test_the_callers_logits_are_not_changed() -> None:
    """Catches penalties written into the runner's tensor."""
    logits = _mixed_logits()
    before = logits.clone()
    _sample(logits, _mixed_rows())
    assert torch.equal(logits, before)


def test_the_callers_tensor_may_be_strided_tracked_or_of_inference_mode() -> None:
    """Catches views that assume contiguity, and scratch memory tied to inference mode."""
    rows, logits = _mixed_rows(), _mixed_logits()
    sampler, plan = Sampler(logits.shape[1]), StepPlan(tuple(rows))
    expected = sampler.sample(logits, plan)
    with torch.inference_mode():
        assert Sampler(logits.shape[1]).sample(logits.clone(), plan) == expected
        assert sampler.sample(logits.clone(), plan) == expected
    assert sampler.sample(logits.t().contiguous().t(), plan) == expected
    assert sampler.sample(logits.clone().requires_grad_(), plan) == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_float_dtype_is_worked_on_as_float32(dtype: torch.dtype) -> None:
    """Catches sums in half precision, where 3,000 small probabilities vanish."""
    logits = _mixed_logits().to(dtype)
    assert _sample(logits, _mixed_rows()) == _sample(logits.float(), _mixed_rows())


def test_logits_of_another_shape_are_refused() -> None:
    """Catches a runner that returns one row too few, or an unpadded vocabulary."""
    with pytest.raises(AssertionError, match=r"logits are \(1, 3\), expected \(2, 3\)"):
        _sample(torch.zeros(1, 3), [_row(), _row()])


# --- fast against plain ----------------------------------------------------------------------

GRID = st.integers(-6, 6).map(lambda i: i / 2)  # few values: many ties
FLAT = st.sampled_from([0.0, 0.0, 0.0, 1.0])
LOGIT = st.one_of(GRID, FLAT, st.sampled_from([-INF, -0.0, -300.0]))
IDS = st.lists(st.integers(0, 23), max_size=4)


@st.composite
def _cases(draw: st.DrawFn) -> tuple[Tensor, list[StepRow]]:
    """1 to 3 rows of 24 logits; every number such that the edits are exact in float32."""
    logit = draw(st.sampled_from([GRID, FLAT, LOGIT]))
    logits = draw(st.lists(st.lists(logit, min_size=24, max_size=24), min_size=1, max_size=3))
    return torch.tensor(logits), [draw(_rows()) for _ in logits]


def _rows() -> st.SearchStrategy[StepRow]:
    return st.builds(
        _row,
        seed=st.integers(0, 2**32),
        prompt=IDS,
        output=IDS,
        stops=IDS,
        temperature=st.sampled_from([0.25, 0.5, 1.0, 1.0, 2.0, 64.0]),
        top_k=st.sampled_from([0, 0, -1, 1, 2, 5, 23, 24, 99]),
        top_p=st.one_of(st.just(1.0), st.sampled_from([0.125, 0.5, 0.75, 1e-6, 0.999999])),
        min_p=st.sampled_from([0.0, 0.0, 0.01, 0.5, 1.0]),
        repetition_penalty=st.sampled_from([1.0, 2.0, 0.5]),
        presence_penalty=st.sampled_from([0.0, 0.5]),
        frequency_penalty=st.sampled_from([0.0, 0.25, -0.5]),
        logit_bias=st.dictionaries(st.integers(0, 23), st.sampled_from([-1.5, 2.0]), max_size=2),
        min_tokens=st.sampled_from([0, 0, 3]),
    )


@settings(max_examples=150, deadline=None)
@given(_cases(), st.integers(1, 7))
def test_few_candidates_give_the_same_tokens_as_a_full_sort(
    case: tuple[Tensor, list[StepRow]], num_candidates: int
) -> None:
    """Catches a kept set believed complete too early: ties at the edge, flat tails, late draws."""
    logits, rows = case
    plain = _sample(logits, rows, num_candidates=logits.shape[1])
    assert _sample(logits, rows, num_candidates=num_candidates) == plain


@settings(max_examples=150, deadline=None)
@given(_cases())
def test_tokens_agree_with_the_oracle(case: tuple[Tensor, list[StepRow]]) -> None:
    """Catches any rule or order that differs from a plain reading of the processors."""
    logits, rows = case
    tokens = _sample(logits, rows, num_candidates=4)
    for row_logits, row, token in zip(logits.tolist(), rows, tokens, strict=True):
        params = row.sampling
        scores = oracle.edited(
            row_logits,
            prompt_ids=row.prompt_ids,
            output_ids=row.output_ids,
            repetition_penalty=params.repetition_penalty,
            presence_penalty=params.presence_penalty,
            frequency_penalty=params.frequency_penalty,
            logit_bias=params.logit_bias,
            banned=row.stop_token_ids if len(row.output_ids) < params.min_tokens else (),
        )
        if not np.isfinite(scores.max()):
            assert token.error is not None
            continue
        number = oracle.uniform(row.seed, len(row.output_ids))
        cuts = {name: getattr(params, name) for name in ("temperature", "top_k", "top_p", "min_p")}
        assert token.token_id in oracle.acceptable(scores, number, ROUNDING, **cuts)


def _hard_logits(kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    flat = torch.zeros(1, 20011)
    if kind == "flat":
        return flat
    if kind == "one peak on a flat tail":
        return flat.index_fill(1, torch.tensor([4000]), 5.0)
    if kind == "ties across the edge of the candidates":
        return flat.index_fill(1, torch.arange(0, 20011, 7), 1.0).index_fill(
            1, torch.arange(3, 20011, 11), 2.0
        )
    return torch.randn(1, 20011, generator=generator)


@pytest.mark.parametrize(
    "kind",
    ["flat", "one peak on a flat tail", "ties across the edge of the candidates", "random"],
)
@pytest.mark.parametrize(
    "cuts",
    [{}, {"top_p": 0.9}, {"min_p": 0.1}, {"top_k": 1024}, {"top_k": 3000, "top_p": 0.7}],
)
def test_the_default_number_of_candidates_equals_a_full_sort(
    kind: str, cuts: dict[str, Any]
) -> None:
    """Catches a proof that holds for 24 tokens but not at the real number of candidates."""
    logits = _hard_logits(kind).expand(12, -1)
    rows = [_row(seed=seed, **cuts) for seed in range(12)]
    assert _sample(logits, rows) == _sample(logits, rows, num_candidates=20011)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.sampled_from([-INF, -2.0, 0.0, 0.5, 3.0]), min_size=2, max_size=80),
    st.integers(1, 9),
)
def test_enough_tokens_reach_the_floor(scores: list[float], num_candidates: int) -> None:
    """Catches groups that count a token twice, and a rest that is left out of the count."""
    row = np.array([scores], dtype=np.float32)
    (floor,) = glimt.sampling._floors(row, num_candidates)
    assert (row >= floor).sum() >= min(num_candidates, len(scores))


# --- what cannot be sampled ------------------------------------------------------------------


@pytest.mark.parametrize("controls", [{"temperature": 0.0}, {}, {"top_p": 0.5, "logprobs": 2}])
@pytest.mark.parametrize(
    ("poison", "said"),
    [
        (math.nan, "1 NaN and 0 infinite logits of 4"),
        (-math.nan, "1 NaN and 0 infinite logits of 4"),
        (INF, "0 NaN and 1 infinite logits of 4"),
    ],
)
def test_a_row_that_is_not_finite_fails_alone(
    poison: float, said: str, controls: dict[str, Any]
) -> None:
    """Catches a NaN that spreads through a batched sum, or is hidden by the ban of its id."""
    healthy = [0.0, 9.0, 0.0, -INF]
    sick = [0.0, 1.0, poison, -INF]
    rows = [_row(stops=[2], min_tokens=1, sequence_id=i, **controls) for i in range(3)]
    tokens = _sample([healthy, sick, healthy], rows)
    assert [token.error is None for token in tokens] == [True, False, True]
    assert [token.sequence_id for token in tokens] == [0, 1, 2]
    assert tokens[1].token_id == -1
    assert tokens[1].logprob is None
    assert said in str(tokens[1].error)
    assert tokens[0].token_id == tokens[2].token_id == 1


def test_a_row_of_only_minus_infinity_says_so() -> None:
    """Catches token 0 as the answer to an impossible row."""
    for controls in ({"temperature": 0.0}, {}, {"top_k": 2}):
        token = _sample([[-INF] * 3], [_row(**controls)])[0]
        assert token.token_id == -1
        assert "all 3 logits are -inf" in str(token.error)


def test_a_row_where_every_token_is_banned_names_min_tokens() -> None:
    """Catches a stop id chosen before min_tokens because nothing else is left."""
    rows = [_row(stops=[0, 1], min_tokens=1, temperature=temperature) for temperature in (0.0, 1.0)]
    for token in _sample([[1.0, 2.0]] * 2, rows):
        assert token.token_id == -1
        assert "min_tokens" in str(token.error)


def test_penalties_that_overflow_are_an_error_of_that_row() -> None:
    """Catches infinity made by ourselves: it would draw NaN probabilities."""
    extreme = _row(prompt=[0], repetition_penalty=1e-6)
    tokens = _sample([[1e35, 0.0], [1e35, 0.0]], [extreme, _row()])
    assert "beyond float32" in str(tokens[0].error)
    assert tokens[1].token_id == 0


@pytest.mark.parametrize("bad_id", [-1, -3, 3, 10**6, 2**63, 2**70, -(2**70)])
def test_ids_outside_the_vocabulary_change_nothing(bad_id: int) -> None:
    """Catches -1 read as the last token, and writes into the next row's logits."""
    controls = {"repetition_penalty": 9.0, "presence_penalty": 9.0, "min_tokens": 5}
    rows = [
        _row(
            prompt=[bad_id],
            output=[bad_id],
            stops=[bad_id],
            logit_bias={bad_id: 50.0},
            temperature=temperature,
            **controls,
        )
        for temperature in (0.0, 0.01)
    ]
    neighbour = _row(temperature=0.0)
    tokens = _sample([[1.0, 2.0, 3.0]] * 3, [rows[0], neighbour, rows[1]])
    assert _ids(tokens) == [2, 2, 2]


def test_valid_ids_count_also_beside_invalid_ones() -> None:
    """Catches dropping a whole list because of one bad id."""
    for bad_id in (-1, 2**70):
        assert _greedy([2.0, 1.5], prompt=[bad_id, 0], repetition_penalty=2.0) == 1


# --- log-probabilities -----------------------------------------------------------------------


def test_logprobs_are_the_log_softmax_of_the_raw_logits() -> None:
    """Catches values taken after penalties, bias, temperature or cuts."""
    logits = torch.randn(1, 400, generator=torch.Generator().manual_seed(1)) * 4
    expected = torch.log_softmax(logits.double(), dim=1)[0]
    best = expected.topk(5)
    row = _row(
        seed=3,
        prompt=range(200),
        output=range(100),
        repetition_penalty=1.5,
        presence_penalty=0.5,
        logit_bias={7: 3.0},
        temperature=2.0,
        top_p=0.9,
        logprobs=5,
    )
    token = _sample(logits, [row])[0]
    assert token.logprob == pytest.approx(float(expected[token.token_id]), abs=1e-9)
    assert [top.token_id for top in token.top_logprobs] == best.indices.tolist()
    assert [top.logprob for top in token.top_logprobs] == pytest.approx(
        best.values.tolist(), abs=1e-9
    )


def test_logprobs_are_given_only_as_asked() -> None:
    """Catches None taken for 0, and 0 taken for None."""
    off, none, two = _sample([[0.0, 1.0, 2.0]] * 3, [_row(logprobs=k) for k in (None, 0, 2)])
    assert (off.logprob, off.top_logprobs) == (None, ())
    assert none.logprob is not None
    assert none.top_logprobs == ()
    assert [top.token_id for top in two.top_logprobs] == [2, 1]


def test_top_logprobs_order_ties_by_id_and_skip_impossible_tokens() -> None:
    """Catches an arbitrary choice among equals, and -inf, which JSON cannot say."""
    ties = _sample([[1.0, 2.0, 1.0, 1.0, 2.0]], [_row(logprobs=4, temperature=0.0)])[0]
    assert [top.token_id for top in ties.top_logprobs] == [1, 4, 0, 2]
    few = _sample([[-INF, 0.0, -INF, 0.0]], [_row(logprobs=64, temperature=0.0)])[0]
    assert [top.token_id for top in few.top_logprobs] == [1, 3]
    assert [top.logprob for top in few.top_logprobs] == pytest.approx([math.log(0.5)] * 2)
