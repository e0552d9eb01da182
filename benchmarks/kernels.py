"""Every native kernel beside its plain torch version and the machine's limit.

    python benchmarks/kernels.py [--isa amx] [--only glm-4v/gate_up] [--formats bf16,int8] [--list]

Shapes of both models, one case after another: limit, native, limit, plain, limit, native … in one
process, because a shared machine changes from second to second. A sample counts only if the limits
around it agree. Ends in one line of JSON. Never imported; passes and fails nothing.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from glimt.bench.samples import Sample, Summary, summarise
from glimt.devices.base import AttentionBatch, Device, KVCache
from glimt.kernels.library import ISAS, available, library_path
from glimt.kernels.limits import LimitMeter
from glimt.kernels.native import Native, PackedWeight

WANTED, MOST = 7, 14  # samples that must count, and samples at most
SAMPLE_S = 0.02  # a shorter sample is mostly noise
COLD_BYTES = 2**30  # weights that are used in turn, so that no cache holds them
GROUP = 64
PLAIN = Device("cpu")


# --- one case --------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Work:
    """What a case does. native gives None where the instruction set has no such kernel.

    limit: "read", "bf16" or "int8"; amount: bytes or operations of one call
    """

    native: Callable[[int], Tensor | None]
    plain: Callable[[int], Tensor]
    limit: str
    amount: float


@dataclass(frozen=True, eq=False)
class Case:
    """name: model/what/form/size; build: makes the tensors, when the case's turn has come."""

    name: str
    build: Callable[[Native], Work]


def measure(case: Case, native: Native, meter: LimitMeter) -> dict[str, Any] | None:
    """Samples of both; None where there is no such kernel."""
    work = case.build(native)
    result = work.native(0)
    if result is None:
        return None
    error = difference(result, work.plain(0))
    take = meter.read if work.limit == "read" else lambda: meter.math(work.limit)  # type: ignore[arg-type]
    runs = {name: Timed(run) for name, run in (("native", work.native), ("plain", work.plain))}
    before = take()
    while any(timed.wants_more for timed in runs.values()):
        for timed in runs.values():
            seconds = timed.run()
            after = take()
            timed.samples.append(Sample(seconds, before, after))
            before = after
    found = {name: summarise(timed.samples, work.amount) for name, timed in runs.items()}
    return {"case": case.name, "isa": native.isa, "limit": work.limit, "error": error} | {
        name: figures(summary) for name, summary in found.items()
    }


class Timed:
    """One version and its samples; every sample is as many calls as SAMPLE_S takes."""

    def __init__(self, call: Callable[[int], Any]) -> None:
        self.call = call
        self.count = 1
        self.samples: list[Sample] = []
        self._turn = 0
        self.count = max(1, min(500, int(SAMPLE_S / max(self.run(), 1e-6))))

    @property
    def wants_more(self) -> bool:
        """Too few samples count so far, and not all tries are spent."""
        num_steady = sum(sample.is_steady for sample in self.samples)
        return num_steady < WANTED and len(self.samples) < MOST

    def run(self) -> float:
        """Seconds of one call."""
        began = time.perf_counter()
        for _ in range(self.count):
            self.call(self._turn)
            self._turn += 1
        return (time.perf_counter() - began) / self.count


def difference(result: Tensor, plain: Tensor) -> float:
    """Length of the difference over the length of the plain result."""
    a, b = result.float(), plain.float()
    return ((a - b).norm() / b.norm().clamp_min(1e-30)).item()


def figures(summary: Summary) -> dict[str, Any]:
    """What a summary says, without its samples."""
    return {name: value for name, value in summary.as_dict().items() if name != "all_s"}


# --- products --------------------------------------------------------------------------------

