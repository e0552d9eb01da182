"""The three tutorials, done as a newcomer would: one file in a scanned folder, and it serves.

Each page's blocks are written into a folder that is scanned too; nothing else is touched.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import glimt
import glimt.devices
import glimt.models
import glimt.quant
from conftest import run_greedy, scanned_too
from glimt.bench import synthetic
from glimt.cli import app
from glimt.config import EngineConfig
from glimt.demo.noise import write_noise_model
from glimt.devices.base import Device, all_devices
from glimt.kernels.limits import LimitMeter
from glimt.layers.linear import Linear
from glimt.loader import open_model
from glimt.models.base import FamilyConfig, Model, ModelFamily, Processor
from glimt.quant.base import QuantFormat, QuantisedWeight, all_formats
from test_docs import ROOT, blocks, glimt_lines

DOCS = ROOT / "docs"
MODEL, DEVICE, FORMAT = (DOCS / f"add-a-{what}.md" for what in ("model", "device", "quant-format"))
LAST = {MODEL: "FAMILY = ", DEVICE: "def test_", FORMAT: "def test_"}  # what ends the page's file


def code_of(page: Path) -> tuple[str, str]:
    """The page's file, and the Python after it that uses it."""
    code = [block.code for block in blocks(page, "python")]
    count = next(i for i, text in enumerate(code) if LAST[page] in text) + 1
    return "\n\n".join(code[:count]), "\n\n".join(code[count:])


def glimt_command(*arguments: str) -> str:
    """What a command that succeeds writes to its standard output."""
    ran = CliRunner().invoke(app, list(arguments))
    assert ran.exit_code == 0, (arguments, ran.output)
    return ran.stdout


def commands(page: Path) -> list[str]:
    """What the commands of the page's shell blocks say, in their order."""
    return [glimt_command(*line) for line in glimt_lines(page)]


@contextmanager
def dropped(page: Path, package: ModuleType, file: Path) -> Iterator[dict[str, Any]]:
    """The names of the page's file while it stands in a folder that is scanned."""
    file.parent.mkdir()
    file.write_text(code_of(page)[0], encoding="utf-8")
    with scanned_too(package, file.parent):
        yield vars(importlib.import_module(f"{package.__name__}.{file.stem}"))


def run_checks(names: dict[str, Any]) -> None:
    """Call the tests that a page's file brings."""
    checks = [value for name, value in names.items() if name.startswith("test_")]
    assert checks
    for check in checks:
        check()


