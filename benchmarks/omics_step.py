"""Time of one optimiser step of the omics study: what the Jacobian penalty costs there.

    python -m benchmarks.omics_step --threads 2

The study's own model, loss, recipe and ``train_step`` (deqfuse/experiments) on random data in the
layout of ROSMAP as the study trains on it: 196 rows, three views of 200 features, two classes,
d = 300. Encoders, classifiers, gradient clipping and Adam are in it. All take turns; ratios are
paired.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable

import torch

from benchmarks.tables import markdown, ms, number
from benchmarks.timing import Call, Phases, interleave, paired_ratio, spread
from deqfuse.backends import BackendName
from deqfuse.data import MultiviewData
from deqfuse.experiments.mmdynamics import MMDynamics
from deqfuse.experiments.omics import FUSE_DROPOUT, FUSED_GAIN, PAPER
from deqfuse.experiments.training import History, Recipe, train_step

ROWS, WIDTHS, CLASSES, DIM = 196, (200, 200, 200), 2, 300
WITHOUT = dataclasses.replace(PAPER, jacobian_weight=0.0)


def draw_data() -> MultiviewData:
    """Features in [0, 1], as the study scales them."""
    torch.manual_seed(0)
    return MultiviewData(
        views=[torch.rand(ROWS, width) for width in WIDTHS],
        labels=torch.randint(CLASSES, (ROWS,)),
        view_names=tuple(f"view {i + 1}" for i in range(len(WIDTHS))),
        class_names=tuple(str(c) for c in range(CLASSES)),
    )


def step_of(data: MultiviewData, recipe: Recipe, backend: BackendName | None) -> Call:
    """One update of a model of its own; ``backend`` None: concatenation instead of DEQ Fusion."""
    torch.manual_seed(0)
    model = MMDynamics(
        data.widths,
        CLASSES,
        "concat" if backend is None else "deq",
        DIM,
        fuse_dropout=FUSE_DROPOUT["deq"],
        fused_gain=FUSED_GAIN,
    )
    if model.fusion is not None and backend is not None:
        model.fusion.backend = backend
    optimizer = torch.optim.Adam(
        model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay
    )

    def call() -> Phases:
        history = History()
        train_step(model, data, optimizer, recipe, history)
        return (history.step_seconds[0],)

    return call


def measure(budget: float, turns: tuple[int, int]) -> str:
    """A table: every step's time, and how many times as long as ours with penalty it takes."""
    data = draw_data()
    makers: dict[str, Callable[[], Call]] = {
        "DEQ Fusion with penalty": lambda: step_of(data, PAPER, "auto"),
        "DEQ Fusion without": lambda: step_of(data, WITHOUT, "auto"),
        "with penalty, reference backend": lambda: step_of(data, PAPER, "reference"),
        "concatenation": lambda: step_of(data, PAPER, None),
    }
    samples = interleave({name: make() for name, make in makers.items()}, budget, turns)
    seconds = {name: [sum(phases) for phases in taken] for name, taken in samples.items()}
    ours = seconds["DEQ Fusion with penalty"]
    rows = [
        [name, str(len(own)), ms(spread(own)), number(paired_ratio(own, ours).median)]
        for name, own in seconds.items()
    ]
    return markdown(["step", "n", "ms", "x with penalty"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, help="torch threads; torch's own choice by default")
    parser.add_argument("--budget", type=float, default=10.0, help="seconds for all turns")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    print(f"{ROWS} rows, views {WIDTHS}, d = {DIM}, {torch.get_num_threads()} threads\n")
    print(measure(args.budget, (5, 60)))


if __name__ == "__main__":
    main()
