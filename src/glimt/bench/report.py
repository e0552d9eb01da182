"""What was measured, as plain data for a file and as rows for a table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from glimt.bench.samples import Summary
from glimt.bench.synthetic import Decoding, FirstToken, Measurements

NONE = "-"


def as_dict(found: Measurements, machine: Mapping[str, Any], command: str) -> dict[str, Any]:
    """Everything, with the machine and the command that gives it again."""
    costs = found.costs
    return {
        "command": command,
        "machine": dict(machine),
        "model": _model(found),
        "settings": _settings(found),
        "limits": {
            "is_native": found.is_limit_native,
            "math": found.math,
            "start": asdict(found.limits[0]),
            "end": asdict(found.limits[1]),
        },
        "costs": asdict(costs) | {"prefill_ops": costs.prefill_ops(found.prompt_tokens)},
        "memory": {
            "plan": found.memory.as_dict(),
            "peak_rss": found.peak_rss,
            "meter_bytes": found.meter_bytes,
        },
        "load_s": found.load_s,
        "fresh": _first_token(found.fresh),
        "again": _first_token(found.again),
        "decoding": [_decoding(one) for one in found.decoding],
    }


def _model(found: Measurements) -> dict[str, Any]:
    name = found.job.name
    return {
        "name": str(name),
        "family": found.family,
        "layers": found.costs.num_layers,
        "vision_layers": name.vision_layers,
        "dtype": found.dtype,
        "kv_dtype": found.job.kv_dtype,
        "quant": found.job.quant,
        "quant_head": found.job.quant_head,
        "quant_tower": found.job.quant_tower,
        "seed": name.seed,
    }


def _settings(found: Measurements) -> dict[str, Any]:
    job = found.job
    return {
        "device": job.device,
        "threads": found.threads,
        "batches": list(job.batches),
        "prompt_tokens": found.prompt_tokens,
        "image_tokens": found.image_tokens,
        "output_tokens": job.output_len,
        "repeats": job.repeats,
    }


def _first_token(first: FirstToken) -> dict[str, Any]:
    return {
        "ttft": first.ttft.as_dict(),
        "image": first.image.as_dict(),
        "prefill": first.prefill.as_dict(),
        "cached_tokens": first.cached_tokens,
    }


def _decoding(one: Decoding) -> dict[str, Any]:
    return {
        "batch": one.batch,
        "tpot": one.step.as_dict(),
        "tokens_per_s": one.tokens_per_s,
        "mbu": one.step.share,
        "mbu_with_kv": one.share_with_kv,
        "context_tokens": one.context_tokens,
    }


# --- rows ------------------------------------------------------------------------------------


HEADINGS = ("what", "median", "spread", "samples", "of the limit", "tokens/s")


def rows(found: Measurements) -> list[tuple[str, ...]]:
    """One row of texts for each thing measured, under HEADINGS."""
    first = [
        ("picture", found.fresh.image),
        (f"prefill, {found.prompt_tokens} tokens", found.fresh.prefill),
        ("first token (TTFT)", found.fresh.ttft),
        ("first token, seen before", found.again.ttft),
    ]
    return [
        *((name, *_figures(summary), "") for name, summary in first),
        *(_decoding_row(one) for one in found.decoding),
    ]


def _decoding_row(one: Decoding) -> tuple[str, ...]:
    name = "token (TPOT), batch 1" if one.batch == 1 else f"step, batch {one.batch}"
    rate = f"{one.tokens_per_s:.2f}" if one.tokens_per_s else NONE
    return (name, *_figures(one.step), rate)


def _figures(summary: Summary) -> tuple[str, str, str, str]:
    samples = f"{summary.num_steady}"
    if summary.num_left_out:
        samples += f" ({summary.num_left_out} left out)"
    if summary.median_s is None or summary.least_s is None or summary.most_s is None:
        return NONE, NONE, samples, NONE
    spread = f"{_seconds(summary.least_s)} … {_seconds(summary.most_s)}"
    share = f"{summary.share:.0%}" if summary.share else NONE
    return _seconds(summary.median_s), spread, samples, share


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1000:.1f} ms"


def limit_rows(found: Measurements) -> dict[str, str]:
    """The machine's limits at the start and at the end."""
    start, end = found.limits
    shown = {
        "read": f"{start.read_bytes / 1e9:.1f} … {end.read_bytes / 1e9:.1f} GB/s",
        "bfloat16": f"{start.bf16_ops / 1e12:.2f} … {end.bf16_ops / 1e12:.2f} TFLOP/s",
    }
    if start.int8_ops and end.int8_ops:
        shown["int8"] = f"{start.int8_ops / 1e12:.2f} … {end.int8_ops / 1e12:.2f} TOP/s"
    shown["measured by"] = "the native loops" if found.is_limit_native else "torch"
    return shown
