"""Imports go one way, and what may harm or slow a program stays out: STYLE.md section 1 as data.

Read from the source with ast, so that a forbidden import inside a function is found as well. An
import under TYPE_CHECKING is held to the map too, but loads nothing.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import glimt

SRC = Path(glimt.__file__).parent

# From high to low. A unit is a file or folder of src/glimt; it may import any unit of a lower
# level, and of its own level unless the level is closed.
LEVELS: tuple[tuple[str, ...], ...] = (
    ("__main__",),
    ("compat",),
    ("cli",),
    ("bench", "cluster", "commands", "demo", "evaluate", "export", "reports", "server"),
    ("async_engine", "llm"),
    ("engine",),
    ("ranks",),
    ("children",),
    ("loader", "memory_plan", "pace", "synthetic"),
    ("inputs", "outputs", "runner", "sampling", "scheduler"),
    ("runtimes", "weights"),
    ("checkpoint",),
    ("structured",),
    ("models",),
    ("layers", "parallel", "quant"),
    ("devices",),
    ("kernels",),
)
STAGES = ("inputs", "outputs", "runner", "sampling", "scheduler")
CLOSED = {STAGES}  # they meet in `engine`, through `types`
FROM_THE_PACKAGE = ("__version__",)  # and nothing else: the public names are for users
COMMON = ("types", "config", "errors", "sizes")  # all may import these
COMMON_MAY = {
    "types": ("errors",),
    "config": ("errors",),
    "errors": (),
    "sizes": (),
}  # and they themselves

# Packages that must not be imported: (what, where not, why).
EVERYWHERE = ("",)
BANS: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("torch", ("scheduler", "inputs", "outputs", *COMMON), "it decides, it computes nothing"),
    (
        "transformers",
        EVERYWHERE,
        "the originals' code is an oracle at most, never part of the engine",
    ),
    (
        "pickle",
        EVERYWHERE,
        "an ordinary unpickler runs what a file says; checkpoint.read_pickle not",
    ),
    ("dill", EVERYWHERE, "see pickle"),
    ("joblib", EVERYWHERE, "see pickle"),
)
# But for one file each: (package, file) -> why.
BANS_LIFTED = {
    ("transformers", "evaluate.clip"): "a CLIP judges answers from outside; the engine runs none",
}
CARD_ATTRIBUTES = ("cuda", "npu")  # of torch
KNOW_CARDS = ("devices", "kernels")
RUNS_TEXT = ("eval", "exec", "__import__")


@dataclass(frozen=True)
class Import:
    """One imported module, dots resolved, and the line that says so."""

    module: str
    line: int


@dataclass(frozen=True)
class Source:
    path: Path
    name: str  # dotted, below glimt; "" for glimt/__init__.py
    tree: ast.Module

    @property
    def unit(self) -> str:
        return self.name.split(".")[0]

    def where(self, line: int) -> str:
        return f"{self.path.relative_to(SRC.parent)}:{line}"

    def imports(self) -> Iterator[Import]:
        package = ["glimt", *self.name.split(".")] if self.name else ["glimt"]
        if self.path.name != "__init__.py":
            package = package[:-1]
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    yield Import(alias.name, node.lineno)
            elif isinstance(node, ast.ImportFrom):
                above = package[: len(package) - node.level + 1] if node.level else []
                base = ".".join([*above, *([node.module] if node.module else [])])
                # `from glimt import engine` names a unit as much as `import glimt.engine` does.
                for alias in node.names:
                    yield Import(f"{base}.{alias.name}", node.lineno)


def read(path: Path) -> Source:
    parts = list(path.relative_to(SRC).with_suffix("").parts)
    if parts[-1] == "__init__":
        parts.pop()
    return Source(path, ".".join(parts), ast.parse(path.read_text(encoding="utf-8")))


SOURCES = [read(path) for path in sorted(SRC.rglob("*.py"))]
UNITS = {unit for level in LEVELS for unit in level}


def level_of(unit: str) -> int:
    return next(i for i, level in enumerate(LEVELS) if unit in level)


def may_import(importer: str, imported: str) -> bool:
    """Whether the map allows one unit to import another."""
    if importer in COMMON:
        return imported in COMMON_MAY[importer]
    if imported == importer or imported in COMMON:
        return True
    if level_of(importer) == level_of(imported):
        return LEVELS[level_of(importer)] not in CLOSED
    return level_of(importer) < level_of(imported)


def broken_rules(source: Source) -> list[str]:
    """Every import of one file that a ban or the map forbids."""
    return [
        f"{source.where(imported.line)}: {breach}"
        for imported in source.imports()
        for breach in (*broken_bans(source, imported), *broken_map(source, imported))
    ]


def broken_bans(source: Source, imported: Import) -> Iterator[str]:
    parts = imported.module.split(".")
    for package, places, why in BANS:
        is_banned = places == EVERYWHERE or source.unit in places
        if parts[0] == package and is_banned and (package, source.name) not in BANS_LIFTED:
            yield f"imports {package}: {why}"
    is_card = parts[0] == "torch_npu" or (
        parts[0] == "torch" and len(parts) > 1 and parts[1] in CARD_ATTRIBUTES
    )
    if is_card and source.unit not in KNOW_CARDS:
        yield f"imports {imported.module}: only {KNOW_CARDS} know a card"


def broken_map(source: Source, imported: Import) -> Iterator[str]:
    parts = imported.module.split(".")
    if parts[0] != "glimt" or len(parts) < 2 or parts[1] in FROM_THE_PACKAGE:
        return
    if parts[1] not in UNITS | set(COMMON):
        yield f"glimt.{parts[1]} is not on the map"
    elif source.name and not may_import(source.unit, parts[1]):
        yield f"{source.unit} must not import {parts[1]}"


def broken_calls(source: Source) -> list[str]:
    """Every use of a card outside devices/, of an unpickler, and of text run as a program."""
    found = []
    for node in ast.walk(source.tree):
        match node:
            case ast.Attribute(value=ast.Name(id="torch"), attr=attr) if attr in CARD_ATTRIBUTES:
                if source.unit not in KNOW_CARDS:
                    found.append(f"{source.where(node.lineno)} uses torch.{attr}")
            case ast.Attribute(value=ast.Name(id="torch"), attr="load"):
                if id(node) not in safe_loads(source.tree):
                    found.append(f"{source.where(node.lineno)}: torch.load without weights_only")
            case ast.Call(func=ast.Name(id=name)) if name in RUNS_TEXT:
                found.append(f"{source.where(node.lineno)} calls {name}")
            case ast.Attribute(attr="Unpickler" | "pickle"):
                found.append(f"{source.where(node.lineno)} uses {node.attr}")
            case ast.keyword(arg="allow_pickle", value=value):
                if not (isinstance(value, ast.Constant) and value.value is False):
                    found.append(f"{source.where(value.lineno)} allows pickle")
    return found


def safe_loads(tree: ast.Module) -> set[int]:
    """The `torch.load` attributes that are called with a plain weights_only=True."""
    return {
        id(node.func)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        for keyword in node.keywords
        if keyword.arg == "weights_only"
        and isinstance(keyword.value, ast.Constant)
        and keyword.value.value is True
    }


# --- the package -----------------------------------------------------------------------------


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name or "glimt")
def test_imports_follow_the_map(source):
    """Would catch a stage that calls another, a layer that knows a model, torch in the scheduler,
    or a device's own package beyond devices/.
    """
    assert broken_rules(source) == []


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name or "glimt")
def test_nothing_runs_text_or_names_a_card(source):
    """Would catch eval, exec or an unpickler on a path that a downloaded file reaches, and code
    that breaks where there is no CUDA or NPU.
    """
    assert broken_calls(source) == []


def test_every_file_is_on_the_map():
    """Would catch a new folder or file that nobody gave a place: add it to LEVELS, and say why."""
    places = UNITS | set(COMMON) | {""}
    assert {source.unit for source in SOURCES} <= places


def test_no_unit_imports_itself_through_others():
    """Would catch a cycle inside an open level, which the order of levels alone lets pass."""
    graph: dict[str, set[str]] = {}
    for source in SOURCES:
        named = {i.module.split(".")[1] for i in source.imports() if i.module.startswith("glimt.")}
        graph.setdefault(source.unit, set()).update(named - {source.unit})
    graph.pop("")  # glimt/__init__.py names all under TYPE_CHECKING
    while leaves := {unit for unit, named in graph.items() if not named & graph.keys()}:
        graph = {unit: named for unit, named in graph.items() if unit not in leaves}
    assert graph == {}


# --- what an import loads --------------------------------------------------------------------


def loaded_by(module: str) -> set[str]:
    """Top-level packages in a fresh interpreter after importing one module."""
    program = f"import sys, {module}; print(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "module", ["glimt", "glimt.cli", "glimt.types", "glimt.scheduler.scheduler"]
)
def test_an_import_that_must_be_quick_does_not_load_torch(module):
    """Would catch `glimt --help` taking seconds, or a scheduler that cannot run without torch."""
    assert loaded_by(module) & {"torch", "transformers", "glimt"} == {"glimt"}


# --- the rules themselves --------------------------------------------------------------------


def source_of(name: str, text: str) -> Source:
    return Source(SRC / Path(*name.split(".")).with_suffix(".py"), name, ast.parse(text))


BREACHES = [
    ("scheduler.x", "import torch"),
    ("scheduler.x", "def f():\n    from torch import Tensor"),
    ("types", "import torch.nn as nn"),
    ("inputs.x", "import torch"),
    ("outputs.x", "from glimt.scheduler.scheduler import Scheduler"),
    ("sampling", "from glimt.runner import batch"),
    ("runner.x", "from ..scheduler import block_pool"),
    ("layers.x", "from glimt.models.base import Model"),
    ("devices.x", "import glimt.layers.rotary"),
    ("models.x", "from glimt import engine"),
    ("models.x", "from glimt.weights import load_weights"),
    ("loader", "from glimt.engine import Engine"),
    ("config", "from glimt.types import Request"),
    ("errors", "from glimt.config import EngineConfig"),
    ("llm", "from glimt.cli import main"),
    ("engine", "import glimt.novelty"),
    ("models.x", "import transformers"),
    ("evaluate.x", "import transformers"),
    ("evaluate.clip", "import pickle"),
    ("weights", "from pickle import Unpickler"),
    ("runner.x", "from torch import cuda"),
    ("runner.x", "import torch.cuda"),
    ("runner.x", "import torch_npu"),
    ("commands.x", "from glimt import LLM"),
]
BROKEN_CALLS = [
    ("runner.x", "torch.cuda.synchronize()"),
    ("models.x", "torch.npu.set_device(0)"),
    ("weights", "torch.load(file)"),
    ("weights", "torch.load(file, weights_only=False)"),
    ("weights", "torch.load(file, weights_only=flag)"),
    ("weights", "load = torch.load"),
    ("weights", "torch.serialization.pickle.load(file)"),
    ("demo.x", "numpy.load(file, allow_pickle=True)"),
    ("inputs.x", "eval(text)"),
    ("inputs.x", "exec(text)"),
]
ALLOWED = [
    ("devices.cuda", "import torch\nfrom torch import cuda\ntorch.cuda.synchronize()"),
    ("devices.npu", "import torch_npu"),
    ("commands.x", "from glimt import __version__"),
    ("weights", "import torch\ntorch.load(file, weights_only=True)"),
    ("evaluate.clip", "from transformers import CLIPModel"),
    ("demo.noise", "from glimt.inputs import tokenizer\nfrom glimt.models.base import Model"),
    ("engine", "from glimt.scheduler.scheduler import Scheduler"),
    ("runner.x", "from glimt.runner.batch import flatten\nmodel.eval()\nre.compile(x)"),
]


@pytest.mark.parametrize(("name", "text"), BREACHES)
def test_each_import_rule_catches_its_breach(name, text):
    """Would catch a rule that no longer bites: every test above would then pass for ever."""
    assert broken_rules(source_of(name, text))


@pytest.mark.parametrize(("name", "text"), BROKEN_CALLS)
def test_each_call_rule_catches_its_breach(name, text):
    """Would catch a rule that no longer bites."""
    assert broken_calls(source_of(name, text))


@pytest.mark.parametrize(("name", "text"), ALLOWED)
def test_what_the_map_allows_passes(name, text):
    """Would catch a rule so strict that people switch it off."""
    source = source_of(name, text)
    assert broken_rules(source) + broken_calls(source) == []
