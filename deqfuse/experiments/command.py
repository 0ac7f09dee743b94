"""``deqfuse experiment NAME``: turn options into a study and run it."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from deqfuse.cli.output import OutputFolder
from deqfuse.experiments.omics import OmicsStudy
from deqfuse.experiments.runner import run_study
from deqfuse.experiments.study import Study

__all__ = ["experiment"]


def experiment(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    """Run the study that the options describe; returns the exit code."""
    study = _STUDIES[options.experiment](options)
    command = shlex.join(["deqfuse", *map(_public, arguments)])
    return run_study(study, OutputFolder(options.out), options.jobs, options.threads, command)


def _omics(options: argparse.Namespace) -> Study:
    study = OmicsStudy(Path(options.data), seeds=options.seeds)
    recipe = study.recipe
    if options.quick:
        return replace(study, seeds=min(2, options.seeds), recipe=replace(recipe, epochs=2), dim=32)
    return replace(study, recipe=replace(recipe, epochs=options.epochs or recipe.epochs))


_STUDIES: dict[str, Callable[[argparse.Namespace], Study]] = {"omics": _omics}


def _public(argument: str) -> str:
    """A report is for others: where a folder lies on this machine is none of their business."""
    return Path(argument).name if argument.startswith("/") else argument
