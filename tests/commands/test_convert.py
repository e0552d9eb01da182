"""commands/convert.py: a SAT form made from the hub form must come back tensor for tensor."""

import importlib.util
import json
import random
import shutil
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from glimt.checkpoint import open_checkpoint
from glimt.commands import convert
from glimt.commands.convert import SAT_FILE, convert_sat, hub_config
from glimt.errors import CheckpointError, ConfigError

GOLDEN = Path(__file__).parents[1] / "golden"
EMBEDDING = "transformer.word_embeddings.weight"
QKV = "transformer.layers.0.attention.query_key_value"


# --- making a SAT form -----------------------------------------------------------------------


def draw_hub_form(spec: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a golden spec, drawn as tests/golden/make_checkpoint.py draws them."""
    module_spec = importlib.util.spec_from_file_location("drawing", GOLDEN / "make_checkpoint.py")
    drawing = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(drawing)
    seed = spec["seed"]
    return {
        name: torch.from_numpy(drawing.draw(seed, name, shape, init))
        for name, shape, init in spec["tensors"]
    }


def tiny_spec(vocab_size: int | None = None) -> dict[str, Any]:
    """The golden VisualGLM spec, with a smaller vocabulary where the size is not the point."""
    spec = json.loads((GOLDEN / "visualglm-tiny.spec.json").read_text(encoding="utf-8"))
    if vocab_size:
        spec["config"]["vocab_size"] = vocab_size
        for tensor in spec["tensors"]:
            tensor[1] = [vocab_size if n == 130528 else n for n in tensor[1]]
    return spec


def blocks(rows: Tensor, num_heads: int) -> Tensor:
    """Per-head [Q | K | V] rows -> all Q, all K, all V, by writing out every row number."""
    dim = len(rows) // (3 * num_heads)
    heads, places = range(num_heads), range(dim)
    order = [(3 * h + part) * dim + j for part in range(3) for h in heads for j in places]
    return rows[order]


def sat_state(hub: Mapping[str, Tensor], num_heads: int, layout: str) -> dict[str, Tensor]:
    """The names that SAT gives, and the tensors that only SAT has."""
    state = {}
    for name, value in hub.items():
        if name.endswith("inv_freq"):
            continue
        if name.startswith("transformer.layers.") and ".query_key_value." in name:
            value = blocks(value, num_heads) if layout == "blocks" else value
        name = name.replace("image_encoder.", "mixins.eva.model.")
        state[name.replace("lm_head.", "mixins.chatglm-final.lm_head.")] = value
    state["transformer.position_embeddings.weight"] = torch.zeros(16, 64)
    state["mixins.chatglm-attn.rotary_emb.inv_freq"] = torch.zeros(4)
    return state


def sat_config(config: Mapping[str, Any], layout: str) -> dict[str, Any]:
    """model_config.json with the keys of the published one, see the real one below."""
    kept = ("num_layers", "hidden_size", "num_attention_heads", "vocab_size", "image_length")
    kept += ("max_sequence_length", "inner_hidden_size")
    kept += ("bos_token_id", "mask_token_id", "gmask_token_id")
    sat = {"model_class": "VisualGLMModel", "tokenizer_type": "THUDM/chatglm-6b"}
    sat |= {"layernorm_order": "post", "model_parallel_size": 1}
    sat |= {name: config[name] for name in kept}
    sat |= {"eva_args": config["eva_config"], "qformer_args": config["qformer_config"]}
    return sat | ({"pad_token_id": 3} if layout == "blocks" else {})


def write_sat(folder: Path, config: Mapping[str, Any], content: Any) -> Path:
    (folder / "1").mkdir(parents=True)
    (folder / "latest").write_text("1")
    (folder / "model_config.json").write_text(json.dumps(config))
    torch.save(content, folder / "1" / SAT_FILE)
    return folder


class Small:
    """A hub form with 640 words and its SAT form, to be spoilt by each test in its own way."""

    def __init__(self, folder: Path) -> None:
        spec = tiny_spec(vocab_size=640)
        self.source, self.target = folder / "sat", folder / "hub"
        self.hub = draw_hub_form(spec)
        self.hub_config = spec["config"]
        self.config = sat_config(self.hub_config, "interleaved")
        self.state = sat_state(self.hub, 4, "interleaved")

    def write(self) -> Path:
        return write_sat(self.source, self.config, {"module": self.state})

    def convert(self, **options: Any) -> convert.ConvertReport:
        return convert_sat(self.write(), self.target, **options)

    def leaves_nothing(self) -> bool:
        return {path.name for path in self.source.parent.iterdir()} <= {"sat"}


@pytest.fixture
def small(tmp_path) -> Small:
    return Small(tmp_path)


def read_hub(folder: Path) -> dict[str, Tensor]:
    tensors = {}
    for file in open_checkpoint(folder).files:
        with safe_open(file, framework="pt") as reader:
            tensors |= {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118
    return tensors


def assert_same(found: Mapping[str, Tensor], hub: Mapping[str, Tensor]) -> None:
    want = {name: value for name, value in hub.items() if not name.endswith("inv_freq")}
    assert found.keys() == want.keys()
    for name, value in found.items():
        assert value.dtype == want[name].dtype, name
        assert torch.equal(value, want[name]), name


# --- the weights -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden() -> tuple[dict[str, Any], dict[str, Tensor]]:
    spec = tiny_spec()
    return spec["config"], draw_hub_form(spec)


@pytest.mark.parametrize("layout", ["blocks", "interleaved"])
def test_the_golden_checkpoint_comes_back_from_its_sat_form(tmp_path, golden, layout):
    """Catches a wrong name, a QKV permutation the wrong way round, one applied to the tower, and
    a config.json that differs from the hub's in any key.
    """
    config, hub = golden
    content = {"module": sat_state(hub, config["num_attention_heads"], layout)}
    source = write_sat(tmp_path / "sat", sat_config(config, layout), content)
    report = convert_sat(source, tmp_path / "hub", max_shard_bytes=35_000_000)
    assert_same(read_hub(tmp_path / "hub"), hub)
    assert json.loads((tmp_path / "hub/config.json").read_text()) == config
    assert (report.qkv_layout, report.is_guess) == (layout, True)
    assert len(report.files) == 2


def test_the_two_layouts_differ(small):
    """Catches a test helper whose permutation does nothing, which would prove nothing."""
    rows = small.hub[f"{QKV}.weight"]
    assert not torch.equal(blocks(rows, 4), rows)


@pytest.mark.parametrize("layout", ["blocks", "interleaved"])
def test_a_layout_that_is_given_is_not_guessed(small, layout):
    """Catches the guess overruling the user, who may know better."""
    small.state = sat_state(small.hub, 4, layout)  # model_config.json would say interleaved
    report = small.convert(qkv_layout=layout)
    assert_same(read_hub(small.target), small.hub)
    assert not report.is_guess
    assert not any("guess" in note for note in report.notes)


def test_a_guess_is_said_to_be_one(small):
    """Catches presenting a guess as a fact: a wrong one gives fluent nonsense, no error."""
    report = small.convert()
    (note, _) = report.notes
    assert "'interleaved' is a guess" in note
    assert "'blocks'" in note


def test_dtypes_are_kept_and_the_embeddings_is_declared(small):
    """Catches casting: LayerNorms of the published files are float32 among float16 matrices."""
    small.hub = {n: v if "layernorm" in n else v.half() for n, v in small.hub.items()}
    small.state = sat_state(small.hub, 4, "interleaved")
    small.convert()
    assert_same(read_hub(small.target), small.hub)
    assert json.loads((small.target / "config.json").read_text())["torch_dtype"] == "float16"


def test_the_weights_may_stand_without_module(small):
    """Catches relying on the wrapper that only training saves."""
    convert_sat(write_sat(small.source, small.config, small.state), small.target)
    assert_same(read_hub(small.target), small.hub)


def add_numpy_1_names(file: Path) -> None:
    """Rewrite a torch.save file as if NumPy 1 had pickled the arrays in it."""
    with zipfile.ZipFile(file) as old:
        members = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(file, "w") as new:
        for name, data in members.items():
            new.writestr(name, data.replace(b"cnumpy._core.multi", b"cnumpy.core.multi"))


@pytest.mark.parametrize("numpy_1", [False, True])
def test_a_training_checkpoint_with_random_states_is_read(small, numpy_1):
    """Catches refusing what fine-tuning saves, which is what people want to convert."""
    training = {
        "iteration": 300,
        "random_rng_state": random.getstate(),
        "np_rng_state": np.random.get_state(),
        "torch_rng_state": torch.get_rng_state(),
        "client_lr_scheduler": {"start_lr": 1e-4},
        "module": small.state,
    }
    write_sat(small.source, small.config, training)
    if numpy_1:
        add_numpy_1_names(small.source / "1" / SAT_FILE)
    convert_sat(small.source, small.target)
    assert_same(read_hub(small.target), small.hub)


def test_what_was_dropped_and_written_is_reported(small):
    """Catches tensors vanishing in silence, and a progress bar that does not reach the end."""
    done: list[int] = []
    report = small.convert(on_tensor=done.append)
    assert report.dropped == (
        "mixins.chatglm-attn.rotary_emb.inv_freq",
        "transformer.position_embeddings.weight",
    )
    assert report.num_tensors == len(done) == 139
    assert report.nbytes == sum(done)


def test_shards_keep_to_their_size(small):
    """Catches a shard beyond the limit, and a tensor larger than it being lost."""
    report = small.convert(max_shard_bytes=40_000)
    shards = shards_of(small.target)
    assert len(shards) == len(report.files) > 2
    crowded = [shard for shard in shards if len(shard) > 1]
    assert all(sum(info.nbytes for info in shard) <= 40_000 for shard in crowded)
    assert max(info.nbytes for shard in shards for info in shard) > 40_000
    index = json.loads((small.target / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": report.nbytes}


def shards_of(folder: Path) -> list[list[Any]]:
    checkpoint = open_checkpoint(folder)
    infos = checkpoint.tensors.values()
    return [[info for info in infos if info.file == file] for file in checkpoint.files]


def test_tensors_are_aligned_in_the_file(small):
    """Catches a header of odd length: no tensor of the file could be mapped as it stands."""
    small.convert()
    raw = (small.target / "model-00001-of-00001.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    starts = [v["data_offsets"][0] for n, v in header.items() if n != "__metadata__"]
    assert all((8 + length + start) % 4 == 0 for start in starts)


# --- config.json -----------------------------------------------------------------------------

# THUDM/VisualGLM-6B model_config.json at commit a49d4cf, the keys and values as published.
PUBLISHED: dict[str, Any] = {
    "model_class": "VisualGLMModel",
    "tokenizer_type": "THUDM/chatglm-6b",
    "num_layers": 28,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "vocab_size": 130528,
    "layernorm_order": "post",
    "model_parallel_size": 1,
    "max_sequence_length": 2048,
    "pre_seq_len": 128,
    "bos_token_id": 130004,
    "mask_token_id": 130000,
    "gmask_token_id": 130001,
    "image_size": [224, 224],
    "pre_len": 1,
    "post_len": 0,
    "in_channels": 3,
    "patch_size": 14,
    "image_length": 32,
    "eva_args": {
        "num_layers": 39,
        "hidden_size": 1408,
        "num_attention_heads": 16,
        "vocab_size": 1,
        "layernorm_order": "pre",
        "model_parallel_size": 1,
        "max_sequence_length": 257,
        "inner_hidden_size": 6144,
        "use_final_layernorm": False,
        "layernorm_epsilon": 1e-06,
        "image_size": [224, 224],
        "pre_len": 1,
        "post_len": 0,
        "in_channels": 3,
        "num_classes": 0,
        "patch_size": 14,
    },
    "qformer_args": {
        "num_layers": 12,
        "hidden_size": 768,
        "num_attention_heads": 12,
        "vocab_size": 32,
        "layernorm_order": "post",
        "model_parallel_size": 1,
        "max_sequence_length": 0,
        "is_decoder": [True, False] * 6,
        "cross_attn_hidden_size": 1408,
        "layernorm_epsilon": 1e-12,
    },
}


def test_the_published_config_gives_the_hubs_values():
    """Catches a wrong default for what SAT leaves out, and the P-tuning length that is not in use
    being taken over, which our own reader refuses.
    """
    config = hub_config(PUBLISHED, "here")
    assert config["inner_hidden_size"] == 16384
    assert config["layernorm_epsilon"] == 1e-5
    assert (config["eos_token_id"], config["pad_token_id"]) == (130005, 3)
    assert config["eva_config"] == PUBLISHED["eva_args"]
    assert config["qformer_config"] == PUBLISHED["qformer_args"]
    assert "pre_seq_len" not in config


def test_the_hubs_spelling_of_the_parts_is_taken_too():
    """Catches refusing a model_config.json that was edited towards config.json."""
    other = {
        name.replace("eva_args", "eva_config").replace("qformer_args", "qformer_config"): value
        for name, value in PUBLISHED.items()
    }
    assert hub_config(other, "here") == hub_config(PUBLISHED, "here")


def test_everything_wrong_with_the_config_is_one_error(small):
    """Catches stopping at the first missing key."""
    for name in ("gmask_token_id", "image_length", "qformer_args"):
        del small.config[name]
    small.config["eva_args"] = {**small.config["eva_args"], "patch_size": "14"}
    del small.config["eva_args"]["pre_len"]
    small.config["model_parallel_size"] = 2
    with pytest.raises(ConfigError) as caught:
        small.convert()
    text = "\n".join(caught.value.problems)
    assert "gmask_token_id is missing" in text
    assert "image_length is missing" in text
    assert "qformer_args is missing" in text
    assert "eva_args.patch_size is '14'" in text
    assert "eva_args.pre_len is missing" in text
    assert "model_parallel_size is 2" in text
    assert small.leaves_nothing()


# --- what cannot be converted ----------------------------------------------------------------


def spoil_lora(small: Small) -> None:
    small.state[f"{QKV}.original.weight"] = small.state.pop(f"{QKV}.weight")
    small.state[f"{QKV}.matrix_A.0"] = torch.zeros(10, 64)


def spoil_shape(small: Small) -> None:
    small.state["transformer.final_layernorm.bias"] = torch.zeros(63)
    del small.state["mixins.eva.model.glm_proj.bias"]
    small.state["transformer.layers.7.mlp.dense_4h_to_h.bias"] = torch.zeros(64)


def spoil_dtype(small: Small) -> None:
    small.state[f"{QKV}.weight"] = torch.zeros(192, 64, dtype=torch.int8)


def spoil_embedding(small: Small) -> None:
    del small.state[EMBEDDING]


SPOILT: dict[str, tuple[Callable[[Small], None], tuple[str, ...]]] = {
    "unmerged LoRA": (spoil_lora, ("matrix_A.0 is a fine-tuning part", "merge_lora")),
    "P-tuning": (
        lambda small: small.state.update({"mixins.ptuning.prefix.0": torch.zeros(2)}),
        ("mixins.ptuning.prefix.0 is a fine-tuning part",),
    ),
    "another model": (
        lambda small: small.state.update({"mixins.foo.weight": torch.zeros(2)}),
        ("mixins.foo.weight is no VisualGLM tensor",),
    ),
    "shapes": (
        spoil_shape,
        (
            "transformer.final_layernorm.bias in mp_rank_00_model_states.pt has shape [63]",
            "image_encoder.glm_proj.bias [64] is missing",
            "transformer.layers.7.mlp.dense_4h_to_h.bias in",
        ),
    ),
    "quantised": (spoil_dtype, ("holds int8",)),
    "no embedding": (spoil_embedding, (f"{EMBEDDING} is missing",)),
    "no tensor": (
        lambda small: small.state.update({"step": 3}),
        ("'step', which is no plain tensor",),
    ),
}


@pytest.mark.parametrize("kind", SPOILT)
def test_weights_that_do_not_fit_are_refused_whole(small, kind):
    """Catches writing gigabytes that the engine then cannot load."""
    spoil, expected = SPOILT[kind]
    spoil(small)
    with pytest.raises(CheckpointError) as caught:
        small.convert()
    for said in expected:
        assert said in str(caught.value)
    assert small.leaves_nothing()


def test_a_pointer_instead_of_the_weights_is_recognised(small):
    """Catches "damaged, or holds more than tensors" for a clone without Git LFS."""
    (small.write() / "1" / SAT_FILE).write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(CheckpointError, match="git lfs pull"):
        convert_sat(small.source, small.target)


def test_model_parallel_parts_are_refused_with_advice(small):
    """Catches converting the first half of every matrix."""
    source = small.write()
    shutil.copy(source / "1" / SAT_FILE, source / "1" / "mp_rank_01_model_states.pt")
    with pytest.raises(CheckpointError, match="merge the parts first"):
        convert_sat(source, small.target)


class Touch:
    """Unpickled by an ordinary unpickler, this creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_a_pickle_that_runs_code_is_refused_unexecuted(small, tmp_path):
    """Catches weights_only=False for the sake of training states."""
    witness = tmp_path / "executed"
    small.state["transformer.trap"] = Touch(witness)
    with pytest.raises(CheckpointError, match="could run code"):
        small.convert()
    assert not witness.exists()


# --- files -----------------------------------------------------------------------------------


def move_up(source: Path) -> Path:
    (source / "latest").unlink()
    shutil.move(source / "1" / SAT_FILE, source / SAT_FILE)
    return source


def without_latest(source: Path) -> Path:
    (source / "latest").unlink()
    return source


FORMS: dict[str, Callable[[Path], Path]] = {
    "folder": lambda source: source,
    "no latest": without_latest,
    "the .pt file": lambda source: source / "1" / SAT_FILE,
    "the step's folder": lambda source: source / "1",
    "flat": move_up,
}


@pytest.mark.parametrize("form", FORMS)
def test_every_way_to_point_at_a_sat_form_works(small, form):
    """Catches a search that knows only the layout of the author's own folder."""
    report = convert_sat(FORMS[form](small.write()), small.target)
    assert report.num_tensors == 139


def second_step(source: Path) -> Path:
    (source / "latest").unlink()
    shutil.copytree(source / "1", source / "2")
    return source


def stale_latest(source: Path) -> Path:
    (source / "latest").write_text("9")
    return source


def no_config(source: Path) -> Path:
    (source / "model_config.json").unlink()
    return source


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (second_step, "2 checkpoints and no file latest"),
        (stale_latest, "latest names"),
        (no_config, "model_config.json is neither"),
        (lambda source: source.parent, "holds no mp_rank_00"),
    ],
)
def test_a_source_that_is_not_clear_is_refused(small, spoil, said):
    """Catches taking the first of several checkpoints, or a traceback for a missing file."""
    with pytest.raises(CheckpointError, match=said):
        convert_sat(spoil(small.write()), small.target)


