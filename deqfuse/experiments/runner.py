"""Run the trials of a study that are not done yet, in one process or several; write its report."""

from __future__ import annotations

import json
import multiprocessing
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from deqfuse.cli.output import MANIFEST, OutputFolder
from deqfuse.cli.progress import Stage, make_console
from deqfuse.cli.report import machine_facts
from deqfuse.experiments.markdown import render
from deqfuse.experiments.provenance import commit, run_facts
from deqfuse.experiments.store import TrialStore
from deqfuse.experiments.study import Record, Study, Trial

__all__ = ["PAGE", "SUMMARY", "run_study"]

PAGE, SUMMARY = "README.md", "summary.json"  # README.md: what repository browsers show


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
    names = [PAGE, SUMMARY, *study.files()]
    out.check(names)
    settings, trials = study.settings(), study.trials()  # reads the data: mistakes come first
    with TrialStore(out.path) as store:
        return _run_study(study, out, store, settings, trials, jobs, threads, command)


def _run_study(
    study: Study,
    out: OutputFolder,
    store: TrialStore,
    settings: dict[str, Any],
    trials: Sequence[Trial],
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
    console.print(f"[bold]deqfuse experiment {study.name}[/bold]: {len(trials)} trials", end="")
    console.print(f", {kept} of them done before" if kept else "")
    rendered = dict(machine_facts(command, torch.device("cpu"), _backend()))
    rendered["deqfuse"] += commit()
    run = {**rendered, "jobs": jobs, "threads": threads}
    number = store.begin(study, run) if todo else None
    with Stage(console, "Running trials", len(todo)) as stage:
        for finished in _run_all(study, todo, jobs, threads):
            elapsed = round(time.monotonic() - started, 3)
            record = replace(finished, run=number, elapsed=elapsed)
            store.append(record)
            done[record.key] = record
            stage.advance(record.key)
            stage.line(f"  {record.key}: {record.seconds:.1f} s")
    seconds = time.monotonic() - started

    records = [done[trial.key] for trial in trials]
    report = study.report(records)
    facts = run_facts(records, store.runs, rendered)
    page, pictures = render(report.title, report.lead, report.sections, facts)
    summary = {
        "study": study.name,
        "facts": dict(facts),
        "settings": settings,
        **report.summary,
    }
    text = json.dumps(summary, indent=1, allow_nan=False) + "\n"
    out.write({PAGE: page.encode(), SUMMARY: text.encode(), **pictures})
    console.print(f"\nReport: {out.path / PAGE}  ({seconds:.0f} s in all)")
    return 0


def _run_all(study: Study, todo: Sequence[Trial], jobs: int, threads: int) -> Iterator[Record]:
    together = [trial for trial in todo if not trial.alone]
    if jobs > 1 and len(together) > 1:
        # Forking a process that has used torch's threads may hang.
        context = multiprocessing.get_context("spawn")
        with context.Pool(min(jobs, len(together)), _begin, (study, threads)) as pool:
            yield from pool.imap_unordered(_run_in_worker, together)
    else:
        yield from (_run_one(study, trial, threads) for trial in together)
    yield from (_run_one(study, trial, jobs * threads) for trial in todo if trial.alone)


_study: Study  # of this worker process


def _begin(study: Study, threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears Ctrl-C and ends the pool
    global _study
    _study = study
    torch.set_num_threads(threads)


def _run_in_worker(trial: Trial) -> Record:
    return _run_one(_study, trial, torch.get_num_threads())


def _run_one(study: Study, trial: Trial, threads: int) -> Record:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    started = time.perf_counter()
    try:
        # The caller's random state is not ours to change, nor may it change the trial.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            values = study.run(trial)
    finally:
        torch.set_num_threads(before)
    return Record(trial.key, trial.params, time.perf_counter() - started, values)


def _backend() -> str:
    from deqfuse import backends

    names = [b.name for b in backends.describe() if b.available]
    return names[0]
