"""Trains a demo model: `python -m training.train glm4v_9b --out DIR`.

Resumable: a run that is stopped goes on from its last checkpoint. The tower starts alone and is
taught what every patch shows through heads that are thrown away afterwards: one sentence per
picture is too thin a signal for a tower that starts from nothing. (Without them, 3,000 steps of
conversations alone read no text and answered questions about scenes no better than a guess.)
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from glimt.config import EngineConfig
from glimt.inputs.tokenizer import load_tokenizer
from glimt.loader import open_model
from glimt.models.base import Model, ModelFamily, Processor, find_family
from training.batches import BatchGroups, batches
from training.check import HeldOutRows, accuracies, held_out_rows
from training.configs import FAMILIES, demo_config
from training.data.mixture import corpus, quick_mixtures, training_mixtures
from training.data.texts import CHARACTERS
from training.export import export
from training.heads import Heads
from training.held_out import tasks_with
from training.optimizers import optimizers
from training.plan import QUICK, Plan
from training.plot import plot_curves
from training.view import Batch, answer, build, see
from training.vocabulary import write_sentencepiece, write_tiktoken

NUM_CHECKED = 256  # held-out questions of each task


@dataclass(slots=True, eq=False)
class Run:
    """Everything that changes while training."""

    model: Model
    heads: Heads
    optimizers: list[torch.optim.Optimizer]
    average: dict[str, Tensor]
    step: int
    curve: list[dict[str, float]]
    checks: list[dict[str, float]]
    seconds: float


def start(model: Model, raw: Mapping[str, Any], plan: Plan) -> Run:
    """A run before its first step."""
    torch.manual_seed(plan.seed)
    device = next(model.parameters()).device
    heads = Heads(raw).to(device)
    named = dict([*model.named_parameters(), *heads.named_parameters(prefix="heads")])
    average = {name: p.detach().clone() for name, p in model.named_parameters()}
    return Run(model, heads, optimizers(named, plan), average, 0, [], [], 0.0)


def train_step(run: Run, batch: Batch, plan: Plan) -> dict[str, float]:
    """One update; its loss, and the share of tokens or of patches that were right."""
    for group in (group for each in run.optimizers for group in each.param_groups):
        group["lr"] = plan.rate_at(run.step) * group["scale"]
    total, figures = _loss(run, batch, plan)
    for optimizer in run.optimizers:
        optimizer.zero_grad(set_to_none=True)
    total.backward()
    nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
    for optimizer in run.optimizers:
        optimizer.step()
    run.step += 1
    _update_average(run, plan)
    return {name: float(value) for name, value in figures.items()}


def _loss(run: Run, batch: Batch, plan: Plan) -> tuple[Tensor, dict[str, Tensor]]:
    total = torch.zeros((), device=next(run.model.parameters()).device)
    figures, features = {}, None
    with torch.autocast(total.device.type, dtype=torch.bfloat16):
        if batch.pictures:
            seen = see(run.model, batch.pictures.pixels)
            features = seen.features
            layout, patches_right = run.heads.layout_loss(seen, batch.pictures)
            garment = run.heads.garment_loss(seen, batch.pictures)
            total = total + plan.layout_weight * layout + plan.garment_weight * garment
            figures = {"layout_loss": layout.detach(), "patches_right": patches_right}
        if batch.rows:
            logits, labels = answer(run.model, batch.rows, features)
            loss = F.cross_entropy(logits.float(), labels)
            total = total + loss
            hits = (logits.argmax(-1) == labels).float().mean()
            figures |= {"loss": loss.detach(), "tokens_right": hits}
    return total, figures


@torch.no_grad()
def _update_average(run: Run, plan: Plan) -> None:
    """A running mean of the weights, which is what is exported; short at first."""
    decay = min(plan.average_decay, (1 + run.step) / (10 + run.step))
    parameters = dict(run.model.named_parameters())
    current = [parameters[name].detach() for name in run.average]
    torch._foreach_lerp_(list(run.average.values()), current, 1 - decay)


@contextmanager
def averaged(run: Run) -> Iterator[Model]:
    """The model with its running mean as weights, for as long as the context lasts."""
    parameters = dict(run.model.named_parameters())
    trained = {name: parameter.data for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        parameter.data = run.average[name]
    try:
        yield run.model
    finally:
        for name, parameter in parameters.items():
            parameter.data = trained[name]


def save(run: Run, folder: Path) -> None:
    """Write the run's state, whole or not at all."""
    state = {
        "model": run.model.state_dict(),
        "heads": run.heads.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in run.optimizers],
        "average": run.average,
        "step": run.step,
        "curve": run.curve,
        "checks": run.checks,
        "seconds": run.seconds,
    }
    torch.save(state, folder / "state.tmp")
    (folder / "state.tmp").replace(folder / "state.pt")


