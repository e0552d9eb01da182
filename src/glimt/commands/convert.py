"""VisualGLM's SAT form -> the hub form: names, the order of QKV rows, and config.json.

The SAT form is what SwissArmyTransformer saves: model_config.json, a file `latest` naming a
folder, and in it mp_rank_00_model_states.pt. Sources: SwissArmyTransformer
sat/training/model_io.py (which keys are written, and which only when they differ from their
default), THUDM/VisualGLM-6B model_config.json and issue 200 (the two QKV orders).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from glimt.checkpoint import (
    Checkpoint,
    TensorInfo,
    list_state,
    read_pickle,
    refuse_stand_in,
)
from glimt.commands.writing import Piece, split, whole_folder, write_json, write_weights
from glimt.devices.base import open_device
from glimt.errors import CheckpointError, ConfigError
from glimt.models.base import BuildContext, find_family
from glimt.models.config_reader import ConfigReader, read_json
from glimt.models.visualglm import EVA_ONLY
from glimt.weights import plan_weights

QKV_LAYOUTS = ("auto", "blocks", "interleaved")
SAT_FILE = "mp_rank_00_model_states.pt"
TOKENIZER_FILE = "ice_text.model"


@dataclass(frozen=True, slots=True)
class ConvertReport:
    """What a conversion wrote.

    qkv_layout: order of the source's language QKV rows: "blocks" is all Q, all K, all V (sat from
        0.4.1 on), "interleaved" is Q, K, V per head, which is the hub's own order
    is_guess:   the layout was chosen by "auto": no file says which it is
    dropped:    tensors of the source that the hub form does not have
    tokenizer:  the copied tokenizer file, None if there was none
    """

    target: Path
    files: tuple[str, ...]
    num_tensors: int
    nbytes: int
    qkv_layout: str
    is_guess: bool
    dropped: tuple[str, ...]
    tokenizer: str | None

    def as_dict(self) -> dict[str, Any]:
        """The same as plain data, for JSON."""
        return {**asdict(self), "target": str(self.target), "notes": self.notes}

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know, one sentence each."""
        notes = []
        if self.is_guess:
            notes.append(_GUESS_NOTE.format(self.qkv_layout, *_GUESS_REASONS[self.qkv_layout]))
        if self.tokenizer is None:
            notes.append(f"no tokenizer was found; copy {TOKENIZER_FILE} of chatglm-6b there")
        return tuple(notes)


_GUESS_NOTE = (
    "the QKV layout {!r} is a guess: model_config.json {} pad_token_id; if the answers are "
    "nonsense, convert again with the layout {!r}"
)
_GUESS_REASONS = {"blocks": ("has", "interleaved"), "interleaved": ("has no", "blocks")}


def convert_sat(
    source: Path,
    target: Path,
    *,
    qkv_layout: str = "auto",
    tokenizer: Path | None = None,
    max_shard_bytes: int = 5 * 2**30,
    on_tensor: Callable[[int], None] | None = None,
) -> ConvertReport:
    """Write a hub-form folder from a SAT folder or its .pt file; dtypes are kept.

    tokenizer: ice_text.model or the folder it is in; looked for beside the source if None
    on_tensor: called with the bytes of each tensor written
    The target appears complete or not at all. Raises ConfigError and CheckpointError, each
    listing all it found, before anything is written.
    """
    _check_arguments(target, qkv_layout, max_shard_bytes)
    weights_file, config_file = _find_source(source)
    tokenizer_file = _find_tokenizer(tokenizer, weights_file)
    sat_config = read_json(config_file)
    config = hub_config(sat_config, str(config_file))
    layout = _guess_layout(sat_config) if qkv_layout == "auto" else qkv_layout
    state = _read_state(weights_file)
    names = _hub_names(state, weights_file)
    config["torch_dtype"] = str(state[_EMBEDDING].dtype).removeprefix("torch.")
    tensors = _check_fits(config, names, list_state(state, weights_file))

    def piece(info: TensorInfo) -> Piece:
        tensor = state[names[info.name]]
        return Piece((info,), lambda: [_hub_tensor(info.name, tensor, config, layout)])

    shards = split([piece(info) for info in tensors], max_shard_bytes)
    with whole_folder(target, sum(info.nbytes for info in tensors)) as folder:
        write_weights(folder, shards, on_tensor)
        write_json(folder / "config.json", config)
        if tokenizer_file:
            shutil.copyfile(tokenizer_file, folder / TOKENIZER_FILE)
    return ConvertReport(
        target=target,
        files=tuple(shards),
        num_tensors=len(tensors),
        nbytes=sum(info.nbytes for info in tensors),
        qkv_layout=layout,
        is_guess=qkv_layout == "auto",
        dropped=tuple(sorted(set(state) - set(names.values()))),
        tokenizer=TOKENIZER_FILE if tokenizer_file else None,
    )


