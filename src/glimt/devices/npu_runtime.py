"""torch_npu: found, loaded and asked which chip there is; or why it cannot be used, and what to do.

Nothing here is run by an import: torch_npu loads CANN's libraries, which may be absent.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import sys
from collections.abc import Callable
from typing import Any, Literal

import torch

Chip = Literal["a2", "310p"]

# Numbers of torch_npu/csrc/core/npu/NpuVariables.h: first, last, and the operators that serve them.
# A3 (Ascend910_93) has those of A2.
_SERVED: tuple[tuple[int, int, Chip], ...] = (
    (200, 205, "310p"),
    (220, 225, "a2"),
    (250, 259, "a2"),
)
_UNSERVED = (
    (100, 104, "the first-generation Ascend 910"),
    (240, 243, "Ascend 310B"),
    (260, 9999, "Ascend 950"),
)


def load_torch_npu() -> Any:
    """The module torch_npu. Raises whatever its import raises, ImportError as a rule."""
    return importlib.import_module("torch_npu")


def chip_of(torch_npu: Any) -> Chip | None:
    """Whose operators serve the chip that is in use; None for a chip that none do."""
    number = int(torch_npu.npu.get_soc_version())
    return next((chip for first, last, chip in _SERVED if first <= number <= last), None)


def takes(operator: str, argument: str) -> bool:
    """Does an operator, such as "npu.npu_rms_norm", exist here and have that argument?"""
    namespace, _, name = operator.partition(".")
    packet = getattr(getattr(torch.ops, namespace), name, None)
    if packet is None:
        return False
    return argument in {one.name for one in packet.default._schema.arguments}


# --- why not ---------------------------------------------------------------------------------


def unavailable_reason(load_library: Callable[[str], object] = ctypes.CDLL) -> str | None:
    """Why no NPU can be used here, and what to do about it; None when one can.

    load_library: raises OSError for a shared library that is not found
    """
    if not _is_installed():
        return (
            f"torch-npu is not installed: install CANN and its operators' package, then "
            f"pip install 'torch-npu=={_release(torch.__version__)}.*' (docs/ascend.md)"
        )
    try:
        torch_npu = load_torch_npu()
    except (ImportError, OSError, RuntimeError) as error:
        return _import_reason(error)
    return _mismatch(torch_npu) or _no_chip(torch_npu) or _no_atb(torch_npu, load_library)


def _is_installed() -> bool:
    return "torch_npu" in sys.modules or importlib.util.find_spec("torch_npu") is not None


def _import_reason(error: Exception) -> str:
    said = str(error).partition("\n")[0]
    if ".so" in said:
        return (
            f"CANN's libraries are not found ({said}): source set_env.sh of the CANN toolkit in "
            "this shell, and set TORCH_DEVICE_BACKEND_AUTOLOAD=0 to use torch without an NPU"
        )
    return f"torch_npu cannot be imported: {said}"


def _release(version: str) -> str:
    """The two numbers that torch and torch-npu must agree on."""
    return ".".join(version.split("+")[0].split(".")[:2])


def _mismatch(torch_npu: Any) -> str | None:
    theirs, ours = _release(torch_npu.__version__), _release(torch.__version__)
    if theirs == ours:
        return None
    return (
        f"torch-npu {torch_npu.__version__} is made for torch {theirs}, but torch "
        f"{torch.__version__} is installed: pip install 'torch-npu=={ours}.*'"
    )


def _no_chip(torch_npu: Any) -> str | None:
    if torch_npu.npu.device_count() == 0:
        return (
            "no NPU can be seen: look whether npu-smi info lists one, and what "
            "ASCEND_RT_VISIBLE_DEVICES leaves of them"
        )
    if chip_of(torch_npu) is not None:
        return None
    number = int(torch_npu.npu.get_soc_version())
    name = next((said for low, high, said in _UNSERVED if low <= number <= high), None)
    return f"{name or f'chip number {number}'} is not served; Atlas A2, A3 and 300I DUO are"


def needs_atb(chip: Chip | None) -> bool:
    """Does this chip, with this torch-npu, call operators of ATB, which is in the package NNAL?"""
    return chip == "310p" or not takes("npu.npu_scatter_pa_kv_cache", "cache_mode")


def _no_atb(torch_npu: Any, load_library: Callable[[str], object]) -> str | None:
    """torch_npu itself would look for it at the first call, in the midst of a request."""
    if not needs_atb(chip_of(torch_npu)):
        return None
    try:
        load_library("libatb.so")
    except OSError as error:
        return (
            f"ATB is not found ({error}): install NNAL of CANN's version, and source its "
            "set_env.sh after that of the CANN toolkit"
        )
    return None
