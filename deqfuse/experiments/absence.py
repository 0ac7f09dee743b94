"""Rows that lack views: accuracy per set of views that rows have, and against the absent share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

import torch
from torch import nn

from deqfuse import ConvergenceWarning
from deqfuse.data import MultiviewData
from deqfuse.experiments.metrics import accuracy
from deqfuse.experiments.statistics import describe, numbers, paired, spread
from deqfuse.experiments.study import Record, Trial
from deqfuse.experiments.training import collect_warnings, predict
from deqfuse.reports import charts
from deqfuse.reports.charts import to_png
from deqfuse.reports.page import NOTHING, Picture, Section, Table, file_name

__all__ = [
    "FILE",
    "MODALITY_DROPOUT",
    "TRAINED",
    "absence_curve",
    "absence_section",
    "absence_summary",
    "absence_trials",
    "pattern_accuracy",
    "without_views",
]

MODALITY_DROPOUT = 0.3  # of the models trained with it
PICTURE = "Test accuracy against the share of absent views"
FILE = file_name(PICTURE)
TRAINED = {False: "complete rows", True: "modality dropout"}  # whether dropped: in training
# What stands in place of an absent view; "mask": nothing, the fusion is told.
FILLS = {"mask": "mask", "zeros": "zeros", "mean": "training mean"}
# Compared with: what is plainest, and the plainest that takes a mask.
BASELINES = {"concat": "mean", "weighted": "mask"}


def without_views(data: MultiviewData, count: int, seed: int) -> MultiviewData:
    """The data with ``count`` views of every row absent (NaN), drawn at random.

    The views that a row lacks at one count it also lacks at a higher one.

    Args:
        data: complete rows.
        count: 0 to the number of views less one.
        seed: of the draw, which depends on nothing else but the number of rows and views.
    """
    generator = torch.Generator().manual_seed(seed)
    ranks = torch.rand(data.num_rows, len(data.views), generator=generator).argsort(1)
    kept = (ranks >= count).to(data.labels.device)
    views = [
        torch.where(here[:, None], view, torch.nan)
        for view, here in zip(data.views, kept.T, strict=True)
    ]
    return replace(data, views=views)


def absence_curve(model: nn.Module, data: MultiviewData, seed: int) -> list[float]:
    """Accuracy with 0, 1, ... views of every row absent, up to all but one.

    Args:
        model: a trained classifier.
        data: complete rows.
        seed: of the draw: every model loses the same views.
    """
    scores = []
    for count in range(len(data.views)):
        with collect_warnings(ConvergenceWarning):
            logits, _ = predict(model, without_views(data, count, seed))
        scores.append(accuracy(logits, data.labels))
    return scores


def pattern_accuracy(model: nn.Module, data: MultiviewData) -> dict[str, tuple[int, float]]:
    """Per set of views that rows have: how many rows, and the accuracy on them.

    Args:
        model: a trained classifier.
        data: rows to classify, NaN where they lack a view.

    Returns:
        By names of the views, joined by "+", the most frequent set first.
    """
    with collect_warnings(ConvergenceWarning):
        logits, _ = predict(model, data)
    found = {}
    patterns, of_row = data.present.unique(dim=0, return_inverse=True)
    for k, pattern in enumerate(patterns.tolist()):
        name = "+".join(n for n, here in zip(data.view_names, pattern, strict=True) if here)
        rows = of_row == k
        found[name] = (int(rows.sum()), accuracy(logits[rows], data.labels[rows]))
    return dict(sorted(found.items(), key=lambda item: -item[1][0]))


def absence_trials(models: Sequence[str], labels: Mapping[str, str], seeds: int) -> list[Trial]:
    """A trial per seed, model, and whether it is trained with modality dropout.

    ``params["absent"]`` is the model: a study's other trials are told from these by it.
    """
    return [
        Trial(
            f"absent views, {labels[model]}, trained: {TRAINED[dropout]}, seed {seed}",
            {"absent": model, "dropout": dropout, "seed": seed},
        )
        for seed in range(seeds)
        for model in models
        for dropout in TRAINED
    ]


_Curves = dict[tuple[str, str, bool], list[list[float]]]


def _curves(records: Sequence[Record], labels: Mapping[str, str]) -> _Curves:
    """(model, fill, dropout) -> per seed the accuracies, in percent."""
    found: _Curves = {}
    mine = [record for record in records if "absent" in record.params]
    for dropout in TRAINED:
        for model in labels:
            for record in mine:
                params = record.params
                if (params["absent"], params["dropout"]) == (model, dropout):
                    for fill, curve in record.values["curves"].items():
                        found.setdefault((model, fill, dropout), []).append(numbers(curve, 100))
    return found


def absence_section(records: Sequence[Record], labels: Mapping[str, str], method: str) -> Section:
    """Table and picture of the trials of :func:`absence_trials`.

    Args:
        records: of the whole study.
        labels: names of the models, of which those in ``BASELINES`` are compared with.
        method: what the study has to say about how this was done.
    """
    curves = _curves(records, labels)
    count = len(next(iter(curves.values()))[0])
    baselines = [(m, fill) for m, fill in BASELINES.items() if (m, fill, False) in curves]
    rows = []
    found: dict[tuple[str, bool, int], list[str]] = {}
    for (model, fill, dropout), seeds in curves.items():
        ours = [fmean(curve[1:]) for curve in seeds]
        results = {
            m: paired(ours, [fmean(curve[1:]) for curve in curves[m, how, dropout]])
            for m, how in baselines
            if (m, how) != (model, fill)
        }
        rows.append(
            (
                labels[model],
                FILLS[fill],
                TRAINED[dropout],
                *(spread([curve[k] for curve in seeds], 1) for k in range(count)),
                spread(ours, 1),
                *(str(results.get(m) or NOTHING) for m, _ in baselines),
            )
        )
        for m, result in results.items():
            if result is not None and result.sign:
                named = f"{labels[model]} ({FILLS[fill]})"
                found.setdefault((m, dropout, result.sign), []).append(named)
    headers = (
        "fusion",
        "in place of an absent view",
        "trained",
        *(f"{k} of {count} absent" for k in range(count)),
        "mean from 1 on",
        *(f"against {labels[m]}, {FILLS[fill]}" for m, fill in baselines),
    )
    note = (
        "Test accuracy, %; every row lacks as many views as the column says, drawn at random, the "
        "same ones for every model. Against: paired difference of the means from one absent view "
        "on, in points, same training, mean ± standard error over seeds."
    )
    texts = ["Better or worse: where the mean difference exceeds two standard errors."]
    for m, fill in baselines:
        reading = "; ".join(
            f"{trained}, {word}: {', '.join(found.get((m, dropout, sign), ['none']))}"
            for dropout, trained in TRAINED.items()
            for word, sign in (("better", 1), ("worse", -1))
        )
        texts.append(f"Against {labels[m]} ({FILLS[fill]}). Trained with {reading}.")
    about = (
        f"{method} Modality dropout: every view of every row is absent with probability "
        f"{MODALITY_DROPOUT:g} in training, at least one stays; epochs are chosen on complete "
        "validation rows. A fusion that takes a mask leaves out what is absent. The others get "
        "something in its place, zeros for the view's encoding or the training rows' mean of its "
        "features, in training as in the test."
    )
    table = Table(headers, tuple(rows), (note,))
    return Section("Absent views", (*texts, about), table, _picture(curves, labels, count))


def _picture(curves: _Curves, labels: Mapping[str, str], count: int) -> Picture:
    panels = []
    shares = [100 * k / count for k in range(count)]
    for dropout, trained in TRAINED.items():
        for fill in ("zeros", "mean"):
            drawn = [
                charts.Line(labels[model], shares, seeds)
                for (model, own, how), seeds in curves.items()
                if own in ("mask", fill) and how == dropout
            ]
            title = f"{trained.capitalize()}, {FILLS[fill]}"
            panels.append(charts.Panel(title, "absent views, %", "accuracy, %", drawn))
    caption = (
        "Mean over seeds, shaded from the lowest to the highest. Above: trained on complete rows, "
        "below: with modality dropout. Left: zeros in place of an absent "
        "view's encoding, right: the training mean of its features, both for fusions that take no "
        "mask; those that do have the same curve left and right."
    )
    return Picture(to_png(charts.lines(panels, columns=2, share_y=True)), PICTURE, caption)


def absence_summary(records: Sequence[Record], labels: Mapping[str, str]) -> dict[str, Any]:
    """The numbers of the table, per number of absent views."""
    return {
        f"{labels[model]}, {FILLS[fill]}, trained: {TRAINED[dropout]}": [
            describe(list(values)) for values in zip(*seeds, strict=True)
        ]
        for (model, fill, dropout), seeds in _curves(records, labels).items()
    }
