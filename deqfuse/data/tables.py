"""Text files of comma-separated numbers, and what to tell whoever wrote one differently."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from deqfuse.data.lines import Line, TableRows, split_lines

__all__ = ["PANDAS", "DataWarning", "read_table", "read_text"]


class DataWarning(UserWarning):
    """Data that can be read, but are hardly meant as they are read."""


PANDAS = "pandas: to_csv(path, header=False, index=False)"
_POINTS = "write decimal points first (-1.64)"
_SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "vertical bars"}
_MISSING = {"", "na", "n/a", "null", "none", "?", "-", "."}
_MARKS = {  # first bytes of files that are no UTF-8 text
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
    b"\x1f\x8b": "a gzip file",
    b"PK\x03\x04": "a zip or Excel file",
    b"PAR1": "a Parquet file",
}
_DECIMAL = r"[+-]?\d+,\d+(?:[eE][+-]?\d+)?"
# A line that may be numbers with decimal commas, separated by commas.
_PAIRS = re.compile(rf"\s*{_DECIMAL}(?:\s*,\s*{_DECIMAL})*\s*")


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, with or without a byte order mark.

    Raises:
        ValueError: the file is not such text; the message says what it looks like.
    """
    content = path.read_bytes()
    for mark, kind in _MARKS.items():
        if content.startswith(mark):
            raise ValueError(_not_text(path, kind))
    if b"\0" in content:  # UTF-16 without a mark: every other byte of plain numbers
        raise ValueError(_not_text(path, "UTF-16 or UTF-32, or no text at all"))
    try:
        return content.decode("utf-8-sig")  # spreadsheets like to write a byte order mark
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(_not_text(path, f"another encoding in line {line}")) from None


def _not_text(path: Path, kind: str) -> str:
    return (
        f"{path}: expected UTF-8 text, got {kind}. Remedy: save it as comma-separated text in "
        "UTF-8 (in spreadsheets: CSV UTF-8)."
    )


def read_table(
    path: Path, doubts: list[str], rows: int | None = None, ids: bool = False
) -> TableRows:
    """The numbers of a CSV file without header row; an empty line is a sample without the view.

    Args:
        path: of the file.
        doubts: gets a text for whatever can be read, but is hardly meant as it is read.
        rows: how many to expect: empty lines at the end of the file that would be more are none.
        ids: whether the first cell of every line is the id of its sample.

    Raises:
        ValueError: the table is empty, ragged, not numeric, or not finite in float32; cells are
            separated by something else than commas; numbers have decimal commas; an id is missing
            or occurs twice. The message names the file, the line and the remedy.
    """
    text = read_text(path)
    if not text.strip():
        raise ValueError(f"{path}: expected rows of numbers, got an empty file.")
    lines = split_lines(path, text, ids)
    while rows is not None and len(lines) > rows and not lines[-1].text.strip():
        lines.pop()
    full = [line for line in lines if not line.empty]
    if not full:
        raise ValueError(
            f"{path}: expected a sample that has the view, got empty cells only. Remedy: remove "
            "the view's tables."
        )
    try:
        # NumPy's parser is fast but words its errors for programmers; on failure look for the line.
        table = np.loadtxt(
            [line.text for line in full], delimiter=",", dtype=np.float64, ndmin=2, comments=None
        )
    except ValueError:
        raise ValueError(_first_fault(path, full)) from None
    with np.errstate(over="ignore"):
        narrow = table.astype(np.float32)
    if not np.isfinite(narrow).all():
        raise ValueError(_first_fault(path, full))
    count = table.shape[1]
    for line in lines:
        if line.empty and line.text.strip() and line.text.count(",") + 1 != count:
            raise ValueError(_ragged(path, line, count))
    if "." not in "".join(line.text for line in full):
        _check_decimal_commas(path, [line.text for line in full], doubts)
    first = table[0].tolist()
    if full[0].number == 1 and count > 2 and first in ([*range(count)], [*range(1, count + 1)]):
        doubts.append(
            f"{path}, line 1 is {first[0]:g}, {first[1]:g}, {first[2]:g}, ...: column numbers? It "
            f"counts as a sample. Remedy: no header row ({PANDAS})."
        )
    values = np.full((len(lines), count), np.nan, dtype=np.float32)
    values[[not line.empty for line in lines]] = narrow
    return TableRows(lines, values)


def _first_fault(path: Path, lines: list[Line]) -> str:
    """The message for the first line that keeps the file from being a table of finite numbers."""
    width = None
    for line in lines:
        cells = line.text.split(",")
        # As the file counts: the id, where there is one, is column 1.
        for column, cell in enumerate(cells, start=2 if line.sample else 1):
            where = f"{path}, line {line.number}, column {column}"
            value = _number(cell)
            if value is None:
                other = _other_format(line.text)
                if other:
                    return (
                        f"{path}, line {line.number}: expected cells separated by commas, got "
                        f"{other}"
                    )
                found = cell.strip()[:40]
                return f"{where}: expected a number, got {found!r}. {_hint(line, column, cells)}"
            if not np.isfinite(value):
                return (
                    f"{where}: expected a finite number, got {cell.strip()!r}. "
                    f"{_missing_hint(cells)}"
                )
            if abs(value) > float(np.finfo(np.float32).max):
                return (
                    f"{where}: expected a number within the range of float32 (3.4e38), got "
                    f"{cell.strip()!r}. Remedy: give the feature in another unit, or leave it out."
                )
        width = len(cells) if width is None else width
        if len(cells) != width:
            return _ragged(path, line, width, any("." in other.text for other in lines))
    return f"{path}: expected comma-separated numbers; the file cannot be read as such."