def _check_arguments(target: Path, qkv_layout: str, max_shard_bytes: int) -> None:
    problems = []
    known = ", ".join(QKV_LAYOUTS)
    if qkv_layout not in QKV_LAYOUTS:
        problems.append(f"qkv_layout {qkv_layout!r} is unknown; choose one of {known}")
    if max_shard_bytes < 1:
        problems.append(f"max_shard_bytes is {max_shard_bytes}; it must be at least 1")
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        problems.append(f"target {target} exists and is not empty; choose another")
    if problems:
        raise ConfigError("convert", problems)


# --- the source ------------------------------------------------------------------------------


def _find_source(source: Path) -> tuple[Path, Path]:
    """The weight file and its model_config.json, which lies in its folder or the one above."""
    weights = source if source.is_file() else _weights_in(source)
    ranks = sorted(file.name for file in weights.parent.glob("mp_rank_*_model_states.pt"))
    if len(ranks) > 1:
        raise CheckpointError(str(weights.parent), [_SPLIT.format(", ".join(ranks))])
    for folder in (source, weights.parent, weights.parent.parent):
        if (folder / "model_config.json").is_file():
            return weights, folder / "model_config.json"
    said = "model_config.json is neither beside the weights nor in the folder above; copy it there"
    raise CheckpointError(str(weights), [said])


_SPLIT = (
    "is split for model parallelism ({}); merge the parts first: load it with "
    "SwissArmyTransformer with model_parallel_size 1 and save it again"
)


def _weights_in(folder: Path) -> Path:
    """The weight file of a SAT folder: the one that `latest` names, or the only one."""
    advice = "give VisualGLM's SAT folder, or its .pt file"
    if not folder.is_dir():
        raise CheckpointError(str(folder), [f"does not exist; {advice}"])
    if (folder / SAT_FILE).is_file():
        return folder / SAT_FILE
    if (folder / "latest").is_file():
        file = folder / (folder / "latest").read_text(encoding="utf-8").strip() / SAT_FILE
        if not file.is_file():
            raise CheckpointError(str(folder), [f"latest names {file}, which is missing"])
        return file
    found = sorted(folder.glob(f"*/{SAT_FILE}"))
    if len(found) == 1:
        return found[0]
    if found:
        said = f"holds {len(found)} checkpoints and no file latest; give the path of one {SAT_FILE}"
        raise CheckpointError(str(folder), [said])
    raise CheckpointError(
        str(folder), [f"holds no {SAT_FILE}, itself or one folder down; {advice}"]
    )


def _find_tokenizer(given: Path | None, weights: Path) -> Path | None:
    if given is not None:
        file = given / TOKENIZER_FILE if given.is_dir() else given
        if not file.is_file():
            raise ConfigError("tokenizer", [f"{file} does not exist"])
        return file
    beside = (folder / TOKENIZER_FILE for folder in (weights.parent, weights.parent.parent))
    return next((file for file in beside if file.is_file()), None)


