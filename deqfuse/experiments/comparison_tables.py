"""From runs to the table and the sentences under it."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, median, stdev
from typing import Any

from deqfuse.experiments.comparison import FusionKind, Run, by_fusion
from deqfuse.experiments.metrics import METRIC_NAMES
from deqfuse.experiments.statistics import percent
from deqfuse.reports.page import NOTHING, Table

__all__ = [
    "comparison_table",
    "comparison_text",
    "convergence_text",
    "non_finite_text",
    "pattern_table",
    "runs_as_json",
]

MAX_PATTERNS = 12  # sets of views in the table


def comparison_table(runs: Sequence[Run], metrics: Sequence[str] | None) -> Table:
    """One row per fusion; numbers over its seeds.

    Args:
        runs: all runs of the comparison.
        metrics: which of them get a column; all when None.
    """
    metrics = metrics or _metrics(runs[0])
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
                *(percent([run.test[m] for run in group]) for m in metrics),
                f"{group[0].model.num_parameters:,}",
                *steps,
                _share_converged(group),
                f"{1000 * median(run.seconds_per_epoch for run in group):.0f}",
            )
        )
    spread = f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "one seed, no spread"
    notes = (
        f"Test scores: {spread}; the epoch was chosen on the validation rows. {NOTHING}: undefined "
        "for a run.",
        "Steps: evaluations of the map per test row, median / maximum, at the layer's tolerance.",
        "Converged: test rows whose every block reached the tolerance.",
        "ms/epoch: median wall time of a training epoch, without validation.",
    )
    return Table(headers, tuple(rows), notes)


def pattern_table(runs: Sequence[Run]) -> Table | None:
    """Accuracy per set of views that test rows have, a column per fusion; None if all have all."""
    patterns = runs[0].patterns
    if not patterns:
        return None
    groups = by_fusion(runs)
    rows = tuple(
        (name, str(count), *(percent([run.patterns[name][1] for run in g]) for _, g in groups))
        for name, (count, _) in list(patterns.items())[:MAX_PATTERNS]
    )
    notes = ["Test accuracy, %, of the rows that have these views and no other."]
    if len(patterns) > len(rows):
        notes.append(f"The most frequent of {len(patterns)} sets; results.json has all of them.")
    return Table(("views", "rows", *(kind.label for kind, _ in groups)), rows, tuple(notes))


def comparison_text(runs: Sequence[Run]) -> str:
    """Whether the accuracies differ by more than the seeds do, in a sentence."""
    groups = [(kind, [run.test["accuracy"] for run in group]) for kind, group in by_fusion(runs)]
    if len(groups[0][1]) < 2:
        return "With one seed there is no spread: these accuracies do not rank the fusions."
    groups = [(kind, scores) for kind, scores in groups if None not in scores]
    if not groups:
        return "No fusion has a mean accuracy: this table does not rank them."
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


def non_finite_text(runs: Sequence[Run]) -> str:
    """Which models answer with NaN or infinity, in a sentence; "" if none does."""
    broken = [
        f"{run.kind.label}, seed {run.seed + 1} ({run.test['non_finite_rows']})"
        for run in runs
        if "non_finite_rows" in run.test
    ]
    if not broken:
        return ""
    return (
        f"NOT FINITE are the answers of {'; '.join(broken)}; in brackets the number of test rows. "
        f"Their scores are undefined ({NOTHING}), and so are the means over their seeds. Remedy: "
        "look for outliers in the data."
    )


def convergence_text(runs: Sequence[Run]) -> str:
    """How many rows missed the tolerance while training, and the warnings, in sentences."""
    group = [run.history for run in runs if run.history.converged]
    if not group:
        return ""
    missed = fmean(1 - (history.rows_converged or 0.0) for history in group)
    told = [text for history in group for text in history.warnings]
    text = (
        f"In training, {100 * missed:.2g}% of the rows of DEQ Fusion's solves missed the "
        f"tolerance. Convergence warnings while training and validating, counted instead of "
        f"printed: {len(told)}."
    )
    return f"{text} The first one: {told[0]}" if told else text


def runs_as_json(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Every run's numbers, for whoever wants to plot or test them again."""
    return [
        {
            "fusion": run.kind.label,
            "seed": run.seed,
            "test": {name: run.test[name] for name in _metrics(run)},
            "test_per_set_of_views": {
                name: {"rows": count, "accuracy": score}
                for name, (count, score) in run.patterns.items()
            },
            "chosen_epoch": run.history.chosen_epoch,
            "validation_accuracy": run.history.validation,
            "train_loss": run.history.train_loss,
            "parameters": run.model.num_parameters,
            "seconds_per_epoch": run.seconds_per_epoch,
            "train_rows_converged": run.history.rows_converged,
            "convergence_warnings": len(run.history.warnings),
            "test_rows_converged": run.test.get("converged"),
            "fuse_evaluations_median_max": run.test.get("fuse_nfe"),
            "cells_evaluations_median_max": run.test.get("cells_nfe"),
        }
        for run in runs
    ]


def _metrics(run: Run) -> list[str]:
    """With two classes F1 is that of class 1, without averages over classes."""
    names = [name for name in METRIC_NAMES if name in run.test]
    return [n for n in names if "f1" not in names or n not in ("weighted_f1", "macro_f1")]


def _steps(kind: FusionKind, group: Sequence[Run]) -> tuple[str, ...]:
    if "fuse_nfe" in group[0].test:
        blocks = ([run.test[name] for run in group] for name in ("cells_nfe", "fuse_nfe"))
        return tuple(
            f"{median(middle for middle, _ in block):g} / {max(most for _, most in block)}"
            for block in blocks
        )
    fixed = f"{kind.steps} fixed" if kind.steps else NOTHING
    return (fixed if kind.key == "tied" else NOTHING), fixed


def _share_converged(group: Sequence[Run]) -> str:
    shares = [run.test["converged"] for run in group if "converged" in run.test]
    if not shares:
        return NOTHING
    share = 100 * fmean(shares)
    return "100%" if share == 100 else f"{min(share, 99.99):.2f}%"
