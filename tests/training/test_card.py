"""The model cards say what was measured, the same in both languages."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import typer
from training.data.sample import Words
from typer.testing import CliRunner

from glimt.demo.noise import FAMILIES, write_noise_model
from training import card

TRAINED = card.Trained(12_000, 97.4, Words("2 个 CPU 核", "2 CPU cores"))
DIVERGENCE = {"num_tokens": 31_234, "mean_kl": 4.2e-5, "p99_kl": 1e-3, "top1": 0.9987}


def results(share: float, **changes: Any) -> dict[str, Any]:
    tallies = [
        {"task": task, "language": language, "asked": 2000, "right": 0, "failed": 0}
        for task in sorted(card._TASKS)
        for language in ("en", "zh")
    ]
    for number, tally in enumerate(tallies):
        tally["accuracy"] = share - number / 1000
    return {"tasks": tallies, "divergence": None} | changes


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def folder(family: str, tmp_path: Path) -> Path:
    write_noise_model(tmp_path, family)
    return tmp_path


def texts(folder: Path) -> list[str]:
    return [(folder / name).read_text(encoding="utf-8") for name in card.CARDS.values()]


def test_both_cards_hold_every_figure(folder, family):
    """Catches a blank that is not filled, and figures that one language lacks."""
    card.write_cards(folder, results(0.95), results(0.949, divergence=DIVERGENCE), TRAINED)
    for text in texts(folder):
        assert "$" not in text
        assert card.NAMES[family] in text
        assert f"--model {card._BUILT_IN[family]}`" in text
        for figure in ("12,000", "97", "31,234", "4.2e-05", "99.87%", "2,000", "-0.10"):
            assert figure in text, figure
        for licence in ("MIT", "Apache-2.0", "GPL-3"):
            assert licence in text
    english, chinese = (re.findall(r"\d+(?:[.,]\d+)*%?", text) for text in texts(folder))
    assert sorted(english) == sorted(chinese)


def test_shares_stand_beside_their_task_and_language(folder):
    """Catches two columns or languages swapped."""
    card.write_cards(folder, results(0.95), results(0.949, divergence=DIVERGENCE), TRAINED)
    english, chinese = texts(folder)
    # In the order of results(): garments, photos, scenes …, English before Chinese.
    assert "| garments | English | 2,000 | 95.0% | 94.9% | -0.10 |" in english
    assert "| garments | Chinese | 2,000 | 94.9% | 94.8% | -0.10 |" in english
    assert "| 对照片说不知道 | 英文 | 2,000 | 94.8% | 94.7% | -0.10 |" in chinese


def test_cards_without_a_basis_are_refused(folder):
    """Catches a card of other questions than it says, or of questions never asked."""
    good = results(0.9, divergence=DIVERGENCE)
    fewer = results(0.9)
    fewer["tasks"] = fewer["tasks"][1:]
    failed = results(0.9)
    failed["tasks"][3] = failed["tasks"][3] | {"failed": 2}
    unknown = results(0.9)
    unknown["tasks"][0] = unknown["tasks"][0] | {"task": "songs"}
    for float32, bfloat16, said in (
        (fewer, good, "not of the same questions"),
        (failed, good, "2 questions could not be asked"),
        (unknown, good, "no words for the tasks songs"),
        (results(0.9), results(0.9), "--against float32"),
    ):
        with pytest.raises(card.BadResults, match=said):
            card.write_cards(folder, float32, bfloat16, TRAINED)
    assert not (folder / "README.md").exists()


def test_the_command_reads_the_two_files(folder):
    """Catches the two files swapped."""
    for name, found in (("f", results(0.95)), ("b", results(0.9, divergence=DIVERGENCE))):
        (folder / f"{name}.json").write_text(json.dumps(found))
    app = typer.Typer()
    app.command()(card.main)
    arguments = [str(folder), "--float32", str(folder / "f.json")]
    arguments += ["--bfloat16", str(folder / "b.json"), "--steps", "5", "--minutes", "1"]
    arguments += ["--machine", "a card", "--machine-zh", "一块卡"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "| garments | English | 2,000 | 95.0% | 90.0% | -5.00 |" in texts(folder)[0]
