"""Draws plots as PNG, in memory and without a screen."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_COLOURS = ("#2a6fbb", "#d9722b", "#2f9461", "#a3459b", "#b3261e", "#6b7280", "#997a00", "#0f8b8d")
_SIZE = (8.4, 4.4)  # inches


@dataclass(frozen=True, slots=True)
class Series:
    """A line of points.

    name:      in the legend; "" for a line that another one's name or the axis explains
    low, high: the spread of each point, where it has one
    is_limit:  what nothing can pass, or must pass: drawn with dashes and without points
    colour:    number of its colour, so that a limit can have that of its line; None: its place
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    is_limit: bool = False
    colour: int | None = None


@dataclass(frozen=True, slots=True)
class Axis:
    """What an axis measures, with its unit; ticks: names of its whole numbers, from 0 on."""

    name: str
    is_log: bool = False
    ticks: Sequence[str] = ()


def draw_lines(series: Sequence[Series], x: Axis, y: Axis) -> bytes:
    """Lines over a common axis; the spread as a band."""
    figure, axes = _figure(x, y)
    for i, each in enumerate(series):
        colour = _COLOURS[(i if each.colour is None else each.colour) % len(_COLOURS)]
        style = {"linestyle": "--"} if each.is_limit else {"marker": "o", "markersize": 3.5}
        axes.plot(
            each.x, each.y, color=colour, label=each.name or "_nolegend_", linewidth=1.6, **style
        )
        if each.low and each.high:
            axes.fill_between(each.x, each.low, each.high, color=colour, alpha=0.15, linewidth=0)
    return _png(figure, axes, has_legend=sum(bool(each.name) for each in series) > 1)


def draw_bars(
    names: Sequence[str], groups: Sequence[tuple[str, Sequence[float]]], y: Axis
) -> bytes:
    """A bar for each name and group, side by side; from 0 on, so that lengths tell."""
    figure, axes = _figure(Axis("", ticks=names), y)
    width = 0.8 / max(1, len(groups))
    for i, (group, values) in enumerate(groups):
        places = [place - 0.4 + width * (i + 0.5) for place in range(len(names))]
        axes.bar(places, values, width, color=_COLOURS[i % len(_COLOURS)], label=group)
    axes.set_ylim(bottom=0)
    return _png(figure, axes, has_legend=len(groups) > 1)


def draw_histogram(groups: Sequence[tuple[str, Sequence[float]]], x: Axis) -> bytes:
    """How many values lie where, one colour for each group; a dashed line at each mean.

    What is no finite number lies nowhere, and is left out.
    """
    groups = [(name, [value for value in group if math.isfinite(value)]) for name, group in groups]
    figure, axes = _figure(x, Axis("count"))
    values = [value for _, group in groups for value in group]
    low, high = min(values, default=0.0), max(values, default=1.0)
    edges = [low + (high - low or 1.0) * i / 24 for i in range(25)]
    for i, (name, group) in enumerate(groups):
        colour = _COLOURS[i % len(_COLOURS)]
        axes.hist(group, bins=edges, color=colour, alpha=0.5, label=name)
        if group:
            axes.axvline(sum(group) / len(group), color=colour, linestyle="--", linewidth=1.4)
    return _png(figure, axes, has_legend=len(groups) > 1)


def _figure(x: Axis, y: Axis) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=_SIZE, dpi=130, layout="constrained")
    FigureCanvasAgg(figure)  # of its own: pyplot would keep every figure and look for a screen
    axes = figure.add_subplot()
    axes.set(xlabel=x.name, ylabel=y.name)
    for axis, setting, scale in (
        (axes.xaxis, x, axes.set_xscale),
        (axes.yaxis, y, axes.set_yscale),
    ):
        if setting.is_log:
            scale("log", base=2 if setting is x else 10)
            if setting is x:
                axis.set_major_formatter("{x:g}")
        if setting.ticks:
            names = list(setting.ticks)
            rotation = 60 if len(names) > 8 else 0
            axis.set_ticks(range(len(names)), labels=names, rotation=rotation, fontsize=8)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _png(figure: Any, axes: Any, has_legend: bool) -> bytes:
    if has_legend:
        axes.legend(fontsize=9, edgecolor="none", framealpha=0.7)  # lines may pass beneath
    stream = io.BytesIO()
    figure.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()
