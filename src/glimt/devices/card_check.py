"""Which fast ways are right on this card: each is tried once, beside the plain way.

A way that raises or gives other values is left out, and that is said once with its reason; what it
would have computed goes the plain way, which is slower and right.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Collection, Mapping
from functools import cache

import torch
from torch import Tensor

from glimt.devices.base import AttentionBatch, Device, KVCache, RotaryStyle
from glimt.devices.fused_attention import attend

log = logging.getLogger("glimt")

# The names of the ways, as CudaDevice asks for them.
FUSED_ATTENTION, INTEGER_PRODUCTS = "fused attention", "integer products"
PAGED_DECODE, RMS_NORM, SILU_MUL, ROTATE = "paged decode", "RMS norm", "SiLU gate", "rotation"
NEED_TRITON = (PAGED_DECODE, RMS_NORM, SILU_MUL, ROTATE)

# Of the largest value: two roundings to bfloat16 are 2**-7, a wrong key or column is far more.
_TOLERANCE = 0.02
_BLOCK_SIZE = 16

Check = Callable[[torch.device, torch.dtype], tuple[Tensor, Tensor]]  # ours, and the plain way's


def has_triton() -> bool:
    """Whether triton is installed; it is not imported."""
    return importlib.util.find_spec("triton") is not None


@cache
def right_ways(torch_device: torch.device, dtypes: tuple[torch.dtype, ...]) -> frozenset[str]:
    """The ways that are right there in all of these dtypes; the others are said, once."""
    reasons = {name: _why_not(check, torch_device, dtypes) for name, check in _checks().items()}
    wrong = {name: reason for name, reason in reasons.items() if reason}
    for name, reason in wrong.items():
        log.warning("%s: not used on %s (%s); torch's own is slower", name, torch_device, reason)
    return frozenset(reasons.keys() - wrong.keys())


def _checks() -> Mapping[str, Check]:
    of_torch: dict[str, Check] = {
        FUSED_ATTENTION: _fused_attention,
        INTEGER_PRODUCTS: _integer_products,
    }
    if not has_triton():
        _say_triton_is_missing()
        return of_torch
    return of_torch | {
        PAGED_DECODE: _paged_decode,
        RMS_NORM: _rms_norm,
        SILU_MUL: _silu_mul,
        ROTATE: _rotate,
    }


@cache
def _say_triton_is_missing() -> None:
    log.warning("triton is not installed: decodes and norms run on torch's own, which is slower")


def _why_not(
    check: Check, torch_device: torch.device, dtypes: Collection[torch.dtype]
) -> str | None:
    try:
        with torch.inference_mode():
            wrong = [t for t in dtypes if not _agree(*check(torch_device, t))]
    except Exception as error:  # a compiler, a driver and a card can raise almost anything
        return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    return f"wrong values in {', '.join(map(str, wrong))}" if wrong else None


def _agree(ours: Tensor, plain: Tensor) -> bool:
    """Shape, dtype, and every value within the tolerance; NaN agrees with nothing."""
    if (ours.shape, ours.dtype) != (plain.shape, plain.dtype):
        return False
    error = (ours.float() - plain.float()).abs().max()
    return bool(error <= _TOLERANCE * plain.float().abs().max())


# --- one check each --------------------------------------------------------------------------


def _normal(torch_device: torch.device, dtype: torch.dtype, *shape: int) -> Tensor:
    """The same values everywhere, drawn on the CPU."""
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to(torch_device, dtype)


def _fused_attention(torch_device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A chunk on a cached context with grouped heads, and full attention of a tower's head size."""
    ours, plain = [], []
    for heads, kv_heads, dim, causal in ((16, 2, 128, True), (4, 4, 112, False), (4, 4, 88, False)):
        query = _normal(torch_device, dtype, 37, heads, dim)
        key, value = (_normal(torch_device, dtype, n, kv_heads, dim)[:75] for n in (75, 76))
        batch = _batch(torch_device, query_starts=(0, 37), contexts=(75,), decodes=0)
        ours.append(attend(query, key, value, dim**-0.5, causal))
        if causal:
            plain.append(Device().chunk_attention(query, key, value, batch, 0, dim**-0.5))
        else:
            spans = [0, 37], [0, 75]
            plain.append(Device().varlen_attention(query, key, value, *spans, dim**-0.5))
    return torch.cat([x.flatten() for x in ours]), torch.cat([x.flatten() for x in plain])


