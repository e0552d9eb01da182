"""What dividing a model among processes costs or saves on one machine.

    python -m benchmarks.ranks synthetic:glm-4v-9b,layers=4,vision-layers=2

Each setting is a process of its own, since threads are counted by process: one rank with every
core, one rank with its share of them as a rank of two has, and --tp. All settings stand loaded and
are asked by turns: a prompt of so many tokens and one token, then an answer of so many more. Times
are the engine's own: to the first token, and from token to token.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from typing import Any

import glimt
from glimt.engine import Engine
from glimt.outputs.assembler import OutputAssembler
from glimt.types import RequestOutput, SamplingParams


def answered(engine: Engine, token_ids: list[int], num_tokens: int) -> RequestOutput:
    """One greedy answer of an exact length."""
    sampling = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    request = engine.prepare_tokens(token_ids, sampling)
    assembler = OutputAssembler(request)
    engine.add_request(request)
    while engine.has_work:
        for output in engine.step():
            if (whole := assembler.add(output)) is not None:
                return whole
    raise AssertionError("a request without an end")


def serve_parent(given: argparse.Namespace) -> None:
    """Load one setting; then measure once for each line that comes in."""
    config = glimt.EngineConfig(
        model=given.model,
        dtype=given.dtype,
        tp_size=given.tp,
        num_threads=given.threads,
        max_num_seqs=1,
        enable_prefix_cache=False,
    )
    engine = Engine.load(config)
    prompt = [1000 + i % 5000 for i in range(given.prompt)]
    answered(engine, prompt, 4)  # warm-up
    print("ready", flush=True)
    for _ in sys.stdin:
        output = answered(engine, prompt, given.tokens)
        per_token_s = output.timings.decode_s / (given.tokens - 1)
        told = {"ttft_ms": 1e3 * output.timings.ttft_s, "tpot_ms": 1e3 * per_token_s}
        print(json.dumps(told | {"tokens": output.token_ids[:8]}), flush=True)
    engine.close()


class Setting:
    """One loaded engine in a process of its own."""

    def __init__(self, given: argparse.Namespace, tp: int, threads: int | None) -> None:
        sizes = ["--prompt", str(given.prompt), "--tokens", str(given.tokens)]
        told = [given.model, "--dtype", given.dtype, "--tp", str(tp), *sizes]
        told += [] if threads is None else ["--threads", str(threads)]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.ranks", "--child", *told],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._line() == "ready\n"

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()

    def measure(self) -> dict[str, Any]:
        """One prompt and its answer."""
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        found: dict[str, Any] = json.loads(self._line())
        return found

    def close(self) -> None:
        """End the engine and its ranks."""
        self._process.communicate(timeout=120)


def main() -> None:
    """Measure each setting by turns and print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=33)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--child", action="store_true")
    given = parser.parse_args()
    if given.child:
        serve_parent(given)
        return
    share = max(1, len(os.sched_getaffinity(0)) // given.tp)
    settings = {
        "one rank, all cores": Setting(given, 1, None),
        f"one rank, {share} threads": Setting(given, 1, share),
        f"--tp {given.tp}": Setting(given, given.tp, None),
    }
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in settings}
    for _ in range(given.repeats):
        for name, setting in settings.items():
            found[name].append(setting.measure())
            print(name, found[name][-1], file=sys.stderr)
    for setting in settings.values():
        setting.close()
    middles = {
        name: {key: statistics.median(run[key] for run in runs) for key in ("ttft_ms", "tpot_ms")}
        for name, runs in found.items()
    }
    print(json.dumps({"model": given.model, "median": middles, "runs": found}))


if __name__ == "__main__":
    main()
