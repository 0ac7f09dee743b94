"""The one path that ``deqfuse demo`` and ``deqfuse train`` share: train, measure, print, write."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table as RichTable
from torch import Tensor

from deqfuse import Anderson
from deqfuse.cli import plots
from deqfuse.cli.measure import NOISE_LEVELS, Curve, convergence_curves, noise_accuracy
from deqfuse.cli.models import FUSIONS, FusionKind
from deqfuse.cli.output import OutputFolder
from deqfuse.cli.progress import Stage, make_console
from deqfuse.cli.report import Picture, Section, machine_facts, render_page
from deqfuse.cli.summary import (
    Table,
    by_fusion,
    comparison_table,
    comparison_text,
    convergence_text,
    runs_as_json,
)
from deqfuse.cli.training import Recipe, Run, train_one
from deqfuse.data import Splits
from deqfuse.testing import gradient_errors

__all__ = ["FILES", "Experiment", "run_experiment"]

FILES = ("index.html", "results.json", "convergence.png", "robustness.png", "training.png")
GRADIENT_ROWS = 4
GRADIENT_LIMIT = 1e-8


@dataclass(frozen=True)
class Experiment:
    """What is compared, on what, and where the report goes."""

    title: str
    about_data: str
    splits: Splits  # standardised
    recipe: Recipe
    seeds: int
    out: OutputFolder
    device: torch.device
    command: str
    metrics: tuple[str, ...] | None = None  # columns of the table; all that there are when None


@dataclass(frozen=True)
class GradientCheck:
    """The trained layer's gradients against dense implicit ones."""

    worst: float
    where: str
    count: int

    @property
    def passed(self) -> bool:
        """False also when the difference is NaN."""
        return self.worst <= GRADIENT_LIMIT

    @property
    def text(self) -> str:
        """One sentence with the number."""
        verdict = "as it should be" if self.passed else f"MORE than the {GRADIENT_LIMIT:g} allowed"
        return (
            "Gradients of the trained layer against dense implicit gradients (float64, "
            f"{GRADIENT_ROWS} test rows, {self.count} parameters and inputs): worst relative "
            f"difference {self.worst:.1e} ({self.where}), {verdict}."
        )


def run_experiment(experiment: Experiment) -> int:
    """Do all of it. Returns the exit code: 1 if the gradient check fails, else 0."""
    started = time.monotonic()
    console = make_console()
    experiment.out.check(FILES)
    console.print(f"[bold]{experiment.title}[/bold]")
    console.print(experiment.about_data)
    console.print(_what_is_compared(experiment) + "\n")

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
    files = _report(experiment, runs, table, (verdict, convergence), check, curves, robustness)
    experiment.out.write(files)
    seconds = time.monotonic() - started
    console.print(f"\nReport: {experiment.out.path / 'index.html'}  ({seconds:.0f} s in all)")
    return 0 if check.passed else 1


def _what_is_compared(experiment: Experiment) -> str:
    recipe = experiment.recipe
    return (
        f"{len(FUSIONS)} fusions with the same encoders, head and recipe ({recipe.epochs} epochs, "
        f"AdamW, batches of {recipe.batch_size}), {experiment.seeds} seed(s) each. The epoch is "
        "chosen on the validation rows; test rows are used for the final numbers only. "
        "Differences smaller than the spread over seeds mean nothing."
    )


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
        errors = gradient_errors(run.model.fusion, encodings)
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


def _report(
    experiment: Experiment,
    runs: Sequence[Run],
    table: Table,
    sentences: tuple[str, str],
    check: GradientCheck,
    curves: list[tuple[int, Curve]],
    robustness: list[tuple[FusionKind, Tensor]],
) -> dict[str, bytes]:
    """File name -> content of the whole report."""
    train, test = experiment.splits.train, experiment.splits.test
    convergence = plots.to_png(plots.convergence_figure(curves, Anderson().tol))
    noise = plots.to_png(plots.robustness_figure(robustness, test.view_names))
    training = plots.to_png(plots.training_figure(runs))
    kinds = "; ".join(f"{kind.label}: {kind.what}" for kind in FUSIONS)
    sections = [
        Section("Comparison", (sentences[0],), table),
        Section(
            "What is compared",
            (
                experiment.about_data,
                "Each view passes through its own encoder (linear, ReLU, dropout), the fusion "
                f"joins the encodings, a linear head classifies. {kinds}.",
                _what_is_compared(experiment),
                "The fusions differ in their number of parameters, and none was tuned by "
                "itself; read the table as a working example, not as a ranking of methods.",
            ),
        ),
        Section(
            "Convergence",
            (sentences[1],),
            picture=Picture(
                convergence,
                "Relative residual per solver step",
                "Relative residual |f(z) - z| / |f(z)| of the trained DEQ Fusion on the "
                f"{test.num_rows} test rows: median and the band holding 95% of the rows, one "
                "curve per seed. The solver was allowed to go on beyond the layer's tolerance; "
                "a row that has stopped counts with its last residual. Grey: the same maps by "
                "plain iteration.",
            ),
        ),
        Section("Gradients", (check.text,)),
        Section(
            "Robustness to noise on one view",
            picture=Picture(
                noise,
                "Test accuracy against noise on one view at a time",
                "Gaussian noise on one view's standardised features, the other views untouched; "
                "the same noise for every fusion. Mean over seeds, shaded from the lowest to "
                "the highest seed. No model was trained with noise.",
            ),
        ),
        Section(
            "Training",
            picture=Picture(
                training,
                "Training loss and validation accuracy per epoch",
                f"{train.num_rows} training rows, {experiment.splits.validation.num_rows} "
                "validation rows; mean over seeds, shaded from the lowest to the highest.",
            ),
        ),
    ]
    facts = machine_facts(experiment.command, experiment.device, _backend(runs, experiment))
    page = render_page(experiment.title, "deqfuse report", sections, facts)
    results = {
        "title": experiment.title,
        "facts": dict(facts),
        "runs": runs_as_json(runs),
        "gradient_check": {"worst": check.worst, "where": check.where, "gradients": check.count},
        "noise_levels": NOISE_LEVELS,
        "noise_accuracy": {kind.label: values.tolist() for kind, values in robustness},
        "views": test.view_names,
    }
    contents = (page.encode(), (json.dumps(results, indent=1) + "\n").encode(), convergence, noise)
    return dict(zip(FILES, (*contents, training), strict=True))


def _backend(runs: Sequence[Run], experiment: Experiment) -> str:
    run = next(run for run in runs if run.kind.key == "deq")
    few = experiment.splits.test.rows(torch.arange(1)).to(experiment.device)
    with torch.no_grad():
        _, info = run.model.forward_with_info(few.views)
    return info.backend if info is not None else "none"


def _rich_table(table: Table) -> RichTable:
    rich_table = RichTable(header_style="bold", show_edge=False, pad_edge=False)
    for i, header in enumerate(table.headers):
        rich_table.add_column(header, justify="left" if i == 0 else "right", vertical="bottom")
    for row in table.rows:
        rich_table.add_row(*row)
    return rich_table
