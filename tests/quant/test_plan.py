"""quant/plan.py: which weights are quantised, and what config.json says of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from glimt.config import EngineConfig
from glimt.demo.noise import FAMILIES, write_noise_model
from glimt.devices.base import Device
from glimt.errors import ConfigError
from glimt.layers.embedding import Embedding
from glimt.layers.linear import Linear
from glimt.loader import open_model
from glimt.models.base import Model
from glimt.quant.plan import CONFIG_KEY, QuantOptions, plan_formats, read_options, remaining

BLOCK = {
    "glm4v_9b": ("attention.qkv", "attention.dense", "mlp.gate_up", "mlp.down"),
    "visualglm": ("attention.qkv", "attention.dense", "mlp.up", "mlp.down"),
}
TOWER = ("attention.qkv", "attention.dense", "mlp.up", "mlp.down")


@pytest.fixture(scope="module", params=FAMILIES)
def opened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    path: Path = tmp_path_factory.mktemp(request.param)
    write_noise_model(path, request.param)
    return request.param, open_model(EngineConfig(model=str(path)))


def blocks_of(model: Model, family: str) -> set[str]:
    return {f"blocks.{i}.{n}.weight" for i in range(model.num_layers) for n in BLOCK[family]}


def test_blocks_are_the_linears_of_the_language_model(opened):
    """Catches an embedding, norm, adapter or Q-Former that is quantised, and a block left out."""
    family, model = opened[0], opened[1].model
    plan = plan_formats(model, QuantOptions(blocks="int4", head="none"))
    assert set(plan) == blocks_of(model, family)
    assert {chosen.name for chosen in plan.values()} == {"int4"}


def test_the_tower_and_the_head_are_chosen_apart(opened):
    """Catches roles that are mixed up."""
    family, model = opened[0], opened[1].model
    plan = plan_formats(model, QuantOptions(blocks="int8", head="w8a8", tower="int4-g32"))
    in_tower = {name for name in plan if name.startswith("tower.")}
    depth = len(model.tower.blocks)
    assert in_tower == {f"tower.blocks.{i}.{n}.weight" for i in range(depth) for n in TOWER}
    assert {plan[name].name for name in in_tower} == {"int4-g32"}
    assert plan["head.weight"].name == "w8a8"
    assert set(plan) - in_tower - {"head.weight"} == blocks_of(model, family)


def test_a_tower_that_is_not_there_cannot_be_quantised(opened):
    """Catches a setting that is accepted and does nothing, as in a text model."""
    model = opened[1].model
    tower = model._modules.pop("tower")
    try:
        with pytest.raises(ConfigError, match="quant_tower: is 'int8', but this model has no"):
            plan_formats(model, QuantOptions(tower="int8"))
        assert plan_formats(model, QuantOptions(blocks="int8")).keys() > {"head.weight"}
    finally:
        model.tower = tower


@pytest.mark.parametrize(("blocks", "head"), [("int4", "int8"), ("w8a8", "w8a8"), ("none", None)])
def test_auto_gives_the_head_what_suits(opened, blocks, head):
    """Catches a head in four bits that nobody asked for, and a head alone that is quantised."""
    plan = plan_formats(opened[1].model, QuantOptions(blocks=blocks))
    assert (plan["head.weight"].name if "head.weight" in plan else None) == head


def test_nothing_is_planned_unless_it_is_asked_for(opened):
    """Catches a default that changes every answer."""
    assert plan_formats(opened[1].model, QuantOptions()) == {}
    assert not opened[1].formats.stored
    assert not opened[1].formats.wanted


def test_a_head_tied_to_the_embedding_stays(opened):
    """Catches a table that is looked up in and is gone once the head has taken it."""
    model = opened[1].model
    own = model.head.weight
    try:
        model.head.weight = model.embedding.weight
        plan = plan_formats(model, QuantOptions(blocks="int8"))
    finally:
        model.head.weight = own
    assert not {"head.weight", "embedding.weight"} & plan.keys()
    assert plan


def test_a_tied_head_stays_whichever_was_made_first():
    """Catches a tied weight that is known by the name of the first module that has it."""
    device, dtype = Device(), torch.float32
    model = nn.Module()
    model.head = Linear(8, 16, False, device, dtype)
    model.embedding = Embedding(16, 8, device, dtype)
    model.embedding.weight = model.head.weight
    model.blocks = nn.ModuleList([Linear(8, 8, False, device, dtype)])
    assert plan_formats(model, QuantOptions(blocks="int8")).keys() == {"blocks.0.weight"}


@pytest.mark.parametrize(
    ("options", "field"),
    [({"blocks": "q4"}, "quant"), ({"head": "q4"}, "quant_head"), ({"tower": "q4"}, "quant_tower")],
)
def test_an_unknown_name_is_told_by_its_setting(options, field):
    """Catches an error that does not say which of the three settings is wrong."""
    with pytest.raises(ConfigError, match=f"{field}: 'q4' is unknown"):
        QuantOptions(**options).settled()


def test_what_is_written_is_read():
    """Catches "auto" in a file, which a later version might resolve otherwise."""
    said = QuantOptions(blocks="int4", tower="int8").as_config()
    assert said == {"version": 1, "blocks": "int4", "head": "int8", "tower": "int8"}
    back = read_options({CONFIG_KEY: said}, "config.json")
    assert back == QuantOptions(blocks="int4", head="int8", tower="int8")
    assert read_options({}, "config.json").is_none


GOOD = {"version": 1, "blocks": "int8", "head": "none", "tower": "none"}


@pytest.mark.parametrize(
    ("said", "problem"),
    [
        (["int8"], "not an object"),
        (GOOD | {"version": 2}, r"version is 2, but this glimt reads 1"),
        (GOOD | {"head": "auto"}, "head is 'auto'; one of"),
        (GOOD | {"blocks": 8}, "blocks is 8; one of"),
        ({"version": 1, "blocks": "int8", "head": "none"}, "tower is None; one of"),
        (GOOD | {"heads": "none"}, "heads is unknown"),
    ],
)
def test_a_wrong_entry_is_refused(said, problem):
    """Catches weights that are read in another format than the one they have."""
    with pytest.raises(ConfigError, match=problem):
        read_options({CONFIG_KEY: said}, "config.json")


def test_only_what_the_files_hold_as_floats_is_left_to_do():
    """Catches a weight that is quantised twice, and a wish that is dropped in silence."""
    stored = QuantOptions(blocks="int4", head="int8", tower="none")
    assert remaining(QuantOptions(), stored).is_none
    left = remaining(QuantOptions(blocks="int4", tower="w8a8"), stored)
    assert left == QuantOptions(blocks="none", head="none", tower="w8a8")
    with pytest.raises(ConfigError, match="quant is 'int8', but the checkpoint holds 'int4'"):
        remaining(QuantOptions(blocks="int8"), stored)
    with pytest.raises(ConfigError, match="quant_head is 'w8a8', but the checkpoint holds 'int8'"):
        remaining(QuantOptions(head="w8a8"), stored)