def _read_state(file: Path) -> dict[str, Tensor]:
    """The state dict, which may lie under `module` beside the training's own state."""
    try:
        refuse_stand_in(file)
        state = read_pickle(file, _random_state_classes())
        state = state.get("module", state) if isinstance(state, Mapping) else state
        list_state(state, file)
    except CheckpointError as error:
        raise CheckpointError(str(file), error.problems) from error
    return dict(state)


def _random_state_classes() -> list[Any]:
    """What a pickled NumPy array calls: training saves NumPy's random state with the weights.

    Listed under the names of NumPy 1 and 2, because the file may come from either.
    """
    rebuild = np.zeros(1).__reduce__()[0]
    names = [f"numpy.{core}.multiarray._reconstruct" for core in ("core", "_core")]
    return [np.ndarray, np.dtype, np.dtypes.UInt32DType, *((rebuild, name) for name in names)]


# --- names and tensors -----------------------------------------------------------------------

_EMBEDDING = "transformer.word_embeddings.weight"
_PREFIXES = (
    ("mixins.eva.model.", "image_encoder."),
    ("mixins.chatglm-final.", ""),
    ("transformer.", "transformer."),
)
_DROPPED = (
    "transformer.position_embeddings.weight",  # made by every SAT model, not used by this one
    "mixins.eva.model.qformer.transformer.position_embeddings.weight",  # of 0 rows
    "*.inv_freq",  # computed, and ignored by the hub's loader as well
)
_UNMERGED = ("*.matrix_A.*", "*.matrix_B.*", "*.original.*", "mixins.ptuning.*", "mixins.lora.*")


def _hub_names(state: Mapping[str, Tensor], file: Path) -> dict[str, str]:
    """Hub name -> SAT name. Raises CheckpointError for names that are of another model."""
    names: dict[str, str] = {}
    problems = [] if _EMBEDDING in state else [f"{_EMBEDDING} is missing"]
    for name in state:
        if any(fnmatchcase(name, pattern) for pattern in _DROPPED):
            continue
        if any(fnmatchcase(name, pattern) for pattern in _UNMERGED):
            problems.append(f"{name} is a fine-tuning part; {_MERGE}")
        elif (hub := _hub_name(name)) is None:
            problems.append(f"{name} is no VisualGLM tensor")
        else:
            names[hub] = name
    if problems:
        raise CheckpointError(str(file), problems)
    return names


_MERGE = "merge it into the weights first (merge_lora of THUDM/VisualGLM-6B finetune_visualglm.py)"


def _hub_name(name: str) -> str | None:
    for sat, hub in _PREFIXES:
        if name.startswith(sat):
            return hub + name.removeprefix(sat)
    return None


def _check_fits(
    config: Mapping[str, Any], names: Mapping[str, str], found: Sequence[TensorInfo]
) -> list[TensorInfo]:
    """The tensors under their hub names, once our own model says that it can be filled by them."""
    by_sat_name = {info.name: info for info in found}
    tensors = [replace(by_sat_name[sat], name=hub) for hub, sat in names.items()]
    file = found[0].file
    family = find_family(config, str(file))
    parsed = family.config.from_json(config, str(file))
    context = BuildContext(open_device("cpu"), torch.float32, parsed.max_positions)
    checkpoint = Checkpoint(file.parent, (file,), {info.name: info for info in tensors})
    plan = plan_weights(checkpoint, family.build(parsed, context))
    if plan.problems:
        raise CheckpointError(str(file), plan.problems)
    return tensors


def _hub_tensor(name: str, tensor: Tensor, config: Mapping[str, Any], layout: str) -> Tensor:
    is_language_qkv = fnmatchcase(name, "transformer.layers.*.attention.query_key_value.*")
    if layout == "blocks" and is_language_qkv:
        return _interleave(tensor, config["num_attention_heads"])
    return tensor