# what: (rows of the matrix, columns, activation)
MATRICES = {
    "glm-4v": {
        "qkv": (4608, 4096, "none"),
        "dense": (4096, 4096, "none"),
        "gate_up": (27392, 4096, "silu_mul"),
        "down": (4096, 13696, "none"),
        "head": (151552, 4096, "none"),
    },
    "glm-4v-tower": {
        "qkv": (5376, 1792, "none"),
        "dense": (1792, 1792, "none"),
        "up": (15360, 1792, "gelu_erf"),
        "down": (1792, 15360, "none"),
    },
    "visualglm": {
        "qkv": (12288, 4096, "none"),
        "dense": (4096, 4096, "none"),
        "up": (16384, 4096, "gelu_tanh"),
        "down": (4096, 16384, "none"),
        "head": (130528, 4096, "none"),
    },
    "visualglm-tower": {
        "qkv": (4224, 1408, "none"),
        "dense": (1408, 1408, "none"),
        "up": (6144, 1408, "gelu_erf"),
        "down": (1408, 6144, "none"),
    },
}
ROWS = {
    "glm-4v": (1, 2, 4, 8, 16, 32, 1634),
    "glm-4v-tower": (6401,),
    "visualglm": (1, 2, 4, 8, 16, 32, 64),
    "visualglm-tower": (257,),
}
# form: (format of the weight, whether activations are rounded to int8 too)
FORMS = {
    "bf16": ("bf16", False),
    "fp16": ("fp16", False),
    "int8": ("int8", False),
    "w8a8": ("int8", True),
    "int4": ("int4", False),
    "w4a8": ("int4", True),
}


def linear_cases(forms: Sequence[str]) -> Iterator[Case]:
    """Every matrix in every form; the head sees few rows only, as in a prompt."""
    for model, matrices in MATRICES.items():
        for (what, shape), form, m in product(matrices.items(), forms, ROWS[model]):
            if what != "head" or m <= 32:
                yield Case(f"{model}/{what}/{form}/m={m}", linear(shape, form, m))


