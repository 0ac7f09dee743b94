"""Accuracy against noise on all views, of the models that are trained for absent views."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from deqfuse.experiments.absence import TRAINED
from deqfuse.experiments.statistics import describe, numbers, paired, spread
from deqfuse.experiments.study import Record, select
from deqfuse.reports import charts
from deqfuse.reports.charts import to_png
from deqfuse.reports.page import NOTHING, Picture, Section, Table, file_name
from deqfuse.robustness import robust_auc

__all__ = ["FILE", "NOISE_LEVELS", "noise_section", "noise_summary"]

NOISE_LEVELS = (0.0, 0.5, 1.0, 2.0, 4.0)  # standard deviations of the feature in the training rows
PICTURE = "Test accuracy against noise"
FILE = file_name(PICTURE)
BASELINES = ("concat", "weighted")

_Curves = dict[tuple[str, bool], list[list[float]]]


def _curves(records: Sequence[Record], labels: Mapping[str, str]) -> _Curves:
    """(model, dropout) -> per seed the accuracies, in percent."""
    return {
        (model, dropout): [numbers(record.values["noise"], 100) for record in group]
        for dropout in TRAINED
        for model in labels
        if (group := select(records, absent=model, dropout=dropout))
    }


def noise_section(records: Sequence[Record], labels: Mapping[str, str]) -> Section:
    """Table and picture of the trials of :func:`deqfuse.experiments.absence.absence_trials`.

    Args:
        records: of these trials; ``values["noise"]``: accuracy per level of ``NOISE_LEVELS``.
        labels: names of the models, of which those in ``BASELINES`` are compared with.
    """
    curves = _curves(records, labels)
    baselines = [model for model in BASELINES if (model, False) in curves]
    rows = []
    for (model, dropout), seeds in curves.items():
        against = []
        for baseline in baselines:
            area = robust_auc(
                torch.tensor(seeds), torch.tensor(curves[baseline, dropout]), NOISE_LEVELS
            )
            result = paired(area.tolist(), [0.0] * len(seeds))
            against.append(NOTHING if model == baseline else str(result))
        accuracies = [spread([curve[k] for curve in seeds], 1) for k in range(len(NOISE_LEVELS))]
        rows.append((labels[model], TRAINED[dropout], *accuracies, *against))
    headers = (
        "fusion",
        "trained",
        *(f"noise {level:g}" for level in NOISE_LEVELS),
        *(f"RobustAUC against {labels[model]}" for model in baselines),
    )
    note = (
        "Test accuracy, %, with Gaussian noise on all features of all views, in standard "
        "deviations of the feature in the training rows; the same noise for every model, and none "
        "in training. RobustAUC (arXiv 2209.00302, Appendix C.1): the integral over the noise "
        "level of the difference in accuracy, in points, same training, mean ± standard error "
        "over seeds; positive: more robust."
    )
    about = (
        "The models are those of the section on absent views: trained on complete rows, or with "
        "modality dropout (concatenation: with the training mean in place of what is dropped)."
    )
    table = Table(headers, tuple(rows), (note,))
    return Section("Noise", (about,), table, _picture(curves, labels))


def _picture(curves: _Curves, labels: Mapping[str, str]) -> Picture:
    panels = []
    for dropout, trained in TRAINED.items():
        drawn = [
            charts.Line(labels[model], NOISE_LEVELS, seeds)
            for (model, how), seeds in curves.items()
            if how == dropout
        ]
        title = f"Trained: {trained}"
        panels.append(charts.Panel(title, "noise, standard deviations", "accuracy, %", drawn))
    caption = "Mean over seeds, shaded from the lowest to the highest."
    return Picture(to_png(charts.lines(panels, columns=2, share_y=True)), PICTURE, caption)


def noise_summary(records: Sequence[Record], labels: Mapping[str, str]) -> dict[str, Any]:
    """The accuracies of the table, per level of noise."""
    return {
        f"{labels[model]}, trained: {TRAINED[dropout]}": {
            f"{level:g}": describe(list(values))
            for level, values in zip(NOISE_LEVELS, zip(*seeds, strict=True), strict=True)
        }
        for (model, dropout), seeds in _curves(records, labels).items()
    }
