"""Reader for multi-omics data in the layout of MOGONET: one folder, one pair of tables per view.

``{i}_tr.csv`` and ``{i}_te.csv`` (rows x features, numbers only, no header row), ``labels_tr.csv``
and ``labels_te.csv`` (one integer per line), and optionally ``{i}_featname.csv`` (one name per
line). An empty line is a sample that lacks the view.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from deqfuse.data.lines import Line, join, split_lines
from deqfuse.data.multiview import MultiviewData
from deqfuse.data.tables import PANDAS, DataWarning, read_table, read_text

__all__ = ["load_mogonet"]

_LABELS = ("labels_tr.csv", "labels_te.csv")
_EXACT = 2**53  # labels are read as float64, which has every whole number below this
# Names like those of the layout, with other numbers, endings, capitals or words; what starts with a
# point is the system's own.
_SIMILAR = re.compile(
    r"(?!\.).+[\W_](?:tr|te|train|test|training|featname)"
    r"(?:\.(?:csv|tsv|txt|gz|zip|xlsx?|npy|parquet))+",
    re.IGNORECASE,
)
_LAYOUT = "expected {i}_tr.csv and {i}_te.csv per view i, labels_tr.csv and labels_te.csv"


def load_mogonet(folder: str | Path, ids: bool = False) -> tuple[MultiviewData, MultiviewData]:
    """Read a folder in MOGONET layout.

    Views are named after their number (``"1"``, ``"2"``, ...). Classes are the label values that
    occur in the training part, in rising order. A sample lacks a view where its line in the view's
    table is empty, or all cells of it are.

    Args:
        folder: where the CSV files are.
        ids: the first cell of every line of the tables and of the labels is the sample's id. The
            samples are those of the labels, in their order; a view lacks those that its table does
            not have.

    Returns:
        The training and the test part: views (rows, features) float32, NaN where a sample lacks the
        view, labels (rows,) int64.

    Raises:
        FileNotFoundError: a file of the layout is missing.
        NotADirectoryError: ``folder`` is a file.
        ValueError: a table is empty, ragged, not numeric or not finite in float32, or has other
            separators or decimal signs; the parts of a view differ in width; the number of labels
            differs from the number of rows; a label is not an integer, or occurs only in the test
            part; all labels differ; a sample has no view; an id is missing, occurs twice, or a
            table has none of the labels' ids. The message names the file and the line.

    Warns:
        DataWarning: what was read is hardly what is meant: files that look like views and are not
            used, running numbers as a feature or as the first row, likely decimal commas, lines
            whose ids have no label.
    """
    folder = Path(folder)
    if not folder.exists():
        raise FileNotFoundError(f"{folder}: no such folder; {_LAYOUT}.")
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder}: is a file; give the folder around it: {_LAYOUT}.")
    doubts: list[str] = []
    numbers = _view_numbers(folder, doubts)
    for name in _LABELS:
        _require(folder / name)

    train_labels, test_labels = (_read_labels(folder / name, ids) for name in _LABELS)
    parts = {"tr": train_labels, "te": test_labels}
    train, test = (
        [_read_view(folder, i, part, labels, ids, doubts) for i in numbers]
        for part, labels in parts.items()
    )
    for i, left, right in zip(numbers, train, test, strict=True):
        if left.shape[1] != right.shape[1]:
            raise ValueError(
                f"{folder / f'{i}_te.csv'}: expected {left.shape[1]} columns as in {i}_tr.csv, got "
                f"{right.shape[1]}. Remedy: write the same features to both files."
            )
        _check_feature_names(folder / f"{i}_featname.csv", left.shape[1])
        _check_running(folder / f"{i}_tr.csv", left, right, doubts)
    for (part, labels), tables in zip(parts.items(), (train, test), strict=True):
        for i, table in zip(numbers, tables, strict=True):
            if len(table) != len(labels.values):
                raise ValueError(
                    f"{folder / f'labels_{part}.csv'}: expected {len(table)} labels, one per row "
                    f"of {i}_{part}.csv, got {len(labels.values)}. Remedy: give each row its label,"
                    " same order; a header row is no label, and an empty line of a table is a row."
                )
        _check_samples(folder, part, numbers, tables, labels)

    values = np.unique(train_labels.values)
    if len(values) == len(train_labels.values) > 1:
        raise ValueError(
            f"{folder / 'labels_tr.csv'}: expected a few classes with several rows each, got "
            f"{len(values)} labels that all differ ({_some(values)}). Remedy: the number of each "
            "row's class, not a row number, a name or a measured value."
        )
    unknown = np.flatnonzero(~np.isin(test_labels.values, values))
    if unknown.size:
        raise ValueError(
            f"{folder / 'labels_te.csv'}, label {unknown[0] + 1}: expected one of the training "
            f"labels {_some(values)}, got {test_labels.values[unknown[0]]}. Remedy: a class needs "
            "training rows."
        )
    if len(values) < 2:
        raise ValueError(
            f"{folder / 'labels_tr.csv'}: expected two classes or more, got only {_some(values)}."
        )

    for doubt in doubts:
        warnings.warn(doubt, DataWarning, stacklevel=2)

    def build(tables: list[npt.NDArray[np.float32]], labels: Labels) -> MultiviewData:
        return MultiviewData(
            views=[torch.from_numpy(table) for table in tables],
            labels=torch.from_numpy(np.searchsorted(values, labels.values)),
            view_names=tuple(map(str, numbers)),
            class_names=tuple(str(value) for value in values),
        )

    return build(train, train_labels), build(test, test_labels)


def _view_numbers(folder: Path, doubts: list[str]) -> list[int]:
    """Numbers of the views, rising; every number must have both of its tables."""
    names = sorted(path.name for path in folder.iterdir())
    matches = (re.fullmatch(r"([1-9][0-9]*)_(?:tr|te)\.csv", name) for name in names)
    numbers = sorted({int(match[1]) for match in matches if match})
    used = {f"{i}_{part}.csv" for i in numbers for part in ("tr", "te", "featname")}
    unused = [name for name in names if _SIMILAR.fullmatch(name) and name not in {*used, *_LABELS}]
    found = f"; unused: {', '.join(unused)}" if unused else ""
    if not numbers:
        raise FileNotFoundError(f"{folder}: no view found (no 1_tr.csv{found}); {_LAYOUT}.")
    for i in numbers:
        _require(folder / f"{i}_tr.csv")
        _require(folder / f"{i}_te.csv")
    if unused:
        doubts.append(
            f"{folder}: not used, because their names are not those of views: {', '.join(unused)}. "
            "Remedy: number the views from 1 and call their files {i}_tr.csv and {i}_te.csv."
        )
    return numbers


def _require(path: Path) -> None:
    if path.is_file():
        return
    similar = [p.name for p in path.parent.iterdir() if p.name.lower() == path.name.lower()]
    found = f" (there is {similar[0]}; capitals matter)" if similar else ""
    raise FileNotFoundError(f"{path}: missing{found}; {_LAYOUT}.")


def _check_running(
    path: Path,
    train: npt.NDArray[np.float32],
    test: npt.NDArray[np.float32],
    doubts: list[str],
) -> None:
    """Doubt columns that number the rows: of the training part, or the first one of both parts."""
    train, test = (table[~np.isnan(table[:, 0])] for table in (train, test))  # who has the view
    if not len(train):
        return
    running = (train == train[0] + np.arange(len(train))[:, None]).all(0)
    both = np.sort(np.concatenate([train[:, 0], test[:, 0]]))
    columns = [k + 1 for k in range(train.shape[1]) if running[k] and train[0, k] in (0, 1)]
    if not columns and both[0] in (0, 1) and (both == both[0] + np.arange(len(both))).all():
        columns = [1]  # shuffled, as by a random split
    if columns and len(train) > 2:
        start = ", ".join(f"{value:g}" for value in train[:3, columns[0] - 1])
        doubts.append(
            f"{path}, column {columns[0]}: {start}, ... numbers the rows, and is used as a "
            f"feature. Remedy: leave out what is no feature ({PANDAS})."
        )


class Labels(NamedTuple):
    """The labels of one part, and where they stand."""

    values: npt.NDArray[np.int64]  # (rows,)
    lines: list[Line]


def _read_labels(path: Path, ids: bool) -> Labels:
    """Integers, one per line; ``1.000e+00`` counts as the integer 1."""
    labels, lines = [], []
    for line in split_lines(path, read_text(path), ids):
        if not line.sample and not line.text.strip():
            continue
        try:
            value = float(line.text)
            if value != int(value) or abs(value) >= _EXACT:
                raise ValueError
        except (ValueError, OverflowError):
            cells = "," in line.text
            only = f" and nothing else ({PANDAS})" if cells else ""
            behind = " behind the id" if ids else ""
            option = "; --ids, if lines start with the sample's id" if cells and not ids else ""
            raise ValueError(
                f"{path}, line {line.number}: expected one integer label{behind}{only}, got "
                f"{line.text.strip()[:40]!r}. Remedy: number the classes 0, 1, 2, ...; no header "
                f"row{option}."
            ) from None
        labels.append(int(value))
        lines.append(line)
    if not labels:
        raise ValueError(f"{path}: expected one label per line, got an empty file.")
    return Labels(np.array(labels, dtype=np.int64), lines)


def _read_view(
    folder: Path, number: int, part: str, labels: Labels, ids: bool, doubts: list[str]
) -> npt.NDArray[np.float32]:
    """One view of one part, (rows, features), in the order of the labels where lines have ids."""
    path = folder / f"{number}_{part}.csv"
    table = read_table(path, doubts, len(labels.values), ids)
    if not ids:
        return table.values
    samples = [line.sample for line in labels.lines]
    return join(path, table, folder / f"labels_{part}.csv", samples, doubts)


def _check_samples(
    folder: Path,
    part: str,
    numbers: list[int],
    tables: list[npt.NDArray[np.float32]],
    labels: Labels,
) -> None:
    """Every sample needs a view: of nothing nothing can be said."""
    lacking = np.flatnonzero(np.stack([np.isnan(table).all(1) for table in tables]).all(0))
    if not lacking.size:
        return
    line = labels.lines[lacking[0]]
    named = f" {line.sample!r}" if line.sample else ""
    raise ValueError(
        f"{folder / f'labels_{part}.csv'}, line {line.number}: expected a sample{named} with a "
        f"view, got one that is empty in {', '.join(f'{i}_{part}.csv' for i in numbers)}; samples "
        f"like that: {lacking.size}. Remedy: leave them out of all files."
    )


def _check_feature_names(path: Path, width: int) -> None:
    """The names are not used, but a wrong number of them says that something is mixed up."""
    if not path.is_file():
        return
    names = [line for line in read_text(path).splitlines() if line.strip()]
    if len(names) != width:
        twice = " (decimal commas in the tables?)" if width == 2 * len(names) else ""
        raise ValueError(
            f"{path}: expected {width} names, one per column of the view's tables, got "
            f"{len(names)}{twice}. Remedy: write one name per line, or remove the file."
        )


def _some(values: npt.NDArray[np.int64]) -> str:
    """The first values as text, so that a message stays a line."""
    return str(values[:10].tolist()) if len(values) <= 10 else f"{values[:10].tolist()} and more"
