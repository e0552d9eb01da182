"""Checkpoint tensors -> parameters, streamed. The names live with the model.

plan_weights  decides which tensors become which parameters, and finds all that is wrong
load_weights  fills the parameters, one tensor at a time

Every check is made before any data is read. Peak memory is the finished model and one tensor;
where the checkpoint's dtype is the wanted one and the device is the CPU, a parameter is the
mapped file itself, so a second process on the same machine shares its pages.

A weight may be quantised (quant/): by the checkpoint, whose tensors are then its parts, or here,
from the checkpoint's own floats and before they are cast.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor, nn

from glimt.checkpoint import WEIGHT_DTYPES, Checkpoint, Shape, TensorInfo, open_reader
from glimt.errors import CheckpointError
from glimt.layers.linear import Product
from glimt.models.base import VISION_MODULES, Model, Weight, WeightTable
from glimt.models.config_reader import either
from glimt.parallel import Shard
from glimt.quant.base import QuantFormat, QuantisedWeight, TakesQuantised, part_of

Formats = Mapping[str, QuantFormat]  # by parameter name
Chooses: TypeAlias = Callable[[str], bool]  # by parameter name

_LARGE_BYTES = 256 * 2**20  # embeddings and heads in 16 bits; no other matrix is as large


# --- what goes where -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LoadStep:
    """A line of the weight table with its numbers filled in.

    stored: the format in which the files hold the one target, whose parts are the sources
    """

    line: Weight
    sources: tuple[str, ...]
    targets: tuple[str, ...]
    stored: QuantFormat | None = None


@dataclass(frozen=True, slots=True)
class WeightFormats:
    """Which parameters are quantised; no parameter is in both.

    stored: they are so in the checkpoint
    wanted: they are made so from its floats
    """

    stored: Formats = field(default_factory=dict)
    wanted: Formats = field(default_factory=dict)


AS_FLOATS = WeightFormats()


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """How a checkpoint fills a model, and everything that stands against it.

    nbytes: what load_weights will report to on_tensor in all
    """

    steps: tuple[LoadStep, ...]
    problems: tuple[str, ...]
    nbytes: int


def every_parameter(name: str) -> bool:
    """Whatever it is called."""
    return True


def is_vision(name: str) -> bool:
    """Whether a parameter of this name is something that only pictures pass through."""
    return name.partition(".")[0] in VISION_MODULES


def plan_weights(
    checkpoint: Checkpoint,
    model: Model,
    formats: WeightFormats = AS_FLOATS,
    chooses: Chooses = every_parameter,
) -> LoadPlan:
    """Match a checkpoint's tensors with a model's parameters by name and shape.

    chooses: the parameters that are to be filled; the tensors of the others must be right as well
    The plan's problems are those of the files, then those of the tensors.
    """
    shapes = full_shapes(model)
    steps = [
        _as_stored(step, shapes, formats.stored) for step in _expand(model.weight_table, shapes)
    ]
    tensors = checkpoint.tensors
    problems = [*checkpoint.problems]
    problems += [text for step in steps for text in _step_problems(step, shapes, checkpoint)]
    sources = [name for step in steps for name in step.sources]
    problems += _unexpected(model.weight_table, set(sources), tensors)
    chosen = [step for step in steps if any(map(chooses, step.targets))]
    read = [name for step in chosen for name in step.sources if name in tensors]
    nbytes = sum(tensors[name].nbytes for name in read)
    return LoadPlan(tuple(chosen), tuple(problems), nbytes)


_DIGEST_VALUES = 1024  # of each tensor's beginning and end: nothing large is read whole


def tower_digest(checkpoint: Checkpoint, model: Model, formats: WeightFormats = AS_FLOATS) -> str:
    """SHA-256 of the tensors that only pictures pass through: which tower it is, at little cost.

    Of each tensor the name, shape and dtype count, and its first and last values.
    """
    plan = plan_weights(checkpoint, model, formats, is_vision)
    names = sorted({name for step in plan.steps for name in step.sources})
    digests: dict[str, bytes] = {}
    for file in {checkpoint.tensors[name].file for name in names}:
        with (checkpoint.open_reader or open_reader)(file) as read:
            here = [name for name in names if checkpoint.tensors[name].file == file]
            digests.update((name, _tensor_digest(name, read(name))) for name in here)
    joined = b"".join(digests[name] for name in names)
    return f"sha256:{hashlib.sha256(joined).hexdigest()}"


def _tensor_digest(name: str, tensor: Tensor) -> bytes:
    """Of a tensor of any shape."""
    values = tensor.flatten()
    ends = torch.cat((values[:_DIGEST_VALUES], values[-_DIGEST_VALUES:]))
    said = f"{name} {list(tensor.shape)} {_dtype_name(tensor.dtype)}\n"
    return hashlib.sha256(said.encode() + ends.view(torch.uint8).numpy().tobytes()).digest()


def full_shapes(model: nn.Module) -> dict[str, Shape]:
    """Each parameter's shape before it was divided among ranks."""
    shards = shards_of(model)
    return {
        name: shards[name].full_shape(tuple(value.shape)) if name in shards else tuple(value.shape)
        for name, value in model.named_parameters()
    }


