"""Rows that lack views: in the models, in `deqfuse train`, in the studies."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from data_cases import empty_lines, with_ids, write_mogonet
from torch import Tensor, nn

from deqfuse import Outcome
from deqfuse.cli.main import main
from deqfuse.data import MultiviewData
from deqfuse.experiments import absence, numerals
from deqfuse.experiments.mmdynamics import MMDynamics
from deqfuse.experiments.models import LABELS, MASKED, FusionClassifier
from deqfuse.experiments.study import Record
from deqfuse.experiments.training import evaluate

EXAMPLE = Path(__file__).parents[2] / "examples" / "missing_modalities.py"
WIDTHS = (4, 6, 5)
ABSENT = {0: [1], 1: [0, 2], 3: [2]}  # row: views


def batch(rows: int = 7) -> MultiviewData:
    generator = torch.Generator().manual_seed(0)
    views = [torch.randn(rows, n, generator=generator) for n in WIDTHS]
    for row, lacking in ABSENT.items():
        for view in lacking:
            views[view][row] = torch.nan
    return MultiviewData(views, torch.arange(rows) % 3, ("a", "b", "c"), ("0", "1", "2"))


def model_of(key: str, **how: Any) -> FusionClassifier:
    torch.manual_seed(0)
    return FusionClassifier(key, WIDTHS, 3, **how).eval()


# --- models ---


@pytest.mark.parametrize("fill", ["mean", "zeros"])
@pytest.mark.parametrize("key", [*LABELS, "progressive"])
def test_models_train_on_rows_that_lack_views(key: str, fill: Any) -> None:
    model, data = model_of(key, fill=fill, modality_dropout=0.4).train(), batch()
    loss, info = model.loss(data)
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert info is None or info.converged.all()


@pytest.mark.parametrize("key", MASKED)
def test_masked_fusions_leave_out_what_is_absent(key: str) -> None:
    """The answer is the head's of the fusion with the mask; nothing stands in for a view."""
    model, data = model_of(key), batch()
    logits, _ = model.logits(data.views)
    z = model.fusion(  # type: ignore[misc]
        model.encode(batch().views), present=data.present
    )
    torch.testing.assert_close(logits, model.head(z))
    # Not what zeros or the mean in its place would give.
    filled = [torch.where(view.isnan(), 0.0, view) for view in data.views]
    given, _ = model.logits(filled)
    whole = data.present.all(1)
    torch.testing.assert_close(logits[whole], given[whole])
    assert (logits[~whole] - given[~whole]).abs().amax(1).min() > 1e-3


@pytest.mark.parametrize("key", [k for k in [*LABELS, "progressive"] if k not in MASKED])
def test_the_others_get_the_mean_or_zeros(key: str) -> None:
    """The mean of standardised features is 0; zeros stand for the encoding, in every step."""
    model, data = model_of(key), batch()
    filled = [torch.where(view.isnan(), 0.0, view) for view in data.views]
    mean, _ = model.logits(data.views)
    torch.testing.assert_close(mean, model.logits(filled)[0])
    model.fill = "zeros"
    zeros, _ = model.logits(data.views)
    whole = data.present.all(1)
    torch.testing.assert_close(zeros[whole], mean[whole])
    assert (zeros[~whole] - mean[~whole]).abs().amax(1).min() > 1e-3
    encoders = model.encoders if model.pro is None else model.pro.encoders
    for encoder, view, here in zip(encoders, data.views, data.present.T, strict=True):
        assert (encoder(view + 1.5)[~here] == 0).all()  # also with a context added


def test_cells_of_absent_views_have_no_steps_to_count() -> None:
    model, data = model_of("deq"), batch()
    few = data.rows(torch.tensor([1] * 6))  # one view of three: most cells have nothing to solve
    assert evaluate(model, few)["cells_nfe"][0] > 1


def mm_dynamics(key: str, **how: Any) -> MMDynamics:
    torch.manual_seed(0)
    means = [torch.full((n,), 0.5) for n in WIDTHS]
    return MMDynamics(WIDTHS, 3, key, 16, means, **how).eval()