def test_the_newest_step_is_the_one_latest_names(small):
    """Catches taking the first folder in alphabetical order."""
    source = small.write()
    newer = {"module": small.state | {EMBEDDING: torch.zeros(640, 64)}}
    (source / "300").mkdir()
    torch.save(newer, source / "300" / SAT_FILE)
    (source / "latest").write_text("300\n")
    convert_sat(source, small.target)
    assert not read_hub(small.target)[EMBEDDING].any()


@pytest.mark.parametrize("place", ["source", "file", "folder"])
def test_the_tokenizer_is_copied_from_where_it_is(small, tmp_path, place):
    """Catches a folder that lacks the one file without which it cannot be used."""
    source = small.write()
    folder = source if place == "source" else tmp_path / "chatglm-6b"
    folder.mkdir(exist_ok=True)
    (folder / "ice_text.model").write_bytes(b"pieces")
    given = {"source": None, "file": folder / "ice_text.model", "folder": folder}[place]
    report = convert_sat(source, small.target, tokenizer=given)
    assert (small.target / "ice_text.model").read_bytes() == b"pieces"
    assert report.tokenizer == "ice_text.model"


def test_a_missing_tokenizer_is_noted_or_refused(small):
    """Catches silence: SAT folders hold no tokenizer."""
    report = small.convert()
    assert report.tokenizer is None
    assert any("ice_text.model" in note for note in report.notes)
    with pytest.raises(ConfigError, match="does not exist"):
        convert_sat(small.source, small.target / "other", tokenizer=small.source / "nowhere")


