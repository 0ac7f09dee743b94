"""Pictures of reports. Figures are built without pyplot: no global state, no display needed."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

__all__ = ["Line", "Panel", "dots", "lines", "surfaces", "to_png"]

# Okabe-Ito: distinct for colour-blind readers too; styles and markers repeat the distinction.
COLOURS = (
    "#B3123C", "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#555555",
    "#8C6D31", "#6A3D9A",
)  # fmt: skip
DASHES = ("-", (0, (1, 1.2)), (0, (5, 1.5)), (0, (5, 1.5, 1, 1.5)))
MARKERS = "os^DvPXd"
INK, GRID = "#333333", "#e4e4e4"
FIRST = ("DEQ Fusion", "concatenation")  # these look the same in every picture


@dataclass(frozen=True)
class Line:
    """A curve, the mean over seeds, with a band from the lowest to the highest seed."""

    label: str
    x: Sequence[float]
    y: Sequence[Sequence[float]]  # per seed
    band: tuple[Sequence[float], Sequence[float]] | None = None  # another one: (low, high)


@dataclass(frozen=True)
class Panel:
    """One pair of axes."""

    title: str
    xlabel: str
    ylabel: str
    lines: Sequence[Line]
    log_y: bool = False
    level: float | None = None  # a horizontal line, e.g. a tolerance
    bottom: float | None = None  # lower end of the y axis; that of the curves when None


def to_png(figure: Figure) -> bytes:
    """The figure as PNG, sharp enough for a dense screen."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160, metadata={"Software": None})
    return buffer.getvalue()


