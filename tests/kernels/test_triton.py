"""The Triton kernels' arithmetic, on the CPU where triton is installed."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parent / "triton_program.py"


def test_every_triton_kernel_computes_what_torch_computes():
    """Would catch a wrong index, mask, part of a context or pair of a rotation, and a device that
    hands a kernel something else than its neighbours do.
    """
    if find_spec("triton") is None:
        pytest.skip("triton is not installed; torch's CUDA build brings it: pip install triton")
    done = subprocess.run(
        [sys.executable, str(PROGRAM)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split("\n")[:-1] == [
        "torch.float32 rows",
        "torch.float32 decodes",
        "torch.float16 rows",
        "torch.float16 decodes",
        "torch.bfloat16 rows",
        "engines",
    ]


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_a_context_is_divided_as_far_as_that_pays():
    """Would catch an empty part, one too few, or parts that do not reach the end."""
    from glimt.kernels.triton_attention import Splits, plan_splits

    assert plan_splits(1, 2, 8192, 64) == Splits(32, 256)
    assert plan_splits(64, 2, 8192, 64) == Splits(4, 2048)
    assert plan_splits(256, 32, 8192, 64) == Splits(1, 8192)
    assert plan_splits(1, 2, 100, 64) == Splits(1, 128)
    for rows, context in ((1, 1), (3, 777), (2, 5000), (1, 131072)):
        splits = plan_splits(rows, 2, context, 64)
        assert splits.tokens % 64 == 0
        assert (splits.count - 1) * splits.tokens < context <= splits.count * splits.tokens
