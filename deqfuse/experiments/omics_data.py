"""Data of the omics studies: MOGONET layout, complete rows, features scaled on training rows."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import replace
from pathlib import Path

import torch

from deqfuse.data import MultiviewData, Splits, load_mogonet, split_stratified
from deqfuse.data.multiview import checked
from deqfuse.reports.errors import UserError

__all__ = ["VALIDATION", "checksum", "read", "scaled", "split"]

VALIDATION = 0.2  # of the training rows, drawn anew for every seed


@functools.lru_cache(maxsize=1)
def read(folder: Path) -> tuple[MultiviewData, MultiviewData]:
    """Training and test rows as they are in the files.

    Raises:
        UserError: no such data, a class with one training row only, or samples that lack views.
    """
    try:
        learning, test = load_mogonet(folder)
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from error
    if int(learning.labels.bincount().min()) < 2:
        raise UserError(f"{folder}: expected at least 2 training rows of every class.")
    for part, data in (("tr", learning), ("te", test)):
        lacking = torch.nonzero(~data.present)
        if len(lacking):
            row, view = lacking[0].tolist()
            raise UserError(
                f"{folder / f'{data.view_names[view]}_{part}.csv'}, line {row + 1}: expected "
                f"complete data, got a sample without the view; there are {len(lacking)} such "
                "lines. "
                "Remedy: `deqfuse train` takes such data; or leave these samples out of all files."
            )
    return learning, test


def split(folder: Path, seed: int) -> Splits:
    """The seed's validation rows taken out of the training rows; every feature scaled."""
    learning, test = read(folder)
    kept, held = split_stratified(learning.labels, (1 - VALIDATION, VALIDATION), seed=seed)
    return Splits(*scaled(Splits(learning.rows(kept), learning.rows(held), test)))


def scaled(splits: Splits) -> list[MultiviewData]:
    """Every feature to [0, 1] on the training rows, as the authors do."""
    parts = (splits.train, splits.validation, splits.test)
    moments = [(view.amin(0), view.amax(0)) for view in splits.train.views]
    found = []
    for part in parts:
        pairs = zip(part.views, moments, strict=True)
        views = [(view - low) / (high - low).clamp(min=1e-10) for view, (low, high) in pairs]
        try:
            found.append(checked(replace(part, views=views)))
        except ValueError as error:
            raise UserError(str(error)) from error
    return found


def checksum(learning: MultiviewData, test: MultiviewData) -> str:
    """Of all features and labels, by which a resumed study knows its data."""
    digest = hashlib.sha256()
    for part in (learning, test):
        for tensor in (*part.views, part.labels):
            digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()[:16]
