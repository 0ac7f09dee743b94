"""Tables and pictures of what the numerals study measures on trained models."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from deqfuse.experiments.models import FUSIONS, LABELS, PRO_EQUILIBRIA
from deqfuse.experiments.statistics import numbers, percent, spread, versus
from deqfuse.experiments.study import Record, select
from deqfuse.reports import charts
from deqfuse.reports.charts import to_png
from deqfuse.reports.page import Picture, Table, file_name
from deqfuse.robustness import effective_robustness, robust_auc

__all__ = [
    "FILES",
    "cost_picture",
    "cost_table",
    "cost_text",
    "noise_picture",
    "probe_picture",
    "probes",
    "residuals",
    "robustness",
    "stopped",
]

ROBUSTNESS = "Test accuracy against noise"
RESIDUALS = "Relative residual per solver step"
COST = "Time against the number of steps"
PROBES = "Linear probes of the unimodal representations"
FILES = tuple(map(file_name, (ROBUSTNESS, RESIDUALS, COST, PROBES)))
_MEASURES = {
    "RobustAUC all": (robust_auc, "all views"),
    "RobustAUC one": (robust_auc, "one view"),
    "effective": (effective_robustness, "all views"),
}
PRO = ("pro 2", "pro 3", *PRO_EQUILIBRIA)


def stopped(runs: Sequence[Record], sizes: Sequence[int]) -> Table:
    table = []
    for model in ("deq", *PRO_EQUILIBRIA):
        for rows in sizes:
            group = select(runs, rows=rows, model=model)
            if group:
                stops = list(group[0].values["stopped"])
                cells = [percent([r.values["stopped"][k] for r in group]) for k in stops]
                table.append((LABELS[model], str(rows), *cells))
    headers = ("accuracy % if the solver stops after", "rows", *(f"{k}" for k in stops))
    return Table(
        headers,
        tuple(table),
        (
            "Trained to the equilibrium, stopped early when tested. Table 9 and Figure 3 of the "
            "paper are of other data; their numbers are not at hand.",
        ),
    )


def residuals(runs: Sequence[Record], sizes: Sequence[int]) -> Picture:
    panels = []
    for model, block, title in (
        ("deq", "cells", "DEQ Fusion, cells"),
        ("deq", "fuse", "DEQ Fusion, fuse map"),
        ("pro equilibrium", "fuse", "Pro-Fusion"),
        ("pro penalised", "fuse", "Pro-Fusion, penalty"),
    ):
        drawn = []
        for solver in ("Anderson", "plain iteration"):
            group = select(runs, rows=sizes[0], model=model)
            curves = [r.values["residuals"][f"{block}, {solver}"][0] for r in group]
            last = max((len(c) for c in curves), default=0)
            # Every trace ends when its last row has stopped.
            held = [[*c, *[c[-1]] * (last - len(c))] for c in curves]
            if held:
                drawn.append(charts.Line(solver, range(1, last + 1), held))
        if drawn:
            panels.append(charts.Panel(title, "solver step", "residual", drawn, True, level=1e-4))
    caption = (
        f"Median over the test rows of models trained on {sizes[0]} rows, mean over seeds, shaded "
        "from lowest to highest; a row that has stopped counts with its last residual. Dashed: "
        "the layer's tolerance. Anderson is allowed to go on to 1e-6."
    )
    return Picture(to_png(charts.lines(panels, columns=2)), RESIDUALS, caption)


def cost_table(cost: dict[str, Any]) -> Table:
    rows = [
        (
            LABELS.get(name, f"Pro-Fusion, {name}"),
            f"{cost['step_ms'][name]:.2f}",
            f"{cost['forward_ms'][name]:.2f}",
        )
        for name in cost["step_ms"]
    ]
    return Table(("fusion", "training step, ms", "forward, ms"), tuple(rows), ())


def cost_text(cost: dict[str, Any]) -> str:
    return (
        f"One batch of {cost['rows']} rows, trained on over and over from the initial values, "
        f"taking turns, tolerance {cost['tol']:g}; the steps of DEQ Fusion and of the penalised "
        "equilibrium include the Jacobian penalty. An equilibrium without it may stop converging "
        "within these steps; its time is then that of the largest number of evaluations. The "
        "paper's Figure 10b measured other models; its numbers are not at hand."
    )


def cost_picture(cost: dict[str, Any]) -> Picture:
    panels = []
    for key, title in (("step_ms", "Training step"), ("forward_ms", "Forward")):
        values = cost[key]
        steps = [int(name.split()[2]) for name in values if name.startswith("R =")]
        drawn = [charts.Line("Pro-Fusion, R steps", steps, [[values[f"R = {r}"] for r in steps]])]
        for name in (*PRO_EQUILIBRIA, "deq", "concat"):
            drawn.append(charts.Line(LABELS[name], steps, [[values[name]] * len(steps)]))
        panels.append(charts.Panel(title, "R", "ms", drawn))
    caption = "Time of one batch against the number of applications; equilibria as level lines."
    return Picture(to_png(charts.lines(panels, columns=2)), COST, caption)


def robustness(runs: Sequence[Record], sizes: Sequence[int], levels: Sequence[float]) -> Table:
    """RobustAUC and effective robustness of every fusion."""
    table = []
    for model in (m for m in FUSIONS if select(runs, model=m)):
        baseline = "base" if model.startswith("pro") else "concat"
        pair = (model, baseline)
        cells = []
        for rows in sizes:
            for measure, kind in _MEASURES.values():
                ours, theirs = (_noise(select(runs, rows=rows, model=m), kind) for m in pair)
                cells.append(spread(measure(ours, theirs, levels).tolist()))
        table.append((LABELS[model], LABELS[baseline], *cells))
    headers = ("fusion", "baseline", *(f"{name}, {r} rows" for r in sizes for name in _MEASURES))
    note = (
        "RobustAUC (arXiv 2209.00302, Appendix C.1): integral over the noise level of the "
        "difference in accuracy from the baseline, noise on all views or on one view (mean over "
        "views). Effective: the same from equal clean accuracy (MultiBench), all views. Paired "
        "over seeds; positive means more robust than the baseline."
    )
    return Table(headers, tuple(table), (note,))


def _noise(group: Sequence[Record], kind: str) -> Tensor:
    """Accuracy per seed and level."""
    return torch.tensor([numbers(r.values["noise"][kind]) for r in group], dtype=torch.float64)


def noise_picture(runs: Sequence[Record], sizes: Sequence[int], levels: Sequence[float]) -> Picture:
    panels = []
    for kind in ("all views", "one view"):
        drawn = []
        for model in FUSIONS:
            group = select(runs, rows=sizes[0], model=model)
            if group:
                values = (100 * _noise(group, kind)).tolist()
                drawn.append(charts.Line(LABELS[model], levels, values))
        panels.append(
            charts.Panel(f"noise on {kind}", "noise, standard deviations", "accuracy, %", drawn)
        )
    caption = (
        f"Models trained on {sizes[0]} rows without noise; mean over seeds, shaded from the lowest "
        "to the highest. The same noise for every model."
    )
    return Picture(to_png(charts.lines(panels, columns=2)), ROBUSTNESS, caption)


def _probe_means(runs: Sequence[Record], rows: int, model: str) -> list[list[float]]:
    """Per seed the accuracy per step, mean over views."""
    group = select(runs, rows=rows, model=model)
    return [[fmean(numbers(step)) for step in r.values["probes"]] for r in group]


def probes(runs: Sequence[Record], sizes: Sequence[int]) -> Table:
    table = []
    for model in (m for m in PRO if select(runs, model=m)):
        for rows in sizes:
            means = _probe_means(runs, rows, model)
            first, last = [m[0] for m in means], [m[-1] for m in means]
            gain = versus(last, first, 100)
            table.append((LABELS[model], str(rows), percent(first), percent(last), gain))
    headers = ("fusion", "rows", "first step, %", "last step, %", "gain, points")
    note = (
        "Test accuracy of a linear probe (ridge regression) on one view's representation, mean "
        "over the six views; the last step of an equilibrium is the equilibrium (Appendix G, "
        "whose numbers are of other data and not at hand)."
    )
    return Table(headers, tuple(table), (note,))


def probe_picture(runs: Sequence[Record], sizes: Sequence[int]) -> Picture:
    panels = []
    for rows in sizes:
        drawn = []
        for model in PRO:
            means = _probe_means(runs, rows, model)
            if means:
                values = [[100 * v for v in seed] for seed in means]
                drawn.append(charts.Line(LABELS[model], range(1, len(values[0]) + 1), values))
        panels.append(charts.Panel(f"{rows} training rows", "step", "probe accuracy, %", drawn))
    caption = "Mean over views and seeds, shaded over seeds. The equilibrium is drawn as step 2."
    return Picture(to_png(charts.lines(panels, columns=2)), PROBES, caption)
