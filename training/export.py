"""Trained parameters -> a checkpoint in the family's published layout."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from glimt.models.base import Model
from glimt.weights import checkpoint_names

MAX_SHARD_BYTES = 6 * 2**20  # two shards, so that the demo models exercise the index


def export(
    parameters: Mapping[str, Tensor], model: Model, raw: Mapping[str, Any], folder: Path
) -> None:
    """Write bfloat16 shards with their index, config.json and generation_config.json.

    parameters: by the model's own names; they are written under the checkpoint's.
    """
    names = checkpoint_names(model)
    tensors = {names[name]: value.to(torch.bfloat16) for name, value in parameters.items()}
    shards = _shards(tensors)
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({n: t.contiguous() for n, t in shard.items()}, folder / file, {"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
    total = sum(t.nbytes for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    _write_json(folder / "model.safetensors.index.json", index)
    _write_json(folder / "config.json", raw)
    _write_json(
        folder / "generation_config.json", {"do_sample": True, "temperature": 0.8, "top_p": 0.8}
    )


def _shards(tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in sorted(tensors.items()):
        if size and size + tensor.nbytes > MAX_SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    return shards


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
