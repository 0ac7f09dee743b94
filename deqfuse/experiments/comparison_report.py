"""The report of the comparison: sections, pictures, raw numbers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from matplotlib.figure import Figure
from torch import Tensor

from deqfuse import Anderson
from deqfuse.experiments.comparison import (
    KINDS,
    Comparison,
    FusionKind,
    GradientCheck,
    Run,
    by_fusion,
)
from deqfuse.experiments.comparison_tables import runs_as_json
from deqfuse.experiments.measurements import Curve
from deqfuse.reports import charts
from deqfuse.reports.charts import to_png
from deqfuse.reports.page import Picture, Report, Section, Table

__all__ = ["NOISE_LEVELS", "PICTURES", "build"]

NOISE_LEVELS = (0.0, 0.5, 1.0, 2.0, 4.0)  # standard deviations of the feature in the training rows
PICTURES = ("convergence.png", "robustness.png", "training.png")
MAX_PANELS = 12
LEAD = "Five ways to join the views of a sample, trained and measured by deqfuse."


def build(
    comparison: Comparison,
    runs: Sequence[Run],
    table: Table,
    patterns: Table | None,
    sentences: tuple[str, str, str],
    check: GradientCheck,
    curves: Sequence[Sequence[Curve]],
    noise: Sequence[tuple[FusionKind, Tensor]],
) -> Report:
    """Everything that was found.

    Args:
        comparison: what was compared.
        runs: all of them.
        table: of their scores.
        patterns: of their accuracies per set of views, where rows lack some.
        sentences: whether the table ranks the fusions, whose answers are not finite, and how
            training converged.
        check: of the gradients.
        curves: residuals of every trained equilibrium.
        noise: per fusion the accuracies (seeds, views, levels).
    """
    train, test = comparison.splits.train, comparison.splits.test
    kinds = "; ".join(f"{kind.label}: {kind.what}" for kind in KINDS)
    sections = [
        Section("Comparison", sentences[:2], table),
        *([Section("Accuracy per set of views", (), patterns)] if patterns else []),
        Section(
            "What is compared",
            (
                comparison.about_data,
                *comparison.doubts,
                "Each view passes through its own encoder (linear, ReLU, dropout), the fusion "
                f"joins the encodings, a linear head classifies. {kinds}.",
                comparison.terms,
                "The fusions differ in their number of parameters, and the recipe was chosen for "
                "a stable training of the equilibrium, not for each fusion: read the table as a "
                "working example, not as a ranking of methods.",
            ),
        ),
        Section(
            "Convergence",
            (sentences[2],),
            picture=Picture(
                to_png(_convergence(curves)),
                "Relative residual per solver step",
                "Relative residual |f(z) - z| / |f(z)| of the trained DEQ Fusion on the "
                f"{test.num_rows} test rows: median and the band holding 95% of the rows, one "
                "curve per seed. The solver was allowed to go on beyond the layer's tolerance, "
                "the dashed line; a row that has stopped counts with its last residual. Plain "
                "iteration: the same maps without mixing. The Jacobian penalty makes the trained "
                "maps contract strongly, hence few steps.",
                PICTURES[0],
            ),
        ),
        Section("Gradients", (check.text,)),
        Section(
            "Robustness to noise on one view",
            picture=Picture(
                to_png(_noise(noise, test.view_names)),
                "Test accuracy against noise on one view at a time",
                "Gaussian noise on one view's standardised features, the other views untouched; "
                "the same noise for every fusion. Mean over seeds, shaded from the lowest to "
                "the highest seed. No model was trained with noise.",
                PICTURES[1],
            ),
        ),
        Section(
            "Training",
            picture=Picture(
                to_png(_training(runs)),
                "Training loss and validation accuracy per epoch",
                f"{train.num_rows} training rows, {comparison.splits.validation.num_rows} "
                "validation rows; mean over seeds, shaded from the lowest to the highest.",
                PICTURES[2],
            ),
        ),
    ]
    summary = {
        "title": comparison.title,
        "runs": runs_as_json(runs),
        "gradient_check": {
            "worst": check.worst if check.count else None,
            "where": check.where,
            "gradients": check.count,
        },
        "noise_levels": NOISE_LEVELS,
        "noise_accuracy": {kind.label: values.tolist() for kind, values in noise},
        "views": test.view_names,
    }
    return Report(comparison.title, LEAD, sections, summary)


def _convergence(curves: Sequence[Sequence[Curve]]) -> Figure:
    """Relative residual per solver step: one panel for the cells, one for the fuse map."""
    # Past the step at which nearly all rows have stopped there is little to see.
    last = 1 + max(_last_change(curve) for own in curves for curve in own)
    titles = {"cells": "Residual cells, all views", "fuse": "Fuse map, given the cells' equilibria"}
    panels = []
    for block, title in titles.items():
        drawn = [_line(curve, last) for own in curves for curve in own if curve.block == block]
        level = Anderson().tol
        panels.append(
            charts.Panel(title, "solver step", "relative residual", drawn, True, level=level)
        )
    return charts.lines(panels, columns=2, share_y=True)


def _line(curve: Curve, last: int) -> charts.Line:
    low, middle, high = (v.tolist()[:last] for v in (curve.low, curve.median, curve.high))
    return charts.Line(curve.label, range(1, len(middle) + 1), [middle], band=(low, high))


def _last_change(curve: Curve) -> int:
    """Step (from 1) after which the upper edge of the band stays within a percent."""
    moving = (curve.high[1:] / curve.high[:-1] - 1).abs() > 0.01
    return int(moving.nonzero().max()) + 2 if moving.any() else 1


def _noise(noise: Sequence[tuple[FusionKind, Tensor]], views: Sequence[str]) -> Figure:
    """Test accuracy against the noise level, one panel per view, for the first views."""
    panels = [
        charts.Panel(
            f"noise on view {view}",
            "standard deviations",
            "test accuracy, %",
            [
                charts.Line(kind.label, NOISE_LEVELS, (100 * values[:, i]).tolist())
                for kind, values in noise
            ],
        )
        for i, view in enumerate(views[:MAX_PANELS])
    ]
    return charts.lines(panels, share_y=True)


def _training(runs: Sequence[Run]) -> Figure:
    """Training loss and validation accuracy per epoch."""
    losses, scores, lowest = [], [], 100.0
    for kind, group in by_fusion(runs):
        epochs = range(1, group[0].history.epochs + 1)
        losses.append(charts.Line(kind.label, epochs, [run.history.train_loss for run in group]))
        score = 100 * torch.tensor([run.history.validation for run in group])
        scores.append(charts.Line(kind.label, epochs, score.tolist()))
        late = score[:, score.shape[1] // 8 :]
        lowest = min([lowest, *late[late.isfinite()].tolist()])
    bottom = max(0.0, lowest - 2)  # the first epochs would flatten everything else
    return charts.lines(
        [
            charts.Panel("Training loss (with dropout)", "epoch", "", losses, log_y=True),
            charts.Panel("Validation accuracy, %", "epoch", "", scores, bottom=bottom),
        ],
        columns=2,
    )