@pytest.mark.parametrize("fill", ["mean", "zeros"])
@pytest.mark.parametrize("key", ["concat", "deq"])
def test_a_views_own_loss_is_that_of_the_rows_that_have_it(key: str, fill: Any) -> None:
    model, data = mm_dynamics(key, fill=fill), batch()
    expected = F.cross_entropy(model.logits(data.views)[0], data.labels)
    for k, view in enumerate(data.views):
        x, labels = view[data.present[:, k]], data.labels[data.present[:, k]]
        gate = model.gates[k](x).sigmoid()
        encoding = model.encoders[k](x * gate).relu()
        own = model.classifiers[k](encoding)
        of_truth = own.softmax(1)[torch.arange(len(labels)), labels]
        expected = expected + gate.mean() + F.cross_entropy(own, labels)
        expected = expected + F.mse_loss(model.confidences[k](encoding)[:, 0], of_truth)
    loss, _ = model.loss(data)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_mm_dynamics_fuses_what_is_present() -> None:
    """By the mask; concatenation with the means of the features, or with zeros for the encoding."""
    data = batch()
    filled = [torch.where(view.isnan(), 0.5, view) for view in data.views]
    mean = mm_dynamics("concat")
    torch.testing.assert_close(mean.logits(data.views)[0], mean.logits(filled)[0])
    zeros = mm_dynamics("concat", fill="zeros")
    lacking = zeros.logits(data.views)[0][0]  # the row that has the views 0 and 2
    with torch.no_grad():
        zeros.head.weight[:, 16:32] = 0  # where the encoding of view 1 goes in
    torch.testing.assert_close(lacking, zeros.logits(filled)[0][0])
    deq = mm_dynamics("deq")
    logits, info = deq.logits(data.views)
    assert info is not None
    assert (info.cells.outcome == Outcome.ABSENT).sum() == 4
    assert (logits - deq.logits(filled)[0]).abs().amax(1)[[*ABSENT]].min() > 1e-3


# --- measurements ---


class Counts(nn.Module):
    """Right where a row has more than one view."""

    def logits(self, views: Sequence[Tensor]) -> tuple[Tensor, None]:
        count = torch.stack([~v.isnan().all(1) for v in views], 1).sum(1)
        return F.one_hot((count <= 1).long(), 2).float(), None


def complete(rows: int = 50) -> MultiviewData:
    views = [torch.ones(rows, n) for n in WIDTHS]
    return MultiviewData(views, torch.zeros(rows, dtype=torch.int64), ("a", "b", "c"), ("0", "1"))


def test_views_are_left_out_at_random_the_same_for_every_model() -> None:
    data = complete(600)
    masks = [absence.without_views(data, count, seed=3).present for count in range(3)]
    for count, mask in enumerate(masks):
        assert ((~mask).sum(1) == count).all()
        assert torch.equal(mask, absence.without_views(data, count, seed=3).present)
    assert not (masks[2] & ~masks[1]).any()  # what is absent stays absent
    shares = masks[1].double().mean(0)
    torch.testing.assert_close(shares, torch.full_like(shares, 2 / 3), rtol=0, atol=0.06)
    assert not torch.equal(masks[1], absence.without_views(data, 1, seed=4).present)


def test_curve_and_patterns() -> None:
    assert absence.absence_curve(Counts(), complete(), seed=0) == [1.0, 1.0, 0.0]
    data = complete(6)
    for row in (0, 1):
        data.views[0][row] = torch.nan
    data.views[0][2], data.views[2][2] = torch.nan, torch.nan
    assert absence.pattern_accuracy(Counts(), data) == {
        "a+b+c": (3, 1.0), "b+c": (2, 1.0), "b": (1, 0.0)
    }  # fmt: skip


def test_section_compares_with_the_baseline() -> None:
    """Seed by seed, over one absent view and more; the same training."""
    curves = {
        ("concat", False): {"zeros": [0.9, 0.5, 0.3], "mean": [0.9, 0.6, 0.4]},
        ("deq", False): {"mask": [0.9, 0.8, 0.5]},
        ("concat", True): {"zeros": [0.9, 0.7, 0.6], "mean": [0.9, 0.7, 0.6]},
        ("deq", True): {"mask": [0.9, 0.6, 0.5]},
        ("weighted", False): {"mask": [0.9, 0.8, 0.5]},
        ("weighted", True): {"mask": [0.9, 0.7, 0.6]},
    }
    records = [
        Record(
            trial.key,
            trial.params,
            1.0,
            {
                "curves": {
                    fill: [v + 0.01 * trial.params["seed"] for v in values]
                    for fill, values in curves[
                        trial.params["absent"], trial.params["dropout"]
                    ].items()
                }
            },
        )
        for trial in absence.absence_trials(("concat", "weighted", "deq"), LABELS, seeds=3)
    ]
    section = absence.absence_section(records, LABELS, "Method.")
    assert section.table is not None
    rows = {row[:3]: row[3:] for row in section.table.rows}
    assert len(rows) == 8
    masked = rows["DEQ Fusion", "mask", "complete rows"]
    assert masked == (
        "91.0 ± 1.0", "81.0 ± 1.0", "51.0 ± 1.0", "66.0 ± 1.0", "+15.0 ± 0.0 (3 up, 0 down)",
        "+0.0 ± 0.0 (0 up, 0 down)",
    )  # fmt: skip
    assert rows["concatenation", "training mean", "complete rows"][-2] == "-"
    assert rows["weighted sum", "mask", "complete rows"][-1] == "-"
    assert section.paragraphs[1].endswith(
        "Trained with complete rows, better: weighted sum (mask), DEQ Fusion (mask); complete "
        "rows, worse: concatenation (zeros); modality dropout, better: none; modality dropout, "
        "worse: DEQ Fusion (mask)."
    )
    assert section.paragraphs[2].endswith(
        "(mask). Trained with complete rows, better: none; complete rows, worse: concatenation "
        "(zeros), concatenation (training mean); modality dropout, better: none; modality "
        "dropout, worse: DEQ Fusion (mask)."
    )
    assert section.picture is not None
    assert section.picture.name == absence.FILE


