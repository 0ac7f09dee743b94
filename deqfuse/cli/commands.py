"""``deqfuse demo`` and ``deqfuse train``: turn options and data into a comparison."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from dataclasses import replace

import torch

from deqfuse.cli.compare import run_comparison
from deqfuse.data import (
    DataWarning,
    MultiviewData,
    Splits,
    load_mogonet,
    load_numerals,
    split_numerals,
    split_stratified,
)
from deqfuse.experiments.comparison import RECIPE, Comparison
from deqfuse.experiments.training import collect_warnings
from deqfuse.reports.errors import UserError
from deqfuse.reports.folder import OutputFolder

__all__ = ["demo", "train"]

STEPS_PER_EPOCH = 5  # at least, so that small data still gets enough updates
QUICK_ROWS = 64
QUICK_EPOCHS = 2

_NUMERALS = (
    "Data: 2000 handwritten numerals in six views ({views}); {train} training, {validation} "
    "validation and {test} test rows, always the same. Source: R. P. W. Duin, Multiple Features, "
    "UCI Machine Learning Repository, DOI 10.24432/C5HC70 (CC BY 4.0)."
)
_OWN = (
    "Data: {name}, {views}; classes {classes}; {train} training and {validation} validation rows "
    "(taken out of the training files, seed {seed}), {test} test rows."
)


def demo(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    """Compare the fusions on the numerals that are shipped with the package."""
    splits = split_numerals(load_numerals())
    views = ", ".join(
        f"{name} {width}"
        for name, width in zip(splits.train.view_names, splits.train.widths, strict=True)
    )
    splits = _quick(splits) if options.quick else splits
    about = _NUMERALS.format(views=views, **_sizes(splits))
    # Balanced classes: F1 would repeat the accuracy.
    return _run(
        "DEQ Fusion on handwritten numerals", about, splits, options, arguments, ("accuracy",)
    )


def train(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    """Compare the fusions on a folder in MOGONET layout."""
    try:
        with collect_warnings(DataWarning) as doubts:
            learning, test = load_mogonet(options.data, options.ids)
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from error
    if learning.num_rows < 4:
        raise UserError(
            f"{options.data}: expected at least 4 training rows, got {learning.num_rows}."
        )
    fractions = (1 - options.validation, options.validation)
    kept, held = split_stratified(learning.labels, fractions, seed=options.split_seed)
    if not len(held):
        raise UserError(
            f"--validation {options.validation:g} of {learning.num_rows} rows leaves no "
            "validation row. Remedy: a larger share."
        )
    try:
        splits = Splits(learning.rows(kept), learning.rows(held), test).standardized()
    except ValueError as error:
        raise UserError(f"{options.data}: {error}") from error
    splits = _quick(splits) if options.quick else splits
    widths = ", ".join(map(str, learning.widths))
    about = _OWN.format(
        name=options.data,
        views=f"features per view: {widths}",
        classes=_classes(learning),
        seed=options.split_seed,
        **_sizes(splits),
    )
    title = f"DEQ Fusion on {options.data}"
    return _run(title, about, splits, options, arguments, doubts=tuple(doubts))


def _run(
    title: str,
    about: str,
    splits: Splits,
    options: argparse.Namespace,
    arguments: Sequence[str],
    metrics: tuple[str, ...] | None = None,
    doubts: tuple[str, ...] = (),
) -> int:
    batch_size = min(RECIPE.batch_size or 1, max(1, splits.train.num_rows // STEPS_PER_EPOCH))
    recipe = replace(RECIPE, epochs=options.epochs, batch_size=batch_size)
    if options.quick:
        recipe = replace(recipe, epochs=QUICK_EPOCHS, batch_size=QUICK_ROWS // 2)
    seeds = 1 if options.quick else options.seeds
    return run_comparison(
        Comparison(title, about, splits, recipe, seeds, metrics, doubts),
        OutputFolder(options.out),
        _device(options.device),
        options.threads,
        shlex.join(["deqfuse", *arguments]),
    )


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device: expected cpu or cuda, got {name!r}.") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device: expected cpu or cuda, got {name!r}.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"--device {name}: this machine or this build of torch offers "
            f"{torch.cuda.device_count()} CUDA devices. Remedy: --device cpu, or see `deqfuse "
            "info`."
        )
    return device


def _sizes(splits: Splits) -> dict[str, int]:
    return {name: getattr(splits, name).num_rows for name in ("train", "validation", "test")}


def _classes(data: MultiviewData) -> str:
    counts = data.labels.bincount(minlength=data.num_classes).tolist()
    shown = [f"{name} ({count})" for name, count in zip(data.class_names, counts, strict=True)]
    return ", ".join(shown[:10]) + (f", ... {len(shown)} in all" if len(shown) > 10 else "")


def _quick(splits: Splits) -> Splits:
    """The first rows of each class, up to ``QUICK_ROWS`` in all."""

    def few(part: MultiviewData) -> MultiviewData:
        each = max(1, QUICK_ROWS // part.num_classes)
        heads = [
            torch.nonzero(part.labels == label).flatten()[:each]
            for label in range(part.num_classes)
        ]
        return part.rows(torch.cat(heads))

    return Splits(few(splits.train), few(splits.validation), few(splits.test))
