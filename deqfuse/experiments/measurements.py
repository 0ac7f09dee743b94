"""What is measured on trained models: residuals, early stops, noise, probes, times."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deqfuse import Anderson, ConvergenceWarning, Picard
from deqfuse.data import MultiviewData, Splits
from deqfuse.experiments.metrics import accuracy
from deqfuse.experiments.models import FusionClassifier
from deqfuse.experiments.training import collect_warnings, predict
from deqfuse.robustness import robustness_curve

__all__ = [
    "Curve",
    "median_ms",
    "noise_curve",
    "probe_steps",
    "residual_curves",
    "ridge_probe",
    "stopped_accuracy",
]

TRACE_TOL = 1e-6  # tighter than the layers' own 1e-4, to show what happens beyond it
STOPS = (1, 2, 3, 4, 5, 6, 8, 10)
RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)


@dataclass(frozen=True)
class Curve:
    """Relative residual per solver step over a set of rows: tensors (steps,)."""

    label: str
    block: str  # "cells" or "fuse"
    median: Tensor
    low: Tensor  # 2.5th percentile
    high: Tensor  # 97.5th percentile

    @classmethod
    def of(cls, label: str, block: str, trace: Tensor) -> Curve:
        """From a trace (steps, rows) that is NaN where a row had stopped.

        A stopped row counts with its last residual: dropping it would leave the median of the slow
        rows and make convergence look worse the further it gets.
        """
        held = trace.double().cpu()
        for step in range(1, held.shape[0]):
            held[step] = torch.where(held[step].isnan(), held[step - 1], held[step])
        low, mid, high = held.nanquantile(torch.tensor([0.025, 0.5, 0.975]).double(), dim=1)
        return cls(label, block, mid, low, high)


def residual_curves(model: FusionClassifier, data: MultiviewData, max_iter: int) -> list[Curve]:
    """Curves of a trained equilibrium: each block, Anderson's and plain iteration's.

    Args:
        model: with an equilibrium.
        data: rows to solve for.
        max_iter: steps to take at most.
    """
    curves = []
    for label, solver in (
        ("Anderson", Anderson(tol=TRACE_TOL, max_iter=max_iter, trace=True)),
        ("plain iteration", Picard(tol=TRACE_TOL, max_iter=max_iter, trace=True)),
    ):
        with collect_warnings(ConvergenceWarning):
            _, info = predict(_with_solver(model, solver), data)
        assert info is not None
        for block, statistics in (("cells", info.cells), ("fuse", info.fuse)):
            if statistics is not None:
                assert statistics.trace is not None
                curves.append(Curve.of(label, block, statistics.trace.flatten(1)))
    return curves


def stopped_accuracy(model: FusionClassifier, data: MultiviewData) -> dict[str, float]:
    """Accuracy of the trained model if its solver has to stop after k evaluations."""
    result = {}
    for k in STOPS:
        with collect_warnings(ConvergenceWarning):
            logits, _ = predict(_with_solver(model, Anderson(max_iter=k)), data)
        result[str(k)] = accuracy(logits, data.labels)
    return result


def _with_solver(model: FusionClassifier, solver: Anderson | Picard) -> FusionClassifier:
    changed = copy.deepcopy(model)
    (changed.pro if changed.pro is not None else changed.fusion).solver = solver  # type: ignore[union-attr]
    return changed


def noise_curve(
    model: nn.Module,
    data: MultiviewData,
    levels: Sequence[float],
    views: int | None,
    seed: int,
    scales: Sequence[Tensor] | None = None,
) -> Tensor:
    """Accuracy per level of Gaussian noise on one view (None: on all): (levels,) float64.

    Every model gets the same noise, so differences between models are not differences between
    draws.

    Args:
        model: a trained one.
        data: rows to classify.
        levels: standard deviations of the noise, in units of ``scales``.
        views: number of the noisy view.
        seed: of the noise.
        scales: per view (features,), the standard deviation of each feature; 1 when not given.
    """

    def score(noise: list[Tensor]) -> float:
        units = [torch.ones(())] * len(noise) if scales is None else scales
        noisy = [x + unit * e for x, unit, e in zip(data.views, units, noise, strict=True)]
        with collect_warnings(ConvergenceWarning):
            logits, _ = predict(model, replace(data, views=noisy))
        return accuracy(logits, data.labels)

    nothing = [torch.zeros_like(view) for view in data.views]
    return robustness_curve(score, nothing, levels, modalities=views, seed=seed)


def probe_steps(model: FusionClassifier, splits: Splits) -> list[list[float]]:
    """Accuracy of linear probes on the unimodal representations: per step, per view (Appendix G).

    The steps of an equilibrium are the first application and the equilibrium itself.
    """
    assert model.pro is not None
    model.eval()
    parts = (splits.train, splits.validation, splits.test)
    with torch.no_grad(), collect_warnings(ConvergenceWarning):
        encoded = [_representations(model, part.views) for part in parts]
    labels = [part.labels for part in parts]
    return [
        [
            ridge_probe([e[step][view] for e in encoded], labels)
            for view in range(len(splits.train.views))
        ]
        for step in range(len(encoded[0]))
    ]


def _representations(model: FusionClassifier, views: Sequence[Tensor]) -> list[list[Tensor]]:
    pro = model.pro
    assert pro is not None
    _, contexts = pro(views, return_contexts=True)
    back = contexts if pro.solver is not None else contexts[:-1]
    return [pro.encode(views), *(pro.encode(views, context) for context in back)]


def ridge_probe(
    features: Sequence[Tensor],  # training, validation, test: each (rows, d)
    labels: Sequence[Tensor],  # the same, each (rows,)
) -> float:
    """Test accuracy of a linear classifier fitted by ridge regression onto one-hot labels.

    The ridge is chosen on the validation rows.
    """
    mean, std = features[0].mean(0), features[0].std(0).clamp(min=1e-6)
    train, validation, test = (
        F.pad((x - mean).double() / std.double(), (0, 1), value=1.0) for x in features
    )
    targets = F.one_hot(labels[0]).double()
    gram, cross = train.T @ train, train.T @ targets
    best, chosen = -1.0, gram
    for ridge in RIDGES:
        weight = torch.linalg.solve(gram + ridge * len(train) * torch.eye(len(gram)), cross)
        score = accuracy(validation @ weight, labels[1])
        if score > best:
            best, chosen = score, weight
    return accuracy(test @ chosen, labels[2])


def median_ms(actions: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median wall time of each action in ms; they take turns, so a slow moment slows all."""
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for i in range(repeats + 2):
        for name, action in actions.items():
            started = time.perf_counter()
            action()
            if i >= 2:  # the first ones allocate
                seconds[name].append(time.perf_counter() - started)
    return {name: round(1000 * median(values), 4) for name, values in seconds.items()}
