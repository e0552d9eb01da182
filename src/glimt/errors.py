"""Every error glimt raises on purpose, in one tree; knows nothing of the rest of the package.

GlimtError
├── RequestError            the caller's mistake: names the field (HTTP 4xx)
│   ├── PromptTooLong       the prompt cannot fit the context, ever
│   └── ImageError          a picture that cannot or may not be read
├── CapacityError           try again later (HTTP 429, 503)
├── EngineError             our own failure (HTTP 500, with the request id)
│   └── RankError           a rank of a divided model is gone: the whole engine stops
└── SetupError              nothing can be served: wrong option, file or package
    ├── ConfigError         a configuration value, ours or the checkpoint's
    ├── CheckpointError     weight files: lists everything that is wrong with them
    └── MissingDependency   an optional package is needed: says how to install it
"""

from __future__ import annotations

from collections.abc import Sequence


class GlimtError(Exception):
    """The root: catch it to catch everything glimt raises on purpose."""


class RequestError(GlimtError):
    """A request that can never be served as it stands.

    field: the name of the offending field, as the caller wrote it.
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        self.message = message


class PromptTooLong(RequestError):
    """The prompt, or the prompt and the answer asked for, can never fit."""


class ImageError(RequestError):
    """A picture is unreadable, of an unsupported kind, or beyond a limit."""


class CapacityError(GlimtError):
    """The engine has no room now; the same request may succeed later."""


class EngineError(GlimtError):
    """The engine failed; the request was not at fault."""


class RankError(EngineError):
    """A rank of a divided model has failed or is gone; no request can go on without it."""


class SetupError(GlimtError):
    """Something must be mended before anything can run."""


class ConfigError(SetupError):
    """One or more configuration values are missing or impossible.

    problems: one line each, every problem found, not just the first.
    """

    def __init__(self, where: str, problems: Sequence[str]) -> None:
        super().__init__(_listing(where, problems))
        self.where = where
        self.problems = tuple(problems)


class CheckpointError(SetupError):
    """Weight files that are missing, damaged or of another model.

    problems: one line each, every problem found, not just the first.
    """

    def __init__(self, where: str, problems: Sequence[str]) -> None:
        super().__init__(_listing(where, problems))
        self.where = where
        self.problems = tuple(problems)


class MissingDependency(SetupError):
    """An optional package is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(
            f"this needs the package {package!r}; install it with: pip install 'glimt[{extra}]'"
        )


def _listing(where: str, problems: Sequence[str]) -> str:
    """Format problems as one message, every one of them on a line of its own."""
    if len(problems) == 1:
        return f"{where}: {problems[0]}"
    shown = [f"  - {problem}" for problem in problems]
    return "\n".join([f"{where}: {len(problems)} problems", *shown])