def own_tests(package: str, folder: Path, tests: str, chosen: str) -> str:
    """Run a test file of this folder with `folder` scanned too; what pytest says last."""
    plugin = f"import {package}\n{package}.__path__.append({str(folder)!r})\n"
    (folder.parent / "beside.py").write_text(plugin, encoding="utf-8")
    paths = os.pathsep.join([str(folder.parent), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "beside", "-p", "no:cacheprovider",
         tests, "-k", chosen],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    return done.stdout.splitlines()[-1]


# --- a family --------------------------------------------------------------------------------


@pytest.fixture
def pebble(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """The family's names, its folder filled as the page fills it, and a bench that is quick."""
    meter = LimitMeter(1, num_bytes=2**20)  # its figures do not matter here
    monkeypatch.setattr(synthetic, "LimitMeter", lambda threads, num_bytes: meter)
    (workplace / "pebble").mkdir()
    (workplace / "pebble" / "config.json").write_text(blocks(MODEL, "json")[0].code)
    with dropped(MODEL, glimt.models, workplace / "families" / "pebble.py") as names:
        exec(code_of(MODEL)[1], names)
        yield names


def test_the_tutorials_family_answers_the_same_whole_and_in_chunks(pebble):
    """Catches a tutorial that no longer fits models/base.py, or pictures cut wrongly by chunks."""
    processor = pebble["llm"].engine.inputs.processor
    assert pebble["output"].usage.image_tokens == processor.image_cost(320, 240)
    greedy = glimt.SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    picture = {"type": "image", "image": "examples/house.png"}
    content = [picture, {"type": "text", "text": "?"}, picture | {"image": "examples/shapes.png"}]
    question = [{"role": "user", "content": content}]
    whole = pebble["llm"].chat(question, greedy)
    chunked = glimt.LLM("pebble", max_num_batched_tokens=7, enable_prefix_cache=False)
    assert chunked.chat(question, greedy).token_ids == whole.token_ids


def test_the_tutorials_commands_take_the_family(pebble):
    """Catches a command that knows the families it serves."""
    inspected, answered, timed = commands(MODEL)
    assert "pebble" in inspected
    assert answered.strip()
    assert "prefill" in timed


def public(*kinds: type) -> set[str]:
    """What classes declare for others to write or to override."""
    names = {
        name for kind in kinds for name in {*vars(kind), *vars(kind).get("__annotations__", {})}
    }
    return {name for name in names if not name.startswith("_")}


def test_the_page_names_all_that_a_family_promises():
    """Catches a field or method that came later and that a newcomer is not told of."""
    promised = public(FamilyConfig, Processor, Model, ModelFamily)
    assert promised - set(re.findall(r"\w+", MODEL.read_text(encoding="utf-8"))) == set()


# --- a device --------------------------------------------------------------------------------


@pytest.fixture
def example(workplace: Path) -> Iterator[dict[str, Any]]:
    with dropped(DEVICE, glimt.devices, workplace / "devices" / "example.py") as names:
        yield names


def test_the_example_device_is_found_and_equals_the_base(example):
    """Catches a device tutorial that no longer fits devices/base.py."""
    assert all_devices()["example"] is example["DEVICE"]
    run_checks(example)


def test_the_tutorials_commands_take_the_device(example):
    """Catches a list of devices that is kept elsewhere, and a form that only the CPU multiplies."""
    examined, shown, said = commands(DEVICE)
    assert re.search(r"usable: .*example", examined)
    line = list(glimt_lines(DEVICE))[1]
    plain = glimt_command(*("cpu" if word == "example" else word for word in line))
    assert shown == plain, "the demo's answers are far from a tie"
    assert said.strip()


def test_auto_asks_the_device_for_its_dtype(example, tmp_path):
    """Catches `--dtype auto` answered by the checkpoint alone."""
    write_noise_model(tmp_path, "visualglm")
    config = json.loads((tmp_path / "config.json").read_text()) | {"torch_dtype": "float16"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    opened = open_model(EngineConfig(model=str(tmp_path), device="example"))
    assert opened.dtype == torch.bfloat16


def test_a_whole_model_on_the_device_is_the_original(example, glm4v_oracle, monkeypatch):
    """Catches an engine that computes elsewhere than on the device it was given."""
    calls = []
    own = example["DEVICE"].rms_norm
    monkeypatch.setattr(
        example["DEVICE"], "rms_norm", lambda *args: calls.append(args) or own(*args)
    )
    engine = glm4v_oracle.engine(device="example")
    case = glm4v_oracle.cases[0]
    ids = run_greedy(engine, glm4v_oracle.request(case, max_tokens=24))
    assert ids == glm4v_oracle.arrays[f"{case}.greedy_24"].tolist()
    assert calls


def test_a_new_device_is_held_to_the_base_by_itself(example, workplace):
    """Catches a list of devices in the conformance test."""
    tests = "tests/devices/test_base_device.py"
    said = own_tests(
        "glimt.devices", workplace / "devices", tests, "example and (rms_norm or takes)"
    )
    assert int(said.split()[0]) >= 3 + 1


def rows_of(page: Path) -> set[str]:
    """The names in the first column of the page's table."""
    cells = re.findall(r"^\| (`.*?) \|", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}


def test_the_page_names_every_operation_that_may_be_overridden():
    """Catches an operation that came later, and one that is gone, in the page's table and list."""
    told = set(re.findall(r"^- `(\w+)` ", DEVICE.read_text(encoding="utf-8"), re.MULTILINE))
    assert rows_of(DEVICE) | told == public(Device)
    assert not rows_of(DEVICE) & told


# --- a format --------------------------------------------------------------------------------


@pytest.fixture
def exponents(workplace: Path) -> Iterator[dict[str, Any]]:
    with dropped(FORMAT, glimt.quant, workplace / "formats" / "int8_exponent.py") as names:
        yield names


def test_the_example_format_is_found_and_right(exponents):
    """Catches a format tutorial that no longer fits quant/base.py."""
    assert all_formats()["int8-exp"] is exponents["FORMATS"][0]
    run_checks(exponents)


def test_the_tutorials_commands_take_the_format(exponents):
    """Catches a folder that is not, bit by bit, what quantising while loading gives."""
    loaded, written, inspected, stored = commands(FORMAT)
    assert loaded == stored
    assert "int8-exp" in written
    assert "blocks int8-exp, head int8-exp" in inspected


def test_a_stored_format_is_the_one_made_while_loading(exponents, monkeypatch):
    """Catches a rounding more on the way through files."""
    monkeypatch.setenv("GLIMT_ISA", "none")  # packed weights cannot be looked at
    glimt_command("quantize", "demo", "demo-exp", "--format", "int8-exp", "--tower", "int8-exp")
    forms = {"quant": "int8-exp", "quant_tower": "int8-exp"}
    made, stored = held("demo", **forms), held("demo-exp")
    assert made.keys() == stored.keys()
    assert len(made) > 10
    assert all(torch.equal(made[name], stored[name]) for name in made)


def held(model: str, **options: str) -> dict[str, torch.Tensor]:
    opened = open_model(EngineConfig(model=model, **options))
    opened.load()
    return {
        name: module.held.dequantise()
        for name, module in opened.model.named_modules()
        if isinstance(module, Linear) and isinstance(module.held, QuantisedWeight)
    }


def test_a_new_format_is_held_to_the_promises_by_itself(exponents, workplace):
    """Catches a list of formats in the test of their promises."""
    tests = "tests/quant/test_formats.py"
    said = own_tests("glimt.quant", workplace / "formats", tests, "int8-exp")
    assert int(said.split()[0]) >= 4 + 4 + 1 + 12 + 1


def test_the_page_names_all_that_a_format_promises():
    """Catches a method that came later, and one that is gone."""
    assert rows_of(FORMAT) == public(QuantFormat)
