"""What is whose, and models that are divided among ranks against the originals' outputs."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from conftest import GOLDEN, Oracle, run_greedy
from divided import divided_engine
from glimt.parallel import Group, Part, Shard, TorchGroup, divided, divided_vocabulary
from ranks import on_ranks

VALUES = 5e-5  # of logits in float32, whose sums are taken in another order


def ranks_of(size: int) -> list[Group]:
    return [Group(rank, size) for rank in range(size)]


def test_neighbouring_parts_are_divided_each_by_itself():
    """Catches a fused matrix that is cut through the middle, so that queries become keys."""
    shards = [divided(group, 0, Part(4, 2), Part(2, 2)) for group in ranks_of(2)]
    assert [shard and shard.ranges for shard in shards] == [((0, 4), (8, 10)), ((4, 8), (10, 12))]
    assert [shard and shard.full for shard in shards] == [12, 12]


def test_ranks_beyond_the_units_hold_the_same_ones():
    """Catches KV heads that are not beside the query heads that read them."""
    shards = [divided(group, 0, Part(2, 3)) for group in ranks_of(8)]
    first = [shard.ranges[0] if shard else None for shard in shards]
    assert first == [(0, 3)] * 4 + [(3, 6)] * 4


def test_a_vocabulary_is_padded_with_zeros():
    """Catches rows of a neighbour, or of nobody, in the last rank's part."""
    table = torch.arange(1.0, 8.0)[:, None]
    shards = [divided_vocabulary(group, 7) for group in ranks_of(4)]
    parts = [shard.of(table)[:, 0].tolist() for shard in shards if shard]
    assert parts == [[1, 2], [3, 4], [5, 6], [7, 0]]


def test_a_rank_without_any_row_has_zeros():
    """Catches a negative length where the vocabulary ends before the rank's part."""
    shard = Shard(Group(3, 4), 0, 5, ((6, 8),))
    assert shard.of(torch.ones(5, 2)).tolist() == [[0, 0], [0, 0]]


def sizes(oracle: Oracle) -> list[int]:
    return [2, 4, 8] if oracle.name.endswith("wide") else [2]


def test_divided_models_give_the_originals_tokens(oracle: Oracle) -> None:
    """Catches every error of division: heads, halves of a fused matrix, sums, biases, padding."""
    for size in sizes(oracle):

        def run(group: Group) -> list[list[int]]:
            engine = divided_engine(oracle, group)
            return [run_greedy(engine, oracle.request(c, max_tokens=24)) for c in oracle.cases]

        for found in on_ranks(size, run):
            assert found == [oracle.arrays[f"{c}.greedy_24"].tolist() for c in oracle.cases]


def test_divided_models_give_the_originals_values(oracle: Oracle) -> None:
    """Catches a bias that every rank adds, which seldom changes a token."""
    picked = oracle.arrays["picked_token_ids"]
    for size in sizes(oracle):

        def run(group: Group) -> tuple[np.ndarray, np.ndarray]:
            engine = divided_engine(oracle, group)
            hidden: list[torch.Tensor] = []
            engine.runner.model.register_forward_hook(lambda m, args, out: hidden.append(out))
            engine.add_request(oracle.request(oracle.cases[0], max_tokens=1))
            engine.step()
            with torch.inference_mode():
                features = engine.runner.model.image_features([oracle.image()])[0]
                logits = engine.runner.model.logits(hidden[0])
            return features.numpy(), logits[-1, picked].numpy()

        for features, logits in on_ranks(size, run):
            expected = oracle.arrays[f"{oracle.cases[0]}.logits_last_picked"]
            np.testing.assert_allclose(logits, expected, atol=VALUES, rtol=0)
            np.testing.assert_allclose(
                features, oracle.arrays["image_features"], atol=VALUES, rtol=0
            )


@pytest.mark.parametrize("name", ["glm4v_wide_oracle", "visualglm_wide_oracle"])
def test_each_rank_holds_its_part_only(name: str, request: pytest.FixtureRequest) -> None:
    """Catches a matrix that every rank loads whole, so that nothing is saved."""
    oracle: Oracle = request.getfixturevalue(name)
    whole = divided_engine(oracle, Group()).runner.model
    size = {name: value.numel() for name, value in whole.named_parameters()}
    for model in on_ranks(4, lambda group: divided_engine(oracle, group).runner.model):
        names = [n for n, v in model.named_parameters() if v.ndim > 1 and v.numel() == size[n]]
        kept = {name.rpartition(".")[0] for name in names}
        assert kept <= {"tower.embed", "tower.embed.patch", "adapter", "adapter.merge",
                        "adapter.project", "qformer", "project"}, kept  # fmt: skip


def gloo_threads() -> set[str]:
    """Numbers of this process's threads that gloo started."""
    found = set()
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # one that ends meanwhile
            if "gloo" in (task / "comm").read_text():
                found.add(task.name)
    return found


def test_a_group_that_is_left_has_no_threads(tmp_path: Path) -> None:
    """Catches a thread of gloo that lives until the interpreter ends, and then aborts the process.

    A layer holds the group beyond its end, as `group` does here, and so may an error.
    """
    before = gloo_threads()
    store = dist.FileStore(str(tmp_path / "store"), 1)  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    assert dist.group.WORLD is not None
    group = TorchGroup(dist.group.WORLD)
    assert group.all_reduce(torch.ones(2)).tolist() == [1, 1]
    with pytest.raises(RuntimeError) as raised:
        group.all_reduce(torch.ones(2, dtype=torch.uint16))
    assert gloo_threads() - before
    group.close()
    group.close()
    assert not gloo_threads() - before
    assert raised.value.__traceback__ is not None
    assert not dist.is_initialized()


def test_processes_over_gloo_give_the_originals_answers(oracle: Oracle, tmp_path: Path) -> None:
    """Catches what threads of one process cannot show: another order or dtype on the wire."""
    golden = GOLDEN / f"{oracle.name}.golden.npz"
    program = "import sys; from rank_program import main; main(*sys.argv[1:])"
    environment = {"GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": os.pathsep.join(sys.path)}
    for size in sizes(oracle):
        store = tmp_path / f"store-{size}"
        given = oracle.name, str(oracle.folder), str(golden)
        ranks = [
            subprocess.Popen(
                [sys.executable, "-c", program, *given, str(rank), str(size), str(store)],
                stdout=subprocess.PIPE,
                env=os.environ | environment,
            )
            for rank in range(size)
        ]
        for rank in ranks:
            said, _ = rank.communicate(timeout=280)
            assert rank.returncode == 0
            found = json.loads(said)
            wanted = {c: oracle.arrays[f"{c}.greedy_24"].tolist() for c in oracle.cases}
            assert found["tokens"] == wanted
            expected = oracle.arrays[f"{oracle.cases[0]}.logits_last_picked"]
            np.testing.assert_allclose(found["logits"], expected, atol=VALUES, rtol=0)
