"""The plain CPU."""

from __future__ import annotations

import torch

from glimt.devices.base import Device


class CpuDevice(Device):
    """torch on the host's processor."""

    name = "cpu"

    def preferred_dtype(self, declared: torch.dtype) -> torch.dtype:
        """bfloat16 in place of float16: processors multiply it faster and it cannot overflow."""
        return torch.bfloat16 if declared == torch.float16 else declared


DEVICE = CpuDevice
