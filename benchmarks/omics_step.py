"""Time of one optimiser step of the omics study: what the Jacobian penalty costs there.

    python -m benchmarks.omics_step --threads 2

The study's own model, loss, recipe and ``train_step`` (deqfuse/experiments) on random data in the
layout of ROSMAP as the study trains on it: 196 rows, three views of 200 features, two classes,
d = 300. Encoders, classifiers, gradient clipping and Adam are in it. Every step starts from the
same parameters, those after 100 steps of the study's training: in its first steps many rows do not
converge, and models that are trained differently need different numbers of evaluations. All take
turns; ratios are paired.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses

import torch

from benchmarks.tables import markdown, ms, number, percent
from benchmarks.timing import Call, Phases, interleave, paired_ratio, spread
from deqfuse import ConvergenceWarning
from deqfuse.backends import BackendName
from deqfuse.data import MultiviewData
from deqfuse.experiments.mmdynamics import MMDynamics
from deqfuse.experiments.omics import RECIPE
from deqfuse.experiments.training import History, Recipe, collect_warnings, train_step

ROWS, WIDTHS, CLASSES, DIM = 196, (200, 200, 200), 2, 300
STEPS_BEFORE = 100
WITHOUT = dataclasses.replace(RECIPE, jacobian_weight=0.0)


def draw_data() -> MultiviewData:
    """Features in [0, 1], as the study scales them."""
    torch.manual_seed(0)
    return MultiviewData(
        views=[torch.rand(ROWS, width) for width in WIDTHS],
        labels=torch.randint(CLASSES, (ROWS,)),
        view_names=tuple(f"view {i + 1}" for i in range(len(WIDTHS))),
        class_names=tuple(str(c) for c in range(CLASSES)),
    )


def build(fusion: str) -> MMDynamics:
    """The study's model with its initial values."""
    torch.manual_seed(0)
    return MMDynamics(WIDTHS, CLASSES, fusion, DIM)


def adam(model: MMDynamics, recipe: Recipe) -> torch.optim.Adam:
    """As the study makes it."""
    return torch.optim.Adam(
        model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay
    )


def trained(data: MultiviewData, steps: int) -> dict[str, MMDynamics]:
    """Both fusions after some steps of the study's training."""
    models = {"deq": build("deq"), "concat": build("concat")}
    for model in models.values():
        optimizer = adam(model, RECIPE)
        for _ in range(steps):
            train_step(model, data, optimizer, RECIPE, History())
    return models


def step_of(
    start: MMDynamics, data: MultiviewData, recipe: Recipe, backend: BackendName
) -> tuple[Call, History]:
    """One update, always of the parameters of ``start``; and what all these updates recorded."""
    model, history = copy.deepcopy(start), History()
    if model.fusion is not None:
        model.fusion.backend = backend
    optimizer = adam(model, recipe)
    pairs = list(zip(model.parameters(), start.parameters(), strict=True))

    def call() -> Phases:
        with torch.no_grad():
            for own, first in pairs:
                own.copy_(first)
        train_step(model, data, optimizer, recipe, history)
        return (history.step_seconds[-1],)

    return call, history


def measure(steps: int, budget: float, turns: tuple[int, int]) -> str:
    """A table: every step's time, and how many times as long as ours with penalty it takes.

    Args:
        steps: of training before.
        budget: seconds for all turns.
        turns: fewest and most.
    """
    data = draw_data()
    # In the first steps many rows do not converge, here as in the study; the table says how many.
    with collect_warnings(ConvergenceWarning):
        models = trained(data, steps)
        made = {
            "DEQ Fusion with penalty": step_of(models["deq"], data, RECIPE, "auto"),
            "DEQ Fusion without": step_of(models["deq"], data, WITHOUT, "auto"),
            "with penalty, reference": step_of(models["deq"], data, RECIPE, "reference"),
            "concatenation": step_of(models["concat"], data, RECIPE, "auto"),
        }
        calls = {name: call for name, (call, _) in made.items()}
        samples = interleave(calls, budget, turns)
    seconds = {name: [sum(phases) for phases in taken] for name, taken in samples.items()}
    ours, rows = seconds["DEQ Fusion with penalty"], []
    for name, own in seconds.items():
        shares = made[name][1].converged
        converged = percent(float(torch.cat(shares).double().mean())) if shares else "-"
        times = number(paired_ratio(own, ours).median)
        rows.append([name, str(len(own)), ms(spread(own)), times, converged])
    return markdown(["step", "n", "ms", "x with penalty", "rows converged"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, help="torch threads; torch's own choice by default")
    parser.add_argument("--budget", type=float, default=10.0, help="seconds for all turns")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    print(f"{ROWS} rows, views {WIDTHS}, d = {DIM}, {torch.get_num_threads()} threads\n")
    print(measure(STEPS_BEFORE, args.budget, (5, 60)))


if __name__ == "__main__":
    main()
