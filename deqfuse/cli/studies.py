"""``deqfuse experiment NAME``: turn options into a study, run what is missing, write its report."""

from __future__ import annotations

import argparse
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from deqfuse.cli.progress import Stage, make_console
from deqfuse.data import DataWarning
from deqfuse.experiments.audiovisual import AudiovisualStudy
from deqfuse.experiments.finance import FinanceStudy
from deqfuse.experiments.mmdynamics import ABLATIONS, FUSIONS
from deqfuse.experiments.mmimdb import MmimdbStudy
from deqfuse.experiments.mosi import MosiStudy
from deqfuse.experiments.numerals import NumeralsStudy
from deqfuse.experiments.omics import LEARNING_RATES, OmicsStudy
from deqfuse.experiments.paper_study import PaperStudy
from deqfuse.experiments.provenance import run_facts
from deqfuse.experiments.runner import run_trials
from deqfuse.experiments.stability import StabilityStudy
from deqfuse.experiments.store import TrialStore
from deqfuse.experiments.study import Record, Study, Trial
from deqfuse.experiments.synthetic import Size, SyntheticStudy
from deqfuse.experiments.training import Recipe, collect_warnings
from deqfuse.experiments.treatments import TREATMENTS
from deqfuse.reports.errors import UserError
from deqfuse.reports.facts import machine_facts
from deqfuse.reports.folder import MANIFEST, OutputFolder
from deqfuse.reports.page import Section
from deqfuse.reports.writer import MARKDOWN, write_report

__all__ = ["experiment", "run_study"]


R = TypeVar("R", bound=Recipe)


