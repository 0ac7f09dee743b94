"""Tables that studies of several fusions share: scores, differences, solves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import NamedTuple

from deqfuse.experiments.statistics import mean_error, paired
from deqfuse.experiments.study import Record
from deqfuse.experiments.training import BEGINNING
from deqfuse.reports.page import NOTHING, Table

__all__ = [
    "Groups",
    "Metric",
    "difference_table",
    "on_test",
    "score_table",
    "solve_table",
    "verdict",
]

Groups = Mapping[str, Sequence[Record]]  # fusion -> its trials, in the order of the seeds


class Metric(NamedTuple):
    """How a number of the test rows is shown."""

    header: str
    scale: float
    digits: int


def on_test(group: Sequence[Record], metric: str) -> list[float | None]:
    """The metric of every trial, None where it is undefined."""
    return [record.values["test"][metric] for record in group]


def verdict(ours: Sequence[float | None], theirs: Sequence[float | None], name: str) -> str:
    """Whether the shares ``ours``, of which more is better, are below those of concatenation."""
    result = paired(ours, theirs, 100)
    if result is None:
        return "cannot be compared with concatenation: an answer is not finite"
    if result.error is None:
        return f"differs from concatenation by {result.mean:+.1f} points of {name} (one seed)"
    place = {-1: "is below", 0: "is not below", 1: "is not below, but above,"}[result.sign]
    plural = {"accuracy": "accuracies"}.get(name, f"values of {name}")
    return (
        f"{place} concatenation by more than two standard errors: the {plural} differ by "
        f"{result.mean:+.1f} ± {result.error:.1f} points (mean ± standard error, {len(ours)} seeds)"
    )


def score_table(
    groups: Groups, labels: Mapping[str, str], metrics: Mapping[str, Metric], note: str
) -> Table:
    """Every metric on the test rows, and the number of parameters."""
    rows = [
        (
            labels[fusion],
            *(mean_error(on_test(group, name), m.digits, m.scale) for name, m in metrics.items()),
            f"{group[0].values['parameters']:,}",
        )
        for fusion, group in groups.items()
    ]
    headers = ("fusion", *(metric.header for metric in metrics.values()), "parameters")
    return Table(headers, tuple(rows), (note,))


def difference_table(
    groups: Groups,
    fusions: Sequence[str],
    baseline: str,
    labels: Mapping[str, str],
    metrics: Mapping[str, Metric],
    note: str,
) -> Table:
    """Paired differences of ``fusions`` to ``baseline``; ``note`` goes on after "Minus ...,"."""
    rows = []
    for fusion in fusions:
        cells = []
        for name, metric in metrics.items():
            ours, theirs = on_test(groups[fusion], name), on_test(groups[baseline], name)
            result = paired(ours, theirs, metric.scale)
            cells.append(NOTHING if result is None else result.interval(metric.digits))
        rows.append((labels[fusion], *cells))
    headers = ("fusion", *(metric.header.replace(" %", "") for metric in metrics.values()))
    return Table(headers, tuple(rows), (f"Minus {labels[baseline]}, {note}",))


def solve_table(
    groups: Groups, labels: Mapping[str, str], cost: str, digits: int, note: str
) -> Table:
    """Cost, and how equilibria were solved.

    Args:
        groups: the trials.
        labels: names of the fusions.
        cost: key of a trial's cost, milliseconds; its words are the header.
        digits: of the cost.
        note: what the cost is.
    """
    rows = []
    for fusion, group in groups.items():
        values, tests = [r.values for r in group], [r.values["test"] for r in group]
        cells: tuple[str, ...] = (NOTHING,) * 5
        if "fuse_nfe" in tests[0]:
            steps = " / ".join(
                f"{fmean(t[key][0] for t in tests):.0f} ({max(t[key][1] for t in tests)})"
                for key in ("cells_nfe", "fuse_nfe")
                if key in tests[0]
            )
            cells = (
                steps,
                f"{100 * fmean(t['converged'] for t in tests):.2f}%",
                f"{100 * fmean(v['train_converged_settled'] for v in values):.3f}%",
                f"{100 * min(v['train_converged_worst_step'] for v in values):.1f}%",
                f"{100 * fmean(v['train_rescued'] for v in values):.1f}%",
            )
        rows.append((labels[fusion], mean_error([v[cost] for v in values], digits), *cells))
    beginning = f"{100 * BEGINNING:g}%"
    headers = (
        "fusion",
        {"processor_ms": "processor ms per epoch", "step_ms": "ms per step"}[cost],
        "cell / fuse steps",
        "converged, test",
        f"training, after the first {beginning}",
        "worst step there",
        "rescued in training",
    )
    about = (
        f"{note} Steps: evaluations per test row, median (maximum). Converged: rows whose every "
        "block reached the tolerance of 1e-4. Worst step: the lowest share of a single step after "
        f"the first {beginning} of any training that was chosen. Rescued: rows that the iteration "
        "gave up and continuation solved, over all steps."
    )
    return Table(headers, tuple(rows), (about,))
