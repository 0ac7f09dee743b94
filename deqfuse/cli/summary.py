"""From runs to the table and the sentences under it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isnan
from statistics import fmean, median, stdev

from deqfuse.cli.models import FUSIONS, FusionKind
from deqfuse.cli.training import Run

__all__ = ["Table", "comparison_table", "comparison_text", "convergence_text", "runs_as_json"]

NOTHING = "-"  # a cell without a meaning for its fusion
METRIC_NAMES = {
    "accuracy": "accuracy %",
    "f1": "F1 %",
    "auc": "AUC %",
    "weighted_f1": "weighted F1 %",
    "macro_f1": "macro F1 %",
}


@dataclass(frozen=True)
class Table:
    """Text cells, for the terminal and for the page alike."""

    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]


def comparison_table(runs: Sequence[Run], metrics: Sequence[str]) -> Table:
    """One row per fusion; numbers over its seeds.

    Args:
        runs: all runs of the comparison.
        metrics: which of ``Run.metrics`` get a column.
    """
    seeds = len({run.seed for run in runs})
    headers = (
        "fusion",
        *(METRIC_NAMES[m] for m in metrics),
        "parameters",
        "cell steps",
        "fuse steps",
        "converged",
        "ms/epoch",
    )
    rows = []
    for kind, group in by_fusion(runs):
        steps = _steps(kind, group)
        rows.append(
            (
                kind.label,
                *(_mean_and_spread([run.metrics[m] for run in group]) for m in metrics),
                f"{group[0].num_parameters:,}",
                *steps,
                _share_converged(group),
                f"{1000 * median(run.seconds_per_epoch for run in group):.0f}",
            )
        )
    spread = f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "one seed, no spread"
    notes = (
        f"Test scores: {spread}; the epoch was chosen on the validation rows.",
        "Steps: evaluations of the map per test row, median / maximum, at the layer's tolerance.",
        "Converged: test rows whose every block reached the tolerance.",
        "ms/epoch: median wall time of a training epoch, without validation.",
    )
    return Table(headers, tuple(rows), notes)


def comparison_text(runs: Sequence[Run]) -> str:
    """Whether the accuracies differ by more than the seeds do, in a sentence."""
    groups = [(kind, [run.metrics["accuracy"] for run in group]) for kind, group in by_fusion(runs)]
    if len(groups[0][1]) < 2:
        return "With one seed there is no spread: these accuracies do not rank the fusions."
    means = {kind.label: 100 * fmean(scores) for kind, scores in groups}
    spreads = {kind.label: 100 * stdev(scores) for kind, scores in groups}
    best = max(means, key=lambda label: means[label])
    worst = min(means, key=lambda label: means[label])
    gap, spread = means[best] - means[worst], max(spreads.values())
    if gap <= spread:
        return (
            f"The mean accuracies lie within {gap:.1f} points of each other, the largest spread "
            f"over seeds is {spread:.1f}: this table does not rank the fusions."
        )
    rivals = [
        label
        for label in means
        if label != best and means[best] - means[label] <= max(spreads[best], spreads[label])
    ]
    names = " and ".join([", ".join(rivals[:-1]), rivals[-1]] if rivals[1:] else rivals)
    tied = f" ({names} within the spread of it)" if rivals else ""
    return (
        f"Best mean accuracy: {best}{tied}; lowest: {worst}, {gap:.1f} points below. Differences "
        "smaller than the spread mean nothing, and a few seeds on one split say little about "
        "other data."
    )


def convergence_text(runs: Sequence[Run]) -> str:
    """How many rows missed the tolerance while training, and the warnings, in sentences."""
    group = [run for run in runs if run.train_converged is not None]
    if not group:
        return ""
    missed = fmean(1 - (run.train_converged or 0.0) for run in group)
    count = sum(run.num_warnings for run in group)
    text = (
        f"In training, {100 * missed:.2g}% of the rows of DEQ Fusion's solves missed the "
        f"tolerance. Convergence warnings while training and validating, counted instead of "
        f"printed: {count}."
    )
    first = next((run.first_warning for run in group if run.first_warning), "")
    return f"{text} The first one: {first}" if first else text


def runs_as_json(runs: Sequence[Run]) -> list[dict[str, object]]:
    """Every run's numbers, for whoever wants to plot or test them again."""
    return [
        {
            "fusion": run.kind.label,
            "seed": run.seed,
            "test": {name: None if isnan(v) else v for name, v in run.metrics.items()},
            "chosen_epoch": run.chosen_epoch,
            "validation_accuracy": run.validation,
            "train_loss": run.train_loss,
            "parameters": run.num_parameters,
            "seconds_per_epoch": run.seconds_per_epoch,
            "train_rows_converged": run.train_converged,
            "convergence_warnings": run.num_warnings,
            "test_rows_converged": run.solve.converged if run.solve else None,
            "fuse_evaluations_median_max": run.solve.fuse_nfe if run.solve else None,
            "cells_evaluations_median_max": run.solve.cells_nfe if run.solve else None,
        }
        for run in runs
    ]


def by_fusion(runs: Sequence[Run]) -> list[tuple[FusionKind, list[Run]]]:
    """Runs of each fusion, in the order of ``FUSIONS``."""
    groups = [(kind, [run for run in runs if run.kind == kind]) for kind in FUSIONS]
    return [(kind, group) for kind, group in groups if group]


def _mean_and_spread(values: list[float]) -> str:
    if any(map(isnan, values)):
        return NOTHING  # AUC without test rows of one of the classes
    if len(values) == 1:
        return f"{100 * values[0]:.1f}"
    return f"{100 * fmean(values):.1f} ± {100 * stdev(values):.1f}"


def _steps(kind: FusionKind, group: list[Run]) -> tuple[str, str]:
    solves = [run.solve for run in group if run.solve is not None]
    if solves:
        return (
            f"{median(s.cells_nfe[0] for s in solves):g} / {max(s.cells_nfe[1] for s in solves)}",
            f"{median(s.fuse_nfe[0] for s in solves):g} / {max(s.fuse_nfe[1] for s in solves)}",
        )
    fixed = f"{kind.steps} fixed" if kind.steps else NOTHING
    return (fixed if kind.key == "tied" else NOTHING), fixed


def _share_converged(group: list[Run]) -> str:
    shares = [run.solve.converged for run in group if run.solve is not None]
    if not shares:
        return NOTHING
    share = 100 * fmean(shares)
    return "100%" if share == 100 else f"{min(share, 99.99):.2f}%"
