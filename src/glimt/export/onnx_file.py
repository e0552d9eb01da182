"""A traced graph and its weights -> an ONNX file, one weight in memory at a time.

protobuf holds at most 2 GiB in one file, so that the weights of a large tower go into a second one,
NAME.onnx.data, which must lie beside the first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from glimt.errors import ConfigError
from glimt.export.trace import import_onnx
from glimt.runtimes.manifest import INPUT

INLINE_BYTES = 2**30  # at most, of all weights, inside the ONNX file itself
_PAGE = 4096  # weights begin on pages, so that a runtime can map them


def external_data(path: Path) -> Path:
    """Where the weights of an ONNX file lie if they are too large for it."""
    return path.with_name(f"{path.name}.data")


def write_onnx(
    graph: Any,
    weights: Mapping[str, Tensor],
    path: Path,
    dtype: torch.dtype,
    on_bytes: Callable[[int], None] | None = None,
    inline_bytes: int = INLINE_BYTES,
) -> None:
    """Fill a traced graph with weights and write it.

    weights:  [*shape] each, by parameter name, of any float dtype; those that the graph has as
              inputs are written
    dtype:    in which they are written
    on_bytes: called with the bytes of each weight written
    Changes `graph`: its weights become initializers. Raises ConfigError for a value that the dtype
    cannot hold, OSError.
    """
    names = [given.name for given in graph.graph.input if given.name != INPUT]
    total = sum(weights[name].numel() for name in names) * dtype.itemsize
    kept = [given for given in graph.graph.input if given.name == INPUT]
    del graph.graph.input[:]
    graph.graph.input.extend(kept)
    outside = external_data(path) if total > inline_bytes else None
    if outside is None:
        _fill(graph, names, weights, dtype, None, on_bytes)
    else:
        with outside.open("wb") as stream:
            _fill(graph, names, weights, dtype, stream, on_bytes)
    path.write_bytes(graph.SerializeToString())


def check_onnx(path: Path) -> None:
    """Hold a written file to the standard, its external data too. Raises ConfigError."""
    onnx = import_onnx()
    try:
        onnx.checker.check_model(str(path))  # by its path: it may be too large for memory twice
    except onnx.checker.ValidationError as error:
        said = f"the graph is not valid ONNX: {str(error).strip()}"
        raise ConfigError("export", [f"{said}; try another --opset"]) from error


def _fill(
    graph: Any,
    names: list[str],
    weights: Mapping[str, Tensor],
    dtype: torch.dtype,
    outside: BinaryIO | None,
    on_bytes: Callable[[int], None] | None,
) -> None:
    for name in names:
        values = _cast(name, weights[name], dtype).contiguous()
        entry = graph.graph.initializer.add()
        entry.name = name
        entry.dims.extend(values.shape)
        entry.data_type = _data_type(dtype)
        raw = values.flatten().view(torch.uint8).numpy().data
        if outside is None:
            entry.raw_data = bytes(raw)
        else:
            _write_outside(entry, raw, outside)
        if on_bytes:
            on_bytes(raw.nbytes)


def _write_outside(entry: Any, raw: memoryview, stream: BinaryIO) -> None:
    stream.write(b"\0" * (-stream.tell() % _PAGE))
    said = {"location": Path(stream.name).name, "offset": stream.tell(), "length": raw.nbytes}
    for key, value in said.items():
        entry.external_data.add(key=key, value=str(value))
    entry.data_location = import_onnx().TensorProto.EXTERNAL
    stream.write(raw)


def _cast(name: str, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """[*shape] -> the same in dtype; what becomes infinite would poison every picture."""
    cast = weight.to(dtype)
    if not cast.isfinite().all():
        largest = float(weight.abs().max())
        if not math.isfinite(largest):
            raise ConfigError("export", [f"{name} is not finite: the checkpoint is damaged"])
        said = f"{name} has values up to {largest:g}, beyond what float16 holds"
        raise ConfigError("dtype", [f"{said}; export with --dtype float32"])
    return cast


def _data_type(dtype: torch.dtype) -> int:
    proto = import_onnx().TensorProto
    return int({torch.float32: proto.FLOAT, torch.float16: proto.FLOAT16}[dtype])
