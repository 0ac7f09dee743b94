"""Tables in another format, views that are not used, numbers that are no features: said, not read.

``test_data.py`` has the plain refusals of the reader.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from data_cases import as_pandas, cells, reformat, rewrite, tables, write_mogonet

from deqfuse.data import DataWarning, MultiviewData, Splits, load_mogonet

BEFORE = r"Remedy: write decimal points first \(-1\.64\), then separate the cells by commas\."
PANDAS = re.escape("pandas: to_csv(path, header=False, index=False)")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_mogonet(tmp_path / "data")


# --- separators and decimal signs ---


@pytest.mark.parametrize(
    ("mark", "name"),
    [(";", "semicolons"), ("\t", "tabs"), (" ", "spaces"), ("|", "vertical bars")],
)
@pytest.mark.parametrize("decimal", [".", ","])
def test_other_separators_are_named(mark: str, name: str, decimal: str, folder: Path) -> None:
    """With decimal commas the two steps come in the order that keeps the widths."""
    reformat(folder, mark, decimal)
    commas = rf"{name} between them and commas as decimal signs\. {BEFORE}"
    points = rf"{name} between them\. Remedy: separate the cells by commas\."
    with pytest.raises(
        ValueError, match=rf"1_tr\.csv, line 1: .*{commas if decimal == ',' else points}"
    ):
        load_mogonet(folder)


def test_decimal_commas_between_commas_are_refused(folder: Path) -> None:
    """What follows from obeying "separate the cells by commas" only: every width doubles."""
    reformat(folder, ",", ",")
    with pytest.raises(ValueError, match=r"1_tr\.csv: .* got 10 columns .* columns in all: 5;"):
        load_mogonet(folder)


@pytest.mark.parametrize(
    "column",
    [
        ["-1,64", "2,3"],  # a sign in front of the first column only
        ["0,05", "12,5"],  # zeros in front in the second only
        ["1,5e-05", "2,25"],
        ["-0,5", "3,25"],
    ],
)
def test_one_feature_with_decimal_commas_is_refused(column: list[str], folder: Path) -> None:
    for path in tables(folder, "2"):
        rows = len(cells(path))
        path.write_text("\n".join((column * rows)[:rows]) + "\n")
    with pytest.raises(ValueError, match=r"2_tr\.csv: .* got 2 columns .* columns in all: 1;"):
        load_mogonet(folder)


@pytest.mark.parametrize("rows", [[["36", "6"], ["37", "2"]], [["36", "6", "7", "5"]]])
def test_likely_decimal_commas_are_doubted(rows: list[list[str]], folder: Path) -> None:
    for path in tables(folder, "2"):
        rewrite(path, (rows * 40)[: len(cells(path))])
    with pytest.warns(DataWarning, match=r"2_t[re]\.csv: \d columns .* may be the decimals"):
        load_mogonet(folder)


@pytest.mark.parametrize(
    "rows",
    [
        [["3", "-1"], ["-2", "4"]],  # signs in both columns
        [["01", "02"], ["10", "11"]],  # zeros in front in both
        [["-1", "64.0"], ["2", "3"]],  # a point says that commas are separators
        [["0", "2", "1", "0"], ["1", "1", "2", "0"]],  # counts
        [["-1", "64", "5"], ["2", "3", "7"]],  # no pairs
    ],
)
def test_whole_numbers_are_read(rows: list[list[str]], folder: Path) -> None:
    for path in tables(folder, "2"):
        rewrite(path, (rows * 40)[: len(cells(path))])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if len(rows[0]) == 2 and "." not in str(rows):
            warnings.simplefilter("ignore", DataWarning)
        train, _ = load_mogonet(folder)
    assert train.widths == (5, len(rows[0]))
    assert train.views[1][0].tolist() == [float(cell) for cell in rows[0]]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('"1.5","2.5","3.5"', r"quoted cells\. Remedy: remove the quotes\."),
        ('"1,5","2,5","3,5"', r"quoted cells with decimal commas\. Remedy: write decimal points"),
        ("1.5,NA,3.5", r"column 2: .* got 'NA'\. Remedy: impute missing values"),
        (",2.5,3.5", r"column 1: .* got ''\. Remedy: impute missing values"),
        ("1_000,2.5,3.5", r"column 1: expected a number, got '1_000'"),
    ],
)
def test_other_cells_get_their_own_remedy(line: str, message: str, folder: Path) -> None:
    path = folder / "2_tr.csv"
    path.write_text("\n".join([line, *path.read_text().splitlines()[1:]]) + "\n")
    with pytest.raises(ValueError, match=rf"2_tr\.csv, line 1.*{message}"):
        load_mogonet(folder)


def test_ragged_decimal_commas_are_guessed(folder: Path) -> None:
    """Whole numbers lose their decimals, so that rows differ in width."""
    (folder / "2_tr.csv").write_text("1,5,2,5\n1,2,5\n")
    with pytest.raises(ValueError, match=r"line 2: expected 4 cells .* commas are decimal signs"):
        load_mogonet(folder)


def test_twice_as_many_columns_as_names_are_explained(folder: Path) -> None:
    (folder / "1_featname.csv").write_text("a\nb\n")
    for path in tables(folder, "1"):
        rewrite(path, [["1", "5", "2", "25"] for _ in cells(path)])
    with pytest.raises(ValueError, match=r"got 2 \(decimal commas in the tables\?\)"):
        load_mogonet(folder)


# --- ranges ---


@pytest.mark.parametrize("value", ["1e39", "-3.5e38", "1e308"])
def test_number_beyond_float32_is_refused(value: str, folder: Path) -> None:
    rows = cells(folder / "2_te.csv")
    rows[3][1] = value
    rewrite(folder / "2_te.csv", rows)
    found = rf"2_te\.csv, line 4, column 2: .* range of float32 \(3\.4e38\), got '{value}'"
    with pytest.raises(ValueError, match=found):
        load_mogonet(folder)


def test_largest_float32_is_read(folder: Path) -> None:
    rows = cells(folder / "2_te.csv")
    rows[3][1] = "3.4e38"
    rewrite(folder / "2_te.csv", rows)
    assert load_mogonet(folder)[1].views[1].isfinite().all()


def test_standardising_beyond_float32_is_refused() -> None:
    """A test value of 1e30 times the training rows' spread of 1e-10."""

    def part(scale: float) -> MultiviewData:
        view = torch.stack([torch.arange(4.0), scale * torch.arange(4.0)], 1)
        return MultiviewData([view], torch.tensor([0, 1, 0, 1]), ("1",), ("0", "1"))

    with pytest.raises(ValueError, match="view 1, column 2: expected values that stay within"):
        Splits(part(1e-10), part(1e-10), part(1e30)).standardized()


