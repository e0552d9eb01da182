"""The compiled kernels: where they lie, what is in them, and the types of csrc/exports.cpp."""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Sequence
from ctypes import POINTER, c_char_p, c_double, c_int, c_int64, c_void_p
from functools import cache

from glimt.kernels import structs
from glimt.kernels.structs import ABI, PlainWeightStruct

ISAS = ("amx", "avx512", "avx2", "portable")  # best first
_CALLS = {
    "glimt_linear": structs.LinearStruct,
    "glimt_mlp": structs.MlpStruct,
    "glimt_attention": structs.AttentionStruct,
    "glimt_decode": structs.DecodeStruct,
    "glimt_norm": structs.NormStruct,
    "glimt_rotate": structs.RotateStruct,
    "glimt_write_kv": structs.WriteKvStruct,
    "glimt_fit": structs.FitStruct,
}


@cache
def library_path() -> str | None:
    """Where the compiled kernels lie; None where they were not built."""
    spec = importlib.util.find_spec("glimt.kernels._native")
    return spec.origin if spec else None


@cache
def open_library(path: str) -> ctypes.CDLL:
    """The compiled kernels. Raises OSError if the file is not usable here or of another build."""
    library = ctypes.CDLL(path)
    if library.glimt_abi() != ABI:
        raise OSError(f"{path} is of another build (ABI {library.glimt_abi()}, not {ABI})")
    for name, struct in _CALLS.items():
        getattr(library, name).argtypes = (POINTER(struct),)
    library.glimt_has.argtypes = library.glimt_use.argtypes = (c_char_p,)
    library.glimt_set_threads.argtypes = (c_int,)
    library.glimt_set_threads.restype = None
    library.glimt_place_threads.argtypes = (POINTER(c_int), c_int)
    library.glimt_place_threads.restype = None
    library.glimt_packed_bytes.argtypes = (POINTER(PlainWeightStruct),)
    library.glimt_packed_bytes.restype = c_int64
    library.glimt_pack.argtypes = (POINTER(PlainWeightStruct), c_int, c_void_p)
    library.glimt_pack.restype = None
    library.glimt_read_limit.argtypes = (c_char_p, c_void_p, c_int64)
    library.glimt_math_limit.argtypes = (c_char_p, c_int)
    library.glimt_read_limit.restype = library.glimt_math_limit.restype = c_double
    return library


def available(path: str) -> Sequence[str]:
    """Instruction sets that are compiled in and that this processor has, best first."""
    library = open_library(path)
    return [isa for isa in ISAS if library.glimt_has(isa.encode())]
