"""Both families against the outputs of the original implementations (tests/golden/README.md)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from conftest import run_greedy
from glimt.engine import Engine
from glimt.kernels.library import ISAS
from glimt.models.pixels import CLIP_MEAN, CLIP_STD, normalise, patchify
from glimt.types import Message, TextPart

# What float32 arithmetic in another order may differ by; the oracle's README gives the figures.
PIXELS = 2e-6
VALUES = 2e-5


class Capture:
    """Keeps the hidden states of all tokens of the last step, which the runner does not return."""

    def __init__(self, engine: Engine) -> None:
        self.hidden = torch.empty(0)
        engine.runner.model.register_forward_hook(self._keep)
        self.engine = engine

    def _keep(self, module: Any, args: Any, output: torch.Tensor) -> None:
        self.hidden = output

    def logits(self) -> np.ndarray:
        with torch.inference_mode():
            return self.engine.runner.model.logits(self.hidden).float().numpy()


def every_case(oracle: Any) -> list[str]:
    expected = {"glm-4v-tiny": 5, "visualglm-tiny": 4, "glm-4v-wide": 2, "visualglm-wide": 2}
    assert len(oracle.cases) == expected[oracle.name]
    return oracle.cases


def test_pixels_are_the_originals(oracle: Any) -> None:
    """Catches another resize filter, another order of normalisation, swapped channels."""
    image = oracle.image()
    pixels = normalise(image.pixels, CLIP_MEAN, CLIP_STD).numpy()
    np.testing.assert_allclose(pixels, oracle.arrays["pixel_values"], atol=PIXELS, rtol=0)


def test_tower_states_are_the_originals(visualglm_oracle: Any) -> None:
    """Catches pre- and post-norm mixed up, and a last norm left out, which the Q-Former hides."""
    model = visualglm_oracle.open().model
    with torch.inference_mode():
        pixels = torch.from_numpy(visualglm_oracle.arrays["pixel_values"])
        states = model.tower(patchify(pixels[None], visualglm_oracle.config.eva.patch_size))
    expected = visualglm_oracle.arrays["vit_features"]
    np.testing.assert_allclose(states.numpy(), expected, atol=VALUES, rtol=0)


def test_picture_features_are_the_originals(oracle: Any) -> None:
    """Catches every error of tower and adapter; a batch of pictures must not mix them."""
    model = oracle.open().model
    image = oracle.image()
    with torch.inference_mode():
        alone = model.image_features([image])
        batch = model.image_features([image, image, image])
    for features in (*alone, *batch):
        expected = oracle.arrays["image_features"]
        np.testing.assert_allclose(features.numpy(), expected, atol=VALUES, rtol=0)


def test_prompt_logits_are_the_originals(oracle: Any) -> None:
    """Catches wrong positions, masks, rotary pairing or splicing at any prompt token."""
    picked = oracle.arrays["picked_token_ids"]
    engine = oracle.engine(enable_prefix_cache=False)
    capture = Capture(engine)
    for case in every_case(oracle):
        engine.add_request(oracle.request(case, max_tokens=1))
        engine.step()
        logits = capture.logits()
        expected = {name: oracle.arrays[f"{case}.{name}"] for name in _LOGITS}
        assert logits.argmax(-1).tolist() == expected["logits_all_positions_argmax"].tolist()
        for row, name in ((0, "logits_first_picked"), (-1, "logits_last_picked")):
            np.testing.assert_allclose(logits[row][picked], expected[name], atol=VALUES, rtol=0)


_LOGITS = ("logits_all_positions_argmax", "logits_first_picked", "logits_last_picked")


def test_greedy_tokens_through_the_paged_cache_are_the_originals(oracle: Any) -> None:
    """Catches a decode position that follows the cache instead of the prompt."""
    engine = oracle.engine(enable_prefix_cache=False)
    for case in every_case(oracle):
        ids = run_greedy(engine, oracle.request(case, max_tokens=24))
        assert ids == oracle.arrays[f"{case}.greedy_24"].tolist()


def test_logits_after_24_tokens_are_the_originals(oracle: Any) -> None:
    """Catches drift in decoding that an argmax would hide (such as a wrong rotary table)."""
    picked = oracle.arrays["picked_token_ids"]
    engine = oracle.engine(enable_prefix_cache=False)
    capture = Capture(engine)
    for case in every_case(oracle):
        run_greedy(engine, oracle.request(case, max_tokens=25))
        expected = oracle.arrays[f"{case}.logits_after_24_picked"]
        np.testing.assert_allclose(capture.logits()[-1][picked], expected, atol=VALUES, rtol=0)


def test_positions_are_the_originals(visualglm_oracle: Any) -> None:
    """Catches a shifted second channel, which a short prompt's argmax would not show."""
    for case in every_case(visualglm_oracle):
        prompt = visualglm_oracle.prompt(case)
        expected = visualglm_oracle.arrays[f"{case}.position_ids"]
        assert prompt.positions.tolist() == expected.tolist()
        n = len(prompt.token_ids)
        last = prompt.positions_between(n + 23, n + 24)[:, 0].tolist()
        assert last == visualglm_oracle.arrays[f"{case}.last_decode_position"].tolist()


