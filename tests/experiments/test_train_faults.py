"""`deqfuse train` on data that are a little broken: an answer in words, never a traceback."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from data_cases import as_pandas, cells, reformat, rewrite, tables, write_mogonet
from torch import Tensor, nn

from deqfuse import SolveInfo
from deqfuse.cli.main import main
from deqfuse.data import MultiviewData
from deqfuse.experiments import metrics
from deqfuse.experiments.mmdynamics import MMDynamics
from deqfuse.experiments.models import FusionClassifier
from deqfuse.experiments.training import Recipe, fit


def train(folder: Path, out: Path, *options: str) -> int:
    arguments = ["train", "--data", str(folder), "--out", str(out)]
    return main([*arguments, "--seeds", "1", "--epochs", "1", *options])


# --- twelve data sets ---


def _decimal_commas(folder: Path) -> None:
    reformat(folder, ";", ",")


def _obeyed(folder: Path) -> None:
    """Separated by commas, as an older message asked for, the decimal commas left as they are."""
    reformat(folder, ",", ",")


def _one_feature(folder: Path) -> None:
    for path in tables(folder, "2"):
        rewrite(path, [row[:1] for row in cells(path)], decimal=",")


def _tabs(folder: Path) -> None:
    reformat(folder, "\t", ".")


def _too_large(folder: Path) -> None:
    rows = cells(folder / "1_tr.csv")
    rows[7][2] = "1e39"
    rewrite(folder / "1_tr.csv", rows)


def _outlier(folder: Path) -> None:
    """Within the range as it is, out of it in units of the training rows' spread."""
    for part, scale in (("tr", 1e-9), ("te", 1e30)):
        path = folder / f"2_{part}.csv"
        rewrite(path, [[str(scale * float(row[0])), *row[1:]] for row in cells(path)])


def _dropped_views(folder: Path) -> None:
    for name in ("01_tr.csv", "0_tr.csv", "3_tr.CSV", "mirna_tr.csv"):
        (folder / name).write_bytes((folder / "1_tr.csv").read_bytes())


def _half(folder: Path) -> None:
    (folder / "3_te.csv").write_bytes((folder / "2_te.csv").read_bytes())


def _pandas_header(folder: Path) -> None:
    for path in tables(folder):
        as_pandas(path, header=True, index=True)


def _pandas_index(folder: Path) -> None:
    for path in tables(folder):
        as_pandas(path, header=False, index=True)


def _utf16(folder: Path) -> None:
    path = folder / "2_tr.csv"
    path.write_text(path.read_text(), encoding="utf-16")


def _all_labels_differ(folder: Path) -> None:
    (folder / "labels_tr.csv").write_text("\n".join(map(str, range(40))))


