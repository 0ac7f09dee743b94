"""The one path that ``deqfuse demo`` and ``deqfuse train`` share: train, measure, print, write."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import cast

import torch
from rich.console import Console
from rich.table import Table as RichTable
from torch import Tensor

from deqfuse import ConvergenceError, DEQFusion
from deqfuse.cli.experiment import (
    FILES,
    GRADIENT_ROWS,
    Experiment,
    GradientCheck,
    what_is_compared,
)
from deqfuse.cli.measure import Curve, convergence_curves, noise_accuracy
from deqfuse.cli.models import FUSIONS, FusionKind
from deqfuse.cli.pages import report_files
from deqfuse.cli.progress import Stage, make_console
from deqfuse.cli.summary import (
    Table,
    by_fusion,
    comparison_table,
    comparison_text,
    convergence_text,
)
from deqfuse.cli.training import Run, train_one
from deqfuse.data import Splits
from deqfuse.testing import gradient_errors

__all__ = ["run_experiment"]


def run_experiment(experiment: Experiment) -> int:
    """Do all of it. Returns the exit code: 1 if the gradient check fails, else 0."""
    experiment.out.check(FILES)
    threads = torch.get_num_threads()
    torch.set_num_threads(experiment.threads)
    try:
        return _run(experiment, make_console())
    finally:
        torch.set_num_threads(threads)


def _run(experiment: Experiment, console: Console) -> int:
    started = time.monotonic()
    console.print(f"[bold]{experiment.title}[/bold]")
    console.print(experiment.about_data)
    console.print(what_is_compared(experiment) + "\n")

    splits = experiment.splits.to(experiment.device)
    runs = _train_all(experiment, splits, console)
    table = comparison_table(runs, experiment.metrics or tuple(runs[0].metrics))
    console.print()
    console.print(_rich_table(table))
    for note in table.notes:
        console.print(f"[dim]{note}[/dim]")
    verdict, convergence = comparison_text(runs), convergence_text(runs)
    console.print(f"\n{verdict}\n{convergence}")

    check = _check_gradients(runs, splits, console)
    console.print(check.text, style=None if check.passed else "bold red")

    curves, robustness = _measure(runs, splits, console)
    console.print("Drawing the report ...")
    files = report_files(experiment, runs, table, (verdict, convergence), check, curves, robustness)
    experiment.out.write(files)
    seconds = time.monotonic() - started
    console.print(f"\nReport: {experiment.out.path / 'index.html'}  ({seconds:.0f} s in all)")
    return 0 if check.passed else 1


def _train_all(experiment: Experiment, splits: Splits, console: Console) -> list[Run]:
    """Seeds outside, fusions inside: a machine that slows down slows all fusions alike."""
    recipe, runs = experiment.recipe, []
    total = experiment.seeds * len(FUSIONS) * recipe.epochs
    with Stage(console, "Training", total) as stage:
        for seed in range(experiment.seeds):
            for kind in FUSIONS:
                name = f"seed {seed + 1}/{experiment.seeds}, {kind.label}"

                def on_epoch(epoch: int, validation: float, name: str = name) -> None:
                    note = (
                        f"{name}: epoch {epoch}/{recipe.epochs}, validation {100 * validation:.1f}%"
                    )
                    stage.advance(note)

                run = train_one(kind, seed, splits, recipe, on_epoch)
                runs.append(run)
                best = run.validation[run.chosen_epoch - 1]
                stage.line(
                    f"  {name:<28} test {100 * run.metrics['accuracy']:5.1f}%  (validation "
                    f"{100 * best:5.1f}% at epoch {run.chosen_epoch}; "
                    f"{sum(run.epoch_seconds):.1f} s)"
                )
    return runs


def _check_gradients(runs: Sequence[Run], splits: Splits, console: Console) -> GradientCheck:
    run = next(run for run in runs if run.kind.key == "deq")
    with Stage(console, "\nChecking gradients", 1) as stage:
        run.model.eval()
        with torch.no_grad():
            few = splits.test.rows(torch.arange(GRADIENT_ROWS, device=splits.test.labels.device))
            encodings = run.model.encode(few.views)
        try:
            errors = gradient_errors(cast(DEQFusion, run.model.fusion), encodings)
        except ConvergenceError as error:
            return GradientCheck(math.nan, str(error), 0)
        stage.advance()
    # NaN is worse than any number; max() alone would let it hide.
    where = max(errors, key=lambda name: (errors[name] != errors[name], errors[name]))
    return GradientCheck(errors[where], where, len(errors))


def _measure(
    runs: Sequence[Run], splits: Splits, console: Console
) -> tuple[list[tuple[int, Curve]], list[tuple[FusionKind, Tensor]]]:
    curves: list[tuple[int, Curve]] = []
    robustness = []
    equilibria = [run for run in runs if run.kind.key == "deq"]
    steps = len(equilibria) + len(runs) * len(splits.test.views)
    with Stage(console, "Measuring convergence and robustness to noise", steps) as stage:
        for run in equilibria:
            curves.extend((run.seed, curve) for curve in convergence_curves(run, splits.test))
            stage.advance("convergence")
        for kind, group in by_fusion(runs):

            def on_view(note: str = kind.label) -> None:
                stage.advance(note)

            values = torch.stack([noise_accuracy(run, splits.test, on_view) for run in group])
            robustness.append((kind, values))
    return curves, robustness


def _rich_table(table: Table) -> RichTable:
    rich_table = RichTable(header_style="bold", show_edge=False, pad_edge=False)
    for i, header in enumerate(table.headers):
        rich_table.add_column(header, justify="left" if i == 0 else "right", vertical="bottom")
    for row in table.rows:
        rich_table.add_row(*row)
    return rich_table
