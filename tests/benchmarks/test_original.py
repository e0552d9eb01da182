"""What glimt is timed against is the same model: the published code's outputs, and glimt's own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from benchmarks.peers.original import Original, answer, load, pixels_of
from PIL import Image

from glimt.engine import Engine

# Float32 in another order of additions: tests/golden/README.md gives 2e-5 as what to expect.
VALUES = 2e-5
# And twice that between two implementations, with room for the sums of larger models.
BETWEEN = 1e-4


def original(oracle: Any) -> Original:
    opened = oracle.open()
    return load(opened.family.name, opened.config, opened.checkpoint, torch.float32)


def last_logits(engine: Engine, request: Any) -> np.ndarray:
    """The logits from which glimt's first token is chosen."""
    kept = []
    sample = engine.sampler.sample
    engine.sampler.sample = lambda logits, plan: kept.append(logits.clone()) or sample(logits, plan)
    engine.add_request(request)
    while engine.has_work:
        engine.step()
    return kept[0][-1].float().numpy()


@pytest.fixture
def picture_case(oracle: Any) -> str:
    return next(case for case in oracle.cases if case.startswith("image"))


def test_the_original_gives_the_published_codes_tokens_and_logits(
    oracle: Any, picture_case: str
) -> None:
    """Catches a comparison with a model that computes something else, or less."""
    model, picked = original(oracle), oracle.arrays["picked_token_ids"]
    ids = oracle.arrays[f"{picture_case}.input_ids"].tolist()
    pixels = torch.from_numpy(oracle.arrays["pixel_values"])[None]
    with torch.inference_mode():
        features = model.image_features(pixels)
        logits, past = model.prefill(ids, features)
        first, tokens = logits[0, -1].numpy(), [int(logits[0, -1].argmax())]
        for i in range(24):
            logits, past = model.decode(tokens[-1], i, ids, past)
            tokens.append(int(logits[0, -1].argmax()))
    expected = {name: oracle.arrays[f"{picture_case}.{name}"] for name in _EXPECTED}
    np.testing.assert_allclose(features[0], oracle.arrays["image_features"], atol=VALUES, rtol=0)
    np.testing.assert_allclose(first[picked], expected["logits_last_picked"], atol=VALUES, rtol=0)
    last = logits[0, -1].numpy()[picked]
    np.testing.assert_allclose(last, expected["logits_after_24_picked"], atol=VALUES, rtol=0)
    assert tokens[:24] == expected["greedy_24"].tolist()


_EXPECTED = ("logits_last_picked", "logits_after_24_picked", "greedy_24")


def test_the_original_and_the_plain_engine_agree_on_every_logit(
    oracle: Any, picture_case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches two models with different weights or prompts being timed as one."""
    monkeypatch.setenv("GLIMT_ISA", "none")
    model, request = original(oracle), oracle.request(picture_case, max_tokens=1)
    with torch.inference_mode():
        features = model.image_features(torch.from_numpy(oracle.arrays["pixel_values"])[None])
        logits, _ = model.prefill(request.prompt.original_token_ids, features)
    ours = last_logits(oracle.engine(), request)
    np.testing.assert_allclose(logits[0, -1].numpy(), ours, atol=BETWEEN, rtol=0)


def test_an_answer_is_the_published_one_and_has_every_figure(
    glm4v_oracle: Any, visualglm_oracle: Any
) -> None:
    """Catches pixels that differ from the original's, and a figure that is missing or zero."""
    for oracle, case in ((glm4v_oracle, "image_zh"), (visualglm_oracle, "image_zh")):
        picture = Image.fromarray(oracle.arrays["picture"])
        ids = oracle.arrays[f"{case}.input_ids"].tolist()
        tokens, seconds = answer(original(oracle), ids, picture, 5, torch.float32)
        assert tokens == oracle.arrays[f"{case}.greedy_24"][:5].tolist()
        assert list(seconds) == ["picture", "prefill", "first token", "per token"]
        assert min(seconds.values()) > 0


def test_pixels_are_the_originals(oracle: Any) -> None:
    """Catches another resize filter or order of channels."""
    expected = oracle.arrays["pixel_values"]
    pixels = pixels_of(Image.fromarray(oracle.arrays["picture"]), expected.shape[-1], torch.float32)
    np.testing.assert_allclose(pixels[0], expected, atol=2e-6, rtol=0)
