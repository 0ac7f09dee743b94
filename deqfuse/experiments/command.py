"""``deqfuse experiment NAME``: turn options into a study and run it."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from deqfuse.cli.output import OutputFolder
from deqfuse.experiments.audiovisual import AudiovisualStudy
from deqfuse.experiments.numerals import NumeralsStudy
from deqfuse.experiments.omics import OmicsStudy
from deqfuse.experiments.runner import run_study
from deqfuse.experiments.study import Study
from deqfuse.experiments.synthetic import Size, SyntheticStudy
from deqfuse.experiments.training import Recipe

__all__ = ["experiment"]


def experiment(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    """Run the study that the options describe; returns the exit code."""
    study = _STUDIES[options.experiment](options)
    command = shlex.join(["deqfuse", *map(_public, arguments)])
    return run_study(study, OutputFolder(options.out), options.jobs, options.threads, command)


def _recipe(options: argparse.Namespace, recipe: Recipe) -> Recipe:
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
    study = OmicsStudy(Path(options.data), seeds=_seeds(options))
    study = replace(study, recipe=_recipe(options, study.recipe))
    return replace(study, dim=32) if options.quick else study


def _audiovisual(options: argparse.Namespace) -> Study:
    study = AudiovisualStudy(Path(options.images), Path(options.audio), seeds=_seeds(options))
    study = replace(study, recipe=_recipe(options, study.recipe))
    return replace(study, rows=(64, 32, 32)) if options.quick else study


_STUDIES: dict[str, Callable[[argparse.Namespace], Study]] = {
    "synthetic": _synthetic,
    "numerals": _numerals,
    "omics": _omics,
    "audiovisual": _audiovisual,
}


def _public(argument: str) -> str:
    """A report is for others: where a folder lies on this machine is none of their business."""
    option, equals, value = argument.rpartition("=")
    return option + equals + (Path(value).name if value.startswith("/") else value)
