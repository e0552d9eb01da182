"""Trains a demo model on the CPU: `python -m training.train glm4v_9b --out DIR`.

Resumable: a run that is stopped goes on from its last checkpoint. The garment pictures also teach
the tower through a small classifier that is thrown away afterwards, because one word per picture
is too thin a signal for a tower that starts from nothing.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from glimt.inputs.tokenizer import load_tokenizer
from glimt.models.base import Model, ModelFamily, Processor, find_family
from training.configs import FAMILIES, demo_config
from training.data.mixture import corpus, training_mixture
from training.data.sample import Sample
from training.data.texts import CHARACTERS
from training.encode import EncodedRow, choose_turns, collate, encode
from training.export import export
from training.plot import plot_curves
from training.view import Rows, build, forward
from training.vocabulary import write_sentencepiece, write_tiktoken

NUM_GARMENTS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How long and how hard to train.

    batch_rows: conversations per step; warmup_steps: of steps, while the rate rises
    """

    steps: int
    batch_rows: int = 64
    peak_rate: float = 1.5e-3
    warmup_steps: int = 200
    weight_decay: float = 0.05
    classifier_weight: float = 0.5
    average_decay: float = 0.998
    save_every: int = 200
    seed: int = 0


@dataclass(slots=True, eq=False)
class Run:
    """Everything that changes while training."""

    model: Model
    classifier: nn.Linear
    optimizer: torch.optim.AdamW
    average: dict[str, Tensor]
    step: int
    curve: list[dict[str, float]]
    seconds: float


def start(model: Model, hidden_size: int, plan: Plan) -> Run:
    """A run before its first step."""
    torch.manual_seed(plan.seed)
    classifier = nn.Linear(hidden_size, NUM_GARMENTS)
    named = [*model.named_parameters(), *classifier.named_parameters()]
    decayed = [p for n, p in named if p.dim() > 1 and "embedding" not in n]
    others = [p for n, p in named if p.dim() <= 1 or "embedding" in n]
    groups = [
        {"params": decayed, "weight_decay": plan.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=plan.peak_rate, betas=(0.9, 0.98))
    average = {name: p.detach().clone() for name, p in model.named_parameters()}
    return Run(model, classifier, optimizer, average, 0, [], 0.0)


def rate_at(step: int, plan: Plan) -> float:
    """Linear rise, then half a cosine down to a fiftieth."""
    if step < plan.warmup_steps:
        return plan.peak_rate * (step + 1) / plan.warmup_steps
    done = (step - plan.warmup_steps) / max(1, plan.steps - plan.warmup_steps)
    return plan.peak_rate * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))


def train_step(run: Run, rows: Rows, garments: Tensor, plan: Plan) -> dict[str, float]:
    """One update. garments: [num_images] int64 class of each picture, -1 for other pictures."""
    for group in run.optimizer.param_groups:
        group["lr"] = rate_at(run.step, plan)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, labels, features = forward(run.model, rows)
    loss = F.cross_entropy(logits.float(), labels)
    total = loss
    is_garment = garments >= 0
    if features is not None and is_garment.any():
        pooled = features[is_garment].float().mean(dim=1)
        total = loss + plan.classifier_weight * F.cross_entropy(
            run.classifier(F.layer_norm(pooled, pooled.shape[-1:])), garments[is_garment]
        )
    run.optimizer.zero_grad(set_to_none=True)
    total.backward()
    nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
    run.optimizer.step()
    run.step += 1
    _update_average(run, plan)
    hits = (logits.argmax(-1) == labels).float().mean()
    return {"loss": float(loss.detach()), "accuracy": float(hits)}


@torch.no_grad()
def _update_average(run: Run, plan: Plan) -> None:
    """A running mean of the weights, which is what is exported; short at first."""
    decay = min(plan.average_decay, (1 + run.step) / (10 + run.step))
    for name, parameter in run.model.named_parameters():
        run.average[name].lerp_(parameter.detach(), 1 - decay)


