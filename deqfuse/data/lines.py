"""Lines of a table, with or without the id of their sample in front, and views joined by it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["Line", "TableRows", "join", "split_lines"]


class Line(NamedTuple):
    """One line of a file."""

    number: int  # from 1
    sample: str  # the sample's id, "" where lines have none
    text: str  # the cells behind it

    @property
    def empty(self) -> bool:
        """Whether no cell holds anything."""
        return not self.text.replace(",", "").strip()


class TableRows(NamedTuple):
    """The rows of a table, NaN where a sample has a line without numbers."""

    lines: list[Line]
    values: npt.NDArray[np.float32]  # (rows, columns)


def split_lines(path: Path, text: str, ids: bool) -> list[Line]:
    """The lines of a file: with ids those that are not blank, otherwise all.

    Args:
        path: of the file, for the messages.
        text: what is in it.
        ids: whether the first cell of a line is its sample's id.

    Raises:
        ValueError: a line without an id, or an id that occurs twice.
    """
    numbered = enumerate(text.splitlines(), start=1)
    if not ids:
        return [Line(number, "", line) for number, line in numbered]
    found: dict[str, Line] = {}
    for number, line in numbered:
        if not line.strip():
            continue
        sample, comma, rest = line.partition(",")
        sample, where = sample.strip(), f"{path}, line {number}"
        if not comma:
            raise ValueError(
                f"{where}: expected a sample's id and its cells, separated by commas, got "
                f"{line.strip()[:40]!r}. Remedy: no --ids where lines have no id; a sample without "
                "the view needs no line."
            )
        if not sample:
            raise ValueError(
                f"{where}: expected a sample's id in the first cell, got an empty one. Remedy: "
                "give every line the id that its sample has in labels_tr.csv or labels_te.csv; no "
                "header row."
            )
        if sample in found:
            raise ValueError(
                f"{where}: expected every id once, got {sample!r} again, as in line "
                f"{found[sample].number}. Remedy: one line per sample."
            )
        found[sample] = Line(number, sample, rest)
    return list(found.values())


def join(
    path: Path, table: TableRows, labels: Path, samples: Sequence[str], doubts: list[str]
) -> npt.NDArray[np.float32]:
    """A view's rows in the order of the labels, NaN for samples that it does not have.

    Args:
        path: of the view's table, for the messages.
        table: what is in it.
        labels: path of the labels, for the messages.
        samples: the ids there.
        doubts: gets a text about lines whose samples have no label.

    Raises:
        ValueError: no line belongs to a label.
    """
    rows = {line.sample: row for row, line in enumerate(table.lines)}
    known = set(samples)
    unknown = [line for line in table.lines if line.sample not in known]
    if len(unknown) == len(rows):
        raise ValueError(
            f"{path}, line {unknown[0].number}: expected ids of {labels.name} in the first cells, "
            f"got {unknown[0].sample!r}, and no other line has one of them. Remedy: the same ids "
            "in both files."
        )
    if unknown:
        doubts.append(
            f"{path}, line {unknown[0].number}: sample {unknown[0].sample!r} has no label in "
            f"{labels.name}. Lines that are not used for this reason: {len(unknown)} of "
            f"{len(rows)}. Remedy: the same ids in both files; nothing if the others are to be "
            "left out."
        )
    joined = np.full((len(samples), table.values.shape[1]), np.nan, dtype=np.float32)
    for k, sample in enumerate(samples):
        if sample in rows:
            joined[k] = table.values[rows[sample]]
    return joined
