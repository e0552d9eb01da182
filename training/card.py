"""Writes the model cards of a demo model, from what `glimt evaluate --json` measured.

usage: python -m training.card FOLDER --float32 FILE --bfloat16 FILE --steps N --minutes M \
           --machine TEXT --machine-zh TEXT

The words stand in card.md and card.zh.md; figures come from the folder and the two files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Annotated, Any

import typer

from glimt.commands.inspect import CheckpointSummary, describe
from glimt.loader import read_folder
from training.configs import IMAGE_SIZE, NAMES
from training.data.sample import Language, Words

CARDS: Mapping[Language, str] = {"en": "README.md", "zh": "README.zh.md"}

_ORIGINALS = {"glm4v_9b": "GLM-4v-9B", "visualglm": "VisualGLM-6B"}
_BUILT_IN = {"glm4v_9b": "demo", "visualglm": "demo-visualglm"}
_ORIGINAL_PARAMETERS = {"glm4v_9b": 13_906_320_896, "visualglm": 7_802_193_408}
_STRUCTURES = {
    "glm4v_9b": Words(
        "GLM-4v 的结构：EVA2-CLIP 视觉塔，卷积与 GLU 适配层，图片首尾两个向量，"
        "多查询的 GLM-4 语言模型。",
        "The structure of GLM-4v: an EVA2-CLIP tower, an adapter of convolution and GLU, vectors "
        "for begin and end of the picture, a GLM-4 language model with multi-query attention.",
    ),
    "visualglm": Words(
        "VisualGLM 的结构：EVA ViT，带 32 个查询的 Q-Former，ChatGLM-6B 语言模型，"
        "其位置有两个通道，提示词双向可见。",
        "The structure of VisualGLM: an EVA ViT, a Q-Former with 32 queries, a ChatGLM-6B language "
        "model with positions of two channels and a prompt that sees itself whole.",
    ),
}
_TASKS = {
    "garments": Words("衣物", "garments"),
    "scenes": Words("场景，各种问题", "scenes, all kinds of question"),
    "yes_no": Words("是非题和 easy-VQA", "yes or no, and easy-VQA"),
    "texts": Words("文字，至多四个字符", "texts of up to four characters"),
    "second_turns": Words("第二轮问题", "second turns"),
    "photos": Words("对照片说不知道", "photographs declined"),
}
_LANGUAGES: Mapping[str, Words] = {"zh": Words("中文", "Chinese"), "en": Words("英文", "English")}
_HEADINGS = Words(
    "| 任务 | 语言 | 问题数 | float32 答对 | bfloat16 答对 | 相差（百分点） |",
    "| task | language | questions | right in float32 | right in bfloat16 | points lost or won |",
)
_DIVERGENCE = Words(
    "bfloat16 与 float32 相比，在后者自己的 {places:,} 个答案词元上：平均 KL 散度 {kl:.1e} nat，"
    "最可能的词元相同 {top1:.2%}。",
    "From float32, over the {places:,} tokens of its own answers, bfloat16 has a mean KL "
    "divergence of {kl:.1e} nats and the same likeliest token in {top1:.2%} of the places.",
)


@dataclass(frozen=True, slots=True)
class Trained:
    """How the weights came about, as the card tells it."""

    steps: int
    minutes: float
    machine: Words


class BadResults(ValueError):
    """The two files do not hold what a card needs."""


def write_cards(
    folder: Path, float32: Mapping[str, Any], bfloat16: Mapping[str, Any], trained: Trained
) -> None:
    """Write both cards into a model folder.

    float32, bfloat16: what `glimt evaluate --json` printed; of bfloat16 with `--against float32`
    Raises BadResults when they are not about the same questions, or some could not be asked.
    """
    rows = _paired(float32, bfloat16)
    if not bfloat16.get("divergence"):
        raise BadResults("the bfloat16 results have no divergence: evaluate with --against float32")
    for language, file in CARDS.items():
        template = Template((Path(__file__).parent / _template(language)).read_text("utf-8"))
        facts = _facts(folder, language) | {
            "table": _table(rows, language),
            "bfloat16": _divergence(bfloat16["divergence"], language),
            "steps": f"{trained.steps:,}",
            "minutes": f"{trained.minutes:.0f}",
            "machine": trained.machine.said(language),
        }
        (folder / file).write_text(template.substitute(facts), encoding="utf-8")


def _template(language: Language) -> str:
    return "card.zh.md" if language == "zh" else "card.md"


def _facts(folder: Path, language: Language) -> dict[str, str]:
    """What the folder itself tells."""
    summary = describe(folder)
    if summary.problems:
        raise BadResults("; ".join(summary.problems))
    return {
        "name": NAMES[summary.family],
        "original": _ORIGINALS[summary.family],
        "builtin": _BUILT_IN[summary.family],
        "ratio": f"{round(_ORIGINAL_PARAMETERS[summary.family] / summary.num_parameters, -2):,.0f}",
        "structure": _STRUCTURES[summary.family].said(language),
        "parameters": f"{summary.num_parameters:,}",
        "megabytes": f"{sum(summary.files.values()) / 1e6:.1f}",
        "image_size": str(IMAGE_SIZE),
        "image_tokens": str(_image_tokens(folder)),
        **_lengths(summary),
    }


def _lengths(summary: CheckpointSummary) -> dict[str, str]:
    return {
        "context": f"{summary.context_tokens:,}",
        "vocabulary": f"{summary.vocab_size:,}",
    }


def _image_tokens(folder: Path) -> int:
    processor = read_folder(folder).processor
    assert processor is not None, "describe() found no problem"
    return processor.image_cost(IMAGE_SIZE, IMAGE_SIZE)


# --- figures ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Row:
    task: str
    language: str
    asked: int
    shares: tuple[float, float]  # in float32, in bfloat16


def _paired(float32: Mapping[str, Any], bfloat16: Mapping[str, Any]) -> list[_Row]:
    """Tasks in the order of _TASKS, Chinese first."""
    ours, theirs = _by_task(float32), _by_task(bfloat16)
    if {key: t["asked"] for key, t in ours.items()} != {k: t["asked"] for k, t in theirs.items()}:
        raise BadResults("the two results are not of the same questions")
    rows = [
        _Row(*key, asked=tally["asked"], shares=(tally["accuracy"], theirs[key]["accuracy"]))
        for key, tally in ours.items()
    ]
    tasks, languages = list(_TASKS), list(_LANGUAGES)
    return sorted(rows, key=lambda row: (tasks.index(row.task), languages.index(row.language)))


def _by_task(results: Mapping[str, Any]) -> dict[tuple[str, str], Mapping[str, Any]]:
    tallies = results["tasks"]
    if unknown := sorted({tally["task"] for tally in tallies} - set(_TASKS)):
        raise BadResults(f"no words for the tasks {', '.join(unknown)}")
    if failed := sum(tally["failed"] for tally in tallies):
        raise BadResults(f"{failed} questions could not be asked: mend them and evaluate again")
    return {(tally["task"], tally["language"]): tally for tally in tallies}


def _table(rows: Sequence[_Row], language: Language) -> str:
    lines = [_HEADINGS.said(language), "|---|---|---:|---:|---:|---:|"]
    for row in rows:
        cells = [
            _TASKS[row.task].said(language),
            _LANGUAGES[row.language].said(language),
            f"{row.asked:,}",
            *(f"{share:.1%}" for share in row.shares),
            f"{100 * (row.shares[1] - row.shares[0]):+.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _divergence(found: Mapping[str, Any], language: Language) -> str:
    return _DIVERGENCE.said(language).format(
        places=found["num_tokens"], kl=found["mean_kl"], top1=found["top1"]
    )


def main(
    folder: Annotated[Path, typer.Argument(help="The model folder; the cards are written there.")],
    float32: Annotated[Path, typer.Option(help="glimt evaluate --dtype float32 --json.")],
    bfloat16: Annotated[
        Path, typer.Option(help="glimt evaluate --dtype bfloat16 --against float32 --json.")
    ],
    steps: Annotated[int, typer.Option(help="Training steps.")],
    minutes: Annotated[float, typer.Option(help="Time they took.")],
    machine: Annotated[str, typer.Option(help='As "on …" goes on: "2 CPU cores".')],
    machine_zh: Annotated[str, typer.Option(help="The same in Chinese: 2 个 CPU 核.")],
) -> None:
    """Write README.md and README.zh.md."""
    in_32, in_16 = (json.loads(path.read_text(encoding="utf-8")) for path in (float32, bfloat16))
    write_cards(folder, in_32, in_16, Trained(steps, minutes, Words(machine_zh, machine)))


if __name__ == "__main__":
    typer.run(main)
