"""The report's pictures. Figures are built without pyplot: no global state, no display needed."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from deqfuse.cli.measure import NOISE_LEVELS, Curve
from deqfuse.cli.models import FusionKind
from deqfuse.cli.summary import by_fusion
from deqfuse.cli.training import Run

__all__ = ["convergence_figure", "robustness_figure", "to_png", "training_figure"]

# Okabe-Ito colours: distinct for colour-blind readers too; line styles repeat the distinction.
COLOURS = {
    "concat": "#0072B2",
    "weighted": "#E69F00",
    "progressive": "#56B4E9",
    "tied": "#009E73",
    "deq": "#B3123C",
}
DASHES = {
    "concat": (0, (1, 1.2)),
    "weighted": (0, (5, 1.5)),
    "progressive": (0, (3, 1, 1, 1, 1, 1)),
    "tied": (0, (5, 1.5, 1, 1.5)),
    "deq": "-",
}
MARKERS = {"concat": "s", "weighted": "^", "progressive": "v", "tied": "D", "deq": "o"}
INK, GRID = "#333333", "#e4e4e4"
MAX_PANELS = 12


def to_png(figure: Figure) -> bytes:
    """The figure as PNG, sharp enough for a dense screen."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160, metadata={"Software": None})
    return buffer.getvalue()


def convergence_figure(curves: Sequence[tuple[int, Curve]], layer_tol: float) -> Figure:
    """Relative residual per solver step: one panel for the cells, one for the fuse map.

    Args:
        curves: (seed, curve) of every trained equilibrium model.
        layer_tol: the tolerance that the layer was trained with.
    """
    figure = Figure(figsize=(9.6, 3.9), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    # Past the step at which nearly all rows have stopped there is little to see.
    last = 1 + max(_last_change(curve) for _, curve in curves)
    titles = {"cells": "Residual cells, all views", "fuse": "Fuse map, given the cells' equilibria"}
    for axis, block in zip(axes, titles, strict=True):
        _style(axis, titles[block], "solver step")
        for seed, curve in curves:
            if curve.block == block:
                _draw_curve(axis, curve, labelled=seed == curves[0][0])
        axis.axhline(layer_tol, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
        axis.annotate(
            f"the layer stops a row here ({layer_tol:g})",
            (0.98, layer_tol),
            xycoords=("axes fraction", "data"),
            xytext=(0, 3),
            textcoords="offset points",
            ha="right",
            fontsize=8,
            color=INK,
        )
        axis.set_yscale("log")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set_xlim(1, last)
    axes[0].set_ylabel("relative residual")
    axes[1].legend(frameon=False, fontsize=8, loc="upper right")
    return figure


def _last_change(curve: Curve) -> int:
    """Step (from 1) after which the upper edge of the band stays within a percent."""
    moving = (curve.high[1:] / curve.high[:-1] - 1).abs() > 0.01
    return int(moving.nonzero().max()) + 2 if moving.any() else 1


def _draw_curve(axis: Axes, curve: Curve, labelled: bool) -> None:
    colour, style = ("#B3123C", "-") if curve.label == "Anderson" else ("#7a7a7a", (0, (5, 1.5)))
    steps = range(1, len(curve.median) + 1)
    axis.fill_between(steps, curve.low, curve.high, color=colour, alpha=0.12, linewidth=0)
    label = f"{curve.label}: median, 95% of rows" if labelled else None
    axis.plot(steps, curve.median, color=colour, linestyle=style, linewidth=1.4, label=label)


def robustness_figure(
    accuracies: Sequence[tuple[FusionKind, Tensor]], view_names: Sequence[str]
) -> Figure:
    """Test accuracy against the noise level, one panel per view.

    Args:
        accuracies: per fusion a tensor (seeds, views, levels).
        view_names: titles of the panels; at most the first 12 views are drawn.
    """
    count = min(len(view_names), MAX_PANELS)
    columns = min(count, 3)
    lines = math.ceil(count / columns)
    figure = Figure(figsize=(max(3.2 * columns, 5.6), 2.5 * lines + 0.7), layout="constrained")
    grid = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    for i, axis in enumerate(grid.flat):
        if i >= count:
            axis.set_axis_off()
            continue
        _style(axis, f"noise on view {view_names[i]}", "")
        for kind, values in accuracies:
            percent = 100 * values[:, i]
            style = {"color": COLOURS[kind.key], "linestyle": DASHES[kind.key]}
            if len(percent) > 1:
                low, high = percent.amin(0), percent.amax(0)
                axis.fill_between(
                    NOISE_LEVELS, low, high, alpha=0.12, linewidth=0, color=style["color"]
                )
            axis.plot(
                NOISE_LEVELS,
                percent.mean(0),
                **style,
                marker=MARKERS[kind.key],
                markersize=3.5,
                linewidth=1.4,
                label=kind.label,
            )
    for axis in grid[:, 0]:
        axis.set_ylabel("test accuracy, %")
    figure.supxlabel("noise: standard deviations of the feature", fontsize=9, color=INK)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside upper center", ncols=len(labels), frameon=False, fontsize=9
    )
    return figure


def training_figure(runs: Sequence[Run]) -> Figure:
    """Training loss and validation accuracy per epoch, mean over seeds, range shaded."""
    figure = Figure(figsize=(9.6, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    _style(left, "Training loss (with dropout)", "epoch")
    _style(right, "Validation accuracy, %", "epoch")
    left.set_yscale("log")
    lowest = 100.0
    for kind, group in by_fusion(runs):
        loss = torch.tensor([run.train_loss for run in group], dtype=torch.float64)
        score = 100 * torch.tensor([run.validation for run in group], dtype=torch.float64)
        lowest = min(lowest, score[:, len(score[0]) // 8 :].min().item())
        for axis, values in ((left, loss), (right, score)):
            epochs = range(1, values.shape[1] + 1)
            colour = COLOURS[kind.key]
            axis.plot(
                epochs,
                values.mean(0),
                color=colour,
                linestyle=DASHES[kind.key],
                linewidth=1.4,
                label=kind.label,
            )
            axis.fill_between(
                epochs, values.amin(0), values.amax(0), color=colour, alpha=0.12, linewidth=0
            )
    right.set_ylim(max(0.0, lowest - 2), None)  # the first epochs would flatten everything else
    for axis in (left, right):
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    right.legend(frameon=False, fontsize=8, loc="lower right")
    return figure


def _style(axis: Axes, title: str, xlabel: str) -> None:
    axis.set_title(title, fontsize=10, color=INK, loc="left")
    axis.set_xlabel(xlabel, fontsize=9)
    axis.grid(True, color=GRID, linewidth=0.7)
    axis.set_axisbelow(True)
    axis.tick_params(labelsize=8, colors=INK)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axis.spines[side].set_color("#999999")