@pytest.mark.parametrize("label", ["1e30", "9007199254740993", "1e400"])
def test_label_that_is_not_exact_is_refused(label: str, folder: Path) -> None:
    lines = (folder / "labels_tr.csv").read_text().splitlines()
    (folder / "labels_tr.csv").write_text("\n".join([*lines[:-1], label]))
    with pytest.raises(ValueError, match=r"labels_tr\.csv, line 40: expected one integer label"):
        load_mogonet(folder)


# --- which files are used ---


@pytest.mark.parametrize(
    "name",
    ["0_tr.csv", "01_tr.csv", "3_tr.CSV", "mirna_tr.csv", "3_train.csv", "3-te.tsv", "3_tr.csv.gz",
     "3_featname.csv"],
)  # fmt: skip
def test_files_that_look_like_views_are_named(name: str, folder: Path) -> None:
    (folder / name).write_text("1\n")
    with pytest.warns(DataWarning, match=rf"not used, because .*: {re.escape(name)}\. Remedy"):
        train, _ = load_mogonet(folder)
    assert train.view_names == ("1", "2")


@pytest.mark.parametrize("name", ["README.txt", "plot_test.py", "._1_tr.csv", "notes.csv"])
def test_other_files_are_nobodys_business(name: str, folder: Path) -> None:
    (folder / name).write_text("1\n")
    load_mogonet(folder)


def test_half_a_view_is_refused_and_its_other_half_named(folder: Path) -> None:
    (folder / "2_te.csv").rename(folder / "2_te.CSV")
    message = r"2_te\.csv: missing \(there is 2_te\.CSV; capitals matter\)"
    with pytest.raises(FileNotFoundError, match=message):
        load_mogonet(folder)