def shards_of(model: nn.Module) -> dict[str, Shard]:
    """What of the checkpoint's tensor is here, by parameter; not those that are here whole."""
    return {
        f"{name}.{parameter}": shard
        for name, module in model.named_modules()
        for parameter, shard in getattr(module, "shards", {}).items()
    }


def checkpoint_shapes(model: Model) -> dict[str, Shape]:
    """Every tensor that a checkpoint of this model must hold, by its name there."""
    shapes = full_shapes(model)
    return {
        name: tuple(shape)
        for step in _expand(model.weight_table, shapes)
        for name, shape in zip(step.sources, _source_shapes(step, shapes), strict=True)
    }


def checkpoint_names(model: Model) -> dict[str, str]:
    """Parameter name -> its name in a checkpoint, for writing one.

    Only for tables that rename: a line that converts cannot be turned round.
    """
    shapes = full_shapes(model)
    steps = _expand(model.weight_table, shapes)
    assert all(step.line.convert is None for step in steps), "this family's layout is converted"
    return {step.targets[0]: step.sources[0] for step in steps}


def _expand(table: WeightTable, parameters: Collection[str]) -> list[LoadStep]:
    """Every line once for each number with which its first target is a parameter."""
    steps = [step for line in table.weights for step in _expand_line(line, parameters)]
    filled = Counter(target for step in steps for target in step.targets)
    wrong = [name for name in {*filled, *parameters} if filled[name] != 1 or name not in parameters]
    assert not wrong, f"the weight table does not fill these exactly once: {sorted(wrong)}"
    return steps


def _expand_line(line: Weight, parameters: Collection[str]) -> Iterator[LoadStep]:
    pattern = re.escape(line.targets[0]).replace(r"\{i\}", r"(\d+)", 1).replace(r"\{i\}", r"\1")
    for match in filter(None, (re.fullmatch(pattern, name) for name in parameters)):
        number = match.group(match.lastindex or 0)
        yield LoadStep(
            line,
            tuple(name.replace("{i}", number) for name in line.sources),
            tuple(name.replace("{i}", number) for name in line.targets),
        )


def _as_stored(step: LoadStep, shapes: Mapping[str, Shape], stored: Formats) -> LoadStep:
    """The step with the parts of its quantised target as sources, if the files hold those.

    A line that converts is left alone: its sources are no matrices of the model.
    """
    chosen = stored.get(step.targets[0])
    if chosen is None or step.line.convert is not None:
        return step
    n, k = shapes[step.targets[0]]
    endings = chosen.stored(n, k)
    return replace(
        step, sources=tuple(step.sources[0] + ending for ending in endings), stored=chosen
    )


def _source_shapes(step: LoadStep, shapes: Mapping[str, Shape]) -> Sequence[Shape]:
    """Shapes the checkpoint must have; a `convert` without `source_shapes` keeps them."""
    wanted = [shapes[target] for target in step.targets]
    if step.stored:
        return [part.shape for part in step.stored.stored(*wanted[0]).values()]
    return step.line.source_shapes(wanted) if step.line.source_shapes else wanted


