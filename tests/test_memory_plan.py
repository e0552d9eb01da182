"""The memory plan: what it counts, and the KV cache that fits under a limit."""

import dataclasses

import pytest
import torch
from torch import nn

from exporting import exported
from glimt.config import EngineConfig
from glimt.engine import Engine
from glimt.errors import ConfigError
from glimt.loader import open_model
from glimt.memory_plan import weight_bytes
from glimt.weights import is_vision

GLM4V = "synthetic:glm-4v-9b"


@pytest.fixture(scope="module")
def tiny(folders):
    return str(folders["glm4v_9b"])


def engine(tiny: str, **options) -> Engine:
    return Engine.load(EngineConfig(model=tiny, max_num_seqs=2, **options))


def test_weights_of_the_published_model_are_counted_by_part():
    """Catches the adapter counted as language, or a part counted twice."""
    model = open_model(EngineConfig(model=GLM4V, dtype="bfloat16")).model
    parts = weight_bytes(model)
    assert sum(parts.values()) == 2 * 13_906_320_896
    assert parts["head"] == parts["embedding"] == 2 * 151_552 * 4096
    assert parts["language"] == 2 * (40 * 203_960_832 + 4096)


def test_a_matrix_in_another_form_counts_at_its_own_size():
    """Catches quantised weights, which are no parameters, planned as nothing."""

    @dataclasses.dataclass
    class Packed:
        nbytes: int

    module = nn.Module()
    module.head = nn.Linear(4, 8, bias=False)
    module.blocks = nn.Module()
    module.blocks.weight = Packed(77)
    assert weight_bytes(module) == {"language": 77, "head": 128, "embedding": 0, "vision": 0}


def test_loaded_weights_take_what_was_planned():
    """Catches a packed matrix that is counted beside the parameter whose place it took."""
    opened = open_model(EngineConfig(model="demo", dtype="bfloat16"))
    planned = sum(weight_bytes(opened.model).values())
    opened.load()
    taken = sum(weight_bytes(opened.model).values())
    assert planned <= taken <= 1.1 * planned  # packed rows are padded to whole blocks


def test_a_tied_matrix_counts_once():
    """Catches a limit refused for memory that is not taken."""
    module = nn.Module()
    module.embedding, module.head = nn.Module(), nn.Module()
    module.embedding.weight = module.head.weight = nn.Parameter(torch.zeros(3, 2))
    assert sum(weight_bytes(module).values()) == 24


def test_every_draft_has_logits_of_its_own(tiny):
    """Catches a limit that is kept only while nothing is drafted."""
    plain, drafting = engine(tiny), engine(tiny, num_draft_tokens=4)
    more = 2 * 4 * plain.opened.config.vocab_size * 12  # of two sequences, 12 bytes a logit
    assert drafting.memory.workspace - plain.memory.workspace == more
    few = engine(tiny, num_draft_tokens=4, max_num_batched_tokens=3)
    fewer = engine(tiny, max_num_batched_tokens=3)
    assert few.memory.workspace - fewer.memory.workspace == more // 8  # three places, not ten


def test_the_cache_takes_what_the_limit_leaves(tiny):
    """Catches a cache sized from free memory although there is a limit."""
    roomy = engine(tiny)
    free = roomy.memory
    block = 2 * 2 * 2 * 16 * 4 * roomy.config.block_size  # K and V, layers, KV heads, dim, float32
    limit = free.total - free.kv + 5 * block + block // 2
    tight = engine(tiny, memory_limit_bytes=limit)
    assert tight.stats().num_blocks == 5
    assert tight.memory.kv == 5 * block
    assert tight.memory.total <= limit
    assert tight.memory.limit == limit


def test_a_cache_in_int8_holds_more_in_the_same_memory(tiny):
    """Catches scales that are not counted, and a plan for another dtype than is allocated."""
    floats, bytes_ = (engine(tiny, kv_dtype=kind, kv_bytes=2**17) for kind in ("auto", "int8"))
    for one, per_head in ((floats, 16 * 4), (bytes_, 16 + 4)):
        block = 2 * 2 * 2 * per_head * one.config.block_size  # K and V, layers, KV heads
        assert one.stats().num_blocks == 2**17 // block
    taken = sum(part.nbytes for cache in bytes_.runner.caches for part in cache.tensors())
    assert taken == bytes_.memory.kv <= 2**17


def test_the_cache_is_no_larger_than_its_rows_could_use(tiny):
    """Catches gigabytes of cache for a toy because the limit allows it."""
    large = engine(tiny, memory_limit_bytes=64 * 2**30)
    assert large.stats().num_blocks == 2 * 1024 // large.config.block_size


@pytest.mark.parametrize("asked", [{"kv_bytes": 2**30}, {"num_blocks": 20_000}])
def test_a_cache_beyond_the_limit_is_refused(tiny, asked):
    """Catches a limit that an explicit cache size silently overrides."""
    limit = engine(tiny).memory.total
    with pytest.raises(ConfigError, match=r"memory_limit_bytes: is .* are needed: .*kv .*iB"):
        engine(tiny, memory_limit_bytes=limit, max_model_len=100_000, **asked)


def test_a_compiled_tower_is_counted_in_place_of_the_models_own(tmp_path):
    """Catches a limit that counts a tower in bfloat16, where onnxruntime holds float32."""
    model, file = "demo-visualglm", tmp_path / "tower.onnx"
    exported(model, file, dtype="float16", checks=False)
    options = {"model": model, "dtype": "bfloat16", "kv_bytes": 2**20}
    own = Engine.load(EngineConfig(**options)).memory
    compiled = Engine.load(
        EngineConfig(**options, vision_runtime="onnxruntime", vision_model=str(file))
    ).memory
    named = open_model(EngineConfig(model=model)).model.named_parameters()
    values = sum(weight.numel() for name, weight in named if is_vision(name))
    assert compiled.vision == 6 * values
    assert dataclasses.replace(compiled, vision=own.vision) == own


def test_weights_beyond_the_limit_are_refused_before_they_are_made():
    """Catches minutes of loading before the refusal; the error names the parts."""
    with pytest.raises(ConfigError) as refused:
        open_model(EngineConfig(model=GLM4V, dtype="bfloat16", memory_limit_bytes=16 * 2**30))
    said = str(refused.value)
    for part in ("is 16.0 GiB", "language 15.2 GiB", "head 1.2 GiB", "vision 8.4 GiB"):
        assert part in said
    assert "--memory-limit" in said


def test_a_limit_that_leaves_no_block_is_refused(tiny):
    """Catches a cache of no blocks, in which the first request would wait for ever."""
    plan = engine(tiny).memory
    with pytest.raises(ConfigError, match="memory_limit_bytes"):
        engine(tiny, memory_limit_bytes=plan.total - plan.kv)


def test_the_features_are_planned_at_their_budget():
    """Catches a part that is in memory and not in the plan."""
    plan = Engine.load(EngineConfig(model="demo", feature_cache_bytes=7)).memory
    assert plan.features == 7
    assert plan.parts().keys() == plan.as_dict().keys() - {"total", "limit"}
