"""Where a step's time goes: every stage of the engine, and what the model spends outside kernels.

    python benchmarks/steps.py [--model demo] [--batch 1,8,64] [--context 256] [--steps 60]

Every sequence decodes one token per step. Median seconds of each part over the steps; "engine" is
what scheduler and runner do in Python, "python" what the model does between its kernels. Ends in
one line of JSON. Never imported; passes and fails nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile

import glimt.runner.model_runner as model_runner
from glimt.config import EngineConfig
from glimt.engine import Engine
from glimt.types import SamplingParams

ENGINE = ("plan_step", "flatten", "clear_blocks", "rest of run", "finish_step", "commit")
MODEL = ("embed", "forward", "logits")
KERNELS = ("linear", "mlp", "norm", "rotate", "attention", "decode", "write_kv")  # of the library


class Stopwatch:
    """Seconds by name; a name's time holds that of the names inside it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, its time added to `name`."""

        def call(*args: Any, **options: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*args, **options)
            finally:
                self.seconds[name] += time.perf_counter() - began

        return call

    def wrap(self, owner: Any, attribute: str, name: str = "") -> None:
        """Time a method or a module's function from now on."""
        setattr(owner, attribute, self.timed(name or attribute, getattr(owner, attribute)))


def build(args: argparse.Namespace, batch: int) -> Engine:
    """An engine in which `batch` sequences decode."""
    tokens = 6 * args.context + args.steps + 40  # a tokenizer may make a token of each character
    engine = Engine.load(
        EngineConfig(
            model=args.model,
            dtype=args.dtype,
            quant=args.quant,
            num_threads=args.threads,
            max_num_seqs=max(batch, 64),
            num_blocks=batch * (tokens // 32 + 2),
        )
    )
    size = engine.opened.config.vocab_size
    for number in range(batch):
        sampling = SamplingParams(
            temperature=0.0, max_tokens=args.steps + 30, ignore_eos=True, n=1, seed=number
        )
        text = " ".join(f"{(number * 7919 + at * 31) % size}" for at in range(args.context // 4))
        engine.add_request(engine.prepare_text(text, sampling))
    while len(engine.scheduler.waiting) or any(s.is_prefilling for s in engine.scheduler.running):
        engine.step()
    return engine


def watch(engine: Engine, stopwatch: Stopwatch) -> None:
    """Time every stage of the engine and of the model."""
    for owner, names in (
        (engine.scheduler, ("plan_step", "commit")),
        (engine.runner, ("run",)),
        (engine.vision, ("complete", "finish_step")),
        (engine.sampler, ("sample",)),
        (engine.outputs, ("note_step", "collect")),
        (model_runner, ("flatten",)),
        (type(engine.runner.caches), ("clear_blocks",)),
        (engine.runner.model, MODEL),
    ):
        for name in names:
            stopwatch.wrap(owner, name)
    library = engine.opened.device.native.library
    for name in KERNELS:
        stopwatch.wrap(library, f"glimt_{name}", "kernels")


def measure(engine: Engine, steps: int) -> dict[str, float]:
    """Median milliseconds of each part of a step."""
    samples: dict[str, list[float]] = defaultdict(list)
    stopwatch = Stopwatch()
    watch(engine, stopwatch)
    for _ in range(steps):
        stopwatch.seconds.clear()
        began = time.perf_counter()
        engine.step()
        whole = time.perf_counter() - began
        for name, seconds in _parts(stopwatch.seconds, whole).items():
            samples[name].append(seconds)
    return {name: 1e3 * statistics.median(values) for name, values in samples.items()}


def _parts(seconds: dict[str, float], whole: float) -> dict[str, float]:
    model = sum(seconds[name] for name in MODEL)
    rest = seconds["run"] - model - seconds["flatten"] - seconds["clear_blocks"]
    parts = {"step": whole, **seconds, "rest of run": rest}
    parts["engine"] = sum(parts[name] for name in ENGINE)
    parts["model"] = model
    parts["python"] = model - seconds["kernels"]
    return parts


def allocations(engine: Engine) -> dict[str, float]:
    """Tensors allocated in a step and their bytes, and Python objects that outlive it."""
    before = sys.getallocatedblocks()
    for _ in range(4):
        engine.step()
    kept = (sys.getallocatedblocks() - before) / 4
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        engine.step()
    sizes = [
        e.nbytes() for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"
    ]
    given = [size for size in sizes if size > 0]
    return {"tensors": len(given), "tensor_bytes": sum(given), "python_blocks_kept": kept}


def main() -> None:
    """Print a table per batch size, and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--quant", default="none")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--batch", default="1,8,64")
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()
    results = {}
    for batch in map(int, args.batch.split(",")):
        engine = build(args, batch)
        found = allocations(engine)
        results[batch] = measure(engine, args.steps) | found
        print(f"batch {batch}")
        for name, value in results[batch].items():
            print(f"  {name:20} {value:12.3f}")
    print(json.dumps({"args": vars(args), "results": results}))


if __name__ == "__main__":
    main()
