"""The pictures of a report page. Figures are built without pyplot: no global state, no display."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from benchmarks.results import Run
from benchmarks.tables import HEADLINES, flops, headlines, number, rivals
from benchmarks.timing import paired_ratio

# Okabe-Ito colours: distinct for colour-blind readers too.
COLOURS = {
    "deqfuse-cpu": "#B3123C", "deqfuse-cuda": "#B3123C", "deqfuse-reference": "#7a7a7a",
    "torchdeq": "#0072B2", "released": "#E69F00", "compiled": "#009E73", "cuda-graph": "#CC79A7",
}  # fmt: skip
MARKERS = {"deqfuse-cpu": "o", "deqfuse-cuda": "o", "torchdeq": "s", "released": "^"}
INK, GRID = "#333333", "#e4e4e4"


def save(run: Run, folder: Path) -> list[str]:
    """Draw what this run has data for; returns the names of the files."""
    drawn = []
    figures = {
        "speedup": (speedup, run.select("speed", regime="tolerance")),
        "roofline": (roofline, run.select("speed", regime="tolerance")),
        "accuracy": (accuracy, run.select("accuracy")),
        "scaling": (scaling, run.select("scaling")),
        "residuals": (residuals, run.select("residuals")),
    }
    for name, (draw, data) in figures.items():
        path = folder / f"{name}.png"
        path.unlink(missing_ok=True)
        if data:
            draw(run).savefig(path, dpi=130, metadata={"Software": None})
            drawn.append(path.name)
    return drawn


def _style(axis: Axes, title: str, x: str, y: str) -> None:
    axis.set_title(title, fontsize=10, color=INK)
    axis.set_xlabel(x, fontsize=9)
    axis.set_ylabel(y, fontsize=9)
    axis.tick_params(labelsize=8)
    axis.grid(True, which="major", color=GRID, linewidth=0.7)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def _plain(axis: Axes, which: str) -> None:
    target = axis.xaxis if which == "x" else axis.yaxis
    if target.get_scale() == "log" and len(target.get_majorticklocs()) < 5:
        target.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    target.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    target.set_minor_formatter(NullFormatter())


def speedup(run: Run) -> Figure:
    """Ratios over every rival in the headline quantities that were measured, with quartiles."""
    cases, names = run.cases("speed", regime="tolerance"), rivals(run)
    figure = Figure(figsize=(12, 0.55 + 0.2 * len(cases) * (len(names) + 1)), layout="constrained")
    quantities = headlines(run)
    axes = figure.subplots(1, len(quantities), sharey=True, squeeze=False)[0]
    for axis, quantity in zip(axes, quantities, strict=True):
        for i, case in enumerate(cases):
            entries = run.by_variant("speed", case, regime="tolerance", quantity=quantity)
            for j, name in enumerate(names):
                if not {name, run.ours} <= set(entries):
                    continue
                r = paired_ratio(entries[name].samples, entries[run.ours].samples)
                y = i + (j - (len(names) - 1) / 2) * 0.26
                whiskers = [[r.median - r.low], [r.high - r.median]]
                label = f"over {name}" if i == 0 else None
                bar = {"height": 0.24, "color": COLOURS[name], "label": label}
                axis.barh(y, r.median, xerr=whiskers, error_kw={"linewidth": 0.8}, **bar)
                axis.text(r.high, y, f"  {number(r.median)}", va="center", fontsize=7, color=INK)
        _style(axis, HEADLINES[quantity], "times as fast, medians and quartiles", "")
        axis.axvline(1, color=INK, linewidth=0.8)
        axis.margins(x=0.1)
    axes[0].set_yticks(range(len(cases)), cases)
    axes[0].set_ylim(len(cases) - 0.4, -0.6)
    axes[-1].legend(frameon=False, fontsize=8, loc="lower right")
    return figure


def roofline(run: Run) -> Figure:
    """Products per second against products per byte, under this machine's measured rates."""
    peak, bandwidth = run.peak / 1e9, run.machine["bandwidth"] / 1e9
    figure = Figure(figsize=(7.6, 4.6), layout="constrained")
    axis = figure.subplots()
    found = run.select("speed", regime="tolerance", quantity="forward", variant=run.ours)
    points = [
        (flops(e, "forward") / e.facts["bytes"], flops(e, "forward") / e.time.median / 1e9, e)
        for e in found
    ]
    left, right = peak / bandwidth / 4, 1.6 * max([x for x, _, _ in points] + [peak / bandwidth])
    ridge = peak / bandwidth
    axis.plot([left, ridge, right], [left * bandwidth, peak, peak], color=INK, linewidth=1.2)
    label = f"float32 matmul peak {peak:.0f} GF/s"
    axis.annotate(label, (ridge, peak), xytext=(0, 5), textcoords="offset points", fontsize=8)
    axis.annotate(
        f"{bandwidth:.0f} GB/s", (left, left * bandwidth), xytext=(8, 0),
        textcoords="offset points", fontsize=8, va="center",
    )  # fmt: skip
    for x, y, e in points:
        axis.plot(x, y, "o", color=COLOURS[run.ours], markersize=5)
        # To the left where another point lies close by on the right.
        left_side = any(1 < a / x < 2 and 0.8 < b / y < 1.25 for a, b, _ in points)
        axis.annotate(
            e.facts["case"]["name"], (x, y), xytext=(-5 if left_side else 5, 3),
            textcoords="offset points", ha="right" if left_side else "left", fontsize=7.5,
        )  # fmt: skip
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_ylim(
        min([10.0, *(0.7 * y for _, y, _ in points)]), 1.5 * max([peak, *(y for _, y, _ in points)])
    )
    _plain(axis, "x")
    _plain(axis, "y")
    _style(
        axis,
        f"{run.ours}, forward: necessary products per second",
        "necessary products per byte that must move (flop/byte)",
        "GF/s",
    )
    return figure