def _step_problems(
    step: LoadStep, shapes: Mapping[str, Shape], checkpoint: Checkpoint
) -> Iterator[str]:
    needed = zip(
        step.sources, _source_shapes(step, shapes), _source_dtypes(step, shapes), strict=True
    )
    for name, shape, dtypes in needed:
        info = checkpoint.tensors.get(name)
        if info is None:
            if not checkpoint.is_hidden(name):
                yield f"{name} {list(shape)} is missing"
        elif info.shape != tuple(shape):
            yield f"{info} has shape {list(info.shape)}, but {list(shape)} is needed"
        elif info.dtype not in dtypes:
            kinds = either([_dtype_name(dtype) for dtype in dtypes])
            yield f"{info} holds {_dtype_name(info.dtype)}, but {kinds} is needed"


def _source_dtypes(
    step: LoadStep, shapes: Mapping[str, Shape]
) -> Iterator[tuple[torch.dtype, ...]]:
    """Dtypes each source may have: any float where a float is meant."""
    if step.stored is None:
        yield from [WEIGHT_DTYPES] * len(step.sources)
        return
    n, k = shapes[step.targets[0]]
    for part in step.stored.stored(n, k).values():
        yield WEIGHT_DTYPES if part.dtype.is_floating_point else (part.dtype,)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _unexpected(table: WeightTable, used: set[str], tensors: Mapping[str, TensorInfo]) -> list[str]:
    return [
        f"{info} is unexpected: no parameter takes it"
        for name, info in tensors.items()
        if name not in used and not any(fnmatchcase(name, pattern) for pattern in table.ignored)
    ]


# --- filling the parameters ------------------------------------------------------------------


def load_weights(
    checkpoint: Checkpoint,
    model: Model,
    dtype: torch.dtype,
    torch_device: torch.device,
    on_tensor: Callable[[int], None] | None = None,
    formats: WeightFormats = AS_FLOATS,
    chooses: Chooses = every_parameter,
) -> None:
    """Fill the parameters of a model on the meta device, file by file.

    dtype:     of the parameters that are not quantised
    chooses:   which parameters; the others stay on the meta device
    on_tensor: called with the bytes of each checkpoint tensor that is done
    Raises CheckpointError, before any data is read, listing every tensor that is missing,
    unexpected, of another shape or of a dtype that is no weight's.
    """
    plan = plan_weights(checkpoint, model, formats, chooses)
    if plan.problems:
        raise CheckpointError(str(checkpoint.folder), plan.problems)
    steps = _largest_first(plan.steps, checkpoint.tensors)
    fill = _Filler(_places(model), formats.wanted, shards_of(model), dtype, torch_device)
    held: dict[tuple[str, ...], dict[str, Tensor]] = {}  # by targets: sources that wait for others
    for file in _largest_files_first(checkpoint):
        for step, sources in _read_steps(file, steps, checkpoint, held):
            fill(step, sources)
            if on_tensor:
                _report(step, checkpoint.tensors, on_tensor)
    assert not held, f"sources never completed: {sorted(held)}"


