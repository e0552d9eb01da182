"""One rank of a test over gloo, in a process of its own.

Runs every case of a golden file through an engine whose model is divided, and prints what it found.
"""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from conftest import Oracle, run_greedy
from divided import divided_engine
from glimt.parallel import TorchGroup


def main(name: str, folder: str, golden: str, rank: str, size: str, store: str) -> None:
    """Print {"tokens": …, "logits": …} of this rank."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, int(size)),  # type: ignore[attr-defined]
        rank=int(rank),
        world_size=int(size),
        timeout=timedelta(seconds=240),
    )
    assert dist.group.WORLD is not None
    oracle = Oracle(name, Path(folder), Path(golden))
    group = TorchGroup(dist.group.WORLD)
    engine = divided_engine(oracle, group)
    tokens = {c: run_greedy(engine, oracle.request(c, max_tokens=24)) for c in oracle.cases}
    hidden: list[torch.Tensor] = []
    engine.runner.model.register_forward_hook(lambda m, args, out: hidden.append(out))
    engine.add_request(oracle.request(oracle.cases[0], max_tokens=1))
    engine.step()
    with torch.inference_mode():
        logits = engine.runner.model.logits(hidden[0])[-1, oracle.arrays["picked_token_ids"]]
    print(json.dumps({"tokens": tokens, "logits": logits.tolist()}))
    group.close()