@pytest.mark.parametrize("key", ["concat", "deq"])
def test_trial_of_a_study(key: str) -> None:
    """The same curve every time; with complete rows the accuracy of the study's own trial."""
    recipe = replace(numerals.RECIPE, epochs=2)
    whole = numerals.NumeralsStudy(1, recipe, (100,), held_rows=50, models=("concat", "deq"))
    trials = whole.trials()
    mine = [t for t in trials if t.params.get("absent") == key]
    assert [t.params["dropout"] for t in mine] == [False, True]
    found = [whole.run(trial)["curves"] for trial in mine]
    expected = {"mask"} if key == "deq" else {"zeros", "mean"}
    assert [*map(set, found)] == [expected, expected]
    assert whole.run(mine[1])["curves"] == found[1]
    own = {"rows": 100, "model": key, "seed": 0}
    reference = next(t for t in trials if dict(t.params) == own)
    score = whole.run(reference)["test"]["accuracy"]
    assert {curve[0] for curve in found[0].values()} == {score}


# --- the command line ---


def train(folder: Path, out: Path, *options: str) -> int:
    arguments = ["train", "--data", str(folder), "--out", str(out)]
    return main([*arguments, "--seeds", "1", "--epochs", "2", *options])


def test_train_reports_accuracy_per_set_of_views(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_mogonet(tmp_path / "data")
    empty_lines(folder / "1_tr.csv", [3, 9, 39])
    empty_lines(folder / "1_te.csv", [2, 9], ",,,,")
    empty_lines(folder / "2_te.csv", [4])
    assert train(folder, tmp_path / "out") == 0
    told, page = capsys.readouterr().out, (tmp_path / "out" / "index.html").read_text()
    for text in (" ".join(told.split()), page):
        assert "of the training and 15.0% of the test rows" in text
        assert "mean of the view" in text
        assert "the rows that have these views and no other" in text
    lines = [line.split() for line in told.splitlines()]
    assert [line[2] for line in lines if line[:1] == ["1+2"]] == ["7"]
    assert "Accuracy per set of views" in page
    for run in json.loads((tmp_path / "out" / "results.json").read_text())["runs"]:
        sets = run["test_per_set_of_views"]
        assert {name: entry["rows"] for name, entry in sets.items()} == {"1+2": 7, "2": 2, "1": 1}
        hits = sum(entry["rows"] * entry["accuracy"] for entry in sets.values())
        assert hits / 10 == pytest.approx(run["test"]["accuracy"])


def test_train_without_absent_views_says_nothing_of_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(write_mogonet(tmp_path / "data"), tmp_path / "out") == 0
    assert "Absent" not in capsys.readouterr().out
    assert "per set of views" not in (tmp_path / "out" / "index.html").read_text()


def test_train_joins_views_by_ids(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Lines that are not there do what empty ones do."""
    scores = []
    for ids in (False, True):
        folder = write_mogonet(tmp_path / f"data{ids}")
        if ids:
            with_ids(folder)
            for name, row in (("2_tr.csv", 7), ("1_te.csv", 3)):
                lines = (folder / name).read_text().splitlines()
                del lines[row]
                (folder / name).write_text("\n".join(lines[::-1]) + "\n")
        else:
            empty_lines(folder / "2_tr.csv", [7])
            empty_lines(folder / "1_te.csv", [3])
        out = tmp_path / f"out{ids}"
        assert train(folder, out, *(["--ids"] if ids else [])) == 0
        runs = json.loads((out / "results.json").read_text())["runs"]
        scores.append([(run["test"], run["test_per_set_of_views"]) for run in runs])
    assert scores[0] == scores[1]
    capsys.readouterr()
    assert train(tmp_path / "dataTrue", tmp_path / "out") == 2
    assert "no header row; --ids, if lines start with the sample's id." in capsys.readouterr().err


def test_omics_study_wants_complete_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_mogonet(tmp_path / "data")
    empty_lines(folder / "2_te.csv", [4, 5])
    arguments = ["experiment", "omics", "--data", str(folder), "--out", str(tmp_path / "out")]
    assert main(arguments) == 2
    told = capsys.readouterr().err
    assert "2_te.csv, line 5: expected complete data" in told
    assert "there are 2 such lines. Remedy: `deqfuse train`" in told
    assert not (tmp_path / "out").exists()


# --- the example ---


def test_example_learns(capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("missing_modalities", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.main(steps=30) > 0.8
    out = capsys.readouterr().out
    assert "1 views:" in out
    assert "3 views:" in out
