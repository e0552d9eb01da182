"""The engine of one rank of a divided golden model; every rank runs one, in lockstep."""

from __future__ import annotations

from typing import Any

import torch

from conftest import Oracle
from glimt.checkpoint import open_checkpoint
from glimt.config import EngineConfig
from glimt.devices.base import Device
from glimt.engine import Engine
from glimt.loader import OpenedModel
from glimt.models.base import BuildContext
from glimt.parallel import Group


def divided_engine(
    oracle: Oracle,
    group: Group,
    device: Device | None = None,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Engine:
    """The engine of one rank; all of them take the same requests in the same order.

    device: None: plain torch
    """
    device = device or Device()
    context = BuildContext(device, dtype, oracle.config.max_positions, group=group)
    opened = OpenedModel(
        family=oracle.family,
        config=oracle.config,
        processor=oracle.family.processor(oracle.folder, oracle.config, oracle.tokenizer()),
        model=oracle.family.build(oracle.config, context),
        checkpoint=open_checkpoint(oracle.folder),
        device=device,
        dtype=dtype,
        max_model_len=oracle.config.context_tokens,
    )
    opened.load()
    settings = {"kv_bytes": 16 * 2**20, "num_blocks": 64} | options
    return Engine(opened, EngineConfig(model=str(oracle.folder), **settings))
