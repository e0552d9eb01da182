"""Sizes in bytes, typed and read."""

import pytest
from typer.testing import CliRunner

from glimt.cli import app
from glimt.sizes import parse_size, size_text


def test_a_memory_size_is_read_as_people_type_it():
    """Catches powers of 1000, and a size that is taken for something else."""
    assert parse_size("16G") == parse_size("16 GiB") == 16 * 2**30
    assert parse_size("1.5m") == 3 * 2**19
    assert parse_size("4096") == 4096
    for wrong in ("", "G", "-1G", "16X", "0"):
        with pytest.raises(ValueError, match="is no size"):
            parse_size(wrong)


@pytest.mark.parametrize("option", ["--memory-limit", "--kv-bytes"])
def test_the_command_line_takes_sizes_and_says_what_one_is(option):
    """Catches one option that takes 4G while its neighbour wants every digit."""
    ran = CliRunner().invoke(app, ["generate", option, "much", "-p", "x"])
    assert ran.exit_code == 2
    assert "'much' is no size" in ran.stderr


def test_a_size_is_told_in_the_unit_that_suits_it():
    """Catches 0.00 GiB for a part of a small model."""
    sizes = (999, 2**10, 3 * 2**19, 2**34)
    assert [size_text(size) for size in sizes] == ["999 bytes", "1.0 KiB", "1.5 MiB", "16.0 GiB"]
