"""Curves of a training run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np


def plot_curves(
    curve: Sequence[Mapping[str, float]],
    checks: Sequence[Mapping[str, float]],
    path: Path,
    window: int = 50,
) -> None:
    """Losses and shares of right tokens and patches, averaged over `window` steps; exact
    matches on held-out questions by task.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(15, 4))
    titles = (("loss", "layout_loss"), ("tokens_right", "patches_right"))
    for axis, names in zip(axes, titles, strict=False):
        for name in names:
            points = [(point["step"], point[name]) for point in curve if name in point]
            if len(points) >= window:
                steps, values = np.array(points).T
                mean = np.convolve(values, np.ones(window) / window, mode="valid")
                axis.plot(steps[window - 1 :], mean, label=name.replace("_", " "))
                axis.legend()
        axis.set_xlabel("step")
        axis.set_title(names[0].replace("_", " "))
    axes[0].set_yscale("log")
    for task in checks[-1] if checks else ():
        if task != "step":
            axes[2].plot([c["step"] for c in checks], [c[task] for c in checks], label=task)
    axes[2].set_xlabel("step")
    axes[2].set_title("held-out answers right")
    if checks:
        axes[2].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
