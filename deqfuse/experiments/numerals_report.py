"""The report of the numerals study."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from deqfuse.experiments import absence
from deqfuse.experiments import numerals_measured as measured
from deqfuse.experiments.models import ABLATIONS, FUSIONS, LABELS
from deqfuse.experiments.statistics import describe, paired, percent, versus
from deqfuse.experiments.study import Record, select
from deqfuse.reports.page import NOTHING, Report, Section, Table

__all__ = ["build"]

# What each row of the ablation leaves out: (equilibrium, cells, combination, gate).
PARTS = {
    "weighted": "- - - -",
    "tied": "- x x x",
    "no cell": "x - x x",
    "no combine": "x x - -",
    "no gate": "x x x -",
    "deq": "x x x x",
}


def build(records: Sequence[Record], settings: dict[str, Any]) -> Report:
    """Tables, pictures and numbers."""
    runs = [record for record in records if "model" in record.params]
    cost = next(dict(record.values) for record in records if "cost" in record.params)
    sizes = settings["train_rows"]
    sections = [
        Section("Fusions", (), _fusions(runs, sizes)),
        Section("Ablations", (_ablation_text(runs, sizes),), _ablations(runs, sizes)),
        Section(
            "Convergence over solver steps",
            (),
            measured.stopped(runs, sizes),
            measured.residuals(runs, sizes),
        ),
        Section(
            "Cost against R",
            (measured.cost_text(cost),),
            measured.cost_table(cost),
            measured.cost_picture(cost),
        ),
        Section(
            "Robustness to noise",
            (),
            measured.robustness(runs, sizes, settings["noise_levels"]),
            measured.noise_picture(runs, sizes, settings["noise_levels"]),
        ),
        Section(
            "Probes over the steps",
            (),
            measured.probes(runs, sizes),
            measured.probe_picture(runs, sizes),
        ),
        absence.absence_section(
            records, LABELS, f"Models trained on {sizes[0]} rows, standardised features."
        ),
        Section("What was done", _method(settings)),
    ]
    summary = {
        "accuracy": {
            f"{rows} rows": {
                LABELS[m]: describe(_accuracy(runs, rows, m))
                for m in LABELS
                if select(runs, model=m)
            }
            for rows in sizes
        },
        "cost": dict(cost),
        "absent views": absence.absence_summary(records, LABELS),
    }
    lead = (
        "Fusions, ablations, convergence, cost, robustness, absent views and probes on 2000 "
        "numerals in six views (UCI Multiple Features, CC BY 4.0): what these data say about "
        "arXiv 2306.16645 (Tables 6, 7, 9, Figure 3) and 2209.00302 (Figure 10b, Table 10, "
        "Appendices C.1 and G), which measured other data sets."
    )
    return Report("Numerals: all fusions", lead, sections, summary)


def _accuracy(runs: Sequence[Record], rows: int, model: str) -> list[float | None]:
    return [r.values["test"]["accuracy"] for r in select(runs, rows=rows, model=model)]


def _fusions(runs: Sequence[Record], sizes: Sequence[int]) -> Table:
    table = []
    for model in (m for m in FUSIONS if select(runs, model=m)):
        first = select(runs, rows=sizes[0], model=model)
        overhead = first[0].values.get("overhead")
        table.append(
            (
                LABELS[model],
                *(percent(_accuracy(runs, rows, model)) for rows in sizes),
                f"{first[0].values['parameters']:,}",
                NOTHING if overhead is None else f"{100 * overhead:.0f}%",
                *_solve_cells(runs, sizes, model),
                f"{fmean(r.values['step_ms'] for r in first):.1f}",
            )
        )
    headers = (
        "fusion",
        *(f"accuracy %, {rows} rows" for rows in sizes),
        "parameters",
        "overhead",
        "cell / fuse steps",
        "converged, test",
        "converged, training",
        "ms/step",
    )
    seeds = len(first)
    notes = (
        f"Mean ± standard deviation over {seeds} seeds, all of them, on 1000 test rows. Overhead: "
        "parameters that progressive fusion adds to its base (the paper's models: 1.8% to 4.3%; "
        "here the encoders are one layer, so the back-projections weigh more). Steps: evaluations "
        "per test row, median (maximum). ms/step: of the training, beside which other programs may "
        "have run; times to compare are those against R.",
    )
    return Table(headers, tuple(table), notes)


def _solve_cells(runs: Sequence[Record], sizes: Sequence[int], model: str) -> tuple[str, str, str]:
    group = [r for rows in sizes for r in select(runs, rows=rows, model=model)]
    tests = [r.values["test"] for r in group]
    if "fuse_nfe" not in tests[0]:
        return NOTHING, NOTHING, NOTHING
    steps = " / ".join(
        f"{fmean(t[key][0] for t in tests):.0f} ({max(t[key][1] for t in tests)})"
        for key in ("cells_nfe", "fuse_nfe")
        if key in tests[0]
    )
    train = fmean(r.values["train_converged"] for r in group)
    return steps, f"{100 * fmean(t['converged'] for t in tests):.2f}%", f"{100 * train:.2f}%"


def _ablations(runs: Sequence[Record], sizes: Sequence[int]) -> Table:
    table = []
    for model in (m for m in ABLATIONS if select(runs, model=m)):
        cells = []
        for rows in sizes:
            ours, full = _accuracy(runs, rows, model), _accuracy(runs, rows, "deq")
            cells += [percent(ours), NOTHING if model == "deq" else versus(ours, full, 100)]
        parameters = select(runs, model=model)[0].values["parameters"]
        label = "all" if model == "deq" else LABELS[model]
        table.append((label, PARTS[model], *cells, f"{parameters:,}"))
    headers = ["variant", "equilibrium, cells, combine, gate"]
    for rows in sizes:
        headers += [f"accuracy %, {rows} rows", "against all"]
    note = (
        "Against all: difference in points, same seed, mean ± standard error, and for how many "
        "seeds (initial values, batches, dropout; there is one split, so the spread is not that "
        "of the data). The weighted sum is x_f alone; without combination z_f is the sum of the "
        "cells. Tables 6 and 7 of the paper are of other data; their numbers are not at hand."
    )
    return Table((*headers, "parameters"), tuple(table), (note,))


def _ablation_text(runs: Sequence[Record], sizes: Sequence[int]) -> str:
    parts = []
    for rows in sizes:
        full = _accuracy(runs, rows, "deq")
        worse = []
        for model in ABLATIONS[:-1]:
            ours = _accuracy(runs, rows, model)
            if not ours:
                continue
            difference = paired(ours, full)
            if difference is not None and difference.sign < 0:
                worse.append(LABELS[model])
        names = ", ".join(worse) if worse else "none"
        parts.append(f"with {rows} training rows: {names}")
    return (
        "Variants whose mean accuracy is below that of the whole layer by more than two standard "
        f"errors of the paired difference, {'; '.join(parts)}."
    )


def _method(settings: dict[str, Any]) -> tuple[str, ...]:
    return (
        "The fixed split of `deqfuse demo`: 500 training rows (of which a seed draws as many as a "
        "small training set needs, classes balanced), 500 validation and 1000 test rows, features "
        "standardised on the training rows.",
        "Encoders: linear, ReLU, dropout 0.3, 64 features. Pro-Fusion's base joins the encodings "
        "by a layer on their concatenation; its context goes back to the encoders' inputs. DEQ "
        "Fusion and its ablations with equilibria train with the Jacobian penalty (weight "
        f"{settings['jacobian_weight']:g}), Pro-Fusion without unless it says so.",
        f"AdamW, learning rate {settings['learning_rate']:g}, cosine schedule, "
        f"{settings['epochs']} epochs, batches of {settings['batch_size']} or a fifth of the "
        "training rows. The epoch of best validation accuracy, the loss deciding ties, is tested "
        "once.",
    )