# --- what pandas writes ---


@pytest.mark.parametrize("corner", ["", '""'])
def test_corner_of_a_header_is_recognised(corner: str, folder: Path) -> None:
    for path in tables(folder):
        as_pandas(path, header=True, index=True)
        path.write_text(corner + path.read_text())
    message = rf"1_tr\.csv, line 1, column 1: .*header row over row names\? .*{PANDAS}"
    with pytest.raises(ValueError, match=message):
        load_mogonet(folder)


def test_row_names_are_recognised(folder: Path) -> None:
    path = folder / "1_tr.csv"
    rewrite(path, [[f"s{i}", *row] for i, row in enumerate(cells(path))])
    with pytest.raises(ValueError, match=rf"got 's0'\. Remedy: row names .*{PANDAS}"):
        load_mogonet(folder)


def test_running_index_is_doubted(folder: Path) -> None:
    for path in tables(folder, "1"):
        as_pandas(path, header=False, index=True)
    message = rf"1_tr\.csv, column 1: 0, 1, 2, \.\.\. numbers the rows.*{PANDAS}"
    with pytest.warns(DataWarning, match=message):
        assert load_mogonet(folder)[0].widths == (6, 3)


def test_index_of_a_random_split_is_doubted(folder: Path) -> None:
    order = iter(torch.randperm(50, generator=torch.Generator().manual_seed(0)).tolist())
    for path in tables(folder, "2"):
        rewrite(path, [[str(next(order)), *row] for row in cells(path)])
    with pytest.warns(DataWarning, match=r"2_tr\.csv, column 1: .* numbers the rows"):
        load_mogonet(folder)


def test_column_numbers_are_doubted(folder: Path) -> None:
    """``to_csv(index=False)``: one more row everywhere, also in the labels."""
    for path in tables(folder):
        as_pandas(path, header=True, index=False)
    for path in folder.glob("labels_*.csv"):
        path.write_text("0\n" + path.read_text())
    with pytest.warns(DataWarning) as told:
        load_mogonet(folder)
    assert len(told) == 4
    assert all("column numbers? It counts as a sample" in str(item.message) for item in told)


def test_labels_with_an_index_are_refused(folder: Path) -> None:
    as_pandas(folder / "labels_tr.csv", header=False, index=True)
    message = rf"line 1: expected one integer label and nothing else \({PANDAS}\), got '0,0'"
    with pytest.raises(ValueError, match=message):
        load_mogonet(folder)


# --- other files ---


@pytest.mark.parametrize(
    ("encode", "kind"),
    [
        (lambda text: text.encode("utf-16"), "UTF-16"),
        (lambda text: b"\xfe\xff" + text.encode("utf-16-be"), "UTF-16"),
        (lambda text: text.encode("utf-16-le"), "UTF-16 or UTF-32"),
        (lambda text: text.encode("utf-32-be"), "UTF-16 or UTF-32"),
        (lambda text: b"\x1f\x8b" + text.encode(), "a gzip file"),
        (lambda text: b"PK\x03\x04" + text.encode(), "a zip or Excel file"),
        (lambda text: b"1\n2\n\xe9\n", "another encoding in line 3"),
    ],
)
@pytest.mark.parametrize("name", ["1_tr.csv", "labels_te.csv"])
def test_other_encodings_are_named(
    name: str, encode: Callable[[str], bytes], kind: str, folder: Path
) -> None:
    (folder / name).write_bytes(encode((folder / name).read_text()))
    message = rf"{re.escape(name)}: expected UTF-8 text, got {kind}.*Remedy: save it as comma-sep"
    with pytest.raises(ValueError, match=message):
        load_mogonet(folder)


def test_labels_that_all_differ_are_refused(folder: Path) -> None:
    (folder / "labels_tr.csv").write_text("\n".join(map(str, range(40))))
    message = (
        r"labels_tr\.csv: expected a few classes .* got 40 labels that all differ \(\[0, .* more"
    )
    with pytest.raises(ValueError, match=message):
        load_mogonet(folder)
