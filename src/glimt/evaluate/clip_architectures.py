"""What the weights of a CLIP do not tell: how wide its heads are, and which GELU it has.

Known by name, as open_clip names its models, or read from open_clip_config.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glimt.errors import ConfigError
from glimt.evaluate.open_clip import Shapes
from glimt.models.config_reader import read_json

CONFIG = "open_clip_config.json"  # beside the weights on the hub
_QUICK = "-quickgelu"
_TEXT_HEAD_WIDTH = 64


@dataclass(frozen=True, slots=True)
class Architecture:
    """vision_heads, text_heads: how many; activation: a name that transformers knows."""

    name: str
    vision_heads: int
    text_heads: int
    activation: str


@dataclass(frozen=True, slots=True)
class _Known:
    """A published model's shapes, by which it is found, and the width of its vision heads."""

    embed_dim: int
    vision_width: int
    vision_layers: int
    patch: int
    image_size: int = 224
    head_width: int = 64

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.embed_dim, self.vision_width, self.vision_layers, self.patch, self.image_size)


# Source: open_clip `model_configs/`.
_KNOWN: Mapping[str, _Known] = {
    "ViT-B-32": _Known(512, 768, 12, 32),
    "ViT-B-16": _Known(512, 768, 12, 16),
    "ViT-L-14": _Known(768, 1024, 24, 14),
    "ViT-L-14-336": _Known(768, 1024, 24, 14, image_size=336),
    "ViT-H-14": _Known(1024, 1280, 32, 14, head_width=80),
    "ViT-H-14-378": _Known(1024, 1280, 32, 14, image_size=378, head_width=80),
    "ViT-g-14": _Known(1024, 1408, 40, 14, head_width=88),
    "ViT-bigG-14": _Known(1280, 1664, 48, 14, head_width=104),
}


def find_architecture(shapes: Shapes, given: str | None, folder: Path) -> Architecture:
    """The architecture of open_clip weights.

    given:  a name, or a file like open_clip_config.json; None: that file in `folder`, else the
            published model of these shapes
    Raises ConfigError if the shapes are another model's, or nobody's.
    """
    if given is None and (folder / CONFIG).exists():
        return _written(folder / CONFIG, shapes)
    if given is not None and given.removesuffix(_QUICK) not in _KNOWN:
        if Path(given).suffix == ".json":
            return _written(Path(given), shapes)
        names = ", ".join(_KNOWN)
        said = f"{given!r} is unknown; {names}, each with {_QUICK} or without, or a file {CONFIG}"
        raise ConfigError("architecture", [said])
    return _named(given, shapes)


def _named(given: str | None, shapes: Shapes) -> Architecture:
    name = given or next((name for name, known in _KNOWN.items() if _is(known, shapes)), None)
    if name is None:
        said = f"is of no model known here ({_shown(shapes)}); give --architecture {CONFIG}"
        raise ConfigError("weights", [said])
    known = _KNOWN[name.removesuffix(_QUICK)]
    if not _is(known, shapes):
        raise ConfigError(
            "architecture", [f"{name} is given, but the weights are of {_shown(shapes)}"]
        )
    return Architecture(
        name,
        _heads("visual", shapes.vision_width, known.head_width),
        _heads("text", shapes.text_width, _TEXT_HEAD_WIDTH),
        "quick_gelu" if name.endswith(_QUICK) else "gelu",
    )


def _is(known: _Known, shapes: Shapes) -> bool:
    found = (
        shapes.embed_dim,
        shapes.vision_width,
        shapes.vision_layers,
        shapes.patch,
        shapes.image_size,
    )
    return found == known.shape


def _shown(shapes: Shapes) -> str:
    return (
        f"width {shapes.vision_width} x {shapes.vision_layers} layers, patches of {shapes.patch} "
        f"in {shapes.image_size} pixels, {shapes.embed_dim} features"
    )


def _heads(tower: str, width: int, head_width: int) -> int:
    if head_width < 1 or width % head_width:
        said = f"the {tower} tower's width {width} is no multiple of its heads' {head_width}"
        raise ConfigError("architecture", [said])
    return width // head_width


# --- open_clip_config.json -------------------------------------------------------------------

_SECTIONS = ("vision_cfg", "text_cfg")
_OF_VISION = {"image_size", "layers", "width", "head_width", "patch_size", "mlp_ratio"}
_OF_TEXT = {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"}


def _written(path: Path, shapes: Shapes) -> Architecture:
    """As the file says; what is neither known nor plain in it is refused, not passed over."""
    raw = read_json(path)
    model = raw.get("model_cfg", raw)
    vision, text = (_section(model, name, path) for name in _SECTIONS)
    strange = [*sorted(vision.keys() - _OF_VISION), *sorted(text.keys() - _OF_TEXT)]
    problems = [f"{name} is set: only plain ViTs are judged with here" for name in strange]
    problems += _contradictions(vision, text, shapes)
    if problems:
        raise ConfigError(str(path), problems)
    heads = text.get("heads", 8)  # open_clip's own defaults
    return Architecture(
        f"open_clip {path.name}",
        _heads("visual", shapes.vision_width, vision.get("head_width", 64)),
        _heads("text", shapes.text_width, shapes.text_width // max(1, heads)),
        "quick_gelu" if model.get("quick_gelu") else "gelu",
    )


def _section(model: Any, name: str, path: Path) -> dict[str, Any]:
    section = model.get(name) if isinstance(model, dict) else None
    if not isinstance(section, dict):
        raise ConfigError(str(path), [f"{name} is missing"])
    for key, value in section.items():
        if key in _OF_VISION | _OF_TEXT and not isinstance(value, (int, float)):
            raise ConfigError(str(path), [f"{name}.{key} is {value!r}; a number is needed"])
    return section


def _contradictions(
    vision: Mapping[str, Any], text: Mapping[str, Any], shapes: Shapes
) -> list[str]:
    pairs = {
        "vision_cfg.width": (vision.get("width"), shapes.vision_width),
        "vision_cfg.layers": (vision.get("layers"), shapes.vision_layers),
        "vision_cfg.patch_size": (vision.get("patch_size"), shapes.patch),
        "text_cfg.width": (text.get("width"), shapes.text_width),
        "text_cfg.layers": (text.get("layers"), shapes.text_layers),
    }
    return [
        f"{name} is {said}, but the weights have {found}"
        for name, (said, found) in pairs.items()
        if said is not None and said != found
    ]