def lines(panels: Sequence[Panel], columns: int = 3, share_y: bool = False) -> Figure:
    """A grid of panels; one legend for all of them, colours by label."""
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(max(3.3 * columns, 5.6), 2.7 * rows + 0.6), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey=share_y)
    labels = list(dict.fromkeys(line.label for panel in panels for line in panel.lines))
    looks = _looks(labels)
    for axis, panel in zip(grid.flat, panels, strict=False):
        _style(axis, panel.title, panel.xlabel, panel.ylabel)
        for line in panel.lines:
            _draw(axis, line, looks[line.label])
        if panel.level is not None:
            axis.axhline(panel.level, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
        axis.set_yscale("log" if panel.log_y else "linear")
        if panel.bottom is not None:
            axis.set_ylim(panel.bottom, None)
        if all(isinstance(x, int) for line in panel.lines for x in line.x):
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axis in grid.flat[len(panels) :]:
        axis.set_axis_off()
    drawn: dict[str, Any] = {}
    for axis in grid.flat:
        drawn |= {
            label: handle for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
        }
    figure.legend(
        [drawn[label] for label in labels],
        labels,
        loc="outside upper center",
        ncols=_legend_columns(figure, labels),
        frameon=False,
        fontsize=8,
    )
    return figure


def dots(
    title: str,
    ylabel: str,
    groups: Sequence[str],
    series: Mapping[str, Sequence[Sequence[float]]],
) -> Figure:
    """A line at the mean per group and series, and a dot for every seed.

    Args:
        title, ylabel: of the axes.
        groups: names on the x axis.
        series: label -> per group the values of all seeds.
    """
    figure = Figure(figsize=(max(5.6, 1.5 * len(groups)), 3.6), layout="constrained")
    axis = figure.subplots()
    _style(axis, title, "", ylabel)
    width = 0.8 / len(series)
    looks = _looks(list(series))
    for k, (label, values) in enumerate(series.items()):
        centers = [i - 0.4 + (k + 0.5) * width for i in range(len(groups))]
        colour = COLOURS[looks[label] % len(COLOURS)]
        means = [float(np.mean(v)) for v in values]
        left, right = ([c + side * 0.42 * width for c in centers] for side in (-1, 1))
        axis.hlines(means, left, right, color=colour, linewidth=2.5, alpha=0.5, label=label)
        for center, seeds in zip(centers, values, strict=True):
            spread = np.linspace(-0.3, 0.3, len(seeds)) * width if len(seeds) > 1 else [0.0]
            axis.scatter(center + np.asarray(spread), seeds, s=11, color=colour, zorder=3)
    axis.set_xticks(range(len(groups)), [textwrap.fill(name, 18) for name in groups])
    everything = np.array([v for values in series.values() for seeds in values for v in seeds])
    known = everything[np.isfinite(everything)]
    if len(known):
        margin = 0.1 * (known.max() - known.min()) or 1.0
        axis.set_ylim(known.min() - margin, known.max() + margin)
    if len(series) > 1:
        columns = _legend_columns(figure, [*series])
        figure.legend(loc="outside upper center", ncols=columns, frameon=False, fontsize=8)
    return figure


def _legend_columns(figure: Figure, labels: Sequence[str]) -> int:
    """How many entries fit side by side; some 0.065 inches a letter, and 0.6 for the line."""
    widest = max(2.1, 0.6 + 0.065 * max(map(len, labels)))
    return max(1, min(len(labels), int(figure.get_figwidth() // widest)))


def surfaces(
    titles: Sequence[str],
    x: Sequence[float],
    y: Sequence[float],
    values: Sequence[Sequence[Sequence[float]]],
    xlabel: str,
    ylabel: str,
    label: str,
    scales: Sequence[str],
    columns: int = 2,
) -> Figure:
    """Contour plots side by side, white at zero, with round levels.

    Args:
        titles: per plot.
        x, y: of the grid.
        values: per plot, row per y, column per x.
        xlabel, ylabel, label: of the axes and the colour bars.
        scales: per plot a name; plots of the same name have the same colours.
        columns: plots side by side.
    """
    columns = min(columns, len(titles))
    rows = -(-len(titles) // columns)
    figure = Figure(figsize=(3.9 * columns, 2.9 * rows + 0.3), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axis, title, table, scale in zip(grid.flat, titles, values, scales, strict=False):
        _style(axis, title, xlabel, ylabel)
        same = [v for v, other in zip(values, scales, strict=True) if other == scale]
        most = max(float(np.nanmax(np.abs(same))), 1e-3)
        levels = MaxNLocator(nbins=10, symmetric=True).tick_values(-most, most)
        filled = axis.contourf(x, y, table, levels, cmap="RdBu")
        axis.contour(x, y, table, [0.0], colors=INK, linewidths=0.8)
        axis.plot(*np.meshgrid(x, y), ".", color=INK, markersize=3, clip_on=False, zorder=3)
        axis.set_xticks(x)
        axis.set_yticks(y)
        bar = figure.colorbar(filled, ax=axis, ticks=levels)
        bar.set_label(label, fontsize=8)
        bar.ax.tick_params(labelsize=7)
    for axis in grid.flat[len(titles) :]:
        axis.set_axis_off()
    return figure


def _style(axis: Axes, title: str, xlabel: str, ylabel: str) -> None:
    """Titles, grid and frame."""
    axis.set_title(title, fontsize=10, color=INK, loc="left")
    axis.set_xlabel(xlabel, fontsize=9)
    axis.set_ylabel(ylabel, fontsize=9)
    axis.grid(True, color=GRID, linewidth=0.7)
    axis.set_axisbelow(True)
    axis.tick_params(labelsize=8, colors=INK)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axis.spines[side].set_color("#999999")


def _looks(labels: Sequence[str]) -> dict[str, int]:
    """Label -> number of its colour, style and marker."""
    fixed = {label: number for number, label in enumerate(FIRST) if label in labels}
    others = (label for label in labels if label not in fixed)
    return fixed | {label: number for number, label in enumerate(others, start=len(FIRST))}


def _draw(axis: Axes, line: Line, index: int) -> None:
    values = np.asarray(line.y, dtype=float)
    colour = COLOURS[index % len(COLOURS)]
    if line.band is not None or len(values) > 1:
        low, high = line.band or (values.min(0), values.max(0))
        axis.fill_between(line.x, low, high, color=colour, alpha=0.12, linewidth=0)
    axis.plot(
        line.x,
        values.mean(0),
        color=colour,
        linestyle=DASHES[index % len(DASHES)],
        marker=MARKERS[index % len(MARKERS)] if len(line.x) <= 12 else "",
        markersize=3.5,
        linewidth=1.4,
        label=line.label,
    )
