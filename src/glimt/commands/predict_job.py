"""What `glimt predict` was asked for, checked before any model is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glimt.commands.reporting import check_file, check_folder
from glimt.commands.running import check_language
from glimt.config import EngineConfig
from glimt.errors import ConfigError, RequestError
from glimt.evaluate.predict import PROMPT, Asking
from glimt.evaluate.scenes import scenes
from glimt.types import SamplingParams

OUT = Path("predict_result.json")  # MindIE's name
MAX_TOKENS = 256  # of an answer, as MindIE's runner allows
_VARIED = ("temperature", "top_p", "top_k", "min_p", "seed")


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictJob:
    """The options.

    engine:   fields of EngineConfig
    sampling: fields of SamplingParams; greedy unless one of them says how to sample
    images:   the folder as it was typed, which the keys begin with; None: the drawn pictures
    out:      the predictions file; None: OUT, and for the drawn pictures no file
    batch:    pictures in the engine together
    restarts: what the file holds gives way
    report:   folder of the report
    """

    engine: Mapping[str, Any]
    sampling: Mapping[str, Any]
    images: str | None = None
    prompt: str | None = None
    language: str = "auto"
    out: Path | None = None
    batch: int = 8
    restarts: bool = False
    report: Path | None = None
    as_json: bool = False

    @property
    def path(self) -> Path:
        """The predictions file, wherever one is written."""
        return self.out or OUT

    @property
    def config(self) -> EngineConfig:
        """Prefixes are not kept: no two prompts here begin alike, the picture comes first."""
        return EngineConfig(**self.engine, max_num_seqs=self.batch, enable_prefix_cache=False)

    @property
    def asking(self) -> Asking:
        """What is asked of each picture, and how."""
        return Asking(self.prompt or PROMPT, sampling_of(self.sampling), self.language)

    @property
    def questions(self) -> list[str]:
        """What the drawn pictures are asked: the prompt, or each its own question."""
        return [self.prompt or scene.question for scene in scenes()]

    @property
    def settings(self) -> dict[str, Any]:
        """What the answers belong to: equal settings may share a file."""
        config, asking = self.config, self.asking
        names = ("dtype", "device", "kv_dtype", "quant", "quant_head", "quant_tower")
        return {
            "model": _model_name(config.model),
            **{name: getattr(config, name) for name in (*names, "rotary_table")},
            "prompt": self.questions if self.images is None else asking.prompt,
            "language": asking.language,
            "sampling": _given(asking.sampling),
        }


def check_job(job: PredictJob) -> None:
    """Raise ConfigError or RequestError for what no run could mend; makes the folders."""
    if job.batch < 1:
        raise ConfigError("batch", [f"is {job.batch}; it must be at least 1"])
    check_language(job.language)
    if job.prompt is not None and not job.prompt.strip():
        raise RequestError("prompt", f"is empty; leave it out to ask {PROMPT}")
    _ = job.config, job.asking
    if job.out is not None or job.images is not None:
        check_file(job.path, "out")
        if job.path.exists() and not job.path.is_file():  # /dev/full would be read for ever
            said = f"{job.path} is no ordinary file, and its answers would be read again"
            raise ConfigError("out", [f"{said}; name a file"])
    check_folder(job.report, "report")


def sampling_of(given: Mapping[str, Any]) -> SamplingParams:
    """Greedy, and MAX_TOKENS long at most, where nothing else is said."""
    asked = given.get("max_tokens")
    fields = {**given, "max_tokens": MAX_TOKENS if asked is None else asked}
    if all(given.get(name) is None for name in _VARIED):
        fields["temperature"] = 0.0
    return SamplingParams(**fields)


def _model_name(model: str) -> str:
    """Where it lies, so that the same folder named in another way is the same model."""
    path = Path(model)
    return str(path.resolve()) if path.is_dir() else model


def _given(sampling: SamplingParams) -> dict[str, Any]:
    """The fields that are not at their defaults, as JSON gives them back."""
    plain = SamplingParams()
    names = [name for name in plain.__dataclass_fields__ if name != "logit_bias"]
    values = {name: getattr(sampling, name) for name in names}
    changed = {n: value for n, value in values.items() if value != getattr(plain, n)}
    return {n: list(value) if isinstance(value, tuple) else value for n, value in changed.items()}