def _batch(
    torch_device: torch.device,
    query_starts: tuple[int, ...],
    contexts: tuple[int, ...],
    decodes: int,
) -> AttentionBatch:
    """Rows whose blocks follow one another, the last row's first."""
    blocks = -(-max(contexts) // _BLOCK_SIZE)
    tables = torch.arange(len(contexts) * blocks, device=torch_device).flip(0).view(-1, blocks)
    return AttentionBatch(
        num_decodes=decodes,
        query_starts=query_starts,
        context_lens=contexts,
        num_shared=(0,) * len(contexts),
        slots=torch.zeros(query_starts[-1], dtype=torch.int64, device=torch_device),
        block_tables=tables,
        decode_lens=torch.tensor(contexts[:decodes], dtype=torch.int64, device=torch_device),
    )


def _paged_decode(torch_device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A long row, which is divided, beside short ones; grouped heads and one head each."""
    from glimt.kernels.triton_attention import decode

    contexts = (700, 1, 33)
    batch = _batch(torch_device, (0, 1, 2, 3), contexts, 3)
    ours, plain = [], []
    for heads, kv_heads, dim in ((32, 2, 128), (4, 4, 64)):
        shape = (batch.block_tables.numel(), _BLOCK_SIZE, kv_heads, dim)
        cache = KVCache(*(_normal(torch_device, dtype, *shape) for _ in ("key", "value")))
        query = _normal(torch_device, dtype, 3, heads, dim)
        lens = batch.block_tables, batch.decode_lens, max(contexts)
        ours.append(decode(query, cache.key, cache.value, *lens, dim**-0.5))
        fresh = _batch(torch_device, (0, 1, 2, 3), contexts, 3)  # masks are of one head layout
        plain.append(Device().decode_attention(query, cache, fresh, dim**-0.5))
    return torch.cat([x.flatten() for x in ours]), torch.cat([x.flatten() for x in plain])


def _rms_norm(torch_device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    from glimt.kernels.triton_rows import rms_norm

    x, weight = _normal(torch_device, dtype, 3, 4096), _normal(torch_device, dtype, 4096)
    return rms_norm(x, weight, 1e-5), Device().rms_norm(x, weight, 1e-5)


def _silu_mul(torch_device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    from glimt.kernels.triton_rows import silu_mul

    gate, up = _normal(torch_device, dtype, 3, 2 * 1500).chunk(2, -1)
    return silu_mul(gate, up), Device().silu_mul(gate, up)


def _rotate(torch_device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """GLM-4's half of each head, in neighbours, and VisualGLM's two segments, in halves."""
    from glimt.kernels.triton_rows import rotate

    ours, plain = [], []
    styles: tuple[tuple[RotaryStyle, int, int], ...] = (("interleaved", 32, 1), ("half", 64, 2))
    for style, pairs, segments in styles:
        x, angle = _normal(torch_device, dtype, 3, 32, 128), _normal(torch_device, dtype, 3, pairs)
        cos, sin = angle.cos(), angle.sin()
        ours.append(rotate(x, cos, sin, style == "interleaved", segments))
        plain.append(Device().rotate(x, cos, sin, style, segments))
    return torch.cat(ours), torch.cat(plain)


def _integer_products(torch_device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Sums of products of int8, as cuBLAS makes them; in float64 they are exact.

    Small enough for float16: the sums are about 200.
    """
    values = (_normal(torch_device, torch.float32, 32, 64) * 5).round().to(torch.int8)
    weight = (_normal(torch_device, torch.float32, 48, 64) * 5).round().to(torch.int8)
    exact = (values.double() @ weight.double().t()).to(dtype)
    return torch._int_mm(values, weight.t()).to(dtype), exact
