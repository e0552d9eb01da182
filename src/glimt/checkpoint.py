"""Checkpoint files -> names, shapes, dtypes and, when asked, tensors. Knows no model.

Headers are parsed here with checked arithmetic, so that a damaged or hostile file is told before
any of its data is read; pickles go through torch's restricted unpickler only.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from glimt.errors import CheckpointError, ConfigError
from glimt.models.config_reader import LFS_HEAD, LFS_SAID, SAT_SAID, read_json

WEIGHT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a file says of one tensor, known without reading its data."""

    name: str
    file: Path
    shape: Shape
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of its data in the file."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.name} in {self.file.name}"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A folder's weight files and the tensors in them, by name.

    problems: what is wrong with the files
    hidden:   names of which `problems` tells already why they are not in `tensors`; None if that
        may be any name, because no index says what a file that cannot be read holds
    open_reader: opens one of `files`, where these are no files on a disk; None: `open_reader` below
    """

    folder: Path
    files: tuple[Path, ...]
    tensors: Mapping[str, TensorInfo]
    problems: tuple[str, ...] = ()
    hidden: frozenset[str] | None = frozenset()
    open_reader: Callable[[Path], AbstractContextManager[Callable[[str], Tensor]]] | None = None

    def is_hidden(self, name: str) -> bool:
        """Whether a tensor's absence from `tensors` is, or may be, no problem of its own."""
        return self.hidden is None or name in self.hidden


# --- which files -----------------------------------------------------------------------------

_FORMATS = (("model.safetensors", "*.safetensors"), ("pytorch_model.bin", "pytorch_model-*.bin"))


def open_checkpoint(folder: Path) -> Checkpoint:
    """List the tensors of a model folder. Raises CheckpointError if anything is wrong."""
    checkpoint = scan_checkpoint(folder)
    if checkpoint.problems:
        raise CheckpointError(str(folder), checkpoint.problems)
    return checkpoint


def scan_checkpoint(folder: Path) -> Checkpoint:
    """List the tensors of a model folder: safetensors if it has any, else pytorch_model .bin.

    What is wrong with each file goes into `problems`, and the sound files are listed all the
    same: missing, truncated, damaged, a Git LFS pointer, a web page, or a pickle that holds more
    than tensors.
    """
    problems: list[str] = []
    files, index = _find_files(folder, problems)
    tensors: dict[str, TensorInfo] = {}
    is_whole, read = not problems, []
    for file in files:
        try:
            _add_tensors(_list_tensors(file, problems), tensors, problems)
            read.append(file.name)
        except CheckpointError as error:
            problems += [f"{file.name} {problem}" for problem in error.problems]
            is_whole = False
    if index is None:
        hidden = frozenset[str]() if is_whole else None
    else:
        problems += _index_problems(index, tensors, read)
        hidden = frozenset(index) - tensors.keys()
    return Checkpoint(folder, tuple(files), tensors, tuple(problems), hidden)


def _find_files(folder: Path, problems: list[str]) -> tuple[list[Path], dict[str, str] | None]:
    """The weight files and, where there is an index, the file name of each tensor."""
    for name, pattern in _FORMATS:
        if (folder / name).is_file():
            return [folder / name], None
        if (folder / f"{name}.index.json").is_file():
            files, index = _indexed_files(folder / f"{name}.index.json", problems)
            # Without its index a shard can still be looked at.
            return (files, index) if index else (sorted(folder.glob(pattern)), None)
        if files := sorted(folder.glob(pattern)):
            problems += _absent_shards(files)
            return files, None
    problems.append(_nothing_found(folder))
    return [], None


def _nothing_found(folder: Path) -> str:
    if not folder.is_dir():
        return "is not a folder"
    if (folder / "model_config.json").is_file():
        return SAT_SAID
    names = " or ".join(f"{name}(.index.json)" for name, _ in _FORMATS)
    return f"holds no weights: {names} is needed"


def _absent_shards(files: Sequence[Path]) -> list[str]:
    """Gaps in the numbering model-00001-of-00005 of files that no index lists."""
    problems = []
    numbered = [re.fullmatch(r"(.+)-(\d{5})-of-(\d{5})(\.\w+)", file.name) for file in files]
    present = {match.group() for match in numbered if match}
    for stem, total, ending in sorted({match.group(1, 3, 4) for match in numbered if match}):
        names = (f"{stem}-{i:05}-of-{total}{ending}" for i in range(1, int(total) + 1))
        problems += [f"{name} is missing" for name in names if name not in present]
    return problems