def _largest_first(steps: Sequence[LoadStep], tensors: Mapping[str, TensorInfo]) -> list[LoadStep]:
    """Steps in their order, but for embeddings and heads, which come before all others.

    The peak is what is loaded already plus the tensor in hand, and these are a gigabyte each.
    """
    return sorted(steps, key=lambda step: -(_step_bytes(step, tensors) // _LARGE_BYTES))


def _largest_files_first(checkpoint: Checkpoint) -> list[Path]:
    """Files in their order, those with an embedding or a head before the others."""
    most: Counter[Path] = Counter()
    for info in checkpoint.tensors.values():
        most[info.file] = max(most[info.file], info.nbytes // _LARGE_BYTES)
    return sorted(checkpoint.files, key=lambda file: -most[file])


def _step_bytes(step: LoadStep, tensors: Mapping[str, TensorInfo]) -> int:
    return sum(tensors[name].nbytes for name in step.sources)


def _report(
    step: LoadStep, tensors: Mapping[str, TensorInfo], on_tensor: Callable[[int], None]
) -> None:
    for name in step.sources:
        on_tensor(tensors[name].nbytes)


def _read_steps(
    file: Path,
    steps: Sequence[LoadStep],
    checkpoint: Checkpoint,
    held: dict[tuple[str, ...], dict[str, Tensor]],
) -> Iterator[tuple[LoadStep, list[Tensor]]]:
    """Steps that this file completes, with their sources; the rest of them goes into `held`."""
    with (checkpoint.open_reader or open_reader)(file) as read:
        for step in steps:
            here = [name for name in step.sources if checkpoint.tensors[name].file == file]
            if not here:
                continue
            sources = held.setdefault(step.targets, {})
            sources.update((name, read(name)) for name in here)
            if len(sources) == len(set(step.sources)):
                del held[step.targets]
                yield step, [sources.pop(name) for name in step.sources]


Places: TypeAlias = Mapping[str, Sequence[tuple[nn.Module, str]]]


@dataclass(frozen=True, slots=True)
class _Filler:
    """Makes parameters of a step's sources: of those that are divided, this rank's part.

    Mapped files are read where they are touched, so a part costs no more than itself.
    """

    places: Places
    wanted: Formats
    shards: Mapping[str, Shard]
    dtype: torch.dtype
    torch_device: torch.device

    def __call__(self, step: LoadStep, sources: list[Tensor]) -> None:
        """Make one step's parameters; empties `sources`, so that each is freed at once."""
        if step.stored:
            self._restore(step, step.stored, sources)
            return
        results = list(step.line.convert(sources) if step.line.convert else sources)
        sources.clear()
        for target in step.targets:
            self._make(target, results.pop(0))
        assert not results, f"convert gave more tensors than {step.targets}"

    def _restore(self, step: LoadStep, stored: QuantFormat, sources: list[Tensor]) -> None:
        (target,) = step.targets
        module, attribute = self.places[target][0]
        shard, shape = self.shards.get(target), getattr(module, attribute).shape
        n, k = shard.full_shape(shape) if shard else shape
        parts = dict(zip(stored.stored(n, k), sources, strict=True))
        weight = stored.restore(parts, n, k)
        part = part_of(weight, shard) if shard else weight
        _place_quantised(part.to(self.torch_device), self.places[target])

    def _make(self, target: str, tensor: Tensor) -> None:
        if target in self.shards:
            tensor = self.shards[target].of(tensor)
        if target in self.wanted:
            # Of the checkpoint's own values: float16 has three bits more than bfloat16.
            quantised = self.wanted[target].quantise(tensor)
            _place_quantised(quantised.to(self.torch_device), self.places[target])
        else:
            cast = tensor.to(self.torch_device, self.dtype)
            _place(cast.contiguous(), self.places[target])


def _places(model: Model) -> dict[str, list[tuple[nn.Module, str]]]:
    """Where each parameter hangs, by its first name: a tied one hangs in several modules."""
    places: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
    names: dict[nn.Parameter, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner, _, attribute = name.rpartition(".")
        names.setdefault(parameter, name)
        places.setdefault(parameter, []).append((model.get_submodule(owner), attribute))
    return {names[parameter]: found for parameter, found in places.items()}


def _place(tensor: Tensor, places: Sequence[tuple[nn.Module, str]]) -> None:
    parameter = nn.Parameter(tensor, requires_grad=False)
    for module, attribute in places:
        expected = getattr(module, attribute).shape
        assert parameter.shape == expected, f"{attribute}: {parameter.shape}, not {expected}"
        if attribute == "weight" and isinstance(module, Product):
            module.hold(parameter)  # which the device may lay out anew
        else:
            setattr(module, attribute, parameter)


def _place_quantised(weight: QuantisedWeight, places: Sequence[tuple[nn.Module, str]]) -> None:
    for module, attribute in places:
        assert isinstance(module, TakesQuantised), "the plan names the weights of linears only"
        expected = getattr(module, attribute).shape
        assert (weight.n, weight.k) == expected, f"[{weight.n}, {weight.k}], not {expected}"
        module.set_weight(weight)
