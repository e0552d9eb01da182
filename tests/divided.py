"""The engine of one rank of a divided golden model; every rank runs one, in lockstep."""

from __future__ import annotations

from typing import Any

import torch

from conftest import Oracle
from glimt.config import EngineConfig
from glimt.devices.base import Device
from glimt.engine import Engine
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
    opened = oracle.open(dtype, device=device or Device(), group=group)
    settings = {"kv_bytes": 16 * 2**20, "num_blocks": 64} | options
    return Engine(opened, EngineConfig(model=str(oracle.folder), **settings))
