"""Small data sets in MOGONET layout, and ways to write their tables otherwise."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch


def write_mogonet(folder: Path, classes: int = 2, test_rows: int = 10) -> Path:
    """Two views of 40 training and some test rows that tell the classes apart."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    for part, rows in (("tr", 40), ("te", test_rows)):
        labels = torch.arange(rows) % classes
        for view, width in ((1, 5), (2, 3)):
            values = torch.randn(rows, width, generator=generator) + labels[:, None]
            lines = [",".join(map(str, row)) for row in values.tolist()]
            (folder / f"{view}_{part}.csv").write_text("\n".join(lines) + "\n")
        (folder / f"labels_{part}.csv").write_text("\n".join(map(str, labels.tolist())) + "\n")
    return folder


def tables(folder: Path, view: str = "?") -> list[Path]:
    """The training and test tables of the views."""
    return sorted([*folder.glob(f"{view}_tr.csv"), *folder.glob(f"{view}_te.csv")])


def cells(path: Path) -> list[list[str]]:
    """The cells of a good table as text."""
    return [line.split(",") for line in path.read_text().splitlines()]


def rewrite(path: Path, rows: list[list[str]], separator: str = ",", decimal: str = ".") -> None:
    """Write a table with other separators."""
    lines = [separator.join(cell.replace(".", decimal) for cell in row) for row in rows]
    path.write_text("\n".join(lines) + "\n")


def reformat(folder: Path, separator: str, decimal: str, view: str = "?") -> None:
    """Write the tables with other separators."""
    for path in tables(folder, view):
        rewrite(path, cells(path), separator, decimal)


def as_pandas(path: Path, header: bool, index: bool) -> None:
    """As ``DataFrame.to_csv`` writes a table without column names."""
    rows = cells(path)
    if index:
        rows = [[str(i), *row] for i, row in enumerate(rows)]
    if header:
        width = len(rows[0]) - index
        rows = [[""] * index + [str(i) for i in range(width)], *rows]
    rewrite(path, rows)


def empty_lines(path: Path, rows: Iterable[int], text: str = "") -> None:
    """Write ``text`` in place of these lines, counted from 0: an empty one is an absent view."""
    lines = path.read_text().splitlines()
    for row in rows:
        lines[row] = text
    path.write_text("\n".join(lines) + "\n")


def with_ids(folder: Path) -> None:
    """Put the samples' ids in front of all lines: ``tr0``, ``tr1``, ... and ``te0``, ..."""
    for path in [*tables(folder), *folder.glob("labels_*.csv")]:
        part = path.stem[-2:]
        rewrite(path, [[f"{part}{i}", *row] for i, row in enumerate(cells(path))])