def resume(run: Run, folder: Path) -> None:
    """Take up a saved state, if there is one."""
    if not (folder / "state.pt").exists():
        return
    state: Mapping[str, Any] = torch.load(
        folder / "state.pt", map_location="cpu", weights_only=True
    )
    run.model.load_state_dict(state["model"])
    run.heads.load_state_dict(state["heads"])
    for optimizer, saved in zip(run.optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    device = next(run.model.parameters()).device
    run.average = {name: mean.to(device) for name, mean in state["average"].items()}
    run.step, run.seconds = state["step"], state["seconds"]
    run.curve, run.checks = list(state["curve"]), list(state["checks"])


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


def copy_weights(folder: Path, model: Model) -> None:
    """Give a model the weights of a trained one of the same shapes."""
    opened = open_model(EngineConfig(model=str(folder), dtype="float32"))
    opened.load()
    trained = dict(opened.model.named_parameters())
    for name, parameter in model.named_parameters():
        parameter.data.copy_(trained[name])


def main(
    family_name: Annotated[str, typer.Argument(help=f"One of {', '.join(FAMILIES)}.")],
    out: Annotated[Path, typer.Option(help="Folder for state, curves and the finished model.")],
    steps: Annotated[int, typer.Option(help="Updates in all.")] = 7600,
    tower_steps: Annotated[int, typer.Option(help="Of them, those of the tower alone.")] = 900,
    batch_rows: Annotated[int, typer.Option(help="Conversations per update.")] = 256,
    peak_rate: Annotated[float, typer.Option(help="Highest learning rate.")] = 1.5e-3,
    photos: Annotated[Path | None, typer.Option(help="Folder of photographs to decline.")] = None,
    start_from: Annotated[
        Path | None, typer.Option(help="A trained model's folder, to train it further.")
    ] = None,
    quick: Annotated[
        bool, typer.Option(help="A few minutes: garments alone, to try the whole path.")
    ] = False,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    workers: Annotated[int, typer.Option(help="Processes that draw ahead; 0 is none.")] = 0,
    seed: Annotated[int, typer.Option(help="Of weights and data.")] = 0,
) -> None:
    """Train a demo model and write it as a checkpoint of its family."""
    plan = Plan(steps=steps, tower_steps=tower_steps, batch_rows=batch_rows,
                peak_rate=peak_rate, seed=seed)  # fmt: skip
    if quick:
        plan = replace(QUICK, seed=seed)
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    family, raw, processor = open_family(family_name, out)
    is_causal = family.prompt_attention == "causal"
    model = build(family, raw, max_positions=512, torch_device=device)
    if start_from:
        copy_weights(start_from, model)
    run = start(model, raw, plan)
    resume(run, out)
    mixtures = quick_mixtures() if quick else training_mixtures(photos=photos)
    groups = BatchGroups(mixtures, processor, is_causal, plan)
    tasks = ("garments",) if quick else tasks_with(photos)
    held_out = held_out_rows(processor, is_causal, tasks, NUM_CHECKED, photos)
    fit(run, batches(groups, run.step, plan.steps, workers), held_out, plan, out)
    export(run.average, run.model, raw, out)


def fit(run: Run, stream: Iterator[Batch], held_out: HeldOutRows, plan: Plan, out: Path) -> None:
    """Train to the end of the plan, with a progress bar, saving and checking now and then."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    device = next(run.model.parameters()).device
    with Progress(*columns, TimeRemainingColumn()) as progress:
        task = progress.add_task("training", total=plan.steps, completed=run.step)
        began = time.monotonic() - run.seconds
        for batch in stream:
            figures = train_step(run, batch.to(device), plan)
            run.seconds = time.monotonic() - began
            run.curve.append({"step": run.step, "seconds": run.seconds} | figures)
            said = ", ".join(f"{name} {value:.3f}" for name, value in figures.items())
            progress.update(task, completed=run.step, description=said)
            is_last = run.step == plan.steps
            if (run.step > plan.tower_steps and run.step % plan.check_every == 0) or is_last:
                progress.console.print(_checked(run, held_out))
            if run.step % plan.save_every == 0 or is_last:
                progress.console.print(f"step {run.step}, {run.seconds:.0f} s: {said}")
                save(run, out)
                plot_curves(run.curve, run.checks, out / "curves.png")


def _checked(run: Run, held_out: HeldOutRows) -> str:
    """Note the averaged weights' accuracy on the held-out questions, and say it."""
    with averaged(run) as model:
        found = accuracies(model, held_out)
    run.checks.append({"step": run.step} | found)
    said = ", ".join(f"{task} {share:.1%}" for task, share in found.items())
    return f"step {run.step}, {run.seconds:.0f} s: {said}"


if __name__ == "__main__":
    typer.run(main)