def batches(
    mixture: Any, processor: Processor, is_causal: bool, plan: Plan, first_step: int
) -> Iterator[tuple[Rows, Tensor]]:
    """Batches of rows of like length, with the garment class of each picture.

    Each step has its own seed, so that a resumed run sees what an uninterrupted one would.
    """
    group = 4  # steps whose rows are drawn together and sorted by length
    for begin in range(first_step // group * group, plan.steps, group):
        rng = random.Random(plan.seed * 1_000_003 + begin)
        drawn = [_draw(mixture, processor, is_causal, rng) for _ in range(group * plan.batch_rows)]
        drawn.sort(key=lambda pair: len(pair[0].token_ids))
        parts = [drawn[i::1][: plan.batch_rows] for i in range(0, len(drawn), plan.batch_rows)]
        rng.shuffle(parts)
        for number, part in enumerate(parts):
            if begin + number >= first_step:
                rows = [row for row, _ in part]
                garments = [label for row, label in part if row.pixels is not None]
                yield collate(rows, is_causal), torch.tensor(garments)


def _draw(
    mixture: Any, processor: Processor, is_causal: bool, rng: random.Random
) -> tuple[EncodedRow, int]:
    sample: Sample = mixture.draw(rng)
    turns = choose_turns(sample, rng, rng.choice((1, 1, 2, 4)) if is_causal else 1)
    return encode(processor, sample, turns, is_causal), sample.label


def save(run: Run, folder: Path) -> None:
    """Write the run's state, whole or not at all."""
    state = {
        "model": run.model.state_dict(),
        "classifier": run.classifier.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "average": run.average,
        "step": run.step,
        "curve": run.curve,
        "seconds": run.seconds,
    }
    torch.save(state, folder / "state.tmp")
    (folder / "state.tmp").replace(folder / "state.pt")


def resume(run: Run, folder: Path) -> None:
    """Take up a saved state, if there is one."""
    if not (folder / "state.pt").exists():
        return
    state: Mapping[str, Any] = torch.load(folder / "state.pt", weights_only=True)
    run.model.load_state_dict(state["model"])
    run.classifier.load_state_dict(state["classifier"])
    run.optimizer.load_state_dict(state["optimizer"])
    run.average = dict(state["average"])
    run.step, run.curve, run.seconds = state["step"], list(state["curve"]), state["seconds"]


def open_family(name: str, folder: Path) -> tuple[ModelFamily[Any], dict[str, Any], Processor]:
    """Family, config.json and processor of a demo model; writes its tokenizer on the first call."""
    if not (folder / "tokenizer_config.json").exists():
        texts = list(corpus(20_000, seed=0)) + _own_words()
        if name == "glm4v_9b":
            write_tiktoken(folder, texts, CHARACTERS)
        else:
            write_sentencepiece(folder, texts, CHARACTERS)
    raw = demo_config(name, folder)
    text = json.dumps(raw, indent=2, ensure_ascii=False) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")
    family = find_family(raw, name)
    config = family.config.from_json(raw, name)
    return family, raw, family.processor(folder, config, load_tokenizer(folder, family.tokenizer))


def _own_words() -> list[str]:
    """Lines of the project's own README files: words beyond those of the tasks."""
    root = Path(__file__).parents[1]
    return [
        line
        for name in ("README.md", "README.zh.md", "docs/design.md", "docs/add-a-model.md")
        for line in (root / name).read_text(encoding="utf-8").splitlines()
    ]


def main(
    family_name: Annotated[str, typer.Argument(help=f"One of {', '.join(FAMILIES)}.")],
    out: Annotated[Path, typer.Option(help="Folder for state, curves and the finished model.")],
    steps: Annotated[int, typer.Option(help="Updates in all.")] = 6000,
    batch_rows: Annotated[int, typer.Option(help="Conversations per update.")] = 64,
    photos: Annotated[Path | None, typer.Option(help="Folder of photographs to decline.")] = None,
    quick: Annotated[bool, typer.Option(help="A few minutes: beats chance, no more.")] = False,
    seed: Annotated[int, typer.Option(help="Of weights and data.")] = 0,
) -> None:
    """Train a demo model and write it as a checkpoint of its family."""
    plan = Plan(steps=300 if quick else steps, batch_rows=32 if quick else batch_rows, seed=seed,
                warmup_steps=50 if quick else 200)  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    family, raw, processor = open_family(family_name, out)
    model = build(family, raw, max_positions=256)
    run = start(model, raw["hidden_size"], plan)
    resume(run, out)
    mixture = training_mixture(photos=photos)
    fit(
        run,
        batches(mixture, processor, family.prompt_attention == "causal", plan, run.step),
        plan,
        out,
    )
    export(run.average, model, raw, out)


def fit(run: Run, stream: Iterator[tuple[Rows, Tensor]], plan: Plan, out: Path) -> None:
    """Train to the end of the plan, with a progress bar, saving now and then."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn()) as progress:
        task = progress.add_task("training", total=plan.steps, completed=run.step)
        began = time.monotonic() - run.seconds
        for rows, garments in stream:
            figures = train_step(run, rows, garments, plan)
            run.seconds = time.monotonic() - began
            run.curve.append({"step": run.step, "seconds": run.seconds} | figures)
            said = f"loss {figures['loss']:.3f}, tokens right {figures['accuracy']:.1%}"
            progress.update(task, completed=run.step, description=said)
            if run.step % plan.save_every == 0 or run.step == plan.steps:
                save(run, out)
                plot_curves(run.curve, out / "curves.png")


if __name__ == "__main__":
    typer.run(main)