def linear(shape: tuple[int, int, str], form: str, m: int) -> Callable[[Native], Work]:
    """Up to 32 rows are held against reading the weights, more against multiplying."""
    n, k, activation = shape
    reads = m <= 32

    def build(native: Native) -> Work:
        format, quantises_x = FORMS[form]
        width = {"bf16": 2.0, "fp16": 2.0, "int8": 1.0, "int4": 0.5}[format]
        copies = max(1, min(32, int(COLD_BYTES / (n * k * width)))) if reads else 1
        matrix = noise(n, k) * k**-0.5
        packed = [pack(native, matrix, format, activation, quantises_x) for _ in range(copies)]
        dtype = dtype_of(form)
        plain = [matrix.to(dtype, copy=True) for _ in range(max(1, copies // 4 if reads else 1))]
        x = noise(m, k).to(dtype)
        return Work(
            native=lambda turn: native.linear(x, packed[turn % copies], activation=activation),
            plain=lambda turn: act(F.linear(x, plain[turn % len(plain)]), activation),
            limit="read" if reads else "int8" if quantises_x else "bf16",
            amount=packed[0].nbytes if reads else 2 * m * n * k,
        )

    return build


def dtype_of(form: str) -> torch.dtype:
    """Of the activations, and of the plain weight beside it."""
    return torch.float16 if form == "fp16" else torch.bfloat16


def pack(
    native: Native, matrix: Tensor, format: str, activation: str, quantises_x: bool
) -> PackedWeight:
    """Round a float32 matrix [n, k] to a format and lay it out."""
    paired = activation == "silu_mul"
    if format in ("bf16", "fp16"):
        return native.pack(matrix.to(dtype_of(format)), format, is_paired=paired)
    if format == "int8":
        scales = matrix.abs().amax(1) / 127
        values = (matrix / scales[:, None]).round().to(torch.int8)
        return native.pack(values, "int8", scales=scales, is_paired=paired, quantises_x=quantises_x)
    groups = matrix.unflatten(1, (-1, GROUP))
    scales = groups.abs().amax(2) / 7.5
    levels = (groups / scales[..., None] + 8).round().clamp(0, 15).to(torch.uint8).flatten(1)
    return native.pack(
        levels[:, 0::2] | levels[:, 1::2] << 4,
        "int4",
        scales=scales.contiguous(),
        offsets=(-8 * scales).contiguous(),
        group=GROUP,
        is_paired=paired,
        quantises_x=quantises_x,
    )


def act(x: Tensor, activation: str) -> Tensor:
    """The plain activation."""
    if activation == "silu_mul":
        gate, up = x.chunk(2, dim=-1)
        return PLAIN.silu_mul(gate, up)
    if activation == "none":
        return x
    return PLAIN.gelu_tanh(x) if activation == "gelu_tanh" else PLAIN.gelu_erf(x)


# m, hidden, inner, activation
MLPS = {
    "glm-4v-tower": (6401, 1792, 15360, "gelu_erf"),
    "glm-4v": (1634, 4096, 27392, "silu_mul"),
    "visualglm-tower": (257, 1408, 6144, "gelu_erf"),
    "visualglm": (64, 4096, 16384, "gelu_tanh"),
}


def mlp_cases(forms: Sequence[str]) -> Iterator[Case]:
    """Both matrices in one call."""
    for model, shape in MLPS.items():
        for form in forms:
            yield Case(f"{model}/mlp/{form}/m={shape[0]}", mlp(shape, form))


def mlp(shape: tuple[int, int, int, str], form: str) -> Callable[[Native], Work]:
    """Held against multiplying: these have many rows."""
    m, hidden, inner, activation = shape
    narrow = inner // 2 if activation == "silu_mul" else inner

    def build(native: Native) -> Work:
        format, quantises_x = FORMS[form]
        up, down = noise(inner, hidden) * hidden**-0.5, noise(hidden, narrow) * narrow**-0.5
        packed_up = pack(native, up, format, activation, quantises_x)
        packed_down = pack(native, down, format, "none", quantises_x)
        x, up, down = (t.to(dtype_of(form)) for t in (noise(m, hidden), up, down))
        return Work(
            native=lambda turn: native.mlp(x, packed_up, packed_down, activation=activation),
            plain=lambda turn: F.linear(act(F.linear(x, up), activation), down),
            limit="int8" if quantises_x else "bf16",
            amount=2 * m * hidden * (inner + narrow),
        )

    return build


# --- attention -------------------------------------------------------------------------------

# queries, heads, KV heads, width, keys that all queries see (None: all of them)
PROMPTS = {
    "glm-4v-tower/attention/6401": (6401, 16, 16, 112, None),
    "glm-4v/attention/1634": (1634, 32, 2, 128, 0),
    "visualglm-tower/attention/257": (257, 16, 16, 88, None),
    "visualglm/attention/64": (64, 32, 32, 128, 63),
}
# rows, context, heads, KV heads
DECODES = {
    f"{model}/decode/rows={rows},context={context}": (rows, context, heads, kv_heads)
    for model, heads, kv_heads, contexts in (
        ("glm-4v", 32, 2, (2048, 8192)),
        ("visualglm", 32, 32, (512,)),
    )
    for rows in (1, 8)
    for context in contexts
}
WIDTH, BLOCK = 128, 32


def attention_cases() -> Iterator[Case]:
    """Prompts and pictures, then decoding rows."""
    for name, shape in PROMPTS.items():
        yield Case(name, attention(*shape))
    for name, sizes in DECODES.items():
        yield Case(name, decode(*sizes))


def attention(
    num: int, heads: int, kv_heads: int, width: int, shared: int | None
) -> Callable[[Native], Work]:
    """Products of queries and keys that see each other; a causal prompt has half of them."""

    def build(native: Native) -> Work:
        q = noise(num, heads, width).bfloat16()
        k, v = (noise(num, kv_heads, width).bfloat16() for _ in range(2))
        scale = width**-0.5
        places = torch.arange(num)
        hidden = (places[None] > places[:, None]) & (places[None] >= (shared or 0))
        mask = None if shared is None else torch.where(hidden, float("-inf"), 0.0).bfloat16()

        def plain(turn: int) -> Tensor:
            keys, values = (t.repeat_interleave(heads // kv_heads, 1) for t in (k, v))
            turned = (t.transpose(0, 1)[None] for t in (q, keys, values))
            out = F.scaled_dot_product_attention(*turned, attn_mask=mask, scale=scale)
            return out[0].transpose(0, 1)

        seen = num if shared is None else max(shared, num / 2)
        return Work(
            native=lambda turn: native.attention(
                q,
                k,
                v,
                scale,
                num_keys=num,
                first_position=0,
                num_shared=num if shared is None else shared,
            ),
            plain=plain,
            limit="bf16",
            amount=4 * num * seen * heads * width,
        )

    return build


def decode(rows: int, context: int, heads: int, kv_heads: int) -> Callable[[Native], Work]:
    """Held against reading the keys and values; caches are used in turn."""

    def build(native: Native) -> Work:
        per_row = context // BLOCK
        nbytes = 2 * rows * context * kv_heads * WIDTH * 2
        copies = max(1, min(64, COLD_BYTES // 2 // nbytes))
        shape = (rows * per_row, BLOCK, kv_heads, WIDTH)
        first = noise(*shape).bfloat16()
        caches = [KVCache(first.clone(), first.flip(0).contiguous()) for _ in range(copies)]
        q, scale = noise(rows, heads, WIDTH).bfloat16(), WIDTH**-0.5
        tables = torch.randperm(rows * per_row).view(rows, per_row)
        lens = torch.full((rows,), context)
        batch = AttentionBatch(
            num_decodes=rows,
            query_starts=tuple(range(rows + 1)),
            context_lens=(context,) * rows,
            slots=torch.zeros(rows, dtype=torch.int64),
            block_tables=tables,
            decode_mask=torch.zeros(rows, 1, 1, context, dtype=torch.bfloat16),
            prefill_masks=(),
        )

        def run(turn: int) -> Tensor | None:
            cache = caches[turn % copies]
            return native.decode(q, cache.key, cache.value, tables, lens, scale)

        return Work(
            native=run,
            plain=lambda turn: PLAIN.decode_attention(q, caches[turn % copies], batch, scale),
            limit="read",
            amount=nbytes,
        )

    return build


# --- rows ------------------------------------------------------------------------------------

# rows, size, whether it is layer normalisation
NORMS = {
    "glm-4v/rms_norm/1634": (1634, 4096, False),
    "glm-4v-tower/layer_norm/6401": (6401, 1792, True),
    "visualglm/layer_norm/64": (64, 4096, True),
}
# tokens, heads, pairs, segments, whether pairs are neighbours
ROTATIONS = {
    "glm-4v/rotate/1634": (1634, 32, 32, 1, True),
    "visualglm/rotate/64": (64, 32, 64, 2, False),
}


def row_cases() -> Iterator[Case]:
    """Norms and rotations."""
    for name, (rows, size, is_layer) in NORMS.items():
        yield Case(name, norm(rows, size, is_layer))
    for name, shape in ROTATIONS.items():
        yield Case(name, rotate(*shape))


def norm(rows: int, size: int, is_layer: bool) -> Callable[[Native], Work]:
    """Held against reading, though half of the bytes are written."""

    def build(native: Native) -> Work:
        copies = max(1, COLD_BYTES // 2 // (rows * size * 2))
        first = noise(rows, size).bfloat16()
        xs = [first.clone() for _ in range(copies)]
        weight, bias = noise(size).bfloat16(), noise(size).bfloat16()
        given = bias if is_layer else None

        def plain(turn: int) -> Tensor:
            x = xs[turn % copies]
            if is_layer:
                return PLAIN.layer_norm(x, weight, bias, 1e-5)
            return PLAIN.rms_norm(x, weight, 1e-5)

        return Work(
            native=lambda turn: native.norm(xs[turn % copies], weight, given, 1e-5),
            plain=plain,
            limit="read",
            amount=2 * rows * size * 2,  # read and written
        )

    return build


def rotate(
    tokens: int, heads: int, pairs: int, segments: int, is_interleaved: bool
) -> Callable[[Native], Work]:
    """The same."""

    def build(native: Native) -> Work:
        x = noise(tokens, heads, WIDTH).bfloat16()
        angles = noise(tokens, pairs)
        cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()
        style: Any = "interleaved" if is_interleaved else "half"
        return Work(
            native=lambda turn: native.rotate(x, cos, sin, is_interleaved, segments),
            plain=lambda turn: PLAIN.rotate(x, cos, sin, style, segments),
            limit="read",
            amount=2 * x.nbytes,
        )

    return build


def noise(*shape: int) -> Tensor:
    """float32 of variance 1, the same in every run; one block over and over, for speed."""
    block = torch.randn(1_048_573, generator=torch.Generator().manual_seed(0))
    flat = torch.empty(shape).flatten()
    for part in flat.split(len(block)):
        part.copy_(block[: len(part)])
    return flat.view(shape)


# --- the run ---------------------------------------------------------------------------------


def main() -> None:
    """Measure the cases that were asked for."""
    args = parse_arguments()
    forms = args.formats.split(",")
    cases = [*linear_cases(forms), *mlp_cases(forms), *attention_cases(), *row_cases()]
    cases = [case for case in cases if args.only in case.name]
    if args.list:
        print(*(case.name for case in cases), sep="\n")
        return
    path = library_path()
    if path is None:
        raise SystemExit("the native kernels are not built; glimt doctor tells how")
    isa = args.isa or available(path)[0]
    torch.set_num_threads(args.threads)
    native, meter = Native(path, isa, args.threads), LimitMeter(args.threads, isa)
    meter.warm_up()
    print(f"{isa}, {args.threads} threads; median of the samples that count")
    print(f"{'case':44} {'native':>10} {'limit':>7} {'plain':>10} {'limit':>7} {'error':>8}  n")
    found = [row for case in cases if (row := shown(case, native, meter)) is not None]
    limits = meter.measure()
    print(json.dumps({"isa": isa, "threads": args.threads, "cases": found,
                      "read_bytes": limits.read_bytes, "bf16_ops": limits.bf16_ops,
                      "int8_ops": limits.int8_ops}))  # fmt: skip


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--isa", choices=ISAS, help="the best there is if not given")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--formats", default="bf16,int8,w8a8,int4,w4a8", help=", ".join(FORMS))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--list", action="store_true", help="name the cases and leave")
    args = parser.parse_args()
    if unknown := set(args.formats.split(",")) - FORMS.keys():
        parser.error(f"--formats: {', '.join(sorted(unknown))} is unknown; {', '.join(FORMS)}")
    return args


def shown(case: Case, native: Native, meter: LimitMeter) -> dict[str, Any] | None:
    """Measure a case and print its line at once."""
    row = measure(case, native, meter)
    if row is None:
        print(f"{case.name:44} {'no kernel':>10}", flush=True)
        return None
    cells = " ".join(cell(row[name]) for name in ("native", "plain"))
    counted = f"{row['native']['num_steady']}/{row['plain']['num_steady']}"
    print(f"{case.name:44} {cells} {row['error']:8.1e}  {counted}", flush=True)
    return row


def cell(figures: dict[str, Any]) -> str:
    """Time and share of one version."""
    if figures["median_s"] is None:
        return f"{'-':>10} {'-':>7}"
    return f"{figures['median_s'] * 1e3:7.2f} ms {figures['share']:7.0%}"


if __name__ == "__main__":
    main()
