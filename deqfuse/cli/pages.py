"""The files of the report: the page's sections, the pictures, the raw numbers."""

from __future__ import annotations

import json
from collections.abc import Sequence

import torch
from torch import Tensor

from deqfuse import Anderson
from deqfuse.cli import plots
from deqfuse.cli.experiment import FILES, Experiment, GradientCheck, what_is_compared
from deqfuse.cli.measure import NOISE_LEVELS, Curve
from deqfuse.cli.models import FUSIONS, FusionKind
from deqfuse.cli.report import Picture, Section, machine_facts, render_page
from deqfuse.cli.summary import Table, runs_as_json
from deqfuse.cli.training import Run

__all__ = ["report_files"]

LEAD = "Five ways to join the views of a sample, trained and measured by deqfuse."


def report_files(
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
                what_is_compared(experiment),
                "The fusions differ in their number of parameters, and the recipe was chosen for "
                "a stable training of the equilibrium, not for each fusion: read the table as a "
                "working example, not as a ranking of methods.",
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
                "plain iteration. The Jacobian penalty makes the trained maps contract strongly, "
                "hence few steps.",
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
    page = render_page(experiment.title, LEAD, sections, facts)
    results = {
        "title": experiment.title,
        "facts": dict(facts),
        "runs": runs_as_json(runs),
        "gradient_check": {
            "worst": check.worst if check.count else None,
            "where": check.where,
            "gradients": check.count,
        },
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
