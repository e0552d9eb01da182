"""glimt runs the GLM vision-language models from their original checkpoints.

>>> import glimt
>>> llm = glimt.LLM("path/to/glm-4v-9b")
>>> llm.chat([{"role": "user", "content": "你好"}]).text
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from glimt.async_engine import AsyncEngine
    from glimt.config import EngineConfig, ImageLimits
    from glimt.engine import Engine, EngineStats
    from glimt.errors import (
        CapacityError,
        CheckpointError,
        ConfigError,
        EngineError,
        GlimtError,
        ImageError,
        MissingDependency,
        PromptTooLong,
        RequestError,
        SetupError,
    )
    from glimt.inputs.request import RequestOptions
    from glimt.llm import LLM
    from glimt.types import (
        Completion,
        Grammar,
        ImagePart,
        Message,
        RequestOutput,
        SampledToken,
        SamplingParams,
        StepOutput,
        TextPart,
        Timings,
        TokenLogprob,
        ToolCall,
        Usage,
    )

__version__ = "0.1.0"

# Where each public name lives. Loaded on first use: `import glimt` stays instant, because torch
# alone takes a second or more.
_HOMES = {
    "glimt.async_engine": ("AsyncEngine",),
    "glimt.config": ("EngineConfig", "ImageLimits"),
    "glimt.engine": ("Engine", "EngineStats"),
    "glimt.errors": (
        "CapacityError",
        "CheckpointError",
        "ConfigError",
        "EngineError",
        "GlimtError",
        "ImageError",
        "MissingDependency",
        "PromptTooLong",
        "RequestError",
        "SetupError",
    ),
    "glimt.inputs.request": ("RequestOptions",),
    "glimt.llm": ("LLM",),
    "glimt.types": (
        "Completion",
        "Grammar",
        "ImagePart",
        "Message",
        "RequestOutput",
        "SampledToken",
        "SamplingParams",
        "StepOutput",
        "TextPart",
        "Timings",
        "TokenLogprob",
        "ToolCall",
        "Usage",
    ),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
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


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'glimt' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