def experiment(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    """Run the study that the options describe; returns the exit code."""
    study = _STUDIES[options.experiment](options)
    command = shlex.join(["deqfuse", *map(_public, arguments)])
    return run_study(study, OutputFolder(options.out), options.jobs, options.threads, command)


def _recipe(options: argparse.Namespace, recipe: R) -> R:
    epochs = 2 if options.quick else options.epochs or recipe.epochs
    return replace(recipe, epochs=epochs)


def _seeds(options: argparse.Namespace) -> int:
    return min(2, options.seeds) if options.quick else options.seeds


def _synthetic(options: argparse.Namespace) -> Study:
    study = SyntheticStudy(seeds=_seeds(options))
    if options.quick:
        more = ((Size(4, 40, 16), ("deq penalised",)), (Size(4, 40, 8), ("base", "pro 2")))
        return replace(
            study, sizes=(Size(4, 40, 16),), etas=(0.0, 1.0), sigmas=(0.0, 1.0), more=more, steps=4
        )
    return replace(study, steps=options.epochs or study.steps)


def _numerals(options: argparse.Namespace) -> Study:
    study = NumeralsStudy(seeds=_seeds(options))
    study = replace(study, recipe=_recipe(options, study.recipe))
    return replace(study, train_rows=(100,), held_rows=50, timed=2) if options.quick else study


def _omics(options: argparse.Namespace) -> Study:
    fusions = FUSIONS if options.fusions is None else tuple(options.fusions)
    known = (*FUSIONS, *ABLATIONS)
    if unknown := [name for name in fusions if name not in known]:
        raise UserError(f"--fusions: expected some of {', '.join(known)}, got {unknown[0]!r}")
    study = OmicsStudy(
        Path(options.data),
        seeds=_seeds(options),
        learning_rates=tuple(options.learning_rates or LEARNING_RATES),
        fusions=fusions,
        robustness=options.robustness,
    )
    study = replace(study, recipe=_recipe(options, study.recipe))
    return replace(study, dim=32) if options.quick else study


def _stability(options: argparse.Namespace) -> Study:
    treatments = tuple(options.treatments or TREATMENTS)
    if unknown := [name for name in treatments if name not in TREATMENTS]:
        raise UserError(
            f"--treatments: expected some of {', '.join(TREATMENTS)}, got {unknown[0]!r}"
        )
    study = StabilityStudy(
        Path(options.data), _seeds(options), treatments=treatments, layers=tuple(options.layers)
    )
    study = replace(study, recipe=_recipe(options, study.recipe))
    return replace(study, dim=32) if options.quick else study


def _audiovisual(options: argparse.Namespace) -> Study:
    study = AudiovisualStudy(Path(options.images), Path(options.audio), seeds=_seeds(options))
    rows = (64, 32, 32) if options.quick else tuple(options.rows)
    return replace(study, recipe=_recipe(options, study.recipe), rows=rows)


def _finance(options: argparse.Namespace) -> Study:
    window = 20 if options.quick else options.window
    study = FinanceStudy(Path(options.prices), seeds=_seeds(options), window=window)
    return replace(study, recipe=_recipe(options, study.recipe))


def _mmimdb(options: argparse.Namespace) -> Study:
    return _on_file(options, MmimdbStudy(Path(options.data), seeds=_seeds(options)))


def _mosi(options: argparse.Namespace) -> Study:
    return _on_file(options, MosiStudy(Path(options.data), seeds=_seeds(options)))


def _on_file(options: argparse.Namespace, study: PaperStudy) -> Study:
    rows = (64, 32, 32) if options.quick else None
    return replace(study, recipe=_recipe(options, study.recipe), rows=rows)


_STUDIES: dict[str, Callable[[argparse.Namespace], Study]] = {
    "synthetic": _synthetic,
    "numerals": _numerals,
    "omics": _omics,
    "stability": _stability,
    "audiovisual": _audiovisual,
    "finance": _finance,
    "mmimdb": _mmimdb,
    "mosi": _mosi,
}


def _public(argument: str) -> str:
    """A report is for others: where a folder lies on this machine is none of their business."""
    option, equals, value = argument.rpartition("=")
    return option + equals + (Path(value).name if value.startswith("/") else value)


def run_study(study: Study, out: OutputFolder, jobs: int, threads: int, command: str) -> int:
    """Run what is missing, then write the report.

    Args:
        study: what to run.
        out: the folder; trials of an earlier run in it are kept if their settings agree.
        jobs: processes that run trials side by side.
        threads: of torch in each of them.
        command: for the report.

    Returns:
        The exit code, 0.

    Raises:
        UserError: the folder belongs to somebody else, or to other settings.
    """
    out.check([*MARKDOWN.files, *study.files()])
    with collect_warnings(DataWarning) as doubts:
        settings, trials = study.settings(), study.trials()  # reads the data: mistakes come first
    with TrialStore(out.path) as store:
        return _run_study(study, out, store, settings, trials, doubts, jobs, threads, command)


def _run_study(
    study: Study,
    out: OutputFolder,
    store: TrialStore,
    settings: dict[str, Any],
    trials: Sequence[Trial],
    doubts: Sequence[str],
    jobs: int,
    threads: int,
    command: str,
) -> int:
    done = store.load(study)
    if not (out.path / MANIFEST).exists():
        out.write({})  # makes the folder ours, for the next call
    console = make_console()
    started = time.monotonic()
    todo = [trial for trial in trials if trial.key not in done]
    kept = len(trials) - len(todo)
    console.print(f"deqfuse experiment {study.name}", style="bold", end="")
    console.print(f": {len(trials)} trials" + (f", {kept} of them done before" if kept else ""))
    for doubt in doubts:
        console.print(doubt, style="yellow")
    rendered = machine_facts(command, torch.device("cpu"), _backend())
    run = {**rendered, "jobs": jobs, "threads": threads}
    number = store.begin(study, run) if todo else None
    with Stage(console, "Running trials", len(todo)) as stage:
        for finished in run_trials(study, todo, jobs, threads):
            elapsed = round(time.monotonic() - started, 3)
            record = replace(finished, run=number, elapsed=elapsed)
            store.append(record)
            done[record.key] = record
            stage.advance(record.key)
            stage.line(f"  {record.key}: {record.seconds:.1f} s")
    seconds = time.monotonic() - started

    records = [done[trial.key] for trial in trials]
    report = study.report(records)
    broken = [record.key for record in records if _non_finite(record)]
    if broken:
        text = "NOT FINITE are answers of these models, and their scores undefined: "
        doubts = [*doubts, text + "; ".join(broken) + "."]
        console.print(doubts[-1], style="bold red")
    sections = [*([Section("Doubts", tuple(doubts))] if doubts else []), *report.sections]
    whole = {"study": study.name, "settings": settings, **report.summary}
    facts = run_facts(records, store.runs, rendered)
    page = write_report(out, replace(report, sections=sections, summary=whole), facts, MARKDOWN)
    console.print(f"\nReport: {page}  ({seconds:.0f} s in all)")
    return 0


def _non_finite(record: Record) -> bool:
    test = record.values.get("test")
    return isinstance(test, dict) and "non_finite_rows" in test


def _backend() -> str:
    from deqfuse import backends

    names = [b.name for b in backends.describe() if b.available]
    return names[0]