def _interleave(tensor: Tensor, num_heads: int) -> Tensor:
    """Rows [all Q | all K | all V] -> [Q | K | V] head by head. [3 * hidden_size, …], a copy."""
    rows = tensor.unflatten(0, (3, num_heads, -1))
    return rows.transpose(0, 1).flatten(0, 2)


# --- config.json -----------------------------------------------------------------------------


def _guess_layout(sat: Mapping[str, Any]) -> str:
    # One release of sat, 0.4.1, both made [Q | K | V] blocks of the rows and added pad_token_id
    # to the model's arguments, which are what is written into model_config.json.
    return "blocks" if "pad_token_id" in sat else "interleaved"


def hub_config(sat: Mapping[str, Any], where: str) -> dict[str, Any]:
    """config.json from model_config.json; its torch_dtype stands in: only the weights tell it.

    Raises ConfigError listing every value that is missing or of another model. What SAT writes
    only if it differs from its default has that default here.
    """
    r = ConfigReader(sat, where)
    for name, only in _ONLY.items():
        r.may_only_be(name, only)
    hidden_size, bos = r.integer("hidden_size"), r.integer("bos_token_id", low=0)
    config = {
        "model_type": "chatglm",
        "architectures": ["ChatGLMModel"],
        "auto_map": dict(_AUTO_MAP),
        "vocab_size": r.integer("vocab_size"),
        "hidden_size": hidden_size,
        "num_layers": r.integer("num_layers"),
        "num_attention_heads": r.integer("num_attention_heads"),
        "inner_hidden_size": r.integer("inner_hidden_size", default=4 * hidden_size),
        "layernorm_epsilon": r.number("layernorm_epsilon", default=1e-5),
        "use_cache": True,
        "bos_token_id": bos,
        # SAT takes it from the tokenizer, where <eop> follows <sop>.
        "eos_token_id": r.integer("eos_token_id", low=0, default=bos + 1),
        "mask_token_id": r.integer("mask_token_id", low=0),
        "gmask_token_id": r.integer("gmask_token_id", low=0),
        # A constant in sat before 0.4.1.
        "pad_token_id": r.integer("pad_token_id", low=0, default=3),
        "max_sequence_length": r.integer("max_sequence_length"),
        "position_encoding_2d": True,
        "torch_dtype": "float32",
        "image_length": r.integer("image_length"),
        "quantization_bit": 0,
        "eva_config": _eva_config(r),
        "qformer_config": _qformer_config(r),
    }
    r.check()
    return config


_ONLY: Mapping[str, Any] = {"layernorm_order": "post", "model_parallel_size": 1, "use_bias": True}
_AUTO_MAP: Mapping[str, str] = {
    "AutoConfig": "configuration_chatglm.ChatGLMConfig",
    "AutoModel": "modeling_chatglm.ChatGLMForConditionalGenerationWithImage",
}


def _eva_config(r: ConfigReader) -> dict[str, Any]:
    part = _part(r, "eva")
    for name, only in EVA_ONLY.items():
        part.must_be(name, only)
    for name in ("num_layers", "hidden_size", "num_attention_heads", "inner_hidden_size"):
        part.integer(name)
    for name in ("max_sequence_length", "patch_size"):
        part.integer(name)
    part.number("layernorm_epsilon")
    part.size("image_size")
    return dict(part.raw)


def _qformer_config(r: ConfigReader) -> dict[str, Any]:
    part = _part(r, "qformer")
    part.must_be("layernorm_order", "post")
    for name in ("hidden_size", "num_attention_heads", "vocab_size", "cross_attn_hidden_size"):
        part.integer(name)
    part.flags("is_decoder", part.integer("num_layers"), "num_layers")
    part.number("layernorm_epsilon")
    return dict(part.raw)


def _part(r: ConfigReader, name: str) -> ConfigReader:
    """The object that SAT calls …_args; the hub's name for it, …_config, is taken as well."""
    return r.section(f"{name}_config" if f"{name}_config" in r.raw else f"{name}_args")
