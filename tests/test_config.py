"""EngineConfig: every count has its least, told by its name."""

from __future__ import annotations

from typing import Any

import pytest

from glimt.config import EngineConfig
from glimt.errors import ConfigError

LEAST = {
    "tp_size": 1,
    "num_threads": 1,
    "max_model_len": 1,
    "max_num_batched_tokens": 1,
    "max_num_seqs": 1,
    "block_size": 0,
    "num_blocks": 1,
    "kv_bytes": 1,
    "memory_limit_bytes": 1,
    "feature_cache_bytes": 0,
    "tower_patches": 1,
    "tower_slice_patches": 1,
    "num_draft_tokens": 0,
}


def problems(**options: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        EngineConfig(model="anywhere", **options)
    return [problem.split()[0] for problem in caught.value.problems]


def test_every_count_is_taken_from_its_least_on() -> None:
    """Catches a setting that is checked no more, and one whose last good value is refused."""
    EngineConfig(model="anywhere", **LEAST)
    below: dict[str, Any] = {name: least - 1 for name, least in LEAST.items()}
    assert sorted(problems(**below)) == sorted(LEAST)


def test_every_count_is_in_the_table() -> None:
    """Catches a new setting in numbers that nothing checks."""
    kinds = {name: kind for name, kind in EngineConfig.__annotations__.items() if "int" in kind}
    assert kinds.keys() == LEAST.keys()


def test_no_more_drafts_than_are_worth_it() -> None:
    """Catches a limit that moved by one."""
    EngineConfig(model="anywhere", num_draft_tokens=16)
    assert problems(num_draft_tokens=17) == ["num_draft_tokens"]


def test_a_compiled_tower_needs_its_file_and_no_rounding() -> None:
    """Catches a file without a runtime, which would be ignored, and one whose weights are taken to
    be rounded here.
    """
    EngineConfig(model="anywhere", vision_runtime="om", vision_model="tower.om")
    assert problems(vision_model="tower.om") == ["vision_model"]
    assert problems(vision_runtime="om") == ["vision_runtime"]
    both = {"vision_runtime": "om", "vision_model": "tower.om"}
    assert problems(**both, quant_tower="int8") == ["quant_tower"]
    assert problems(**both, tp_size=2) == ["vision_runtime"]
    assert problems(vision_runtime=3) == ["vision_runtime", "vision_runtime"]
    assert problems(vision_model=3) == ["vision_model"]
