"""What a model folder holds and what running it takes, from headers and config.json alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from glimt.checkpoint import WEIGHT_DTYPES, Checkpoint
from glimt.devices.base import open_device
from glimt.loader import Findings, ModelFolder, build_model, read_folder
from glimt.models.base import VISION_MODULES, BuildContext, Model
from glimt.quant.base import NONE, QuantFormat
from glimt.quant.plan import plan_formats
from glimt.weights import LoadPlan, WeightFormats, plan_weights

GroupName = Literal["language", "vision", "other"]


@dataclass(frozen=True, slots=True)
class TensorGroup:
    """Checkpoint tensors of one purpose; "other" are those that no parameter takes."""

    name: GroupName
    num_tensors: int
    num_elements: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class CheckpointSummary:
    """A model folder in numbers.

    quantised:          format of each role's weights in the files, where one is not "none"
    files:              bytes by file name
    dtypes:             tensors by dtype
    num_parameters:     of the model, whatever the files hold
    weight_bytes:       memory for the parameters, by the dtype they are loaded in
    kv_bytes_per_token: memory for one cached token, by dtype
    problems:           why the folder cannot be loaded; empty if it can
    """

    folder: str
    family: str
    declared_dtype: str
    context_tokens: int
    vocab_size: int
    num_parameters: int
    quantised: Mapping[str, str]
    files: Mapping[str, int]
    dtypes: Mapping[str, int]
    groups: tuple[TensorGroup, ...]
    weight_bytes: Mapping[str, int]
    kv_bytes_per_token: Mapping[str, int]
    problems: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """The same as plain data, for JSON."""
        return asdict(self)


def describe(folder: Path) -> CheckpointSummary:
    """Summarise a model folder and check its weight files against its config.json.

    Raises ConfigError, or CheckpointError if there is more to tell, where config.json is missing,
    wrong or of no family that is known; what is wrong with tokenizer and weights is listed in
    `problems` instead.
    """
    found = read_folder(folder)
    context = BuildContext(open_device("cpu"), torch.float32, found.config.max_positions)
    model = build_model(found, context)
    stored = plan_formats(model, found.stored)
    plan = plan_weights(found.checkpoint, model, WeightFormats(stored=stored))
    problems = [*Findings(folder, found.errors).problems(), *plan.problems]
    return _summary(found, model, stored, plan, problems)


def _summary(
    found: ModelFolder,
    model: Model,
    stored: Mapping[str, QuantFormat],
    plan: LoadPlan,
    problems: Sequence[str],
) -> CheckpointSummary:
    config, checkpoint = found.config, found.checkpoint
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    num_cached = 2 * model.num_layers * model.num_kv_heads * model.head_dim  # keys and values
    dtypes = Counter(_name(info.dtype) for info in checkpoint.tensors.values())
    return CheckpointSummary(
        folder=str(checkpoint.folder),
        family=found.family.name,
        declared_dtype=config.torch_dtype,
        context_tokens=config.context_tokens,
        vocab_size=config.vocab_size,
        num_parameters=num_parameters,
        quantised={role: name for role, name in asdict(found.stored).items() if name != NONE},
        files={file.name: file.stat().st_size for file in checkpoint.files},
        dtypes=dict(sorted(dtypes.items())),
        groups=_groups(checkpoint, plan),
        weight_bytes=_weight_bytes(model, stored),
        kv_bytes_per_token=_by_dtype(num_cached),
        problems=tuple(problems),
    )


def _groups(checkpoint: Checkpoint, plan: LoadPlan) -> tuple[TensorGroup, ...]:
    module_of = {
        source: step.targets[0].partition(".")[0] for step in plan.steps for source in step.sources
    }
    members: dict[GroupName, list[str]] = {"language": [], "vision": [], "other": []}
    for name in checkpoint.tensors:
        members[_group_of(module_of.get(name))].append(name)
    return tuple(_group(name, members[name], checkpoint) for name in members)


def _group_of(module: str | None) -> GroupName:
    if module is None:
        return "other"
    return "vision" if module in VISION_MODULES else "language"


def _group(name: GroupName, members: Sequence[str], checkpoint: Checkpoint) -> TensorGroup:
    tensors = [checkpoint.tensors[member] for member in members]
    nbytes = sum(info.nbytes for info in tensors)
    elements = sum(info.nbytes // info.dtype.itemsize for info in tensors)
    return TensorGroup(name, len(tensors), elements, nbytes)


def _weight_bytes(model: Model, stored: Mapping[str, QuantFormat]) -> dict[str, int]:
    """What is quantised has its size in the files, whatever the dtype of the rest."""
    shapes = {name: value.shape for name, value in model.named_parameters()}
    quantised = sum(
        part.nbytes
        for name, chosen in stored.items()
        for part in chosen.stored(*shapes[name]).values()
    )
    floats = sum(shape.numel() for name, shape in shapes.items() if name not in stored)
    return {name: nbytes + quantised for name, nbytes in _by_dtype(floats).items()}


def _by_dtype(num_elements: int) -> dict[str, int]:
    return {_name(dtype): num_elements * dtype.itemsize for dtype in WEIGHT_DTYPES}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
