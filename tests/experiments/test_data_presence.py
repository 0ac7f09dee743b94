"""Samples that lack views: empty lines of tables, views joined by ids, what is refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from data_cases import cells, empty_lines, rewrite, with_ids, write_mogonet

from deqfuse.data import DataWarning, MultiviewData, Splits, load_mogonet


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_mogonet(tmp_path / "data")


# --- empty lines ---


@pytest.mark.parametrize("empty", ["", "  ", ",,,,", " , , , , "])
def test_empty_lines_are_absent(empty: str, folder: Path) -> None:
    """Also the last line of a file, after which there is nothing to see."""
    whole, _ = load_mogonet(folder)
    empty_lines(folder / "1_tr.csv", [0, 7, 39], empty)
    train, test = load_mogonet(folder)
    assert train.num_rows == 40
    assert torch.nonzero(~train.present).tolist() == [[0, 0], [7, 0], [39, 0]]
    assert train.views[0][7].isnan().all()
    assert torch.equal(train.views[0][8], whole.views[0][8])
    assert torch.equal(train.views[1], whole.views[1])
    assert test.present.all()


def test_empty_lines_behind_the_last_sample_are_none(folder: Path) -> None:
    whole, _ = load_mogonet(folder)
    path = folder / "2_tr.csv"
    path.write_text(path.read_text() + "\n\n")
    assert torch.equal(load_mogonet(folder)[0].views[1], whole.views[1])


def _too_few_empty_cells(folder: Path) -> None:
    empty_lines(folder / "1_te.csv", [3], ",,")


def _nan_cells(folder: Path) -> None:
    empty_lines(folder / "1_te.csv", [3], "nan,nan,nan,nan,nan")


def _na_cells(folder: Path) -> None:
    empty_lines(folder / "1_te.csv", [3], "NA,NA,NA,NA,NA")


def _some_cells(folder: Path) -> None:
    empty_lines(folder / "1_te.csv", [3], "1.5,,,,2.5")


def _no_view(folder: Path) -> None:
    for view in (1, 2):
        empty_lines(folder / f"{view}_te.csv", [3, 5])


def _nobody(folder: Path) -> None:
    empty_lines(folder / "2_tr.csv", range(40), ",,")


def _one_line_more(folder: Path) -> None:
    path = folder / "1_tr.csv"
    path.write_text("\n" + path.read_text())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_too_few_empty_cells, r"1_te\.csv, line 4: expected 5 cells .* got 3\. Remedy"),
        (_nan_cells, r"line 4, column 1: .*got 'nan'\. Remedy: leave the cells of a sample that"),
        (_na_cells, r"line 4, column 1: .*got 'NA'\. Remedy: leave the cells of a sample that"),
        (_some_cells, r"line 4, column 2: .* got ''\. Remedy: impute missing values, or leave"),
        (
            _no_view,
            r"labels_te\.csv, line 4: expected a sample with a view, got one that is empty in "
            r"1_te\.csv, 2_te\.csv; samples like that: 2\. Remedy: leave them out of all files",
        ),
        (_nobody, r"2_tr\.csv: expected a sample that has the view, got empty .*Remedy: remove"),
        (
            _one_line_more,
            r"labels_tr\.csv: expected 41 labels, .* got 40\. .*an empty line of a table is a row",
        ),
    ],
)
def test_what_is_neither_a_row_nor_absent_is_refused(
    change: Callable[[Path], None], message: str, folder: Path
) -> None:
    change(folder)
    with pytest.raises(ValueError, match=message):
        load_mogonet(folder)


def test_running_numbers_are_doubted_beside_empty_lines(folder: Path) -> None:
    path = folder / "1_tr.csv"
    rewrite(path, [[str(i), *row[1:]] for i, row in enumerate(cells(path))])
    empty_lines(path, [38, 39])
    with pytest.warns(DataWarning, match=r"1_tr\.csv, column 1: .* numbers the rows"):
        load_mogonet(folder)


# --- ids ---


def test_ids_join_views_of_different_length(folder: Path) -> None:
    """Whatever the order of the lines; the samples are those of the labels."""
    whole = load_mogonet(folder)
    with_ids(folder)
    lines = (folder / "1_tr.csv").read_text().splitlines()
    (folder / "1_tr.csv").write_text("\n\n".join(reversed(lines[3:])) + "\n")  # blank ones: none
    empty_lines(folder / "2_te.csv", [4], "te4,,,")
    train, test = load_mogonet(folder, ids=True)
    assert torch.equal(train.labels, whole[0].labels)
    assert torch.nonzero(~train.present).tolist() == [[0, 0], [1, 0], [2, 0]]
    assert torch.equal(train.views[0][3:], whole[0].views[0][3:])
    assert torch.equal(train.views[1], whole[0].views[1])
    assert torch.nonzero(~test.present).tolist() == [[4, 1]]


def test_lines_without_a_label_are_named(folder: Path) -> None:
    with_ids(folder)
    path = folder / "2_tr.csv"
    path.write_text("stranger,1.5,2.5,9.0\n" + path.read_text())
    message = (
        r"2_tr\.csv, line 1: sample 'stranger' has no label in labels_tr\.csv\. Lines that are not "
        r"used for this reason: 1 of 41\. Remedy"
    )
    with pytest.warns(DataWarning, match=message):
        assert load_mogonet(folder, ids=True)[0].num_rows == 40


def _replace(name: str, line: int, text: str) -> Callable[[Path], None]:
    return lambda folder: empty_lines(folder / name, [line - 1], text)


def _strangers(folder: Path) -> None:
    path = folder / "1_te.csv"
    path.write_text(path.read_text().replace("te", "sample "))


def _drop(folder: Path) -> None:
    for view in (1, 2):
        path = folder / f"{view}_tr.csv"
        path.write_text("\n".join(path.read_text().splitlines()[:-1]) + "\n")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            _replace("1_tr.csv", 3, "tr2"),
            r"1_tr\.csv, line 3: expected a sample's id and",
        ),
        (_replace("1_tr.csv", 3, "tr2;1.5;2"), r"line 3: .* got 'tr2;1\.5;2'\. Remedy: no --ids"),
        (_replace("2_tr.csv", 3, ",1,2,3"), r"2_tr\.csv, line 3: .* got an empty one\. Remedy"),
        (
            _replace("2_tr.csv", 3, "tr0,1,2,3"),
            r"2_tr\.csv, line 3: expected every id once, got 'tr0' again, as in line 1\. Remedy",
        ),
        (_replace("2_tr.csv", 3, "tr2,1,x,3"), r"2_tr\.csv, line 3, column 3: .* number, got 'x'"),
        (_replace("2_tr.csv", 3, "tr2,1,3"), r"line 3: expected 3 cells behind the id .* got 2"),
        (
            _replace("labels_te.csv", 2, "te1,case"),
            r"labels_te\.csv, line 2: expected one integer label behind the id, got 'case'",
        ),
        (
            _strangers,
            r"1_te\.csv, line 1: expected ids of labels_te\.csv .* got 'sample 0', and no other",
        ),
        (_drop, r"labels_tr\.csv, line 40: expected a sample 'tr39' with a view, got .* 2_tr\.csv"),
    ],
)
def test_ids_that_do_not_fit_are_refused(
    change: Callable[[Path], None], message: str, folder: Path
) -> None:
    with_ids(folder)
    change(folder)
    with pytest.raises(ValueError, match=message):
        load_mogonet(folder, ids=True)


def test_row_names_without_the_option_name_it(folder: Path) -> None:
    with_ids(folder)
    for name in ("labels_tr.csv", "labels_te.csv"):
        rows = cells(folder / name)
        rewrite(folder / name, [row[1:] for row in rows])
    with pytest.raises(ValueError, match=r"got 'tr0'\. Remedy: row names .* with --ids they have"):
        load_mogonet(folder)


# --- scaling ---


def test_absent_samples_have_no_part_in_the_scale(folder: Path) -> None:
    """The scale is that of the data without them, and they stay absent."""
    train, test = load_mogonet(folder)
    kept = torch.arange(40) % 4 != 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        some = [torch.where(kept[:, None], train.views[0], torch.nan), train.views[1]]
        lacking = MultiviewData(some, train.labels, train.view_names, train.class_names)
        given = Splits(lacking, lacking, test).standardized()
    expected = Splits(train.rows(torch.nonzero(kept).flatten()), train, test).standardized()
    assert torch.equal(given.test.views[0], expected.test.views[0])
    assert torch.equal(given.train.views[0][kept], expected.train.views[0])
    assert torch.equal(given.train.present[:, 0], kept)


def test_a_view_that_no_training_row_has_is_refused() -> None:
    views = [torch.randn(4, 2), torch.full((4, 3), torch.nan)]
    data = MultiviewData(views, torch.tensor([0, 1, 0, 1]), ("a", "b"), ("0", "1"))
    with pytest.raises(ValueError, match=r"view b: expected training rows that have it, .* of 4"):
        Splits(data, data, data).standardized()