def _indexed_files(path: Path, problems: list[str]) -> tuple[list[Path], dict[str, str] | None]:
    """Shards that exist, and the index if it can be read."""
    try:
        refuse_stand_in(path)
        index = _weight_map(path)
    except (CheckpointError, ConfigError) as error:
        problems += [f"{path.name} {problem}" for problem in error.problems]
        return [], None
    names = sorted(set(index.values()))
    absent = [name for name in names if not (path.parent / name).is_file()]
    problems += [f"{name} is missing, but {path.name} names it" for name in absent]
    return [path.parent / name for name in names if name not in absent], index


def _weight_map(path: Path) -> dict[str, str]:
    index = read_json(path).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise CheckpointError(path.name, ["has no weight_map"])
    # A name with a slash would read a file outside the model folder.
    odd = {file for file in index.values() if not isinstance(file, str) or Path(file).name != file}
    if odd:
        raise CheckpointError(path.name, [f"names {file!r}, not a file beside it" for file in odd])
    return index


def _add_tensors(
    found: Sequence[TensorInfo], tensors: dict[str, TensorInfo], problems: list[str]
) -> None:
    for info in found:
        if info.name in tensors:
            problems.append(f"{tensors[info.name]} is also in {info.file.name}")
        tensors[info.name] = info


def _index_problems(
    index: Mapping[str, str], tensors: Mapping[str, TensorInfo], read: Collection[str]
) -> list[str]:
    """Tensors that are not in the file of the index, if that file could be read."""
    return [
        f"{name} is not in {file}, where the index says it is"
        for name, file in index.items()
        if file in read and (name not in tensors or tensors[name].file.name != file)
    ]


# --- one file --------------------------------------------------------------------------------


def _list_tensors(file: Path, problems: list[str]) -> list[TensorInfo]:
    """Tensors of one file, as far as they can be known; adds what is wrong with their data.

    Raises CheckpointError if they cannot be known; its problems do not repeat the file's name.
    """
    try:
        refuse_stand_in(file)
        if file.suffix != ".safetensors":
            return list_state(read_pickle(file), file)
        tensors, wrong = _parse_safetensors(file)
        problems += [f"{file.name} {problem}" for problem in wrong]
        return tensors
    except OSError as error:
        raise CheckpointError(file.name, [f"cannot be read: {error.strerror}"]) from error


def refuse_stand_in(file: Path) -> None:
    """Raise CheckpointError for the usual things that lie where a large file should."""
    with file.open("rb") as stream:
        head = stream.read(64).lower()
    if not head:
        raise CheckpointError(file.name, ["is empty"])
    if head.startswith(LFS_HEAD):
        raise CheckpointError(file.name, [LFS_SAID])
    # Not just "<": that may be the first byte of a safetensors header's length.
    if head.lstrip().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise CheckpointError(file.name, ["is a web page, not the file itself; download it again"])


_DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit: a real header is under one megabyte


def _parse_safetensors(file: Path) -> tuple[list[TensorInfo], list[str]]:
    """Read a safetensors header: u64 length, JSON, then the tensors' data without gaps.

    Returns the tensors and what is wrong with the layout of their data.
    Source: huggingface/safetensors README, section Format.
    """
    header, num_data_bytes = _read_header(file)
    header.pop("__metadata__", None)
    problems: list[str] = []
    spans: list[tuple[int, int, str]] = []
    tensors = []
    for name, entry in header.items():
        try:
            info, start, end = _parse_entry(file, name, entry)
        except ValueError as error:
            problems.append(f"is damaged: {name} {error}")
        else:
            tensors.append(info)
            spans.append((start, end, name))
    if problems:
        raise CheckpointError(file.name, problems)
    return tensors, _layout_problems(sorted(spans), num_data_bytes)


def _read_header(file: Path) -> tuple[dict[str, Any], int]:
    """The parsed header and the number of bytes that follow it."""
    rest = file.stat().st_size - 8
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 2 <= length <= min(rest, _MAX_HEADER_BYTES):
            said = f"is truncated or no safetensors file: a header of {length} bytes in {rest + 8}"
            raise CheckpointError(file.name, [said])
        raw = stream.read(length)
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(file.name, [f"is damaged: its header: {error}"]) from error
    if not isinstance(header, dict):
        raise CheckpointError(file.name, ["is damaged: its header is no JSON object"])
    return header, rest - length


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    twice = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
    if twice:
        raise ValueError(f"{', '.join(twice)} occurs twice")
    return dict(pairs)


