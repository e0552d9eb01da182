"""`glimt quantize`: a model folder -> one whose weights are in few bits."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glimt.checkpoint import TensorInfo, open_reader
from glimt.commands.writing import Piece, split, whole_folder, write_json, write_weights
from glimt.devices.base import open_device
from glimt.errors import ConfigError
from glimt.loader import Findings, ModelFolder, build_model, model_folder, read_folder
from glimt.models.base import BuildContext, Model
from glimt.models.config_reader import read_model_config
from glimt.quant.base import QuantFormat, find_format
from glimt.quant.plan import AUTO, CONFIG_KEY, QuantOptions, plan_formats
from glimt.weights import Formats, LoadPlan, LoadStep, plan_weights

_MAX_SHARD_BYTES = 5 * 2**30
# What else belongs to a model folder: configuration, tokenizer, cards. Never code.
_KEPT_ENDINGS = frozenset({".json", ".md", ".txt", ".model", ".tiktoken", ".jinja"})
_KEPT_STARTS = ("license", "model_license", "notice")


@dataclass(frozen=True, slots=True)
class QuantizeReport:
    """What was written.

    formats:     name by role, "none" for what stays as it is
    num_weights: that are quantised
    source_bytes, nbytes: of all tensors, in the source and here
    """

    target: Path
    formats: Mapping[str, str]
    files: tuple[str, ...]
    num_weights: int
    source_bytes: int
    nbytes: int

    def as_dict(self) -> dict[str, Any]:
        """The same as plain data, for JSON."""
        return {
            "target": str(self.target),
            "formats": dict(self.formats),
            "files": list(self.files),
            "num_weights": self.num_weights,
            "source_bytes": self.source_bytes,
            "nbytes": self.nbytes,
        }


@dataclass(frozen=True, slots=True, eq=False)
class QuantizeJob:
    """A conversion whose every check has passed and of which nothing is written yet."""

    found: ModelFolder
    target: Path
    options: QuantOptions
    pieces: tuple[Piece, ...]
    num_weights: int
    source_bytes: int
    sources: _Sources

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors to write."""
        return sum(piece.nbytes for piece in self.pieces)


def plan_quantize(
    source: Path, target: Path, options: QuantOptions, force: bool = False
) -> QuantizeJob:
    """Check everything that can be checked before a weight is read.

    force: a model folder at `target` is to be replaced
    Raises ConfigError and CheckpointError, each listing all it found.
    """
    _check_names(options)
    folder = model_folder(str(source))
    found = read_folder(folder)
    _check(found, target, options, force)
    context = BuildContext(open_device("cpu"), torch.float32, found.config.max_positions)
    model = build_model(found, context)
    plan = plan_weights(found.checkpoint, model)
    if found.errors or plan.problems:
        raise Findings(folder, found.errors).error(plan.problems)
    formats = plan_formats(model, options)
    _check_lines(plan, formats)
    sources = _Sources(found.checkpoint.tensors)
    return QuantizeJob(
        found=found,
        target=target,
        options=options,
        pieces=tuple(_pieces(plan, model, formats, sources)),
        num_weights=len(formats),
        source_bytes=plan.nbytes,
        sources=sources,
    )


def quantize(
    job: QuantizeJob,
    on_bytes: Callable[[int], None] | None = None,
    max_shard_bytes: int = _MAX_SHARD_BYTES,
) -> QuantizeReport:
    """Write the target: complete or, on any error, not at all.

    on_bytes: called with the bytes written, of job.nbytes in all
    Peak memory is the largest weight and what quantising it takes.
    """
    shards = split(job.pieces, max_shard_bytes)
    settled = job.options.as_config()
    folder = job.found.checkpoint.folder
    with whole_folder(job.target, job.nbytes, is_replaced=True) as partial:
        with job.sources:
            write_weights(partial, shards, on_bytes)
        _copy_companions(folder, partial, job.found.family.tokenizer.file)
        write_json(partial / "config.json", read_model_config(folder) | {CONFIG_KEY: settled})
    return QuantizeReport(
        target=job.target,
        formats={role: name for role, name in settled.items() if role != "version"},
        files=tuple(shards),
        num_weights=job.num_weights,
        source_bytes=job.source_bytes,
        nbytes=job.nbytes,
    )


# --- checks ----------------------------------------------------------------------------------


