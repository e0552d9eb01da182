"""Curves of a training run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np


def plot_curves(curve: Sequence[Mapping[str, float]], path: Path, window: int = 50) -> None:
    """Loss and share of right tokens over steps, raw and averaged over `window` steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    steps = np.array([point["step"] for point in curve])
    figure, axes = plt.subplots(1, 2, figsize=(10, 4))
    for axis, name in zip(axes, ("loss", "accuracy"), strict=True):
        values = np.array([point[name] for point in curve])
        axis.plot(steps, values, alpha=0.25)
        if len(values) >= window:
            mean = np.convolve(values, np.ones(window) / window, mode="valid")
            axis.plot(steps[window - 1 :], mean)
        axis.set_xlabel("step")
        axis.set_title({"loss": "loss per learnt token", "accuracy": "tokens right"}[name])
    axes[0].set_yscale("log")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