def test_a_target_in_use_is_left_alone(small):
    """Catches overwriting a folder that holds something else."""
    small.target.mkdir()
    (small.target / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="exists and is not empty"):
        small.convert()
    assert [path.name for path in small.target.iterdir()] == ["notes.txt"]


def test_an_empty_target_is_filled(small):
    """Catches refusing the folder that the user has just made for it."""
    small.target.mkdir()
    small.convert()
    assert_same(read_hub(small.target), small.hub)


@pytest.mark.parametrize(
    ("error", "told"), [(KeyboardInterrupt, KeyboardInterrupt), (OSError, ConfigError)]
)
def test_an_interrupted_conversion_leaves_nothing(small, error, told):
    """Catches a half checkpoint that looks like a whole one."""
    seen: list[int] = []

    def stop(nbytes: int) -> None:
        seen.append(nbytes)
        if len(seen) == 50:
            raise error

    with pytest.raises(told):
        small.convert(on_tensor=stop)
    assert small.leaves_nothing()


def test_a_full_disk_is_noticed_before_writing(small, monkeypatch):
    """Catches filling the disk for ten minutes first."""
    usage = shutil._ntuple_diskusage(10, 9, 1)
    monkeypatch.setattr(convert.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ConfigError, match="1 bytes are free"):
        small.convert()
    assert small.leaves_nothing()


def test_wrong_options_are_one_error(small):
    """Catches a misspelt layout being taken for "interleaved"."""
    with pytest.raises(ConfigError) as caught:
        small.convert(qkv_layout="block", max_shard_bytes=0)
    assert len(caught.value.problems) == 2
