"""Ascend NPUs: which of the chips' classes serves this machine. Not run on hardware."""

from __future__ import annotations

import os

import torch

from glimt.devices.base import ONLY_SEAT, Device, Seat
from glimt.devices.npu_310p import Atlas310P
from glimt.devices.npu_a2 import AtlasA2
from glimt.devices.npu_base import NpuDevice
from glimt.devices.npu_graphs import SWITCH, check_graphs, wants_graphs, why_no_graphs
from glimt.devices.npu_runtime import chip_of, load_torch_npu, unavailable_reason
from glimt.errors import ConfigError

_TILES = "GLIMT_NPU_NZ"  # 1: matrices in tiles on A2 too; 300I DUO always has them


class Npu(NpuDevice):
    """The NPUs that torch_npu shows; `open` gives one of the class that suits its chip."""

    @classmethod
    def open(cls, num_threads: int | None = None, seat: Seat = ONLY_SEAT) -> Device:
        """The NPU of this seat, counted among those that ASCEND_RT_VISIBLE_DEVICES leaves.

        num_threads: of the host. Raises ConfigError where there are fewer NPUs than seats, or
        GLIMT_NPU_GRAPHS asks for what cannot be.
        """
        records = wants_graphs(os.environ.get(SWITCH, ""))
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        torch_npu = load_torch_npu()
        count = torch_npu.npu.device_count()
        if seat.index >= count:
            said = f"{seat.count} ranks need {seat.count} NPUs, but {count} can be seen"
            raise ConfigError("tp_size", [f"{said}; see ASCEND_RT_VISIBLE_DEVICES"])
        torch_npu.npu.set_device(seat.index)
        if records:
            check_graphs(torch_npu)
        place = f"npu:{seat.index}"
        if chip_of(torch_npu) == "310p":
            return Atlas310P(torch_npu, place)
        casts_weights = os.environ.get(_TILES) == "1"
        return AtlasA2(torch_npu, place, casts_weights=casts_weights, records=records)

    @classmethod
    def unavailable_reason(cls) -> str | None:
        """Why no NPU can be used here, and what to do."""
        return unavailable_reason()

    @classmethod
    def missing(cls) -> tuple[tuple[str, str], ...]:
        """Why decoding steps are not recorded, where GLIMT_NPU_GRAPHS asks for it."""
        try:
            wanted = wants_graphs(os.environ.get(SWITCH, ""))
        except ConfigError as error:
            return ((str(error), f"unset {SWITCH}"),)
        if not wanted or cls.unavailable_reason():
            return ()
        why = why_no_graphs(load_torch_npu())
        return (why,) if why else ()


DEVICE = Npu
