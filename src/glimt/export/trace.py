"""A family's own tower -> an ONNX graph without its weights.

The model is built on torch's meta device, so that nothing is computed and no weight is needed:
whatever size a tower has, its graph takes seconds. The family's file stays the one place that says
what a tower computes; only what exporters do not take is written otherwise here.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glimt.devices.base import Device, add_residual
from glimt.errors import ConfigError, MissingDependency
from glimt.loader import ModelFolder, build_model
from glimt.models.base import BuildContext, Model
from glimt.runtimes.manifest import INPUT, OUTPUT
from glimt.types import ImageInput

OPSETS = range(13, 21)  # 13: the original's; the exporter that knows it ends with 20
_ANY_ROWS = 2**31  # more than any picture's: its parts would be unrolled into the graph
_BATCH = "batch"  # name of a dimension of any size


class TraceDevice(Device):
    """The plain operations, in the form in which every opset from 13 on can say them.

    Pictures are packed and all of one size, as they are in one input tensor, so that a graph can
    be given more of them than it was traced with.
    """

    name = "trace"

    def __init__(self) -> None:
        super().__init__("meta")

    def layer_norm(
        self, x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None = None
    ) -> Tensor:
        """[…, size] -> the same; in float32 throughout, which float16 on a chip would not be."""
        size = [int(weight.shape[0])]  # a number, where x.shape would be traced
        if x.dtype == torch.float32:
            return add_residual(F.layer_norm(x, size, weight, bias, eps), residual)
        normed = F.layer_norm(x.float(), size, weight.float(), bias.float(), eps)
        return add_residual(normed.to(x.dtype), residual)

    def varlen_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        query_starts: Sequence[int],
        key_starts: Sequence[int],
        scale: float,
    ) -> Tensor:
        """As the base class, [num_queries, num_heads, head_dim], written out as two products.

        Every sequence is as long as the first.
        """
        q = _by_picture(query * scale, query_starts)
        k, v = _by_picture(key, key_starts), _by_picture(value, key_starts)
        attended = torch.softmax(q @ k.transpose(-1, -2), dim=-1) @ v
        return attended.transpose(1, 2).reshape(-1, *map(int, query.shape[1:]))


def _by_picture(packed: Tensor, starts: Sequence[int]) -> Tensor:
    """[num_pictures * length, heads, dim] -> [num_pictures, heads, length, dim]."""
    length = int(starts[1]) - int(starts[0])  # numbers, where the starts would be traced
    return packed.reshape(-1, length, *map(int, packed.shape[1:])).transpose(1, 2)


class RawToFeatures(nn.Module):
    """[batch, height, width, 3] float32 -> [batch, image tokens, hidden_size]."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, raw: Tensor) -> Tensor:
        """[batch, height, width, 3], 0 to 255 -> [batch, image tokens, hidden_size]."""
        return self.model.encode_raw(raw)


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphShape:
    """What a graph is to look like.

    batch: pictures at once; None: any number
    dtype: of weights, arithmetic and output; norms, and the input's normalisation, are float32
    """

    batch: int | None
    opset: int
    dtype: torch.dtype


def trace_tower(found: ModelFolder, image: ImageInput, shape: GraphShape) -> Any:
    """The tower of a model folder as an onnx.ModelProto.

    image: any picture of the family; found.family must have `Model.encode_raw`
    Weights are inputs of the graph, in the order in which it needs them, under the names of our
    parameters. Raises ConfigError for a family without an exportable tower, MissingDependency
    without onnx.
    """
    onnx = import_onnx()
    model = _meta_model(found, shape.dtype)
    if type(model).encode_raw is Model.encode_raw:
        said = f"its family {found.family.name} has no tower that can be exported"
        raise ConfigError(str(found.checkpoint.folder), [said])
    batch = shape.batch or 2  # not 1, of which a graph might make a constant
    raw = torch.zeros(batch, *image.pixels.shape)
    written = io.BytesIO()
    _export(RawToFeatures(model), raw, written, shape)
    graph = onnx.load_from_string(written.getvalue())
    _name_weights(graph)
    size = _BATCH if shape.batch is None else shape.batch
    _set_shape(graph.graph.output[0], (size, image.num_tokens, model.embedding.weight.shape[1]))
    return graph


def import_onnx() -> Any:
    """The package onnx. Raises MissingDependency."""
    try:
        import onnx
    except ImportError as error:
        raise MissingDependency("onnx", "export") from error
    return onnx


def _meta_model(found: ModelFolder, dtype: torch.dtype) -> Model:
    """The model without weights; no part of its tower is divided."""
    context = BuildContext(TraceDevice(), dtype, found.config.max_positions)
    model = build_model(found, context).eval()
    for module in model.modules():
        if hasattr(module, "part_rows"):
            setattr(module, "part_rows", _ANY_ROWS)  # noqa: B010 a module's own type forbids it
    return model


def _export(module: nn.Module, raw: Tensor, written: Any, shape: GraphShape) -> None:
    axes = {INPUT: {0: _BATCH}, OUTPUT: {0: _BATCH}} if shape.batch is None else {}
    with warnings.catch_warnings(), torch.no_grad():
        # Numbers that are computed from shapes become constants, which is what is wanted here, and
        # this exporter, the only one that knows opsets below 18, is called an old one.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module,
            (raw,),
            written,
            dynamo=False,
            opset_version=shape.opset,
            export_params=False,
            keep_initializers_as_inputs=True,
            do_constant_folding=False,  # its results would be inputs without values
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_axes=axes,
        )


def _name_weights(graph: Any) -> None:
    """Drop what the wrapper put before the names of our parameters."""
    prefix = "model."
    for given in graph.graph.input:
        given.name = given.name.removeprefix(prefix)
    for node in graph.graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = name.removeprefix(prefix)


def _set_shape(value: Any, sizes: Sequence[int | str]) -> None:
    """Say a tensor's shape; a text is the name of a dimension of any size."""
    dims = value.type.tensor_type.shape.dim
    for dim, size in zip(dims, sizes, strict=True):
        if isinstance(size, int):
            dim.dim_value = size
        else:
            dim.dim_param = size