def _ragged(path: Path, line: Line, width: int, point: bool = True) -> str:
    behind = " behind the id" if line.sample else ""
    return (
        f"{path}, line {line.number}: expected {width} cells{behind} as in the lines above, got "
        f"{line.text.count(',') + 1}. Remedy: every row needs one cell per feature"
        + ("." if point else f"; if the commas are decimal signs, {_POINTS}.")
    )


def _number(cell: str) -> float | None:
    """The number in a cell, None if there is none; Python's ``1_000`` is none."""
    try:
        return float("no" if "_" in cell else cell)
    except ValueError:
        return None


def _other_format(line: str) -> str:
    """What separates the cells of a line if not commas, and the remedy; "" if nothing else does."""
    if '"' in line:
        inside = re.search(rf'"\s*{_DECIMAL}\s*"', line)
        if inside:
            return f"quoted cells with decimal commas. Remedy: {_POINTS}, then remove the quotes."
        if all(_number(cell.strip().strip('"')) is not None for cell in line.split(",")):
            return "quoted cells. Remedy: remove the quotes."
        return ""
    mark = next((mark for mark in _SEPARATORS if mark in line), None)
    name = _SEPARATORS[mark] if mark else "spaces"
    pieces = [piece.strip() for piece in line.split(mark)]
    decimal = [bool(re.fullmatch(_DECIMAL, piece)) for piece in pieces]
    if mark is None:
        numeric = [_number(piece) is not None for piece in pieces]
        if len(pieces) < 2 or not all(d or n for d, n in zip(decimal, numeric, strict=True)):
            return ""
    if any(decimal):
        return (
            f"{name} between them and commas as decimal signs. Remedy: {_POINTS}, then separate "
            "the cells by commas."
        )
    return f"{name} between them. Remedy: separate the cells by commas."


def _hint(line: Line, column: int, cells: list[str]) -> str:
    """The remedy for a cell that is not a number."""
    found = [cell.strip().strip('"') for cell in cells]
    names = [cell for cell in found if _number(cell) is None and cell.lower() not in _MISSING]
    place = column - (2 if line.sample else 1)
    header = names or found[1:] == [str(number) for number in range(len(found) - 1)]
    if line.number == 1 and place == 0 and not found[0] and len(found) > 1 and header:
        # An empty corner, with column names or 0, 1, 2, ... to the right and row names below.
        return (
            "The empty corner of a header row over row names? Remedy: write the numbers only "
            f"({PANDAS}); names go to {{i}}_featname.csv."
        )
    if found[place].lower() in _MISSING:
        return _missing_hint(cells)
    if line.number == 1 and (len(names) > 1 or len(found) == 1):
        return "Remedy: remove the header row; names go to {i}_featname.csv."
    if place == 0 and len(found) > 1 and not line.sample:
        return f"Remedy: row names have no place here ({PANDAS}); with --ids they have."
    return "Remedy: numbers only, with a decimal point."


def _missing_hint(cells: list[str]) -> str:
    """The remedy for a missing value, alone or with all the others of its line."""
    if all(cell.strip().strip('"').lower() in {*_MISSING, "nan"} for cell in cells):
        return "Remedy: leave the cells of a sample that lacks the view empty."
    return "Remedy: impute missing values, or leave the feature out."


def _check_decimal_commas(path: Path, rows: list[str], doubts: list[str]) -> None:
    """Refuse numbers whose decimal commas were read as separators: every feature became two.

    Whole numbers look the same, so it takes a sign of it: a minus, an exponent or zeros in front in
    every other cell only. Without one it is a doubt where decimals are likely.
    """
    if not all(_PAIRS.fullmatch(line) for line in rows):
        return
    cells = [[cell.strip() for cell in line.split(",")] for line in rows]
    before = [cell for row in cells for cell in row[::2]]
    after = [cell for row in cells for cell in row[1::2]]
    width = len(cells[0])
    what = (
        f"columns of which every second may be the decimals of the one before "
        f"({rows[0].strip()[:40]!r}). Remedy: {_POINTS}, columns in all: {width // 2}"
    )
    padded = [any(re.match(r"[+-]?0\d", cell) for cell in part) for part in (before, after)]
    if (
        any(cell.startswith("-") for cell in before)
        or any("e" in cell.lower() for cell in after)
        or padded == [False, True]
    ):
        raise ValueError(
            f"{path}: expected numbers with decimal points, got {width} {what}; if all cells are "
            "whole numbers, write one of them with a point (3.0)."
        )
    digits = [max(map(len, part)) for part in (before, after)]
    if width == 2 or digits[0] > digits[1] == 1:
        doubts.append(f"{path}: {width} {what}; nothing if all cells are whole numbers.")
