"""What the report shows beside accuracy: convergence per solver step, robustness to noise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from deqfuse import Anderson, DEQFusion, Picard
from deqfuse.cli.metrics import accuracy
from deqfuse.cli.models import DIM, GROUPS
from deqfuse.cli.training import Run, count_convergence_warnings, predict
from deqfuse.data import MultiviewData
from deqfuse.robustness import robustness_curve

__all__ = ["NOISE_LEVELS", "Curve", "convergence_curves", "noise_accuracy"]

NOISE_LEVELS = (0.0, 0.5, 1.0, 2.0, 4.0)  # standard deviations of the feature in the training rows
TRACE_TOL = 1e-6  # tighter than the layer's own 1e-4, to show what happens beyond it
TRACE_STEPS = 30


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


def convergence_curves(run: Run, data: MultiviewData) -> list[Curve]:
    """Curves of a trained equilibrium model: cells and fuse map, Anderson and plain iteration."""
    curves = []
    solvers = (
        ("Anderson", Anderson(tol=TRACE_TOL, max_iter=TRACE_STEPS, trace=True)),
        ("plain iteration", Picard(tol=TRACE_TOL, max_iter=TRACE_STEPS, trace=True)),
    )
    run.model.eval()
    with torch.no_grad(), count_convergence_warnings():
        encodings = run.model.encode(data.views)
        for label, solver in solvers:
            fusion = DEQFusion(DIM, len(encodings), num_groups=GROUPS, solver=solver)
            fusion.load_state_dict(run.model.fusion.state_dict())
            _, info = fusion.to(encodings[0].device).eval()(encodings, return_info=True)
            for block, statistics in (("cells", info.cells), ("fuse", info.fuse)):
                curves.append(Curve.of(label, block, statistics.trace.flatten(1)))
    return curves


def noise_accuracy(
    run: Run, data: MultiviewData, on_view: Callable[[], None] = lambda: None
) -> Tensor:
    """Test accuracy with Gaussian noise on one view at a time: (views, levels), float64.

    Every fusion gets the same noise, so differences between fusions are not differences between
    draws.
    """

    def evaluate(views: list[Tensor]) -> float:
        with count_convergence_warnings():
            logits, _ = predict(run.model, replace(data, views=views))
        return accuracy(logits.argmax(1), data.labels)

    curves = []
    for i in range(len(data.views)):
        curves.append(
            robustness_curve(evaluate, data.views, NOISE_LEVELS, modalities=i, seed=run.seed)
        )
        on_view()
    return torch.stack(curves)
