"""Every Triton kernel on the CPU, by triton's interpreter, against plain torch.

A program of its own: triton reads TRITON_INTERPRET when it is imported. Prints what it has tried.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

import glimt.loader
from glimt.config import EngineConfig
from glimt.demo.noise import FAMILIES, write_noise_model
from glimt.devices.base import Device, KVCache, RotaryStyle
from glimt.devices.card_check import FUSED_ATTENTION, NEED_TRITON, right_ways
from glimt.devices.cuda import CudaDevice
from glimt.engine import Engine
from glimt.kernels import triton_attention, triton_rows
from glimt.types import SamplingParams

PLAIN = Device()
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Sums in another order; of 16 bits one rounding instead of several.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def close(ours: Tensor, plain: Tensor, name: str) -> None:
    tolerance = TOLERANCES[plain.dtype]
    torch.testing.assert_close(
        ours, plain, rtol=tolerance, atol=tolerance, msg=lambda m: f"{name}: {m}"
    )


def rows(dtype: torch.dtype) -> None:
    x, weight = normal(1, 5, 96).to(dtype)[:, :48], normal(2, 48).to(dtype)
    close(triton_rows.rms_norm(x, weight, 1e-5), PLAIN.rms_norm(x, weight, 1e-5), "rms_norm")
    gate, up = normal(3, 5, 2 * 1500).to(dtype).chunk(2, -1)
    close(triton_rows.silu_mul(gate, up), PLAIN.silu_mul(gate, up), "silu_mul")
    turns: list[tuple[RotaryStyle, int, int, int]] = [
        ("interleaved", 16, 4, 1), ("interleaved", 16, 8, 1), ("half", 16, 8, 2),
        ("half", 24, 6, 3), ("half", 16, 4, 1), ("half", 4, 1, 1),
    ]  # fmt: skip
    for style, dim, pairs, segments in turns:
        heads, angle = normal(4, 3, 20, 3, dim).to(dtype).unbind(2)[1], normal(5, 3, pairs)
        cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
        ours = triton_rows.rotate(heads, cos, sin, style == "interleaved", segments)
        close(ours, PLAIN.rotate(heads, cos, sin, style, segments), f"rotate {style} {dim}")


def contexts() -> Iterator[tuple[list[int], int, tuple[int, int], int]]:
    """Lengths of the rows, block size, query and KV heads, head size."""
    yield [1, 11, 7], 4, (16, 1), 16
    yield [600, 1, 257, 64], 32, (4, 2), 128
    yield [5, 4], 4, (32, 2), 128
    yield [9], 16, (3, 3), 88
    yield [300], 8, (2, 2), 112
    yield [33, 65], 32, (4, 4), 64


def decodes(dtype: torch.dtype) -> None:
    for lengths, block_size, (heads, kv_heads), dim in contexts():
        blocks = -(-max(lengths) // block_size)
        generator = torch.Generator().manual_seed(6)
        order = torch.randperm(len(lengths) * blocks, generator=generator)
        tables = order.view(len(lengths), blocks)
        shape = (tables.numel(), block_size, kv_heads, dim)
        # What lies beyond a row's end is never read: NaN there would spread.
        cache = KVCache(*(torch.full(shape, float("nan"), dtype=dtype) for _ in "kv"))
        fused = normal(7, len(lengths), 3 * heads, dim).to(dtype)
        query, plain = fused[:, heads : 2 * heads], []
        for row, length in enumerate(lengths):
            keys, values = (normal(8 + row + s, length, kv_heads, dim).to(dtype) for s in (0, 9))
            at = torch.arange(length)
            slots = tables[row, at // block_size] * block_size + at % block_size
            PLAIN.write_kv(keys, values, cache, slots)
            spans = [0, 1], [0, length]
            wide = (part.repeat_interleave(heads // kv_heads, 1) for part in (keys, values))
            plain.append(PLAIN.varlen_attention(query[row, None], *wide, *spans, dim**-0.5))
        lens = torch.tensor(lengths)
        longest = max(lengths) + 3 * block_size  # a recorded step knows only its widest
        ours = triton_attention.decode(
            query, cache.key, cache.value, tables, lens, longest, dim**-0.5
        )
        close(ours, torch.cat(plain), f"decode {lengths} {block_size} {heads} {kv_heads} {dim}")


class Interpreted(CudaDevice):
    """The device of a card, with its kernels on the CPU."""

    def _on_card(self, kernel: Callable[..., Tensor], *arguments: object) -> Tensor:
        USED.add(kernel.__name__)
        return kernel(*arguments)


USED: set[str] = set()


def answers(device: Device, folder: Path) -> list[int]:
    """What a noise model says, greedily."""
    glimt.loader.open_device = lambda *rest: device
    engine = Engine.load(EngineConfig(model=str(folder), dtype="float32", kv_bytes=2**20))
    sampling = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    engine.add_request(engine.prepare_text("a text of some length", sampling))
    tokens: list[int] = []
    while engine.has_work:
        tokens += [token for output in engine.step() for token in output.token_ids]
    return tokens


def engines() -> None:
    fast = right_ways(torch.device("cpu"), (torch.float32, torch.float16))
    assert {*NEED_TRITON} <= fast, "the device's own self-test"
    for family in FAMILIES:
        with TemporaryDirectory() as folder:
            write_noise_model(Path(folder), family)
            expected = answers(Device(), Path(folder))
            assert answers(Interpreted("cpu", fast - {FUSED_ATTENTION}), Path(folder)) == expected
    assert {"decode", "rms_norm", "silu_mul", "rotate"} == USED


for dtype in DTYPES:
    rows(dtype)
    print(dtype, "rows")
    # The interpreter multiplies the bits of bfloat16 as whole numbers, whatever the kernel.
    if dtype != torch.bfloat16:
        decodes(dtype)
        print(dtype, "decodes")
engines()
print("engines")
