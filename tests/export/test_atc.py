"""The compiler's command line, through an executable of its name; no chip is here."""

from __future__ import annotations

from pathlib import Path

import pytest

from glimt.errors import ConfigError
from glimt.export.atc import AtcJob, run_atc, soc_problems


def job(folder: Path) -> AtcJob:
    (folder / "my tower.onnx").write_bytes(b"a graph")
    return AtcJob(
        onnx=folder / "my tower.onnx",
        om=folder / "my tower.om",
        soc_version="Ascend310P3",
        batch=4,
        image_size=(224, 448),
        precision="mixed_float16",
    )


def test_the_command_is_the_documented_one(tmp_path):
    """Catches an option of another name, swapped sides, and a name that a shell would split."""
    expected = (
        "atc --framework=5 '--model=my tower.onnx' '--output=my tower' "
        "--soc_version=Ascend310P3 --input_shape=input:4,224,448,3 "
        "--precision_mode_v2=mixed_float16"
    )
    assert job(tmp_path).as_text() == expected


@pytest.mark.parametrize("ending", [".om", "_linux_x86_64.om"])
def test_the_om_has_the_wanted_name_whatever_atc_adds(stand_in_atc, tmp_path, ending):
    """Catches a file that is lost because its name holds the host's system and processor."""
    stand_in_atc.install(ending=ending)
    made = run_atc(job(tmp_path), str(stand_in_atc.folder / "atc"), tmp_path)
    assert made == tmp_path / "my tower.om"
    assert made.read_bytes() == b"a graph"
    assert stand_in_atc.asked["files"] == ["my tower.onnx"], "it runs where the weights lie"


def test_what_atc_says_when_it_fails_is_told(stand_in_atc, tmp_path):
    """Catches an error code that the user has to look for in a log."""
    stand_in_atc.install(status=255)
    with pytest.raises(ConfigError) as caught:
        run_atc(job(tmp_path), str(stand_in_atc.folder / "atc"), tmp_path)
    said = str(caught.value)
    assert said.startswith("atc: atc failed (255): ATC start working now")
    assert "E10007: the chip is unknown; the command was: atc --framework=5" in said


def test_an_atc_that_writes_nothing_has_failed(tmp_path):
    """Catches a success that leaves no file."""
    with pytest.raises(ConfigError, match="ended with status 0 and no OM file: it said nothing"):
        run_atc(job(tmp_path), "/bin/true", tmp_path)


@pytest.mark.parametrize("name", ["Ascend910B3", "Ascend310P3", "Ascend910_9391", "Ascend310"])
def test_chips_are_known_by_their_form(name):
    """Catches a list that the next chip is missing from."""
    assert soc_problems(name) == []


@pytest.mark.parametrize("name", ["910B3", "ascend910B3", "Ascend910B3 ", "H100", ""])
def test_what_is_no_chip_is_refused(name):
    """Catches the name that npu-smi shows, which lacks its beginning."""
    (said,) = soc_problems(name)
    assert said.startswith(f"soc_version {name!r} is no chip of Ascend; it is Ascend and the name")
