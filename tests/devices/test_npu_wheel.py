"""Our schemas against those of a real torch-npu, which may be installed beside and needs no chip.

GLIMT_TORCH_NPU_PYTHON names a Python that can import torch_npu: with CANN, or with libraries in
LD_LIBRARY_PATH that only have its symbols. It is asked in a process of its own, since the
namespaces npu and atb can be defined once in each.
"""

from __future__ import annotations

import json
import os
import subprocess

import pytest
import torch

from npu_stand_in import VERSIONS, schemas

PROGRAM = """
import json, os, torch
import torch_npu
# Loaded at the first call of one of its operators otherwise, which needs a chip.
folder = os.path.join(os.path.dirname(torch_npu.__file__), "lib")
torch.ops.load_library(os.path.join(folder, "libop_plugin_atb.so"))
known = [str(schema) for schema in torch._C._jit_get_all_schemas()
         if schema.name.partition("::")[0] in ("npu", "atb")]
print("SCHEMAS", json.dumps([torch_npu.__version__, known]))
"""
# Of torch-npu's releases, which of our versions they have: COMPATIBILITY of Ascend/pytorch.
OF_RELEASE = {"2.13": "26.1.0", "2.14": "26.1.0", "2.9": "26.0.0", "2.7": "7.3.0"}


def told(python: str) -> tuple[str, set[str]]:
    """The version of torch-npu and its schemas as text; skips, with the reason, without one."""
    environment = os.environ | {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    ended = subprocess.run(
        [python, "-c", PROGRAM], capture_output=True, env=environment, text=True, check=False
    )
    if ended.returncode:
        pytest.skip(f"{python} cannot import torch_npu: {ended.stderr.strip().splitlines()[-1]}")
    line = next(said for said in ended.stdout.splitlines() if said.startswith("SCHEMAS "))
    version, known = json.loads(line.removeprefix("SCHEMAS "))
    return version, set(known)


def test_schemas_are_those_of_the_installed_torch_npu() -> None:
    """Catches a stand-in that takes calls which the real operators refuse, or the reverse."""
    python = os.environ.get("GLIMT_TORCH_NPU_PYTHON")
    if not python:
        pytest.skip("GLIMT_TORCH_NPU_PYTHON names no Python with torch-npu")
    version, known = told(python)
    ours = OF_RELEASE.get(".".join(version.split(".")[:2]))
    if ours is None:
        pytest.skip(f"torch-npu {version} has none of the versions {', '.join(VERSIONS)}")
    parsed = {str(torch._C.parse_schema(f"{ns}::{text}")) for ns, text in schemas(ours)}
    assert parsed <= known, sorted(parsed - known)
