"""The plots of the documentation, as SVG."""

from __future__ import annotations

from typing import TYPE_CHECKING

import matplotlib as mpl
from matplotlib.figure import Figure

from tests.bench.report import PLOTS, SERVERS, digest
from tests.bench.results import Results

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes

COLORS = dict(zip(SERVERS, ("tab:blue", "tab:gray", "tab:purple", "tab:orange", "tab:green", "tab:red"), strict=True))
BARS = ("steps-64", "steps-200", "short-16", "flat")
CURVE_AXES = {
    "streams": ("open streams of 5 tokens/s, in steps", "CPU µs per token"),
    "tokens": ("tokens of an answer, flat out", "CPU µs per token"),
    "arguments": ("pieces of a tool call's arguments, flat out", "CPU µs per piece"),
    "models": ("registered models", "CPU µs per short call"),
}


def draw(folder: Path) -> None:
    """Draw every plot into the folder that has the results."""
    # The salt makes the same file of the same results.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "deltawire", "font.size": 9}):
        for (plot, source), drawn in zip(PLOTS.items(), (_bars, _curves), strict=True):
            figure = drawn(Results.read(folder / source))
            metadata = {"Date": None, "Identifier": digest(folder / source)}
            figure.savefig(folder / plot, metadata=metadata, facecolor="white")


def _bars(results: Results) -> Figure:
    figure = Figure(figsize=(10, 2.6), layout="constrained")
    axes = figure.subplots(1, len(BARS))
    for axis, name in zip(axes, BARS, strict=True):
        rows = {who: row for who, row in results.of(name).items() if who in COLORS}
        heights = [row.fastest.cpu_micros for row in rows.values()]
        bars = axis.bar(list(rows), heights, color=[COLORS[who] for who in rows])
        axis.bar_label(bars, fmt="%.3g")
        axis.tick_params(axis="x", rotation=30)
        axis.set_title(next(iter(rows.values())).title, fontsize=9)
    axes[0].set_ylabel("CPU µs per token, or per call")
    return figure


def _curves(results: Results) -> Figure:
    figure = Figure(figsize=(10, 6), layout="constrained")
    for axis, name in zip(figure.subplots(2, 2).flat, CURVE_AXES, strict=True):
        _curve(axis, results, name)
    return figure


def _curve(axis: Axes, results: Results, name: str) -> None:
    for who, color in COLORS.items():
        points = [row for row in results.rows if row.scenario == name and row.who == who and row.samples]
        if points:
            costs = [point.fastest.cpu_micros for point in points]
            axis.plot([point.at for point in points], costs, marker="o", color=color, label=who)
    horizontal, vertical = CURVE_AXES[name]
    axis.set_xlabel(horizontal)
    axis.set_ylabel(vertical)
    axis.set_xscale("log")
    axis.set_ylim(bottom=0)
    axis.legend(frameon=False)