def _parse_entry(file: Path, name: str, entry: Any) -> tuple[TensorInfo, int, int]:
    """One tensor and the range of its data, counted from the header's end."""
    if not isinstance(entry, dict):
        raise ValueError("is no JSON object")
    dtype = _DTYPES.get(str(entry.get("dtype")))
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    if dtype is None:
        raise ValueError(f"has the unknown dtype {entry.get('dtype')!r}")
    if not _are_counts(shape) or not _are_counts(offsets) or len(offsets) != 2:
        raise ValueError(f"has shape {shape!r} and data_offsets {offsets!r}")
    info = TensorInfo(name, file, tuple(shape), dtype)
    if info.nbytes != offsets[1] - offsets[0]:
        given = f"{offsets[1] - offsets[0]} are given"
        raise ValueError(f"of shape {shape} needs {info.nbytes} bytes, but {given}")
    return info, offsets[0], offsets[1]


def _are_counts(values: Any) -> TypeGuard[list[int]]:
    """A list of whole numbers that a signed 64-bit integer can hold."""
    return isinstance(values, list) and all(
        type(value) is int and 0 <= value < 2**63 for value in values
    )


def _layout_problems(spans: Sequence[tuple[int, int, str]], num_data_bytes: int) -> list[str]:
    """Check that sorted ranges of data follow each other and fill the file exactly."""
    described = max((end for _, end, _ in spans), default=0)
    if described > num_data_bytes:
        return [f"is truncated: {num_data_bytes} of {described} data bytes; download it again"]
    if described < num_data_bytes:
        return [f"is damaged: {num_data_bytes - described} bytes at its end are no tensor's"]
    position = 0
    for start, end, name in spans:
        if start != position:
            return [f"is damaged: {name} starts at data byte {start}, not {position}"]
        position = end
    return []


def read_pickle(file: Path, allowed: Sequence[Any] = ()) -> Any:
    """Load a torch.save file of tensors and plain data, on the CPU; mapped, not read, if a zip.

    allowed: classes and functions that may be called besides torch's own list
    Raises CheckpointError if it is damaged or holds anything else: only torch's restricted
    unpickler is ever used, because an ordinary one runs whatever code the file contains.
    """
    with file.open("rb") as stream:
        is_zip = stream.read(4) == b"PK\x03\x04"  # else the format of torch before 1.6
    try:
        with torch.serialization.safe_globals(list(allowed)):
            return torch.load(os.fspath(file), map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:  # a damaged pickle can raise almost anything
        said = "is damaged, or holds more than tensors and was refused because it could run code"
        raise CheckpointError(file.name, [f"{said} ({_pickle_reason(error)})"]) from error


def _pickle_reason(error: Exception) -> str:
    """The reason alone: before it torch advises to load the file without its restrictions."""
    text = str(error).partition("WeightsUnpickler error:")[2] or str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    reasons = [line for line in lines if "weights_only" not in line]
    return next(iter(reasons), type(error).__name__)


def list_state(state: Any, file: Path) -> list[TensorInfo]:
    """Tensors of a state dict. Raises CheckpointError if it is anything else."""
    if not isinstance(state, Mapping) or not state:
        raise CheckpointError(file.name, [f"holds a {type(state).__name__}, not named tensors"])
    problems = [
        f"holds {name!r}, which is no plain tensor"
        for name, value in state.items()
        if not isinstance(name, str) or not _is_plain(value)
    ]
    if problems:
        raise CheckpointError(file.name, problems)
    return [
        TensorInfo(name, file, tuple(value.shape), value.dtype) for name, value in state.items()
    ]


def _is_plain(value: Any) -> bool:
    is_tensor = isinstance(value, Tensor) and value.layout == torch.strided
    return is_tensor and value.device.type == "cpu" and not value.is_quantized


# --- reading data ------------------------------------------------------------------------------


@contextmanager
def open_reader(file: Path) -> Iterator[Callable[[str], Tensor]]:
    """A function that gives a file's tensors by name; they stay valid when it is closed.

    Each is [*shape], of the shape and dtype of its TensorInfo.
    Raises CheckpointError if the file cannot be read.
    """
    if file.suffix != ".safetensors":
        state = read_pickle(file)
        yield lambda name: state[name].detach()
        return
    try:
        mapped = safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(file.name, [f"can no longer be read: {error}"]) from error
    with mapped as tensors:
        yield lambda name: _aligned(tensors.get_tensor(name))


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor, copied if it lies across the boundaries of its dtype in memory.

    The format does not pad the header, and vector instructions of some CPUs need aligned data.
    """
    return tensor.clone() if tensor.data_ptr() % tensor.element_size() else tensor
