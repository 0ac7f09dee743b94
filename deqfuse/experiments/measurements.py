"""What is measured on trained models: residuals, early stops, probes, times."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deqfuse import Anderson, Picard
from deqfuse.cli.measure import Curve
from deqfuse.cli.metrics import accuracy
from deqfuse.cli.training import count_convergence_warnings
from deqfuse.data import MultiviewData, Splits
from deqfuse.experiments.numerals_models import NumeralsModel
from deqfuse.experiments.training import predict

__all__ = [
    "median_ms",
    "probe_steps",
    "residual_curves",
    "ridge_probe",
    "stopped_accuracy",
]

TRACE_TOL, TRACE_STEPS = 1e-6, 20
STOPS = (1, 2, 3, 4, 5, 6, 8, 10)
RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)


def residual_curves(model: NumeralsModel, data: MultiviewData) -> dict[str, list[list[float]]]:
    """Relative residual per solver step: "block, solver" -> [median, 97.5th percentile]."""
    curves = {}
    for label, solver in (
        ("Anderson", Anderson(tol=TRACE_TOL, max_iter=TRACE_STEPS, trace=True)),
        ("plain iteration", Picard(tol=TRACE_TOL, max_iter=TRACE_STEPS, trace=True)),
    ):
        traced = _with_solver(model, solver)
        with count_convergence_warnings():
            _, info = predict(traced, data)
        assert info is not None
        blocks = [("fuse", info.fuse)] + ([("cells", info.cells)] if info.cells else [])
        for block, statistics in blocks:
            assert statistics.trace is not None
            curve = Curve.of(label, block, statistics.trace.flatten(1))
            curves[f"{block}, {label}"] = [_rounded(curve.median), _rounded(curve.high)]
    return curves


def stopped_accuracy(model: NumeralsModel, data: MultiviewData) -> dict[str, float]:
    """Accuracy of the trained model if its solver has to stop after k evaluations."""
    result = {}
    for k in STOPS:
        with count_convergence_warnings():
            logits, _ = predict(_with_solver(model, Anderson(max_iter=k)), data)
        result[str(k)] = accuracy(logits.argmax(1), data.labels)
    return result


def _with_solver(model: NumeralsModel, solver: Anderson | Picard) -> NumeralsModel:
    changed = copy.deepcopy(model)
    (changed.pro if changed.pro is not None else changed.fusion).solver = solver  # type: ignore[union-attr]
    return changed


def probe_steps(model: NumeralsModel, splits: Splits) -> list[list[float]]:
    """Accuracy of linear probes on the unimodal representations: per step, per view (Appendix G).

    The steps of an equilibrium are the first application and the equilibrium itself.
    """
    assert model.pro is not None
    model.eval()
    parts = (splits.train, splits.validation, splits.test)
    with torch.no_grad(), count_convergence_warnings():
        encoded = [_representations(model, part.views) for part in parts]
    labels = [part.labels for part in parts]
    return [
        [
            ridge_probe([e[step][view] for e in encoded], labels)
            for view in range(len(splits.train.views))
        ]
        for step in range(len(encoded[0]))
    ]


def _representations(model: NumeralsModel, views: Sequence[Tensor]) -> list[list[Tensor]]:
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
        score = accuracy((validation @ weight).argmax(1), labels[1])
        if score > best:
            best, chosen = score, weight
    return accuracy((test @ chosen).argmax(1), labels[2])


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


def _rounded(values: Tensor) -> list[float]:
    return [float(f"{v:.3g}") for v in values.tolist()]
