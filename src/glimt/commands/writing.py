"""Writes a model folder whole or not at all, one weight in memory at a time."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO

import torch
from torch import Tensor

from glimt.checkpoint import TensorInfo
from glimt.errors import ConfigError
from glimt.sizes import size_text


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """Tensors that are made together and stand next to each other in a file.

    tensors: names, shapes and dtypes
    make:    gives the tensors, in their order
    """

    tensors: tuple[TensorInfo, ...]
    make: Callable[[], Sequence[Tensor]]

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(info.nbytes for info in self.tensors)


Shards = Mapping[str, Sequence[Piece]]  # by file name


def write_weights(folder: Path, shards: Shards, on_bytes: Callable[[int], None] | None) -> None:
    """Write every shard, and the index. on_bytes: called with the bytes written."""
    for file, pieces in shards.items():
        _write_safetensors(folder / file, pieces, on_bytes)
    write_json(folder / "model.safetensors.index.json", _index(shards))


@contextmanager
def whole_folder(target: Path, nbytes: int, is_replaced: bool = False) -> Iterator[Path]:
    """A folder to write into that becomes `target` at the end, or vanishes on any error.

    is_replaced: what lies at `target` gives way; else it must be absent or empty
    Raises ConfigError where the disk has no room for nbytes, or cannot be written to.
    """
    with _partial_folder(target, nbytes, "target") as partial:
        yield partial
        for file in partial.iterdir():
            _sync(file)
        _sync(partial)
        if is_replaced and target.exists():
            _exchange(partial, target)
        else:
            partial.rename(target)  # replaces an empty folder
        _sync(target.parent)


@contextmanager
def whole_files(target: Path, nbytes: int, replaced: Iterable[str] = ()) -> Iterator[Path]:
    """A folder to write into whose files move to where `target` is, or vanish on any error.

    replaced: names of files there that give way, besides those that new ones have

    What gives way stays until all is written, and is back after an error. What ends in .json, which
    says that the others are whole, goes first and comes last: what a process that is killed in the
    midst of moving leaves is not taken for whole. Raises ConfigError as `whole_folder` does.
    """
    with _partial_folder(target, nbytes, "output") as partial:
        yield partial
        new = sorted(file.name for file in partial.iterdir())
        for name in new:
            _sync(partial / name)
        old = [name for name in {*new, *replaced} if (target.parent / name).is_file()]
        _move_in(partial, target.parent, _manifests_last(new), _manifests_last(old))
        _sync(target.parent)


def _manifests_last(names: Iterable[str]) -> list[str]:
    return sorted(names, key=lambda name: (name.endswith(".json"), name))


def _move_in(partial: Path, folder: Path, new: Sequence[str], old: Sequence[str]) -> None:
    """Put the new files in the place of the old ones, which go with `partial`."""
    aside = partial / ".replaced"
    aside.mkdir()
    try:
        for name in reversed(old):
            (folder / name).rename(aside / name)
        for name in new:
            (partial / name).rename(folder / name)
    except BaseException:
        for name in reversed(new):
            if not (partial / name).exists():
                (folder / name).unlink(missing_ok=True)
        for name in old:
            if (aside / name).exists():
                (aside / name).rename(folder / name)
        raise


@contextmanager
def _partial_folder(target: Path, nbytes: int, field: str) -> Iterator[Path]:
    """A new folder beside `target`, which is gone at the end unless it was given another name."""
    # Not by the process alone: in a container it has the number of the one that was killed.
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        with _ending_in_order():
            _check_room(target, nbytes, field)
            partial.mkdir(parents=True)
            yield partial
    except OSError as error:
        said = f"{target} cannot be written: {error.strerror or error}"
        raise ConfigError(field, [f"{said}; make room, or choose another folder"]) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _ending_in_order() -> Iterator[None]:
    """Inside, a signal that would end the process at once raises SystemExit instead.

    Gigabytes that are half written would stay, under a hidden name.
    """
    is_main = threading.current_thread() is threading.main_thread()
    numbers = [signal.SIGTERM, signal.SIGHUP] if is_main else []
    changed = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]
    for number in changed:
        signal.signal(number, _end)
    try:
        yield
    finally:
        for number in changed:
            signal.signal(number, signal.SIG_DFL)


def _end(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _check_room(target: Path, nbytes: int, field: str) -> None:
    """Ask the nearest folder that exists, so that a refusal makes none."""
    above = next(folder for folder in target.absolute().parents if folder.exists())
    if (free := shutil.disk_usage(above).free) < nbytes:
        said = f"{target} needs {size_text(nbytes)}, but {size_text(free)} are free in {above}"
        raise ConfigError(field, [f"{said}; make room, or choose another folder"])


def write_file(path: Path, content: bytes) -> None:
    """Write a file whole, or leave what was there. Raises OSError.

    What is no ordinary file, such as a device or a pipe, is written into and stays what it is.
    """
    if path.exists() and not path.is_file():
        path.write_bytes(content)
        return
    path = path.resolve()  # what a link leads to is replaced, not the link
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        with suppress(OSError):
            partial.unlink()


def _exchange(new: Path, target: Path) -> None:
    """Put `new` in the target's place; `new` is then the old one's name."""
    aside = target.with_name(f".{target.name}.replaced-{os.getpid()}")
    target.rename(aside)
    try:
        new.rename(target)
    except OSError:
        aside.rename(target)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def split(pieces: Sequence[Piece], max_bytes: int) -> dict[str, list[Piece]]:
    """Shards by file name, each of at most max_bytes or of a single larger piece."""
    shards: list[list[Piece]] = []
    size = 0
    for piece in pieces:
        if not shards or size + piece.nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(piece)
        size += piece.nbytes
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    return dict(zip(names, shards, strict=True))


def _index(shards: Shards) -> dict[str, Any]:
    total = sum(piece.nbytes for shard in shards.values() for piece in shard)
    weight_map = {
        info.name: file
        for file, shard in shards.items()
        for piece in shard
        for info in piece.tensors
    }
    return {"metadata": {"total_size": total}, "weight_map": weight_map}


_DTYPE_NAMES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int8: "I8",
    torch.uint8: "U8",
}


def _write_safetensors(
    path: Path, pieces: Sequence[Piece], on_bytes: Callable[[int], None] | None
) -> None:
    """Write one shard, one piece in memory at a time; the library's writer holds all at once."""
    with path.open("wb") as stream:
        _write_header(stream, [info for piece in pieces for info in piece.tensors])
        for piece in pieces:
            for info, tensor in zip(piece.tensors, piece.make(), strict=True):
                assert (tensor.shape, tensor.dtype) == (info.shape, info.dtype), info.name
                stream.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
            if on_bytes:
                on_bytes(piece.nbytes)


def _write_header(stream: BinaryIO, tensors: Sequence[TensorInfo]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for info in tensors:
        end = start + info.nbytes
        header[info.name] = {
            "dtype": _DTYPE_NAMES[info.dtype],
            "shape": info.shape,
            "data_offsets": (start, end),
        }
        start = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    stream.write(len(raw).to_bytes(8, "little") + raw)


def write_json(path: Path, value: Any) -> None:
    """As a person would read it, with a line feed at the end."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
