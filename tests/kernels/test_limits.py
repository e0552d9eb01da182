"""The limits are measured by whatever is there; their values are the machine's business."""

import pytest

from glimt.kernels import limits
from glimt.kernels.library import available, library_path
from glimt.kernels.limits import LimitMeter

SMALL = 2**20


def test_without_the_compiled_loops_torch_measures(monkeypatch):
    """Catches a machine without a compiler that cannot be measured at all."""
    monkeypatch.setattr(limits, "library_path", lambda: None)
    meter = LimitMeter(1, num_bytes=SMALL)
    meter.warm_up()
    found = meter.measure()
    assert not meter.is_native
    assert found.read_bytes > 0
    assert found.bf16_ops > 0
    assert found.int8_ops is None


def native_path() -> str:
    path = library_path()
    if path is None or LimitMeter(1, num_bytes=SMALL).is_native is False:
        pytest.skip("the native kernels are not built")
    return path


def test_every_instruction_set_has_its_loops():
    """Catches a tile loop that is not allowed to run, and a set without a table entry."""
    for isa in {*available(native_path()), "portable"}:
        found = LimitMeter(2, isa, num_bytes=SMALL).measure()
        assert found.read_bytes > 0, isa
        assert found.bf16_ops > 0, isa
        assert (found.int8_ops or 0) > 0, isa


def test_an_unknown_instruction_set_is_refused():
    """Catches another set's limit under the name that was asked for."""
    native_path()
    with pytest.raises(OSError, match="sse9 is not compiled in"):
        LimitMeter(1, "sse9", num_bytes=SMALL)


def test_the_buffer_is_whole_and_aligned():
    """Catches pages that do not exist yet, whose making would be timed as reading."""
    meter = LimitMeter(1, num_bytes=SMALL)
    assert meter.buffer.numel() == SMALL
    assert meter.buffer.data_ptr() % 64 == 0
    assert bool(meter.buffer.all())
