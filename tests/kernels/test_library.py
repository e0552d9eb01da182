"""kernels/library.py: a library that is not ours, or not this one, is refused in words."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace

import pytest

from glimt.kernels.library import open_library
from glimt.kernels.structs import ABI


def test_a_library_of_another_build_is_refused_before_it_is_asked_for_more(monkeypatch):
    """Catches AttributeError, which nobody takes for unusable kernels, where a function is new."""
    old = SimpleNamespace(glimt_abi=lambda: ABI - 1)
    monkeypatch.setattr(ctypes, "CDLL", lambda path: old)
    with pytest.raises(OSError, match=f"of another build \\(ABI {ABI - 1}, not {ABI}\\)"):
        open_library("old.so")


def test_a_file_that_is_no_library_is_refused(tmp_path):
    """Catches an error that the choice of kernels does not take for their absence."""
    (tmp_path / "text.so").write_text("no library")
    with pytest.raises(OSError, match=r"text\.so"):
        open_library(str(tmp_path / "text.so"))
