"""The shipped numerals, splits and standardisation, the MOGONET reader and its refusals."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from deqfuse.data import (
    MultiviewData,
    Splits,
    load_mogonet,
    load_numerals,
    split_numerals,
    split_stratified,
)

PINNED_SPLIT = [19354, 19700, 10374]  # sums of the first 100 row numbers of each part
WIDTHS = {"fac": 216, "fou": 76, "kar": 64, "mor": 6, "pix": 240, "zer": 47}
ROSMAP = Path(
    os.environ.get(
        "DEQFUSE_ROSMAP", Path(__file__).resolve().parents[3] / "shared" / "data" / "ROSMAP"
    )
)


# --- numerals ---


@pytest.fixture(scope="module")
def numerals() -> MultiviewData:
    return load_numerals()


def test_numerals_have_the_published_shape(numerals: MultiviewData) -> None:
    assert dict(zip(numerals.view_names, numerals.widths, strict=True)) == WIDTHS
    assert numerals.num_rows == 2000
    assert all(view.dtype == torch.float32 for view in numerals.views)
    assert numerals.labels.dtype == torch.int64
    assert numerals.labels.tolist() == [digit for digit in range(10) for _ in range(200)]
    assert numerals.class_names == tuple("0123456789")


def test_numerals_have_the_published_values(numerals: MultiviewData) -> None:
    """Cells copied from the tables by hand; sums over each table as NumPy parses its text."""
    fac, fou, kar, mor, pix, zer = numerals.views
    assert fac[0, :6].tolist() == [98, 236, 531, 673, 607, 647]
    assert mor[0].tolist() == pytest.approx([1, 0, 0, 133.15, 1.3117, 1620.2])
    assert pix[0, :6].tolist() == [0, 3, 4, 4, 6, 6]
    expected = {
        "fac": (137492808.0, 97437985744.0),
        "fou": (20068.876447618488, 4191.48263177988),
        "kar": (6794.852888103493, 899765.4824410768),
        "mor": (12632390.632603288, 104048580765.0922),
        "pix": (1452834.0, 7963692.0),
        "zer": (8331825.073161973, 2029496947.0355196),
    }
    for name, view in zip(numerals.view_names, numerals.views, strict=True):
        sums = (view.double().sum().item(), view.double().square().sum().item())
        assert sums == pytest.approx(expected[name], rel=1e-12), name
    # Float32 nearest to the decimal text, not something one rounding away.
    torch.testing.assert_close(
        torch.stack([fou[0, 0], kar[0, 0], zer[0, 5]]),
        torch.tensor([0.065882, -10.297, 490.16], dtype=torch.float32),
        rtol=0,
        atol=0,
    )


def test_numerals_views_show_the_same_samples(numerals: MultiviewData) -> None:
    """Karhunen-Loeve coefficients are linear in the image, so its pixels predict them."""
    kar, pix = numerals.views[2].double(), numerals.views[4].double()
    design = torch.cat([pix, torch.ones(2000, 1, dtype=torch.float64)], dim=1)
    fitted = torch.linalg.lstsq(design[::2], kar[::2], driver="gelsd").solution
    unexplained = (kar[1::2] - design[1::2] @ fitted).var(0) / kar[1::2].var(0)
    assert unexplained.median() < 0.25  # 1.1 when the rows of each class are shuffled


def test_data_file_is_small_and_names_its_source() -> None:
    import deqfuse.data

    folder = Path(deqfuse.data.__file__).parent
    assert (folder / "numerals.npz").stat().st_size < 2.5e6
    assert "10.24432/C5HC70" in (folder / "DATA_LICENSE.md").read_text(encoding="utf-8")


def test_numerals_split_is_fixed_and_balanced(numerals: MultiviewData) -> None:
    splits = split_numerals(numerals)
    for part, each in ((splits.train, 50), (splits.validation, 50), (splits.test, 100)):
        assert part.labels.bincount().tolist() == [each] * 10
    again = split_numerals()
    assert torch.equal(splits.test.views[0], again.test.views[0])
    # Pins the rows themselves: another split would make old reports incomparable.
    raw = split_stratified(numerals.labels, (0.25, 0.25, 0.5), seed=20230629)
    assert [int(part[:100].sum()) for part in raw] == PINNED_SPLIT


def test_no_test_sample_occurs_in_training(numerals: MultiviewData) -> None:
    """The tables hold six samples twice; a split that parts the twins tests on training data."""
    splits = split_numerals(numerals)
    seen = {tuple(row) for row in torch.cat(splits.train.views, 1).tolist()}
    rest = torch.cat([torch.cat(splits.validation.views, 1), torch.cat(splits.test.views, 1)])
    assert not any(tuple(row) in seen for row in rest.tolist())
    assert len({tuple(row) for row in torch.cat(numerals.views, 1).tolist()}) == 1994


def test_data_does_not_import_plotting() -> None:
    code = (
        "import sys, deqfuse.data; "
        "sys.exit(any(name in sys.modules for name in ('matplotlib', 'rich')))"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=120)


# --- splits and standardisation ---


def test_standardisation_uses_training_rows_only() -> None:
    generator = torch.Generator().manual_seed(0)

    def part(rows: int, shift: float) -> MultiviewData:
        view = torch.randn(rows, 3, generator=generator) * 5 + shift
        view[:, 2] = 7.0
        return MultiviewData([view], torch.zeros(rows, dtype=torch.int64), ("v",), ("a",))

    splits = Splits(part(50, 2.0), part(20, 0.0), part(20, 30.0))
    done = splits.standardized()
    train = done.train.views[0].double()
    torch.testing.assert_close(train.mean(0), torch.zeros(3).double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(
        train[:, :2].std(0, correction=0), torch.ones(2).double(), atol=1e-6, rtol=0
    )
    assert (done.test.views[0][:, 2] == 0).all()  # constant: shifted, not divided by zero
    mean = splits.train.views[0].mean(0)
    std = splits.train.views[0].std(0, correction=0)
    torch.testing.assert_close(
        done.test.views[0][:, :2], ((splits.test.views[0] - mean) / std)[:, :2]
    )


def test_split_covers_every_row_once() -> None:
    labels = torch.tensor([0] * 7 + [1] * 11 + [2] * 2 + [3])
    parts = split_stratified(labels, (0.8, 0.2), seed=3)
    assert sorted(torch.cat(parts).tolist()) == list(range(21))
    assert labels[parts[1]].bincount(minlength=4)[2] == 1  # two rows: one in each part
    assert 20 in parts[0].tolist()  # a single row trains
    other = split_stratified(labels, (0.8, 0.2), seed=4)
    assert not torch.equal(parts[1], other[1])


@pytest.mark.parametrize("fractions", [(), (0.5, 0.4), (1.2, -0.2)])
def test_split_refuses_fractions_that_do_not_add_up(fractions: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="fractions: expected positive numbers that add up to 1"):
        split_stratified(torch.zeros(4, dtype=torch.int64), fractions)


def test_multiview_data_refuses_views_of_unequal_length() -> None:
    views = [torch.zeros(3, 2), torch.zeros(4, 2)]
    with pytest.raises(ValueError, match=re.escape("got [3, 4] rows in the views and 3 labels")):
        MultiviewData(views, torch.zeros(3, dtype=torch.int64), ("a", "b"), ("x",))
    with pytest.raises(ValueError, match="2 views and 1 names"):
        MultiviewData(views, torch.zeros(3, dtype=torch.int64), ("a",), ("x",))


# --- MOGONET layout ---


def write_mogonet(folder: Path) -> Path:
    """A good small data set: two views, three classes numbered 1, 2, 5."""
    folder.mkdir(parents=True, exist_ok=True)
    for part, rows in (("tr", 6), ("te", 3)):
        for view, width in ((1, 2), (2, 3)):
            lines = [",".join(f"{2 * r + 0.5 * c}" for c in range(width)) for r in range(rows)]
            (folder / f"{view}_{part}.csv").write_text("\n".join(lines) + "\n")
        labels = [f"{(1, 2, 5)[r % 3]:.18e}" for r in range(rows)]
        (folder / f"labels_{part}.csv").write_text("\n".join(labels) + "\n")
    (folder / "1_featname.csv").write_text("gene one\ngene two\n")
    return folder


def test_mogonet_reads_values_and_labels(tmp_path: Path) -> None:
    train, test = load_mogonet(str(write_mogonet(tmp_path)))
    assert (train.widths, train.num_rows, test.num_rows) == ((2, 3), 6, 3)
    assert train.view_names == ("1", "2")
    assert train.class_names == ("1", "2", "5")
    assert train.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert test.views[1][2].tolist() == [4.0, 4.5, 5.0]
    assert train.views[0].dtype == torch.float32


def test_mogonet_takes_one_view_and_a_byte_order_mark(tmp_path: Path) -> None:
    write_mogonet(tmp_path)
    for name in ("2_tr.csv", "2_te.csv"):
        (tmp_path / name).unlink()
    text = (tmp_path / "1_tr.csv").read_text()
    (tmp_path / "1_tr.csv").write_text("\ufeff" + text.replace("\n", "\r\n"), encoding="utf-8")
    train, _ = load_mogonet(tmp_path)
    assert train.widths == (2,)
    assert train.views[0][0].tolist() == [0.0, 0.5]


def replace_line(name: str, line: int, text: str) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        lines = (folder / name).read_text().splitlines()
        lines[line - 1] = text
        (folder / name).write_text("\n".join(lines) + "\n")

    return change


def drop_line(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(
        "\n".join((folder / name).read_text().splitlines()[1:]) + "\n"
    )


FAULTS: dict[str, tuple[Callable[[Path], object], type[Exception], str]] = {
    "no labels": (
        lambda f: (f / "labels_te.csv").unlink(),
        FileNotFoundError,
        r"labels_te\.csv: missing; expected \{i\}_tr\.csv",
    ),
    "half a view": (
        lambda f: (f / "2_te.csv").unlink(),
        FileNotFoundError,
        r"2_te\.csv: missing",
    ),
    "no views": (
        lambda f: [(f / f"{v}_{p}.csv").unlink() for v in (1, 2) for p in ("tr", "te")],
        FileNotFoundError,
        r"no view found \(no 1_tr\.csv; unused: 1_featname\.csv\)",
    ),
    "ragged": (
        replace_line("2_tr.csv", 4, "1.0,2.0"),
        ValueError,
        r"2_tr\.csv, line 4: expected 3 cells as in the lines above, got 2\. Remedy",
    ),
    "text": (
        replace_line("1_te.csv", 2, "1.0,abc"),
        ValueError,
        r"1_te\.csv, line 2, column 2: expected a number, got 'abc'\. Remedy: numbers only",
    ),
    "header": (
        replace_line("1_tr.csv", 1, "gene one,gene_two"),
        ValueError,
        r"1_tr\.csv, line 1, column 1: expected a number, got 'gene one'",
    ),
    "semicolons": (
        replace_line("1_tr.csv", 1, "1.0;2.0"),
        ValueError,
        r"line 1: .* got semicolons between them\. Remedy: separate the cells by commas",
    ),
    "empty cell": (
        replace_line("1_tr.csv", 3, "1.0,"),
        ValueError,
        r"1_tr\.csv, line 3, column 2: expected a number, got ''\. Remedy: impute",
    ),
    "nan": (
        replace_line("1_tr.csv", 3, "nan,1.0"),
        ValueError,
        r"1_tr\.csv, line 3, column 1: expected a finite number, got 'nan'\. Remedy: impute",
    ),
    "empty table": (
        lambda f: (f / "1_te.csv").write_text("\n"),
        ValueError,
        r"1_te\.csv: expected rows of numbers, got an empty file",
    ),
    "not text": (
        lambda f: (f / "1_te.csv").write_bytes(b"\xff\xfe\x00\x80"),
        ValueError,
        r"1_te\.csv: expected UTF-8 text",
    ),
    "widths differ": (
        lambda f: (f / "1_te.csv").write_text("1\n2\n3\n"),
        ValueError,
        r"1_te\.csv: expected 2 columns as in 1_tr\.csv, got 1\. Remedy",
    ),
    "too few labels": (
        drop_line("labels_tr.csv"),
        ValueError,
        r"labels_tr\.csv: expected 6 labels, one per row of 1_tr\.csv, got 5\. Remedy",
    ),
    "empty labels": (
        lambda f: (f / "labels_tr.csv").write_text(""),
        ValueError,
        r"labels_tr\.csv: expected one label per line, got an empty file",
    ),
    "fractional label": (
        replace_line("labels_tr.csv", 2, "1.5"),
        ValueError,
        r"labels_tr\.csv, line 2: expected one integer label, got '1\.5'\. Remedy",
    ),
    "infinite label": (
        replace_line("labels_tr.csv", 2, "inf"),
        ValueError,
        r"labels_tr\.csv, line 2: expected one integer label, got 'inf'",
    ),
    "text label": (
        replace_line("labels_te.csv", 1, "case"),
        ValueError,
        r"labels_te\.csv, line 1: expected one integer label, got 'case'",
    ),
    "label not trained": (
        replace_line("labels_te.csv", 3, "4"),
        ValueError,
        r"labels_te\.csv, label 3: expected one of the training labels \[1, 2, 5\], got 4",
    ),
    "one class": (
        lambda f: [
            (f / f"labels_{p}.csv").write_text("1\n" * n) for p, n in (("tr", 6), ("te", 3))
        ],
        ValueError,
        r"labels_tr\.csv: expected two classes or more, got only \[1\]",
    ),
    "feature names": (
        lambda f: (f / "2_featname.csv").write_text("a\nb\n"),
        ValueError,
        r"2_featname\.csv: expected 3 names, one per column of the view's tables, got 2",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_mogonet_refuses(fault: str, tmp_path: Path) -> None:
    change, error, message = FAULTS[fault]
    change(write_mogonet(tmp_path))
    with pytest.raises(error, match=message):
        load_mogonet(tmp_path)


def test_mogonet_refuses_what_is_no_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such folder; expected"):
        load_mogonet(tmp_path / "absent")
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="is a file; give the folder around it"):
        load_mogonet(tmp_path / "file")


@pytest.mark.skipif(
    not ROSMAP.is_dir(), reason="no ROSMAP data; set DEQFUSE_ROSMAP to its folder to run this"
)
def test_mogonet_reads_rosmap() -> None:
    train, test = load_mogonet(ROSMAP)
    assert train.widths == test.widths == (200, 200, 200)
    assert (train.num_rows, test.num_rows) == (245, 106)
    assert (train.labels.bincount() + test.labels.bincount()).tolist() == [169, 182]
