"""The public names of the package: what users write must not come or go unnoticed."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import glimt

PUBLIC = [
    "LLM",
    "AsyncEngine",
    "CapacityError",
    "CheckpointError",
    "Completion",
    "ConfigError",
    "Engine",
    "EngineConfig",
    "EngineError",
    "EngineStats",
    "GlimtError",
    "Grammar",
    "ImageError",
    "ImageLimits",
    "ImagePart",
    "Message",
    "MissingDependency",
    "PromptTooLong",
    "RequestError",
    "RequestOptions",
    "RequestOutput",
    "SampledToken",
    "SamplingParams",
    "SetupError",
    "StepOutput",
    "TextPart",
    "Timings",
    "TokenLogprob",
    "ToolCall",
    "Usage",
]


def test_the_public_names_are_these():
    """Would catch a name added, renamed or lost by accident: change the list on purpose."""
    assert sorted(glimt.__all__) == sorted(PUBLIC)
    assert len(set(glimt.__all__)) == len(glimt.__all__)


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_is_what_it_says(name):
    """Would catch a lazy name that points at a module or object that is gone."""
    value = getattr(glimt, name)
    assert value.__name__ == name
    assert value.__module__.startswith("glimt.")
    assert value.__doc__


def test_a_star_import_gives_all_of_them():
    """Would catch a lazy attribute that `from glimt import *` cannot reach."""
    from glimt import __all__ as names

    assert {name: getattr(glimt, name) for name in names}.keys() == set(PUBLIC)


def test_dir_lists_the_public_names_and_the_version():
    """Would catch an interactive session in which nothing can be completed."""
    assert set(dir(glimt)) == {*PUBLIC, "__version__"}
    assert glimt.__version__.count(".") == 2


def test_an_unknown_name_raises_attribute_error():
    """Would catch a KeyError: hasattr, pickle and mock all rely on AttributeError."""
    assert not hasattr(glimt, "Modell")
    with pytest.raises(AttributeError, match="module 'glimt' has no attribute 'Modell'"):
        _ = glimt.Modell


def test_type_checkers_see_the_same_names():
    """Would catch a name that runs but that an editor or mypy does not know, or the reverse."""
    tree = ast.parse(Path(glimt.__file__).read_text(encoding="utf-8"))
    guarded = next(
        node for node in tree.body if isinstance(node, ast.If) and node.test.id == "TYPE_CHECKING"
    )
    homes = {node.module: {a.name for a in node.names} for node in guarded.body}
    assert {home: set(names) for home, names in glimt._HOMES.items()} == homes
    assert sorted(name for names in homes.values() for name in names) == sorted(PUBLIC)