def scaling(run: Run) -> Figure:
    """Time per evaluation over rows and over width, with the slope that it ought to have."""
    figure = Figure(figsize=(9.2, 3.8), layout="constrained")
    titles = {"rows": ("rows B", 1), "dim": ("width d", 2)}
    for axis, (name, (label, order)) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        entries = run.select("scaling", axis=name)
        for e in entries:
            x, n = e.facts["values"], e.facts["evaluations"]
            y = [1e3 * s / k for s, k in zip(e.facts["seconds"], n, strict=True)]
            text = f"{e.variant}: slope {e.facts['slope']:.2f}"
            axis.plot(x, y, "-", marker="o", color=COLOURS[e.variant], label=text, markersize=4)
            if e.variant == run.ours:
                ideal = [y[0] * (v / x[0]) ** order for v in x]
                axis.plot(
                    x,
                    ideal,
                    color=INK,
                    linewidth=0.9,
                    linestyle=(0, (4, 3)),
                    label=f"slope {order}",
                )
                axis.set_xticks(x)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        _plain(axis, "x")
        _plain(axis, "y")
        _style(axis, f"forward, time against {label}", label, "ms per evaluation")
        axis.legend(frameon=False, fontsize=8)
    return figure


def accuracy(run: Run) -> Figure:
    """True error of the worst row against time."""
    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    axis = figure.subplots()
    for e in run.select("accuracy"):
        axis.plot(
            [1e3 * s for s in e.facts["seconds"]], e.facts["errors"], "-",
            marker=MARKERS.get(e.variant, "d"), markersize=4.5, color=COLOURS[e.variant],
            label=e.variant,
        )  # fmt: skip
    axis.set_xscale("log")
    axis.set_yscale("log")
    _plain(axis, "x")
    name = run.cases("accuracy")[0]
    _style(
        axis,
        f"{name}: each point one tolerance, 1e-2 to 1e-6",
        "forward, ms",
        "relative error of the worst row",
    )
    axis.legend(frameon=False, fontsize=8)
    return figure


def residuals(run: Run) -> Figure:
    """Residual of the best iterate after k evaluations: median and 95th percentile of the rows."""
    figure = Figure(figsize=(9.2, 3.8), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    colours = {"Anderson": "#B3123C", "Picard": "#7a7a7a"}
    for axis, init in zip(axes, ("contractive", "torch"), strict=True):
        for e in run.select("residuals", init=init):
            steps = range(1, len(e.facts["median"]) + 1)
            colour = colours[e.variant]
            axis.plot(steps, e.facts["median"], color=colour, label=f"{e.variant}, median")
            axis.plot(
                steps,
                e.facts["high"],
                color=colour,
                linestyle=(0, (4, 2)),
                label=f"{e.variant}, 95th percentile",
            )
        axis.set_yscale("log")
        axis.set_xlim(1, None)
        axis.set_ylim(1e-8, 3)  # float32 ends near 1e-7; some rows arrive at exactly zero
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        _style(
            axis,
            f"init {init!r}",
            "evaluations",
            "relative residual" if init == "contractive" else "",
        )
        axis.legend(frameon=False, fontsize=8)
    return figure
