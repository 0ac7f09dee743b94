"""Reader for multi-omics data in the layout of MOGONET: one folder, one pair of tables per view.

``{i}_tr.csv`` and ``{i}_te.csv`` (rows x features, numbers only, no header row), ``labels_tr.csv``
and ``labels_te.csv`` (one integer per line), and optionally ``{i}_featname.csv`` (one name per
line).
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from deqfuse.data.multiview import MultiviewData

__all__ = ["load_mogonet"]

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
        ValueError: a table is empty, ragged, not numeric or not finite; the parts of a view differ
            in width; the number of labels differs from the number of rows; a label is not an
            integer, or occurs only in the test part. The message names the file and the line.
    """
    folder = Path(folder)
    if not folder.exists():
        raise FileNotFoundError(f"{folder}: no such folder; {_LAYOUT}.")
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder}: is a file; give the folder around it: {_LAYOUT}.")
    numbers = _view_numbers(folder)
    for name in ("labels_tr.csv", "labels_te.csv"):
        _require(folder / name)

    train = [_read_table(folder / f"{i}_tr.csv") for i in numbers]
    test = [_read_table(folder / f"{i}_te.csv") for i in numbers]
    for i, left, right in zip(numbers, train, test, strict=True):
        if left.shape[1] != right.shape[1]:
            raise ValueError(
                f"{folder / f'{i}_te.csv'}: expected {left.shape[1]} columns as in {i}_tr.csv, got "
                f"{right.shape[1]}. Remedy: write the same features to both files."
            )
        _check_feature_names(folder / f"{i}_featname.csv", left.shape[1])
    train_labels = _read_labels(folder / "labels_tr.csv")
    test_labels = _read_labels(folder / "labels_te.csv")
    for part, tables, labels in (("tr", train, train_labels), ("te", test, test_labels)):
        for i, table in zip(numbers, tables, strict=True):
            if len(table) != len(labels):
                raise ValueError(
                    f"{folder / f'labels_{part}.csv'}: expected {len(table)} labels, one per row "
                    f"of {i}_{part}.csv, got {len(labels)}. Remedy: give each row its label, same "
                    "order."
                )

    values = np.unique(train_labels)
    unknown = np.flatnonzero(~np.isin(test_labels, values))
    if unknown.size:
        raise ValueError(
            f"{folder / 'labels_te.csv'}, label {unknown[0] + 1}: expected one of the training "
            f"labels {values.tolist()}, got {test_labels[unknown[0]]}. Remedy: a class needs "
            "training rows."
        )
    if len(values) < 2:
        raise ValueError(
            f"{folder / 'labels_tr.csv'}: expected two classes or more, got only {values.tolist()}."
        )

    def build(
        tables: list[npt.NDArray[np.float64]], labels: npt.NDArray[np.int64]
    ) -> MultiviewData:
        return MultiviewData(
            views=[torch.from_numpy(table.astype(np.float32)) for table in tables],
            labels=torch.from_numpy(np.searchsorted(values, labels)),
            view_names=tuple(map(str, numbers)),
            class_names=tuple(str(value) for value in values),
        )

    return build(train, train_labels), build(test, test_labels)


def _view_numbers(folder: Path) -> list[int]:
    """Numbers of the views, rising; every number must have both of its tables."""
    matches = (re.fullmatch(r"([1-9]\d*)_(?:tr|te)\.csv", path.name) for path in folder.iterdir())
    numbers = sorted({int(match[1]) for match in matches if match})
    if not numbers:
        raise FileNotFoundError(f"{folder}: no view found (no 1_tr.csv); {_LAYOUT}.")
    for i in numbers:
        _require(folder / f"{i}_tr.csv")
        _require(folder / f"{i}_te.csv")
    return numbers


def _require(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing; {_LAYOUT}.")


def _read_table(path: Path) -> npt.NDArray[np.float64]:
    """(rows, columns) of a CSV of finite numbers."""
    text = _read_text(path)
    if not text.strip():
        raise ValueError(f"{path}: expected rows of numbers, got an empty file.")
    try:
        # NumPy's parser is fast but words its errors for programmers; on failure look for the line.
        table = np.loadtxt(
            text.splitlines(), delimiter=",", dtype=np.float64, ndmin=2, comments=None
        )
    except ValueError:
        raise ValueError(_first_fault(path, text)) from None
    if not np.isfinite(table).all():
        raise ValueError(_first_fault(path, text))
    return table


def _first_fault(path: Path, text: str) -> str:
    """The message for the first line that keeps ``text`` from being a table of finite numbers."""
    width = None
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        cells = line.split(",")
        for column, cell in enumerate(cells, start=1):
            where = f"{path}, line {number}, column {column}"
            try:
                value = float(cell)
            except ValueError:
                return (
                    f"{where}: expected a number, got {cell.strip()[:40]!r}. {_hint(number, cell)}"
                )
            if not np.isfinite(value):
                return (
                    f"{where}: expected a finite number, got {cell.strip()!r}. Remedy: impute "
                    "missing values, or leave the feature out."
                )
        width = len(cells) if width is None else width
        if len(cells) != width:
            return (
                f"{path}, line {number}: expected {width} cells as in the lines above, got "
                f"{len(cells)}. Remedy: every row needs one cell per feature."
            )
    return f"{path}: expected comma-separated numbers; the file cannot be read as such."


def _hint(line: int, cell: str) -> str:
    if not cell.strip():
        return "Remedy: impute missing values, or leave the feature out."
    if any(mark in cell.strip() for mark in ";\t "):
        return "Remedy: separate the cells by commas."
    if line == 1:
        return "Remedy: remove the header row; names go to {i}_featname.csv."
    return "Remedy: numbers only, with a decimal point; row names have no place here."


def _read_labels(path: Path) -> npt.NDArray[np.int64]:
    """(rows,) integers, one per line; ``1.000e+00`` counts as the integer 1."""
    labels = []
    for number, line in enumerate(_read_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            value = float(line)
            if value != int(value):
                raise ValueError
        except (ValueError, OverflowError):
            raise ValueError(
                f"{path}, line {number}: expected one integer label, got {line.strip()[:40]!r}. "
                "Remedy: number the classes 0, 1, 2, ...; no header row."
            ) from None
        labels.append(int(value))
    if not labels:
        raise ValueError(f"{path}: expected one label per line, got an empty file.")
    return np.array(labels, dtype=np.int64)


def _check_feature_names(path: Path, width: int) -> None:
    """The names are not used, but a wrong number of them says that something is mixed up."""
    if not path.is_file():
        return
    names = [line for line in _read_text(path).splitlines() if line.strip()]
    if len(names) != width:
        raise ValueError(
            f"{path}: expected {width} names, one per column of the view's tables, got "
            f"{len(names)}. Remedy: write one name per line, or remove the file."
        )


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # spreadsheets like to write a byte order mark
    except UnicodeDecodeError:
        raise ValueError(f"{path}: expected UTF-8 text; the file is not text.") from None