BROKEN: dict[str, tuple[Callable[[Path], None], int, str]] = {
    "decimal commas": (_decimal_commas, 2, "semicolons between them and commas as decimal signs"),
    "decimal commas, obeyed": (_obeyed, 2, "every second may be the decimals of the one before"),
    "one feature": (
        _one_feature,
        2,
        "Remedy: write decimal points first (-1.64), columns in all: 1",
    ),
    "tabs": (_tabs, 2, "got tabs between them. Remedy: separate the cells by commas."),
    "too large": (_too_large, 2, "1_tr.csv, line 8, column 3: expected a number within the range"),
    "outlier": (_outlier, 2, "view 2, column 1: expected values that stay within the range"),
    "dropped views": (_dropped_views, 0, "01_tr.csv, 0_tr.csv, 3_tr.CSV, mirna_tr.csv. Remedy"),
    "half a view": (_half, 2, "3_tr.csv: missing"),
    "pandas header": (_pandas_header, 2, "The empty corner of a header row over row names?"),
    "pandas index": (_pandas_index, 0, "1_tr.csv, column 1: 0, 1, 2, ... numbers the rows"),
    "UTF-16": (_utf16, 2, "2_tr.csv: expected UTF-8 text, got UTF-16. Remedy: save it as"),
    "labels differ": (_all_labels_differ, 2, "40 labels that all differ"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_data_set(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A refusal is one line; what is read in spite of a doubt says so, also in the report."""
    change, code, message = BROKEN[name]
    change(write_mogonet(tmp_path / "data"))
    assert train(tmp_path / "data", tmp_path / "out") == code
    told = capsys.readouterr()
    if code:
        assert message in told.err
        assert told.err.count("\n") == 1
        assert not (tmp_path / "out").exists()
    else:
        assert message in " ".join(told.out.split())
        assert message in (tmp_path / "out" / "index.html").read_text()


# --- few rows, odd names ---


@pytest.mark.parametrize("rows", [1, 3])
def test_few_test_rows_are_enough(
    rows: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_mogonet(tmp_path / "data", test_rows=rows)
    assert train(folder, tmp_path / "out") == 0
    assert f"test rows: {rows}, parameters and inputs" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("name", ["x[old]", "[red]x[/red]", "a:smile:b", "x[/]"])
def test_folder_keeps_its_name(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_mogonet(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert train(Path(name), Path(f"out {name}"), "--quick") == 0
    out = capsys.readouterr().out
    assert f"DEQ Fusion on {name}\n" in out
    assert f"Data: {name}, features" in out
    assert f"Report: out {name}/index.html" in out


def test_study_names_doubts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_mogonet(tmp_path / "data")
    _pandas_index(folder)
    out = tmp_path / "out"
    arguments = ["experiment", "omics", "--data", str(folder), "--quick", "--seeds", "1"]
    assert main([*arguments, "--out", str(out)]) == 0
    for text in (" ".join(capsys.readouterr().out.split()), (out / "README.md").read_text()):
        assert "1_tr.csv, column 1: 0, 1, 2, ... numbers the rows" in text


def test_study_refuses_outliers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_mogonet(tmp_path / "data")
    _outlier(folder)
    arguments = ["experiment", "omics", "--data", str(folder), "--quick", "--seeds", "1"]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 2
    assert "view 2, column 1: expected values that stay within" in capsys.readouterr().err


# --- answers that are not finite ---


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("classes", [2, 3])
def test_metrics_of_non_finite_scores_are_nan(value: float, classes: int) -> None:
    labels = torch.arange(6) % classes
    logits = nn.functional.one_hot(labels, classes).double()
    assert all(score == 1.0 for score in metrics.evaluate_metrics(logits, labels).values())
    logits[2, 0] = value
    scores = metrics.evaluate_metrics(logits, labels)
    assert len(scores) == (5 if classes == 2 else 3)
    scores |= {"ece": metrics.calibration_error(logits, labels)}
    assert all(score != score for score in scores.values())
    up = metrics.auc(torch.tensor([0.0, value, 1.0]), torch.tensor([False, True, True]))
    assert up != up


class Answers(nn.Module):
    """Answers NaN in the first epochs, after that the truth."""

    def __init__(self, broken: int) -> None:
        super().__init__()
        self.broken, self.seen = broken, 0
        self.weight = nn.Parameter(torch.zeros(()))

    def loss(self, batch: object) -> tuple[Tensor, None]:
        return -self.weight, None

    def logits(self, views: Sequence[Tensor]) -> tuple[Tensor, None]:
        self.seen += 1
        answer = torch.tensor([[0.0, 1.0]]).repeat(len(views[0]), 1)
        return answer if self.seen > self.broken else torch.full_like(answer, torch.nan), None


@pytest.mark.parametrize(("broken", "chosen"), [(0, 1), (2, 3), (3, 1)])
def test_epoch_with_finite_answers_is_preferred(broken: int, chosen: int) -> None:
    """The second label is never answered: a finite epoch may score 0 and is better than NaN."""
    data = MultiviewData([torch.zeros(4, 1)], torch.zeros(4, dtype=torch.int64), ("1",), ("0", "1"))
    recipe = Recipe(3, 1.0, 0.0, 9.0, schedule="step")
    history = fit(Answers(broken), data, data, recipe, seed=0)
    assert history.chosen_epoch == chosen
    assert history.values()["validation_accuracy"] == (None if broken == 3 else 0.0)


def _break(patch: pytest.MonkeyPatch, model: type[nn.Module], method: str, key: str = "") -> None:
    """The models (of one key) answer NaN."""
    answer = getattr(model, method)

    def broken(self: nn.Module, *arguments: object) -> tuple[Tensor, SolveInfo | None]:
        logits, info = answer(self, *arguments)
        return (logits * torch.nan if key in ("", getattr(self, "key", "")) else logits), info

    patch.setattr(model, method, broken)


@pytest.mark.parametrize(("key", "label"), [("deq", "DEQ Fusion"), ("concat", "concatenation")])
def test_report_names_models_that_are_not_finite(
    key: str,
    label: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _break(monkeypatch, FusionClassifier, "logits", key)
    folder = write_mogonet(tmp_path / "data")
    # The gradients of a layer whose parameters are NaN cannot be checked.
    assert train(folder, tmp_path / "out", "--seeds", "2") == (1 if key == "deq" else 0)
    told = f"NOT FINITE are the answers of {label}, seed 1 (10); {label}, seed 2 (10)"
    assert told in " ".join(capsys.readouterr().out.split())
    assert told in (tmp_path / "out" / "index.html").read_text()
    results = json.loads(
        (tmp_path / "out" / "results.json").read_text(), parse_constant=pytest.fail
    )
    for run in results["runs"]:
        undefined = run["fusion"] == label
        assert all((score is None) == undefined for score in run["test"].values())


@pytest.mark.parametrize("study", ["numerals", "omics"])
def test_study_names_models_that_are_not_finite(
    study: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = ["experiment", study, "--quick", "--seeds", "1", "--out", str(tmp_path / "out")]
    if study == "omics":
        _break(monkeypatch, MMDynamics, "_fuse")
        arguments += ["--data", str(write_mogonet(tmp_path / "data"))]
        named = "concatenation, seed 0;"
    else:
        _break(monkeypatch, FusionClassifier, "logits", "pro penalised")
        named = r"100 rows, Pro-Fusion, equilibrium, penalty, seed 0\."
    assert main(arguments) == 0
    page = (tmp_path / "out" / "README.md").read_text()
    for text in (" ".join(capsys.readouterr().out.split()), page):
        assert re.search(rf"NOT FINITE are answers .*: .*{named}", text)
