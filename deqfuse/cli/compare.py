"""Carry out the comparison of `deqfuse demo` and `deqfuse train`: train, measure, print, write."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import torch
from rich.console import Console
from rich.table import Table as RichTable
from torch import Tensor

from deqfuse import ConvergenceWarning
from deqfuse.cli.progress import Stage, make_console
from deqfuse.data import Splits
from deqfuse.experiments import comparison_report
from deqfuse.experiments.comparison import (
    KINDS,
    Comparison,
    FusionKind,
    GradientCheck,
    Run,
    by_fusion,
    check_gradients,
    train_one,
)
from deqfuse.experiments.comparison_tables import (
    comparison_table,
    comparison_text,
    convergence_text,
    non_finite_text,
    pattern_table,
)
from deqfuse.experiments.measurements import Curve, noise_curve, residual_curves
from deqfuse.experiments.training import collect_warnings, predict
from deqfuse.reports.facts import machine_facts
from deqfuse.reports.folder import OutputFolder
from deqfuse.reports.page import Table
from deqfuse.reports.writer import HTML, write_report

__all__ = ["run_comparison"]

TRACE_STEPS = 30


def run_comparison(
    comparison: Comparison, out: OutputFolder, device: torch.device, threads: int, command: str
) -> int:
    """Do all of it.

    Args:
        comparison: what to compare.
        out: the report's folder.
        device: to train on.
        threads: of torch.
        command: for the report.

    Returns:
        The exit code: 1 if the gradient check fails, else 0.
    """
    out.check([*HTML.files, *comparison_report.PICTURES])
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return _run(comparison, out, device, command, make_console())
    finally:
        torch.set_num_threads(before)


def _run(
    comparison: Comparison,
    out: OutputFolder,
    device: torch.device,
    command: str,
    console: Console,
) -> int:
    started = time.monotonic()
    console.print(comparison.title, style="bold")
    console.print(comparison.about_data)
    for doubt in comparison.doubts:
        console.print(doubt, style="yellow")
    console.print(comparison.terms + "\n")

    splits = comparison.splits.to(device)
    runs = _train_all(comparison, splits, console)
    table = comparison_table(runs, comparison.metrics)
    patterns = pattern_table(runs)
    for shown in filter(None, (table, patterns)):
        console.print()
        console.print(_rich_table(shown))
        for note in shown.notes:
            console.print(note, style="dim")
    sentences = comparison_text(runs), non_finite_text(runs), convergence_text(runs)
    console.print("\n" + "\n".join(filter(None, sentences)))

    check = _check_gradients(runs, splits, console)
    console.print(check.text, style=None if check.passed else "bold red")

    curves, noise = _measure(runs, splits, console)
    console.print("Drawing the report ...")
    report = comparison_report.build(
        comparison, runs, table, patterns, sentences, check, curves, noise
    )
    facts = machine_facts(command, device, _backend(runs, splits))
    page = write_report(out, report, facts, HTML)
    seconds = time.monotonic() - started
    console.print(f"\nReport: {page}  ({seconds:.0f} s in all)")
    return 0 if check.passed else 1


def _train_all(comparison: Comparison, splits: Splits, console: Console) -> list[Run]:
    """Seeds outside, fusions inside: a machine that slows down slows all fusions alike."""
    recipe, runs = comparison.recipe, []
    total = comparison.seeds * len(KINDS) * recipe.epochs
    with Stage(console, "Training", total) as stage:
        for seed in range(comparison.seeds):
            for kind in KINDS:
                name = f"seed {seed + 1}/{comparison.seeds}, {kind.label}"

                def on_epoch(epoch: int, validation: float, name: str = name) -> None:
                    note = f"{name}: epoch {epoch}/{recipe.epochs}, validation {_shown(validation)}"
                    stage.advance(note)

                run = train_one(kind, seed, splits, recipe, on_epoch)
                runs.append(run)
                history = run.history
                best = history.validation[history.chosen_epoch - 1]
                stage.line(
                    f"  {name:<28} test {_shown(run.test['accuracy'])}  (validation "
                    f"{_shown(best)} at epoch {history.chosen_epoch}; "
                    f"{sum(history.epoch_seconds):.1f} s)"
                )
    return runs


def _shown(share: float | None) -> str:
    """A share of rows as a percentage, of one width."""
    return "   NaN" if share is None or math.isnan(share) else f"{100 * share:5.1f}%"


def _check_gradients(runs: Sequence[Run], splits: Splits, console: Console) -> GradientCheck:
    with Stage(console, "\nChecking gradients", 1) as stage:
        check = check_gradients(runs, splits)
        stage.advance()
    return check


def _measure(
    runs: Sequence[Run], splits: Splits, console: Console
) -> tuple[list[list[Curve]], list[tuple[FusionKind, Tensor]]]:
    test, levels = splits.test, comparison_report.NOISE_LEVELS
    equilibria = [run for run in runs if run.kind.key == "deq"]
    curves, noise = [], []
    steps = len(equilibria) + len(runs) * len(test.views)
    with Stage(console, "Measuring convergence and robustness to noise", steps) as stage:
        for run in equilibria:
            curves.append(residual_curves(run.model, test, TRACE_STEPS))
            stage.advance("convergence")
        for kind, group in by_fusion(runs):
            values = torch.empty(len(group), len(test.views), len(levels), dtype=torch.float64)
            for seed, run in enumerate(group):
                for view in range(len(test.views)):
                    values[seed, view] = noise_curve(run.model, test, levels, view, run.seed)
                    stage.advance(kind.label)
            noise.append((kind, values))
    return curves, noise


def _backend(runs: Sequence[Run], splits: Splits) -> str:
    run = next(run for run in runs if run.kind.key == "deq")
    with collect_warnings(ConvergenceWarning):  # the table has the share of converged rows
        _, info = predict(run.model, splits.test.rows(torch.arange(1)))
    return info.backend if info is not None else "none"


def _rich_table(table: Table) -> RichTable:
    rich_table = RichTable(header_style="bold", show_edge=False, pad_edge=False)
    for i, header in enumerate(table.headers):
        rich_table.add_column(header, justify="left" if i == 0 else "right", vertical="bottom")
    for row in table.rows:
        rich_table.add_row(*row)
    return rich_table
