"""Reader for multi-omics data in the layout of MOGONET: one folder, one pair of tables per view.

``{i}_tr.csv`` and ``{i}_te.csv`` (rows x features, numbers only, no header row), ``labels_tr.csv``
and ``labels_te.csv`` (one integer per line), and optionally ``{i}_featname.csv`` (one name per
line).
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

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


def load_mogonet(folder: str | Path) -> tuple[MultiviewData, MultiviewData]:
    """Read a folder in MOGONET layout.

    Views are named after their number (``"1"``, ``"2"``, ...). Classes are the label values that
    occur in the training part, in rising order.

    Args:
        folder: where the CSV files are.

    Returns:
        The training and the test part: views (rows, features) float32, labels (rows,) int64.

    Raises:
        FileNotFoundError: a file of the layout is missing.
        NotADirectoryError: ``folder`` is a file.
        ValueError: a table is empty, ragged, not numeric or not finite in float32, or has other
            separators or decimal signs; the parts of a view differ in width; the number of labels
            differs from the number of rows; a label is not an integer, or occurs only in the test
            part; all labels differ. The message names the file and the line.

    Warns:
        DataWarning: what was read is hardly what is meant: files that look like views and are not
            used, running numbers as a feature or as the first row, likely decimal commas.
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

    train = [read_table(folder / f"{i}_tr.csv", doubts) for i in numbers]
    test = [read_table(folder / f"{i}_te.csv", doubts) for i in numbers]
    for i, left, right in zip(numbers, train, test, strict=True):
        if left.shape[1] != right.shape[1]:
            raise ValueError(
                f"{folder / f'{i}_te.csv'}: expected {left.shape[1]} columns as in {i}_tr.csv, got "
                f"{right.shape[1]}. Remedy: write the same features to both files."
            )
        _check_feature_names(folder / f"{i}_featname.csv", left.shape[1])
        _check_running(folder / f"{i}_tr.csv", left, right, doubts)
    train_labels, test_labels = (_read_labels(folder / name) for name in _LABELS)
    for part, tables, labels in (("tr", train, train_labels), ("te", test, test_labels)):
        for i, table in zip(numbers, tables, strict=True):
            if len(table) != len(labels):
                raise ValueError(
                    f"{folder / f'labels_{part}.csv'}: expected {len(table)} labels, one per row "
                    f"of {i}_{part}.csv, got {len(labels)}. Remedy: give each row its label, same "
                    "order; a header row is no label."
                )

    values = np.unique(train_labels)
    if len(values) == len(train_labels) > 1:
        raise ValueError(
            f"{folder / 'labels_tr.csv'}: expected a few classes with several rows each, got "
            f"{len(values)} labels that all differ ({_some(values)}). Remedy: the number of each "
            "row's class, not a row number, a name or a measured value."
        )
    unknown = np.flatnonzero(~np.isin(test_labels, values))
    if unknown.size:
        raise ValueError(
            f"{folder / 'labels_te.csv'}, label {unknown[0] + 1}: expected one of the training "
            f"labels {_some(values)}, got {test_labels[unknown[0]]}. Remedy: a class needs "
            "training rows."
        )
    if len(values) < 2:
        raise ValueError(
            f"{folder / 'labels_tr.csv'}: expected two classes or more, got only {_some(values)}."
        )

    for doubt in doubts:
        warnings.warn(doubt, DataWarning, stacklevel=2)

    def build(
        tables: list[npt.NDArray[np.float32]], labels: npt.NDArray[np.int64]
    ) -> MultiviewData:
        return MultiviewData(
            views=[torch.from_numpy(table) for table in tables],
            labels=torch.from_numpy(np.searchsorted(values, labels)),
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


def _read_labels(path: Path) -> npt.NDArray[np.int64]:
    """(rows,) integers, one per line; ``1.000e+00`` counts as the integer 1."""
    labels = []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            value = float(line)
            if value != int(value) or abs(value) >= _EXACT:
                raise ValueError
        except (ValueError, OverflowError):
            only = f" and nothing else ({PANDAS})" if "," in line else ""
            raise ValueError(
                f"{path}, line {number}: expected one integer label{only}, got "
                f"{line.strip()[:40]!r}. Remedy: number the classes 0, 1, 2, ...; no header row."
            ) from None
        labels.append(int(value))
    if not labels:
        raise ValueError(f"{path}: expected one label per line, got an empty file.")
    return np.array(labels, dtype=np.int64)


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
