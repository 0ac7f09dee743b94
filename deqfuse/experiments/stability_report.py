"""The report of the stability study."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from deqfuse.data import MultiviewData
from deqfuse.experiments.fusion_tables import Groups, on_test
from deqfuse.experiments.mmdynamics import LABELS
from deqfuse.experiments.statistics import describe, mean_error, numbers, paired
from deqfuse.experiments.study import Record, select
from deqfuse.experiments.training import BEGINNING
from deqfuse.experiments.treatments import TREATMENTS
from deqfuse.reports import charts
from deqfuse.reports.charts import to_png
from deqfuse.reports.page import Picture, Report, Section, Table, file_name

__all__ = ["FILES", "build"]

PICTURE = "Work of the fuse solve through training"
FILES = (file_name(PICTURE),)
AFTER = f"after the first {100 * BEGINNING:g}% of the steps"

# header: (digits, scale, value of a trial's values)
_COLUMNS: dict[str, tuple[int, float, Callable[[Mapping[str, Any]], float | None]]] = {
    "left in training %": (3, 100.0, lambda v: v["train_left_settled"]),
    "converged, training %": (2, 100.0, lambda v: v["train_converged_settled"]),
    "converged, test %": (2, 100.0, lambda v: v["test"]["converged"]),
    "radius, median": (2, 1.0, lambda v: v["test"]["radius_median"]),
    "radius, max": (2, 1.0, lambda v: v["test"]["radius_max"]),
    "last epoch: median": (2, 1.0, lambda v: v["last_test"]["radius_median"]),
    "last epoch: max": (2, 1.0, lambda v: v["last_test"]["radius_max"]),
    "cross-entropy": (3, 1.0, lambda v: v["test"]["cross_entropy"]),
    "accuracy %": (1, 100.0, lambda v: v["test"]["accuracy"]),
    "ms per step": (0, 1.0, lambda v: v["processor_ms"]),
    "mean ms": (0, 1.0, lambda v: v["processor_ms_mean"]),
}


def build(
    records: Sequence[Record],
    settings: dict[str, Any],
    learning: MultiviewData,
    test: MultiviewData,
) -> Report:
    """A table for each layer, a picture, and numbers."""
    layers = {
        fusion: {key: group for key in TREATMENTS if (group := select(of, treatment=key))}
        for fusion in LABELS
        if (of := select(records, fusion=fusion))
    }
    sections = [
        Section(LABELS[fusion], _reading(groups), _table(groups))
        for fusion, groups in layers.items()
    ]
    sections.append(Section("Through training", (), None, _curves(layers)))
    sections.append(Section("What was done", _method(layers, settings, learning, test)))
    summary = {
        LABELS[fusion]: {
            TREATMENTS[key].label: {
                header: describe([value(record.values) for record in group])
                for header, (_, _, value) in _COLUMNS.items()
            }
            for key, group in groups.items()
        }
        for fusion, groups in layers.items()
    }
    title = f"Stability in training: {settings['data']}"
    return Report(title, _lead(layers, settings), sections, summary)


def _lead(layers: Mapping[str, Groups], settings: dict[str, Any]) -> str:
    """How much there was to mend."""
    found = [
        f"{max(100 * r.values['train_left_settled'] for r in groups['none']):.3f}% "
        f"({LABELS[fusion]})"
        for fusion, groups in layers.items()
    ]
    return (
        f"What keeps rows convergent in training on {settings['data']}: penalties, spectral "
        "normalisation, a smaller learning rate, a smaller output gain. Without any of them the "
        f"solver left at most this share of the rows, {AFTER}, in the worst seed: "
        f"{', '.join(found)}."
    )


def _reading(groups: Groups) -> tuple[str, ...]:
    """Paired differences to doing nothing that are decided, in a sentence."""
    if len(groups["none"]) == 1:
        return ("One seed: small differences between scores and radii mean nothing.",)
    lines = []
    for name, metric, better in (
        ("Accuracy", "accuracy", 1),
        ("Cross-entropy", "cross_entropy", -1),
    ):
        told: dict[int, list[str]] = {better: [], -better: []}
        for key, group in groups.items():
            result = paired(on_test(group, metric), on_test(groups["none"], metric))
            if key != "none" and result is not None and result.sign:
                told[result.sign].append(TREATMENTS[key].label)
        lines.append(
            f"{name} against nothing, decided beyond two standard errors of the paired "
            f"differences. Better: {'; '.join(told[better]) or 'none'}. "
            f"Worse: {'; '.join(told[-better]) or 'none'}. Undecided: the others."
        )
    return tuple(lines)


def _table(groups: Groups) -> Table:
    rows = []
    for key, group in groups.items():
        cells = [
            mean_error([value(record.values) for record in group], digits, scale)
            for digits, scale, value in _COLUMNS.values()
        ]
        rows.append((TREATMENTS[key].label, *cells))
    note = (
        f"Mean ± standard error, seeds: {len(groups['none'])}. Left in training: rows that the "
        f"solver gave up, rescued or not, {AFTER}; converged: rows that reached the tolerance, by "
        "solver or rescue. Radius: spectral radius of each test row's worst block, at the chosen "
        "epoch and at the last one; below 1 the plain iteration converges. Cross-entropy in nats, "
        "at the chosen epoch. Milliseconds: time of the processor, one thread, median over the "
        "steps, and their mean, in which rescued rows show; other programs ran on the machine."
    )
    return Table(("treatment", *_COLUMNS), tuple(rows), (note,))


def _curves(layers: Mapping[str, Groups]) -> Picture:
    panels = []
    for fusion, groups in layers.items():
        drawn = []
        for key, group in groups.items():
            curves = [numbers(record.values["train_fuse_nfe_curve"]) for record in group]
            count = len(curves[0])
            steps = [100 * (i + 0.5) / count for i in range(count)]
            drawn.append(charts.Line(TREATMENTS[key].label, steps, curves))
        axes = "training done, %", "evaluations, mean over rows"
        panels.append(charts.Panel(LABELS[fusion], *axes, drawn, log_y=True))
    caption = (
        "Evaluations of the fuse solve: mean over seeds, shaded from the lowest to the highest."
    )
    return Picture(to_png(charts.lines(panels, columns=1)), PICTURE, caption)


def _method(
    layers: Mapping[str, Groups],
    settings: dict[str, Any],
    learning: MultiviewData,
    test: MultiviewData,
) -> tuple[str, ...]:
    names = "; ".join(LABELS[fusion] for fusion in layers)
    return (
        f"MM-Dynamics with {names}, as in the omics study. {learning.num_rows} training rows, "
        f"{100 * settings['validation']:.0f}% of them held out for validation by each seed, "
        f"{test.num_rows} test rows. Every treatment: {settings['epochs']} epochs of one "
        f"full-batch step, Adam at {settings['learning_rate']:g}, weight decay "
        f"{settings['weight_decay']:g}, gradient norm clipped at {settings['clip_norm']:g}. The "
        f"epoch (every {settings['evaluate_every']} epochs) of lowest cross-entropy on the "
        "validation rows is chosen. Test rows decide nothing.",
        "Jacobian penalty: info.jacobian_penalty() times the weight, added to the loss. Radius "
        f"penalty: in each step {settings['power_steps']} power iterations with J^T find a unit "
        "vector v for every row and block; the mean of |J^T v|^2, about the squared radius, is "
        "added to the loss, v held constant.",
        "Spectral norm 1: torch.nn.utils.parametrizations.spectral_norm on W2 of every cell, W_f "
        "and W_a. The library draws these matrices smaller (norms of about 0.2, 0.2 and 0.5 / N), "
        "so that norm 1 makes them larger; 'as drawn' multiplies the parametrised matrix by the "
        "norm that it was drawn with. Norm 1 with the papers' equations was left out: so many "
        "rows have to be rescued, one by one, that on ROSMAP a training had not ended after three "
        "minutes of processor time, where the others took 5 to 40 seconds.",
        "A tenth of the learning rate: for the layer's parameters alone. Output gain: the weights "
        "of the GroupNorms that give z_i and z_f start at 0.5 instead of 1 and are then trained.",
    )