def _check_names(options: QuantOptions) -> None:
    """By the names that this command gives them; loading has others for the same."""
    find_format(options.blocks, "format")
    find_format(options.tower, "tower")
    if options.head != AUTO:
        find_format(options.head, "head")


def _check(found: ModelFolder, target: Path, options: QuantOptions, force: bool) -> None:
    folder = found.checkpoint.folder
    if options.settled().is_none:
        raise ConfigError(
            "quantize", ["every format is none; choose one with --format, --head or --tower"]
        )
    if not found.stored.is_none:
        said = "is quantised already; give the unquantised checkpoint that it was made of"
        raise ConfigError(str(folder), [said])
    own, new = folder.resolve(), target.resolve()
    if own == new or own in new.parents or new in own.parents:
        raise ConfigError("target", [f"{target} is, holds or lies in the source; choose another"])
    is_free = not target.exists() or (target.is_dir() and not any(target.iterdir()))
    if not is_free and not (force and (target / "config.json").is_file()):
        advice = "a model folder is replaced with --force; choose another otherwise"
        raise ConfigError("target", [f"{target} exists and is not empty; {advice}"])


def _check_lines(plan: LoadPlan, formats: Formats) -> None:
    """What a family converts while loading has no matrix in the files that could be quantised."""
    converted = [
        target
        for step in plan.steps
        if step.line.convert is not None
        for target in step.targets
        if target in formats
    ]
    if converted:
        said = f"{converted[0]} is converted while loading; quantise such a family with --quant"
        raise ConfigError("quantize", [said])


# --- what is written -------------------------------------------------------------------------


class _Sources:
    """Tensors of the source's files, with one file open at a time."""

    def __init__(self, tensors: Mapping[str, TensorInfo]) -> None:
        self.tensors = tensors
        self._file: Path | None = None
        self._open: Any = None
        self._read: Callable[[str], Tensor] | None = None

    def read(self, name: str) -> Tensor:
        """A tensor, mapped rather than read where its file can be."""
        file = self.tensors[name].file
        if file != self._file:
            self.close()
            self._open = open_reader(file)
            self._read, self._file = self._open.__enter__(), file
        assert self._read is not None
        return self._read(name)

    def close(self) -> None:
        if self._open is not None:
            self._open.__exit__(None, None, None)
        self._open = self._read = self._file = None

    def __enter__(self) -> _Sources:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _pieces(plan: LoadPlan, model: Model, formats: Formats, sources: _Sources) -> Iterator[Piece]:
    """In the order of the source's files, so that each is opened once."""
    shapes = {name: tuple(value.shape) for name, value in model.named_parameters()}
    by_file = sorted(plan.steps, key=lambda step: sources.tensors[step.sources[0]].file.name)
    for step in by_file:
        chosen = formats.get(step.targets[0])
        if chosen is None:
            for name in step.sources:
                yield Piece((sources.tensors[name],), _Copied(sources, name))
        else:
            yield _quantised_piece(step, shapes[step.targets[0]], chosen, sources)


def _quantised_piece(
    step: LoadStep, shape: tuple[int, ...], chosen: QuantFormat, sources: _Sources
) -> Piece:
    info = sources.tensors[step.sources[0]]
    n, k = shape
    tensors = tuple(
        replace(info, name=info.name + ending, shape=part.shape, dtype=part.dtype)
        for ending, part in chosen.stored(n, k).items()
    )
    return Piece(tensors, _Quantised(sources, info.name, chosen))


@dataclass(frozen=True, slots=True)
class _Copied:
    sources: _Sources
    name: str

    def __call__(self) -> list[Tensor]:
        return [self.sources.read(self.name)]


@dataclass(frozen=True, slots=True)
class _Quantised:
    sources: _Sources
    name: str
    chosen: QuantFormat

    def __call__(self) -> list[Tensor]:
        weight = self.chosen.quantise(self.sources.read(self.name))
        return list(self.chosen.parts(weight).values())


def _copy_companions(folder: Path, target: Path, tokenizer: str) -> None:
    """Tokenizer, settings and cards; neither weights nor their index, nor code."""
    for file in sorted(folder.iterdir()):
        is_card = file.name.lower().startswith(_KEPT_STARTS)
        is_kept = file.suffix in _KEPT_ENDINGS or is_card or file.name == tokenizer
        is_written = file.name == "config.json" or file.name.endswith(".index.json")
        if file.is_file() and is_kept and not is_written and not file.name.startswith("."):
            shutil.copyfile(file, target / file.name)
