"""Run trials of a study, in one process or several."""

from __future__ import annotations

import multiprocessing
import signal
import time
import warnings
from collections.abc import Iterator, Sequence

import torch

from deqfuse.data import DataWarning
from deqfuse.experiments.study import Record, Study, Trial
from deqfuse.reports.page import plain

__all__ = ["run_trials"]


def run_trials(study: Study, todo: Sequence[Trial], jobs: int, threads: int) -> Iterator[Record]:
    """The records of the trials as they finish; those that run alone come last.

    Args:
        study: whose trials.
        todo: what to run.
        jobs: processes that run trials side by side.
        threads: of torch in each of them.
    """
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
    warnings.simplefilter("ignore", DataWarning)  # the parent read the same data and told
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
            values = plain(study.run(trial))
    finally:
        torch.set_num_threads(before)
    return Record(trial.key, trial.params, time.perf_counter() - started, values)