def test_patches_share_one_position_and_text_goes_on_after_it(glm4v_oracle: Any) -> None:
    """Catches vLLM's bug 14790: sequential positions for the patches of a picture."""
    prompt = glm4v_oracle.prompt("image_zh")
    patches = glm4v_oracle.config.vision.num_image_tokens - 2
    begin = prompt.spans[0].start
    tail = len(prompt.original_token_ids) - begin - 2
    expected = [*range(begin + 1), *[begin + 1] * patches, *range(begin + 2, begin + 2 + tail)]
    assert prompt.positions[0].tolist() == expected
    n = len(prompt.token_ids)
    assert prompt.positions_between(n, n + 1)[0, 0] == len(prompt.original_token_ids)


def test_every_stop_id_of_the_file_ends_an_answer(glm4v_oracle: Any) -> None:
    """Catches a list of which only the first id is read: GLM-4v ends most answers with another."""
    assert len(glm4v_oracle.raw["eos_token_id"]) == 3
    processor = glm4v_oracle.open().processor
    assert processor.stop_token_ids == frozenset(glm4v_oracle.raw["eos_token_id"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits_stay_close_to_float32_with_all_kernels(
    oracle: Any, dtype: torch.dtype, isa: str
) -> None:
    """Catches kernels that are right each alone and are given the wrong things by a model, and a
    reduction or a norm that runs in half precision by mistake.
    """
    engine = assert_close_to_float32(oracle, dtype)
    held = [m for m in engine.runner.model.modules() if getattr(m, "held", None) is not None]
    assert bool(held) == (isa in ISAS), "the kernels were not what computed"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_pictures_in_16_bits_stay_close_to_float32_with_all_kernels(
    oracle: Any, dtype: torch.dtype, isa: str
) -> None:
    """Catches a tower whose errors the few rows of a prompt's logits would hide."""
    model = oracle.open(dtype).model
    with torch.inference_mode():
        batch = model.image_features([oracle.image()] * 2)
    theirs = oracle.arrays["image_features"]
    for features in batch:
        ours = features.float().numpy()
        cosine = (ours * theirs).sum() / np.linalg.norm(ours) / np.linalg.norm(theirs)
        assert cosine >= 0.9995


def test_float32_takes_plain_torch_whatever_the_kernels(tiny_oracle: Any, isa: str) -> None:
    """Catches float32 weights or activations handed to kernels that read 16 bits."""
    engine = tiny_oracle.engine(enable_prefix_cache=False)
    capture = Capture(engine)
    picked = tiny_oracle.arrays["picked_token_ids"]
    for case in every_case(tiny_oracle):
        run_greedy(engine, tiny_oracle.request(case, max_tokens=25))
        expected = tiny_oracle.arrays[f"{case}.logits_after_24_picked"]
        np.testing.assert_allclose(capture.logits()[-1][picked], expected, atol=VALUES, rtol=0)


def assert_close_to_float32(oracle: Any, dtype: torch.dtype) -> Engine:
    """Every prompt's last logits point where the original's do. Returns the last engine."""
    tables = ("auto",) if oracle.is_glm4v else ("hub_fp16", "fp32_product")
    picked = oracle.arrays["picked_token_ids"]
    for table in tables:
        engine = oracle.engine(dtype, table, enable_prefix_cache=False)
        capture = Capture(engine)
        for case in every_case(oracle):
            engine.add_request(oracle.request(case, max_tokens=1))
            engine.step()
            ours = capture.logits()[-1][picked]
            theirs = oracle.arrays[f"{case}.logits_last_picked"]
            cosine = ours @ theirs / np.linalg.norm(ours) / np.linalg.norm(theirs)
            assert cosine >= 0.9995
    return engine


def test_the_hub_table_is_chosen_by_float16_alone(visualglm_oracle: Any) -> None:
    """Catches a table that follows the option only, or the wrong dtype."""
    modes = {
        (dtype, option): visualglm_oracle.open(dtype, option).model.rotary.spec.mode
        for dtype in (torch.float32, torch.float16)
        for option in ("auto", "hub_fp16", "fp32_product")
    }
    assert modes == {
        (torch.float32, "auto"): "fp32_product",
        (torch.float32, "hub_fp16"): "hub_fp16",
        (torch.float32, "fp32_product"): "fp32_product",
        (torch.float16, "auto"): "hub_fp16",
        (torch.float16, "hub_fp16"): "hub_fp16",
        (torch.float16, "fp32_product"): "fp32_product",
    }


_CONVERSATIONS = {
    "glm4v_9b": {
        "image_zh": [("user", "描述这张图片", True)],
        "image_en": [("user", "What is in this picture? Answer in one sentence.", True)],
        "image_multi": [
            ("system", "你是一个有用的助手。", False),
            ("user", "这是什么？", True),
            ("assistant", "一张棋盘图。", False),
            ("user", "它是什么颜色的？", False),
        ],
        "text_zh": [("user", "你好，请介绍一下你自己。", False)],
        "text_en": [("user", "Write a haiku about the sea.", False)],
    },
    "visualglm": {
        "image_zh": [("user", "描述这张图片。", True)],
        "image_en": [("user", "Describe the image.", True)],
        "image_multi": [
            ("user", "这是什么？", True),
            ("assistant", "一张棋盘图。", False),
            ("user", "它是什么颜色的？", False),
        ],
        "text_zh": [("user", "你好，请介绍一下你自己。", False)],
    },
}


def test_conversations_encode_to_the_originals_ids(tiny_oracle: Any) -> None:
    """Catches a template, a joint encoding or a special token that differs from the original."""
    from conftest import shared_path
    from glimt.inputs.tokenizer import load_tokenizer
    from glimt.types import ImagePart

    name = "glm-4-9b" if tiny_oracle.is_glm4v else "chatglm-6b"
    tokenizer = load_tokenizer(
        shared_path(f"data/tokenizers/{name}/tokenizer_config.json").parent,
        tiny_oracle.family.tokenizer,
    )
    processor = tiny_oracle.family.processor(tiny_oracle.folder, tiny_oracle.config, tokenizer)
    for case, turns in _CONVERSATIONS[tiny_oracle.family.name].items():
        messages = [
            Message(role, (*([ImagePart(None)] if pictured else []), TextPart(text)))
            for role, text, pictured in turns
        ]
        sizes = [(640, 480)] * sum(m.num_images for m in messages)
        prompt = processor.encode_chat(messages, sizes, "auto")
        golden = tiny_oracle.prompt(case)
        assert list(prompt.original_token_ids) == tiny_oracle.arrays[f"{case}.input_ids"].tolist()
        assert prompt.token_ids == golden.token_ids
        assert prompt.spans == golden.spans
        assert prompt.positions.tolist() == golden.positions.tolist()
        assert prompt.bidirectional_len == golden.bidirectional_len
