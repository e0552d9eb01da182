"""Tries the kernels of one instruction set: `python -m glimt.kernels.selftest ISA`.

Runs in a process of its own, on threads of its own, so that an instruction that the system refuses
ends nothing else. Ragged sizes; every result is held against torch in float32.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from glimt.kernels.choose import WRONG_VALUES
from glimt.kernels.library import library_path
from glimt.kernels.native import Native, fit_groups

_TOLERANCE = 0.03  # of the largest value: some bfloat16 steps


def main(isa: str) -> int:
    """0 if every kernel is right; WRONG_VALUES, and the first one's name on stderr, if not."""
    path = library_path()
    if path is None:
        print("the native kernels were not built", file=sys.stderr)
        return 1
    torch.manual_seed(0)
    torch.set_num_threads(1)
    native = Native(path, isa, threads=2)
    for check in (_linear, _low_bits, _mlp, _attention, _decode, _norm, _rotate, _write_kv, _fit):
        if not check(native):
            print(f"{check.__name__.strip('_')} gives wrong values", file=sys.stderr)
            return WRONG_VALUES
    return 0


def _close(got: Tensor | None, expected: Tensor) -> bool:
    """A kernel that is not there is not wrong."""
    if got is None:
        return True
    error = (got.float() - expected).abs().max()
    return bool(error <= _TOLERANCE * expected.abs().max())


def _random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape).to(dtype)


def _linear(native: Native) -> bool:
    return _products(native, "bf16", torch.bfloat16) and _products(native, "fp16", torch.float16)


def _products(native: Native, format: str, dtype: torch.dtype) -> bool:
    weight, bias = _random(83, 120, dtype=dtype) * 0.1, _random(83, dtype=dtype)
    packed = native.pack(weight, format)
    return all(
        _close(native.linear(x, packed, bias), x.float() @ weight.float().T + bias.float())
        for x in (_random(m, 120, dtype=dtype) for m in (1, 7, 20, 150))
    )


def _low_bits(native: Native) -> bool:
    values = torch.randint(-127, 128, (48, 128), dtype=torch.int8)
    scales = torch.rand(48) * 0.01 + 0.001
    wide = values.float() * scales[:, None]
    nibbles = torch.randint(0, 256, (48, 64), dtype=torch.uint8)
    steps = torch.stack((nibbles & 15, nibbles >> 4), dim=-1).flatten(1).float()
    group = torch.rand(48, 2) * 0.1 + 0.01
    narrow = (steps - 8) * group.repeat_interleave(64, 1)
    for rounds_x in (False, True):
        int8 = native.pack(values, "int8", scales=scales, quantises_x=rounds_x)
        int4 = native.pack(
            nibbles, "int4", scales=group, offsets=-8 * group, group=64, quantises_x=rounds_x
        )
        rows = [_random(1, 128), _random(20, 128), _random(70, 128)]
        for x in (*rows, rows[0].half(), rows[1].half()):
            if not _close(native.linear(x, int8), x.float() @ wide.T):
                return False
            if not _close(native.linear(x, int4), x.float() @ narrow.T):
                return False
    return True


def _mlp(native: Native) -> bool:
    up, down = _random(64, 120) * 0.1, _random(50, 32) * 0.1
    packed = native.pack(up, is_paired=True), native.pack(down)
    for x in (_random(1, 120), _random(70, 120)):
        gate, wide = (x.float() @ up.float().T).chunk(2, dim=-1)
        inner = torch.nn.functional.silu(gate) * wide
        got = native.mlp(x, *packed, activation="silu_mul")
        if not _close(got, inner @ down.float().T):
            return False
    return True


def _softmax_attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float) -> Tensor:
    """[queries, heads, dim] over [keys, kv_heads, dim]; seen [queries, keys]."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.float().repeat_interleave(group, 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.float(), k) * scale
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v)


def _attention(native: Native) -> bool:
    q, k, v = _random(45, 4, 88), _random(77, 2, 88), _random(77, 2, 88)
    seen = torch.arange(77) <= torch.arange(32, 77)[:, None]
    got = native.attention(q, k, v, 0.1, num_keys=77, first_position=32, num_shared=0)
    return _close(got, _softmax_attention(q, k, v, seen, 0.1))


def _decode(native: Native) -> bool:
    k, v = _random(6, 16, 2, 64), _random(6, 16, 2, 64)
    q, tables = _random(2, 8, 64), torch.tensor([[3, 1, 4], [5, 0, 2]])
    lens = torch.tensor([41, 17])
    rows = []
    for i, length in enumerate(lens.tolist()):
        keys, values = (x[tables[i]].flatten(0, 1)[:length] for x in (k, v))
        seen = torch.ones(1, length, dtype=torch.bool)
        rows.append(_softmax_attention(q[i : i + 1], keys, values, seen, 0.125))
    return _close(native.decode(q, k, v, tables, lens, 0.125), torch.cat(rows))


def _norm(native: Native) -> bool:
    return _norms(native, torch.bfloat16) and _norms(native, torch.float16)


def _norms(native: Native, dtype: torch.dtype) -> bool:
    x, weight, bias = (_random(*shape, dtype=dtype) for shape in ((5, 100), (100,), (100,)))
    wide = x.float()
    layer = torch.nn.functional.layer_norm(wide, (100,), weight.float(), bias.float(), 1e-5)
    rms = wide * torch.rsqrt(wide.pow(2).mean(-1, True) + 1e-5) * weight.float()
    is_layer = _close(native.norm(x, weight, bias, 1e-5), layer)
    return is_layer and _close(native.norm(x, weight, None, 1e-5), rms)


def _rotate(native: Native) -> bool:
    return _rotations(native, torch.bfloat16) and _rotations(native, torch.float16)


def _rotations(native: Native, dtype: torch.dtype) -> bool:
    x, angles = _random(5, 3, 40, dtype=dtype), torch.rand(5, 8) * 6
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    a, b = x[..., 0:16:2].float(), x[..., 1:16:2].float()
    c, s = cos[:, None].float(), sin[:, None].float()
    turned = torch.stack((a * c - b * s, b * c + a * s), dim=-1).flatten(-2)
    wanted = torch.cat((turned, x[..., 16:].float()), dim=-1)
    return _close(native.rotate(x, cos, sin, True, 1), wanted)


def _write_kv(native: Native) -> bool:
    key, value, slots = _random(3, 2, 40), _random(3, 2, 40), torch.tensor([9, 0, 14])
    caches = torch.zeros(2, 4, 4, 2, 40, dtype=torch.bfloat16)
    if not native.write_kv(key, value, caches[0], caches[1], slots):
        return True
    wanted = torch.zeros(2, 16, 2, 40)
    wanted[0, slots], wanted[1, slots] = key.float(), value.float()
    return _close(caches.flatten(1, 2), wanted)


def _fit(native: Native) -> bool:
    groups = torch.randn(70, 64)
    found = fit_groups(groups, has_offsets=False)
    if found is None:
        return True
    values, scales, offsets = found
    steps = torch.stack((values & 15, values >> 4), dim=-1).flatten(1).float()
    error = (steps * scales[:, None] + offsets[:, None] - groups).abs()
    # All but what a narrower scale cuts off is within half a step.
    return bool((error.median(1).values <= scales.abs() / 2).all() and error.max() < 2)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
