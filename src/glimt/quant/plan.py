"""Which weights of a model are held in few bits, and what config.json says of it.

A weight has one of three roles; all others (embeddings, norms, adapters, the Q-Former) stay as
they are, because they are small, looked up or fragile.

    blocks  the linears of the language model: nearly all that a decoded token reads
    head    the output head: as large as several blocks, and it makes the logits
    tower   the linears of the vision tower
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from torch import nn

from glimt.errors import ConfigError
from glimt.quant.base import NONE, QuantFormat, TakesQuantised, all_formats, find_format

AUTO = "auto"  # the head: what suits the blocks' format
CONFIG_KEY = "glimt_quantization"  # of config.json
_VERSION = 1
_PREFIXES = {"blocks": "blocks.", "head": "head.", "tower": "tower."}  # of module names


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantOptions:
    """The name of a format, or "none", for each role. head may be "auto"."""

    blocks: str = NONE
    head: str = AUTO
    tower: str = NONE

    def settled(self) -> QuantOptions:
        """With every name checked, and the head's own. Raises ConfigError naming the setting."""
        blocks = find_format(self.blocks, "quant")
        find_format(self.tower, "quant_tower")
        if self.head == AUTO:
            return replace(self, head=blocks.head if blocks else NONE)
        find_format(self.head, "quant_head")
        return self

    @property
    def is_none(self) -> bool:
        """Nothing is quantised."""
        return {self.blocks, self.head, self.tower} <= {NONE, AUTO}

    def as_config(self) -> dict[str, Any]:
        """What config.json says of a checkpoint written with these options."""
        return {"version": _VERSION, **asdict(self.settled())}


def plan_formats(model: nn.Module, options: QuantOptions) -> dict[str, QuantFormat]:
    """Parameter name -> its format, for each weight that is quantised.

    Raises ConfigError for a name that is no format, and for a tower that is not there.
    """
    settled = options.settled()
    by_role = {role: find_format(getattr(settled, role)) for role in _PREFIXES}
    found: dict[str, QuantFormat] = {}
    linears = _linear_weights(model)
    has_role = {r: any(n.startswith(start) for n in linears) for r, start in _PREFIXES.items()}
    if by_role["tower"] and not has_role["tower"]:
        said = f"is {settled.tower!r}, but this model has no vision tower; leave it out"
        raise ConfigError("quant_tower", [said])
    assert has_role["blocks"], (
        f"{type(model).__name__} has no linears in `blocks` (see models/base.py)"
    )
    for name in linears:
        role = next((role for role, start in _PREFIXES.items() if name.startswith(start)), None)
        chosen = by_role[role] if role else None
        if chosen is not None:
            found[name] = chosen
    return found


def _linear_weights(model: nn.Module) -> list[str]:
    """Names of the weights that only linears use: a head tied to the embedding is none."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    elsewhere = {
        id(parameter)
        for name, parameter in parameters.items()
        if not isinstance(model.get_submodule(name.rpartition(".")[0]), TakesQuantised)
    }
    return [
        name
        for name, parameter in model.named_parameters()
        if name.endswith(".weight") and parameter.ndim == 2 and id(parameter) not in elsewhere
    ]


# --- config.json -----------------------------------------------------------------------------


def read_options(raw: Mapping[str, Any], where: str) -> QuantOptions:
    """What a parsed config.json says of the checkpoint's weights; nothing said: none is quantised.

    Raises ConfigError listing every wrong value.
    """
    said = raw.get(CONFIG_KEY)
    if said is None:
        return QuantOptions(head=NONE)
    if not isinstance(said, Mapping):
        raise ConfigError(where, [f"{CONFIG_KEY} is {said!r}, not an object"])
    if said.get("version") != _VERSION:
        newer = f"{CONFIG_KEY}.version is {said.get('version')!r}, but this glimt reads {_VERSION}"
        raise ConfigError(where, [f"{newer}; use the glimt that wrote the checkpoint, or a newer"])
    roles = [field.name for field in fields(QuantOptions)]
    known = {NONE, *all_formats()}
    problems = [
        f"{CONFIG_KEY}.{role} is {said.get(role)!r}; one of {', '.join(sorted(known))} is needed"
        for role in roles
        if not isinstance(said.get(role), str) or said[role] not in known
    ]
    problems += [f"{CONFIG_KEY}.{key} is unknown" for key in said if key not in (*roles, "version")]
    if problems:
        raise ConfigError(where, problems)
    return QuantOptions(**{role: said[role] for role in roles})


def remaining(wanted: QuantOptions, stored: QuantOptions) -> QuantOptions:
    """What is left to quantise of a checkpoint that holds some roles quantised already.

    Raises ConfigError where another format is wanted than the files hold: what a format has
    rounded away cannot be had back.
    """
    settled, problems, left = wanted.settled(), [], {}
    for role, setting in (("blocks", "quant"), ("head", "quant_head"), ("tower", "quant_tower")):
        want, have = getattr(settled, role), getattr(stored, role)
        left[role] = NONE if have != NONE else want
        is_chosen = want != NONE and not (role == "head" and wanted.head == AUTO)
        if is_chosen and have not in (NONE, want):
            problems.append(
                f"{setting} is {want!r}, but the checkpoint holds {have!r} already; "
                "leave it out, or give the unquantised checkpoint"
            )
    if problems:
        raise ConfigError("quant", problems)
    return QuantOptions(**left)
