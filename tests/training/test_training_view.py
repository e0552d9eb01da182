"""The training view computes what the engine serves, and a run can be stopped at any time."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from training.batches import BatchGroups, batches
from training.data.mixture import Mixtures
from training.data.sample import Exchange, Sample
from training.encode import choose_turns, collate, encode
from training.export import export
from training.plan import Plan
from training.view import Batch, Rows, answer, build, see
from training.vocabulary import write_sentencepiece, write_tiktoken

from glimt.config import EngineConfig
from glimt.engine import Engine
from glimt.types import SamplingParams
from training import train

ALONE = "0123456789ABC红"
QUESTIONS = ("图片里是什么？", "What is in the picture?", "它是什么颜色的？", "How many are there?")
ANSWERS = ("图片里是一件外套。", "The picture shows a coat.", "它是红色的。", "There are two.")


def picture(seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def samples(count: int) -> list[Sample]:
    exchanges = [Exchange(q, a, "test") for q, a in zip(QUESTIONS, ANSWERS, strict=True)]
    return [
        Sample(picture(i) if i % 3 else None, tuple(exchanges[i % 4 :]), "test", "zh", label=i % 10)
        for i in range(count)
    ]


class FixedMixture:
    """Draws from a handful of samples."""

    def __init__(self, *, only_pictures: bool = False) -> None:
        self.samples = [s for s in samples(12) if s.image or not only_pictures]

    def draw(self, rng: random.Random) -> Sample:
        return rng.choice(self.samples)


@pytest.fixture(scope="module", params=["glm4v_9b", "visualglm"])
def opened(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, Any, dict[str, Any], Any]:
    """A demo model of small vocabulary: its name, folder, family, config and processor."""
    folder = tmp_path_factory.mktemp(request.param)
    words = [word * 2 for word in (*QUESTIONS, *ANSWERS)] * 3 + train._own_words()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("training.vocabulary.NUM_RANKS", 400)
        patch.setattr("training.vocabulary.NUM_PIECES", 1200)
        write = write_tiktoken if request.param == "glm4v_9b" else write_sentencepiece
        write(folder, words, ALONE)
    return (request.param, folder, *train.open_family(request.param, folder))


def batch_of(opened: Any, count: int = 6) -> Batch:
    name, _, _, _, processor = opened
    is_causal = name == "glm4v_9b"
    rng = random.Random(1)
    encoded = [
        encode(processor, sample, choose_turns(sample, rng, 2 if is_causal else 1), is_causal)
        for sample in samples(count)
    ]
    return collate(encoded, is_causal)


def rows_of(batch: Batch) -> Rows:
    assert batch.rows
    return batch.rows


def forward(model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    features = see(model, batch.pictures.pixels).features if batch.pictures else None
    return answer(model, rows_of(batch), features)


def test_the_training_view_gives_the_served_logits(opened: Any) -> None:
    """Catches a mask, a position or a splice that is trained in another way than served."""
    name, folder, family, raw, processor = opened
    torch.manual_seed(3)
    model = build(family, raw, max_positions=256)
    export(dict(model.named_parameters()), model, raw, folder)
    for parameter in model.parameters():  # what a bfloat16 file keeps of it
        parameter.data = parameter.data.bfloat16().float()
    engine = Engine.load(EngineConfig(model=str(folder), dtype="float32", num_blocks=64))
    sample = samples(6)[4]
    turns = sample.exchanges[:1]
    row = encode(processor, sample, turns, name == "glm4v_9b")
    with torch.no_grad():
        logits, labels = forward(model, collate([row], name == "glm4v_9b"))
    parts = [{"type": "image", "image": sample.image}, {"type": "text", "text": turns[0].question}]
    sampling = SamplingParams(temperature=0, max_tokens=len(labels), ignore_eos=True, logprobs=0)
    forced: list[float] = []
    for k in range(len(labels)):
        # The answer so far is forced by a bias, so that every learnt token's probability is asked.
        request = engine.prepare_chat([{"role": "user", "content": parts}], sampling)
        engine.add_request(request)
        forced.append(_forced_logprob(engine, labels[: k + 1].tolist()))
    expected = logits.float().log_softmax(-1)[torch.arange(len(labels)), labels]
    np.testing.assert_allclose(forced, expected.numpy(), atol=2e-4, rtol=0)


def _forced_logprob(engine: Engine, answer: list[int]) -> float:
    """Log-probability of the last token of `answer`, whose other tokens are forced."""
    sequence = engine.scheduler.waiting[0]
    sampler = engine.sampler.sample
    logprob = 0.0
    for token_id in answer:
        plan = engine.scheduler.plan_step()
        logits = engine.runner.run(plan)
        logprob = float(logits.logits.float().log_softmax(-1)[0, token_id])
        engine.outputs.note_step(plan, {}, 0.0)
        (token,) = sampler(logits.logits, plan)
        forced = type(token)(token.sequence_id, token_id, token.logprob, token.top_logprobs)
        engine.outputs.collect(engine.scheduler.commit(plan, [forced]))
    engine.abort(sequence.request.request_id)
    return logprob


def test_only_answers_are_learnt(opened: Any) -> None:
    """Catches a loss on questions, pictures or padding, or without the token that ends a reply."""
    processor = opened[-1]
    rows = rows_of(batch_of(opened, 3))
    for i, sample in enumerate(samples(3)):
        learnt = rows.labels[i][rows.labels[i] >= 0].tolist()
        text = processor.tokenizer.decode(learnt)
        assert any(answer in text for answer in (e.answer for e in sample.exchanges))
        assert not any(question in text for question in QUESTIONS)
        assert learnt[-1] in processor.stop_token_ids


def test_padding_changes_nothing(opened: Any) -> None:
    """Catches a padded token that a real one attends to."""
    name, _, family, raw, processor = opened
    torch.manual_seed(0)
    model = build(family, raw, max_positions=256)
    is_causal = name == "glm4v_9b"
    encoded = [encode(processor, s, s.exchanges[-1:], is_causal) for s in samples(4)[1:3]]
    with torch.no_grad():
        together = forward(model, collate(encoded, is_causal))[0]
        alone = torch.cat([forward(model, collate([row], is_causal))[0] for row in encoded])
    np.testing.assert_allclose(together.numpy(), alone.numpy(), atol=2e-5, rtol=0)


def test_a_resumed_run_equals_an_uninterrupted_one(opened: Any, tmp_path: Path) -> None:
    """Catches state that is not saved: the optimiser, the average, or the place in the data."""
    name, _, family, raw, processor = opened
    mixtures: Any = Mixtures(FixedMixture(), FixedMixture(only_pictures=True))
    plan = Plan(steps=6, tower_steps=2, batch_rows=3, tower_pictures=3, more_pictures=2)
    groups = BatchGroups(mixtures, processor, name == "glm4v_9b", plan)

    def run(stop_after: int, folder: Path) -> train.Run:
        torch.manual_seed(0)
        run = train.start(build(family, raw, max_positions=256), raw, plan)
        train.resume(run, folder)
        for batch in batches(groups, run.step, plan.steps, num_workers=0):
            train.train_step(run, batch, plan)
            if run.step == stop_after:
                break
        train.save(run, folder)
        return run

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    straight = run(6, whole)
    run(3, parts)
    resumed = run(6, parts)
    assert resumed.step == straight.step == 6
    for key, value in straight.average.items():
        assert torch.equal(resumed.average[key], value), key


def test_training_lowers_the_loss(opened: Any) -> None:
    """Catches gradients that do not reach the model: a frozen part or a wrong sign."""
    family, raw = opened[2:4]
    torch.manual_seed(0)
    plan = Plan(steps=12, batch_rows=6, warmup_steps=2, peak_rate=1e-3)
    run = train.start(build(family, raw, max_positions=256), raw, plan)
    before = {n: p.detach().clone() for n, p in run.model.named_parameters()}
    batch = batch_of(opened)
    losses = [train.train_step(run, batch, plan)["loss"] for _ in range(12)]
    assert losses[-1] < 0.7 * losses[0]
    unmoved = [n for n, p in run.model.named_parameters() if torch.equal(p.detach(), before[n])]
    assert unmoved == []
