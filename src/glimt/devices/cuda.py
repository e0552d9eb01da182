"""CUDA cards: torch's fused attention, Triton kernels where they are right, recorded decodes.

GLIMT_CUDA says what to do without: "no-graphs" records nothing, "plain" also leaves out every fast
way that is glimt's own. What no fast way takes goes the base's way.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glimt.devices import card_check as ways
from glimt.devices.base import (
    ONLY_SEAT,
    Activation,
    AttentionBatch,
    Card,
    Device,
    KVCache,
    LowBitWeight,
    MatrixWeight,
    ModelStep,
    RotaryStyle,
    Seat,
    add_residual,
)
from glimt.devices.chunks import chunk_parts
from glimt.devices.fused_attention import attend, attend_packed
from glimt.devices.host import PROC, read_text
from glimt.devices.low_bits import low_bit_product
from glimt.devices.replay import Replay, ReplayedStep
from glimt.errors import ConfigError

_MODES = ("", "no-graphs", "plain")  # of GLIMT_CUDA
_LEAST_CAPABILITY = (7, 0)  # Volta: older cards have no tensor cores, and torch no kernels for them
_WIDEST_ROW = 65536  # values of a row that one Triton program holds
_LARGEST_HEAD = 256


class CudaDevice(Device):
    """One card.

    fast: names of the ways of card_check that may be taken; else the plain ones take their place
    records: whether decoding steps are recorded as CUDA graphs
    dtypes: those in which `fast` was found right
    """

    name = "cuda"
    collectives = "nccl"
    num_scratch_blocks = 1

    def __init__(
        self,
        torch_device: str = "cuda:0",
        fast: frozenset[str] = frozenset(),
        records: bool = False,
        dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16),
    ) -> None:
        super().__init__(torch_device)
        self.fast = fast
        self.dtypes = dtypes
        self.records = records
        self._pool: Any = None  # memory that all recordings share

    # --- the card ---

    @classmethod
    def open(cls, num_threads: int | None = None, seat: Seat = ONLY_SEAT) -> Device:
        """The card of this seat, among those that CUDA_VISIBLE_DEVICES leaves.

        Raises ConfigError if there is none for it, or GLIMT_CUDA says something unknown.
        """
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        mode = read_mode(os.environ.get("GLIMT_CUDA", ""))
        check_seat(seat, torch.cuda.device_count())
        card = torch.device("cuda", seat.index)
        torch.cuda.set_device(card)
        # cuDNN's attention is not known to read the same keys for several heads, as ours asks.
        torch.backends.cuda.enable_cudnn_sdp(False)
        dtypes = _dtypes_of(card)
        fast = frozenset() if mode == "plain" else ways.right_ways(card, dtypes)
        return cls(str(card), fast, not mode, dtypes)

    @classmethod
    def unavailable_reason(cls) -> str | None:
        """What is missing: a build of torch, a driver, or a card that this build can use."""
        if torch.version.cuda is None:
            version = torch.__version__.partition("+")[0]
            advice = f"pip install --force-reinstall torch=={version} (pip's usual one is)"
            return f"torch {torch.__version__} is not built for CUDA; {advice}"
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if not count:
            return why_no_card(PROC, os.environ.get("CUDA_VISIBLE_DEVICES"), [*map(_text_of, said)])
        capability = torch.cuda.get_device_capability(0)
        return None if capability >= _LEAST_CAPABILITY else _too_old(capability)

    @classmethod
    def cards(cls) -> tuple[Card, ...]:
        """Every card that CUDA_VISIBLE_DEVICES leaves."""
        if cls.unavailable_reason():
            return ()
        return tuple(_card(index) for index in range(torch.cuda.device_count()))

    @classmethod
    def missing(cls) -> tuple[tuple[str, str], ...]:
        """triton, which torch's CUDA build brings."""
        if cls.unavailable_reason() or ways.has_triton():
            return ()
        return (("triton is not installed: decodes and norms are slower", "pip install triton"),)

    def preferred_dtype(self, declared: torch.dtype) -> torch.dtype:
        """Of 16 bits bfloat16, which cannot overflow, where the card has it, else float16."""
        return declared if declared == torch.float32 else _sixteen_bits(self.torch_device)

    def free_bytes(self) -> int:
        """What the card has left, and what torch holds of it without using it."""
        free, _ = torch.cuda.mem_get_info(self.torch_device)
        held = torch.cuda.memory_reserved(self.torch_device)
        return free + held - torch.cuda.memory_allocated(self.torch_device)

    def peak_bytes(self) -> int | None:
        """The most that torch held of the card."""
        return torch.cuda.max_memory_reserved(self.torch_device)

    # --- products ---

    def linear(
        self,
        x: Tensor,
        weight: MatrixWeight,
        bias: Tensor | None,
        activation: Activation = "none",
        residual: Tensor | None = None,
        residual_scale: float = 1.0,
    ) -> Tensor:
        """As the base; of a matrix in few bits only a part is in floats at a time."""
        if isinstance(weight, Tensor):
            return super().linear(x, weight, bias, activation, residual, residual_scale)
        assert isinstance(weight, LowBitWeight), "only its own device multiplies with another form"
        has_integers = ways.INTEGER_PRODUCTS in self.fast
        rows = low_bit_product(x.reshape(-1, x.shape[-1]), weight, bias, has_integers)
        y = self.activate(rows.view(*x.shape[:-1], -1), activation)
        return add_residual(y, residual, residual_scale)

    # --- rows ---

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """As the base, in one pass."""
        if not self._takes(ways.RMS_NORM, x, weight) or x.shape[-1] > _WIDEST_ROW:
            return super().rms_norm(x, weight, eps)
        from glimt.kernels.triton_rows import rms_norm

        return self._on_card(rms_norm, x.reshape(-1, x.shape[-1]), weight, eps).view(x.shape)

    def silu_mul(self, gate: Tensor, up: Tensor) -> Tensor:
        """As the base, in one pass."""
        if not self._takes(ways.SILU_MUL, gate, up) or gate.dim() != 2:
            return super().silu_mul(gate, up)
        from glimt.kernels.triton_rows import silu_mul

        return self._on_card(silu_mul, gate, up)

    def rotate(
        self, x: Tensor, cos: Tensor, sin: Tensor, style: RotaryStyle, num_segments: int
    ) -> Tensor:
        """As the base, in one pass and with one rounding."""
        is_like = cos.stride() == sin.stride()
        if not self._takes(ways.ROTATE, x, cos, sin) or not is_like:
            return super().rotate(x, cos, sin, style, num_segments)
        from glimt.kernels.triton_rows import rotate

        return self._on_card(rotate, x, cos, sin, style == "interleaved", num_segments)

    def _takes(self, way: str, *tensors: Tensor) -> bool:
        """Whether a Triton kernel is right here, and takes tensors that lie so."""
        dtype = tensors[0].dtype
        is_tried = way in self.fast and dtype in self.dtypes
        return is_tried and all(
            x.numel() and x.dtype == dtype and x.stride(-1) == 1 for x in tensors
        )

    def _on_card(self, kernel: Callable[..., Tensor], *arguments: object) -> Tensor:
        """Run a Triton kernel, which starts on the calling thread's card, on this one."""
        with torch.cuda.device(self.torch_device):
            return kernel(*arguments)

    # --- attention ---

    def varlen_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        query_starts: Sequence[int],
        key_starts: Sequence[int],
        scale: float,
    ) -> Tensor:
        """As the base, with pictures of one size at once."""
        if ways.FUSED_ATTENTION not in self.fast:
            return super().varlen_attention(query, key, value, query_starts, key_starts, scale)
        return attend_packed(query, key, value, query_starts, key_starts, scale)

    def chunk_attention(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        batch: AttentionBatch,
        row: int,
        scale: float,
    ) -> Tensor:
        """As the base, without a mask."""
        if ways.FUSED_ATTENTION not in self.fast:
            return super().chunk_attention(query, keys, values, batch, row, scale)
        parts = [
            attend(
                query[part.start : part.stop],
                keys[: part.num_keys],
                values[: part.num_keys],
                scale,
                part.is_causal,
            )
            for part in chunk_parts(len(query), len(keys), batch.num_shared[row])
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def decode_attention(
        self, query: Tensor, cache: KVCache, batch: AttentionBatch, scale: float
    ) -> Tensor:
        """As the base, without gathering what the rows' blocks hold."""
        rows = query[: batch.num_decodes]
        is_plain = cache.scales is None and query.shape[-1] <= _LARGEST_HEAD
        if not is_plain or not self._takes(ways.PAGED_DECODE, rows, cache.key, cache.value):
            return super().decode_attention(query, cache, batch, scale)
        from glimt.kernels.triton_attention import decode

        longest = max(batch.context_lens[: batch.num_decodes])
        lens = batch.block_tables[: batch.num_decodes], batch.decode_lens, longest
        return self._on_card(decode, rows, cache.key, cache.value, *lens, scale)

    # --- recorded steps ---

    def recorded(self, step: ModelStep, cache: KVCache) -> ModelStep:
        """The step as CUDA graphs, one for each size of batch that comes."""
        return ReplayedStep(step, self._record, cache) if self.records else step

    def _record(self, function: Callable[[], Tensor]) -> tuple[Tensor, Replay]:
        """Run a function once, so that libraries and kernels are ready, and then record it.

        Source: PyTorch's notes on CUDA semantics, section CUDA graphs.
        """
        with torch.cuda.device(self.torch_device):
            aside, current = torch.cuda.Stream(), torch.cuda.current_stream()
            aside.wait_stream(current)
            with torch.cuda.stream(aside):
                function()
            current.wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            # Other threads prepare pictures meanwhile: what they ask of the driver is their own.
            with torch.cuda.graph(graph, self._pool, capture_error_mode="thread_local"):
                result = function()
            self._pool = graph.pool()
        return result, lambda context_lens: graph.replay()  # kernels read lengths on the card


def read_mode(said: str) -> str:
    """What GLIMT_CUDA asks for. Raises ConfigError if it is unknown."""
    if said not in _MODES:
        known = ", ".join(mode for mode in _MODES if mode)
        advice = f"choose one of {known}, or unset it"
        raise ConfigError("GLIMT_CUDA", [f"{said!r} is unknown; {advice}"])
    return said


def check_seat(seat: Seat, num_cards: int) -> None:
    """Raise ConfigError if there is no card for this process; num_cards: those that are seen."""
    if seat.index >= num_cards:
        said = f"of {seat.count} ranks here the one of index {seat.index} has no card: "
        advice = "lower --tp, or let CUDA_VISIBLE_DEVICES name more cards"
        raise ConfigError("tp_size", [f"{said}{num_cards} can be seen; {advice}"])


def why_no_card(proc: Path, visible: str | None, said: Sequence[str]) -> str:
    """Why a torch that is built for CUDA sees no card, and what to do.

    visible: CUDA_VISIBLE_DEVICES; said: what torch warned of
    """
    told = f" (torch says: {said[0]})" if said else ""
    if not driver_version(proc):
        return (
            f"no NVIDIA driver is loaded{told}; install it, and see whether nvidia-smi lists cards"
        )
    if visible is not None:
        advice = "unset it or name a card that nvidia-smi lists"
        return f"CUDA_VISIBLE_DEVICES is {visible!r}, which leaves no card{told}; {advice}"
    advice = "see whether nvidia-smi lists one; in a container: docker run --gpus all"
    return f"no card can be used{told}; {advice}"


def driver_version(proc: Path = PROC) -> str:
    """The loaded NVIDIA driver's, such as "570.124.06"; "" without one."""
    words = read_text(proc / "driver" / "nvidia" / "version").partition("\n")[0].split()
    return next((word for word in words if word[:1].isdigit() and "." in word), "")


def _text_of(warning: warnings.WarningMessage) -> str:
    return str(warning.message).partition("\n")[0]


def _too_old(capability: tuple[int, int]) -> str:
    least, has = (".".join(map(str, numbers)) for numbers in (_LEAST_CAPABILITY, capability))
    return f"the card's compute capability is {has}, and {least} is needed; use a newer card"


def _card(index: int) -> Card:
    card = torch.cuda.get_device_properties(index)
    capability = f"{card.major}.{card.minor}"
    return Card(index, card.name, card.total_memory, capability, driver_version())


def _sixteen_bits(card: torch.device) -> torch.dtype:
    """Ampere is the first that multiplies bfloat16."""
    has_bfloat16 = torch.cuda.get_device_capability(card) >= (8, 0)
    return torch.bfloat16 if has_bfloat16 else torch.float16


def _dtypes_of(card: torch.device) -> tuple[torch.dtype, ...]:
    """Those that its tensor cores know, and float32."""
    return tuple(dict.fromkeys((_sixteen_bits(card), torch.float16, torch.float32)))


DEVICE = CudaDevice
