"""The studies: recipes, whole tiny runs, what reads the test rows."""

from __future__ import annotations

import importlib.util
import json
import struct
import wave
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from paper_cases import write_mmimdb, write_mosi, write_prices

from deqfuse.cli.main import main
from deqfuse.data import MultiviewData
from deqfuse.experiments import (
    audiovisual,
    finance,
    mmimdb,
    mosi,
    numerals,
    omics,
    omics_data,
    omics_report,
    stability,
    synthetic,
)
from deqfuse.experiments.mmdynamics import LABELS
from deqfuse.experiments.study import Record, Study, Trial

SIZE = synthetic.Size(dim=3, rows=12, width=8)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Small files in the real formats: MOGONET, MNIST, recordings."""
    root = tmp_path_factory.mktemp("data")
    generator = torch.Generator().manual_seed(0)
    for part, rows in (("tr", 30), ("te", 12)):
        labels = torch.arange(rows) % 2
        (root / f"labels_{part}.csv").write_text("".join(f"{i}\n" for i in labels.tolist()))
        for view in (1, 2):
            table = torch.rand(rows, 4, generator=generator) + labels[:, None]
            lines = [",".join(f"{v:.4f}" for v in row) for row in table.tolist()]
            (root / f"{view}_{part}.csv").write_text("\n".join(lines) + "\n")
    for prefix, rows in (("train", 60), ("t10k", 30)):
        pixels = torch.randint(256, (rows, 28, 28), generator=generator).to(torch.uint8)
        labels = (torch.arange(rows) % 10).to(torch.uint8)
        for name, kind, values in (("images", 3, pixels), ("labels", 1, labels)):
            head = struct.pack(f">2xBB{kind}I", 8, kind, *values.shape)
            path = root / f"{prefix}-{name}-idx{kind}-ubyte"
            path.write_bytes(head + values.numpy().tobytes())
    (root / "audio").mkdir()
    for digit in range(10):
        for number in (0, 5, 10):
            tone = 2000 * torch.sin(torch.arange(2000) * 0.1 * (digit + 1))
            with wave.open(str(root / "audio" / f"{digit}_a_{number}.wav"), "wb") as file:
                file.setnchannels(1)
                file.setsampwidth(2)
                file.setframerate(8000)
                file.writeframes(struct.pack("<2000h", *tone.short().tolist()))
    found = {"data": root, "images": root, "audio": root / "audio", "mosi": root / "mosi_data.pkl"}
    write_mosi(found["mosi"])
    write_prices(root)
    found["prices"] = root
    if importlib.util.find_spec("h5py"):
        found["mmimdb"] = root / "multimodal_imdb.hdf5"
        write_mmimdb(found["mmimdb"])
    return found


def test_omics_gives_every_fusion_the_same_budget(folders: dict[str, Path]) -> None:
    """Every fusion tries all rates with the same epochs; the lowest cross-entropy is kept."""
    recipe = replace(omics.RECIPE, epochs=10, evaluate_every=2)
    study = omics.OmicsStudy(
        folders["data"], 2, recipe, (3e-4, 1e-1), fusions=("paper", "no-gate"), dim=16
    )
    assert [tuple(t.params.values()) for t in study.trials()] == [
        (fusion, seed) for seed in range(2) for fusion in ("concat", "paper", "deq", "no-gate")
    ]
    for trial in study.trials()[:4]:
        values = study.run(trial)
        assert [one["learning_rate"] for one in values["tried"]] == [3e-4, 1e-1]
        assert {one["epochs"] for one in values["tried"]} == {10}
        best = min(values["tried"], key=lambda one: one["validation_cross_entropy"])
        assert values["learning_rate"] == best["learning_rate"]
        assert values["chosen_epoch"] == best["chosen_epoch"]
        assert values["validation_cross_entropy"] == best["validation_cross_entropy"]
        assert len({one["validation_cross_entropy"] for one in values["tried"]}) == 2
    assert study.settings()["learning_rate"] == [3e-4, 1e-1]
    assert (omics.RECIPE.choose_by, omics.RECIPE.jacobian_weight) == ("cross_entropy", 20.0)
    learning = omics_data.read(folders["data"])[0]
    splits = omics_data.split(folders["data"], 0)
    assert splits.validation.num_rows == round(0.2 * learning.num_rows)
    assert splits.train.num_rows + splits.validation.num_rows == learning.num_rows


def of_seeds(name: str, scores: dict[str, list[float]]) -> dict[str, list[Record]]:
    """Trials by fusion that have these test scores, a value per seed."""
    return {
        fusion: [
            Record(f"{fusion} {i}", {}, 0.0, {"test": {"accuracy": 0.5, name: score}})
            for i, score in enumerate(found)
        ]
        for fusion, found in scores.items()
    }


def test_omics_report_says_whether_the_layer_is_below() -> None:
    """The first line, by the paired difference."""

    def lead(ours: list[float], theirs: list[float]) -> str:
        groups = of_seeds("accuracy", {"deq": ours, "concat": theirs})
        return omics_report._lead(groups, {"data": "X"})

    below = lead([0.5, 0.6, 0.7], [0.6, 0.71, 0.8])
    assert below.startswith("On X DEQ Fusion is below concatenation by more than two standard")
    assert "-10.3 ± 0.3 points (mean ± standard error, 3 seeds)" in below
    assert "is not below concatenation" in lead([0.5, 0.7, 0.9], [0.6, 0.71, 0.8])
    assert "is not below, but above, concatenation" in lead([0.9, 0.9, 0.91], [0.6, 0.71, 0.8])
    assert "+10.0 points of accuracy (one seed)" in lead([0.8], [0.7])


def test_omics_report_prefers_low_cross_entropy() -> None:
    scores = {"concat": [1.0, 1.1], "weighted": [0.8, 0.9], "tied": [1.2, 1.31], "deq": [0.8, 1.4]}
    groups = of_seeds("cross_entropy", scores)
    assert omics_report._reading(groups, [*scores])[1] == (
        "Cross-entropy against concatenation, decided beyond two standard errors. Better: weighted "
        "sum. Worse: 5 tied steps. Undecided: DEQ Fusion."
    )


def test_omics_refuses_unknown_fusions(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["experiment", "omics", "--data", str(folders["data"]), "--fusions", "norm", "sum"]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 2
    assert "--fusions: expected some of weighted, base, pro," in (told := capsys.readouterr().err)
    assert "got 'sum'" in told


def test_stability_runs_the_treatments_that_are_asked_for(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["experiment", "stability", "--data", str(folders["data"]), "--out", str(tmp_path)]
    assert main([*arguments, "--treatments", "rate", "radius"]) == 2
    assert "--treatments: expected some of none, jacobian 2," in (told := capsys.readouterr().err)
    assert "got 'radius'" in told
    study = stability.StabilityStudy(folders["data"], 1, treatments=("rate", "norm one"))
    asked = [(trial.params["fusion"], trial.params["treatment"]) for trial in study.trials()]
    assert asked == [
        ("deq", "none"), ("deq", "norm one"), ("deq", "rate"), ("paper", "none"), ("paper", "rate")
    ]  # fmt: skip
    assert len(replace(study, layers=("paper",)).trials()) == 2


def test_omics_ablations_have_a_table_of_their_own(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    arguments = ["experiment", "omics", "--data", str(folders["data"]), "--quick", "--seeds", "1"]
    ablations = ["no-cell", "no-combine", "no-gate"]
    assert main([*arguments, "--fusions", *ablations, "--out", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out" / "README.md").read_text()
    results, after = page.split("## Ablations: difference to DEQ Fusion")
    table = after.split("##")[0]
    for name in ablations:
        label = LABELS[name]
        assert f"| {label} |" in table
        assert f"| {label} |" not in results


STUDIES = {
    "synthetic": ([], ["DEQ Fusion", "Pro-Fusion as published", "90%"]),
    "numerals": (
        [],
        ["no combine", "RobustAUC", "Table 10", "solver stops after", "5 of 6 absent"],
    ),
    "omics": (
        ["data"],
        [
            *("two standard errors", "Minus concatenation", "ECE %", "seeds with rate 0.001"),
            *("1 of 2 absent", "chosen as above", "RobustAUC against concatenation"),
        ],
    ),
    "stability": (["data"], ["radius penalty, weight 1", "left in training", "in the worst seed"]),
    "audiovisual": (["images", "audio"], ["recording only", "overhead"]),
    "finance": (["prices"], ["RobustAUC", "always answering the mean", "F&B", "5% lower error"]),
    "mmimdb": (["data"], ["macro F1", "authors' MM-IMDB code", "left out rather than quoted"]),
    "mosi": (["data"], ["Acc-7", "Corr", "left out rather than quoted"]),
}
needs_h5py = pytest.mark.skipif(not importlib.util.find_spec("h5py"), reason="h5py is missing")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=needs_h5py) if n == "mmimdb" else n for n in STUDIES]
)
def test_whole_run(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """A quick run of every study: the page, its pictures, the numbers behind it."""
    wanted, texts = STUDIES[name]
    found = {**folders, "data": folders.get(name, folders["data"])}
    arguments = [f"--{option}={found[option]}" for option in wanted]
    arguments += ["--robustness"] if name == "omics" else []
    out = tmp_path / "out"
    assert main(["experiment", name, "--quick", *arguments, "--out", str(out)]) == 0
    page = (out / "README.md").read_text()
    for text in ("Machine, versions, command", torch.__version__, "--quick", *texts):
        assert text in page
    assert str(folders["data"]) not in page  # where data lie is nobody's business
    pictures = sorted(out.glob("*.png"))
    assert pictures
    for path in pictures:
        assert path.read_bytes().startswith(b"\x89PNG")
        assert f"]({path.name})" in page
    summary = json.loads((out / "summary.json").read_text(), parse_constant=pytest.fail)
    assert summary["study"] == name


def test_mistakes_in_data_are_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for arguments in (
        ["omics", "--data", "nowhere"],
        ["stability", "--data", "nowhere"],
        ["audiovisual", "--images", str(tmp_path), "--audio", str(tmp_path)],
        ["finance", "--prices", "nowhere"],
        ["mosi", "--data", "nowhere"],
        ["mmimdb", "--data", "nowhere"],
    ):
        assert main(["experiment", *arguments, "--out", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert error.startswith("deqfuse experiment: ")
        assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


# --- the test rows decide nothing ---


def scrambled(data: MultiviewData) -> MultiviewData:
    """Other rows, all of one class: permuted labels would not show in a constant prediction."""
    views, labels = [v.flip(0) * 3 + 1 for v in data.views], torch.zeros_like(data.labels)
    return replace(data, views=views, labels=labels)


def omics_case(folders: dict[str, Path], patch: pytest.MonkeyPatch) -> tuple[Study, Trial]:
    study = omics.OmicsStudy(folders["data"], recipe=replace(omics.RECIPE, epochs=20), dim=16)
    learning, test = omics_data.read(folders["data"])
    patch.setattr(omics_data, "read", lambda folder: (learning, scrambled(test)))
    return study, Trial("x", {"fusion": "deq", "seed": 1})


def stability_case(folders: dict[str, Path], patch: pytest.MonkeyPatch) -> tuple[Study, Trial]:
    recipe = replace(stability.RECIPE, epochs=20)
    study = stability.StabilityStudy(folders["data"], recipe=recipe, dim=16)
    learning, test = omics_data.read(folders["data"])
    patch.setattr(omics_data, "read", lambda folder: (learning, scrambled(test)))
    return study, Trial("x", {"fusion": "deq", "treatment": "radius 1", "seed": 1})


def numerals_case(folders: dict[str, Path], patch: pytest.MonkeyPatch) -> tuple[Study, Trial]:
    recipe = replace(numerals.RECIPE, epochs=2)
    study = numerals.NumeralsStudy(recipe=recipe, train_rows=(100,), held_rows=50)
    whole = numerals._numerals()
    patch.setattr(numerals, "_numerals", lambda: replace(whole, test=scrambled(whole.test)))
    return study, Trial("x", {"rows": 100, "model": "concat", "seed": 1})


def audiovisual_case(folders: dict[str, Path], patch: pytest.MonkeyPatch) -> tuple[Study, Trial]:
    recipe = replace(audiovisual.RECIPE, epochs=2)
    study = audiovisual.AudiovisualStudy(
        folders["images"], folders["audio"], recipe=recipe, rows=(20, 10, 10)
    )
    whole = audiovisual._splits(folders["images"], folders["audio"], (20, 10, 10), 1)
    changed = replace(whole, test=scrambled(whole.test))
    patch.setattr(audiovisual, "_splits", lambda *arguments: changed)
    return study, Trial("x", {"model": "deq", "seed": 1})


def finance_case(folders: dict[str, Path], patch: pytest.MonkeyPatch) -> tuple[Study, Trial]:
    recipe = replace(finance.RECIPE, epochs=2)
    study = finance.FinanceStudy(folders["prices"], recipe=recipe, window=20)
    whole = finance._splits(study.prices, "TECH", 20)
    changed = replace(whole, test=replace(whole.test, labels=whole.test.labels + 1))
    patch.setattr(finance, "_splits", lambda *arguments: changed)
    return study, Trial("x", {"sector": "TECH", "model": "pro 2", "seed": 1})


def mmimdb_case(folders: dict[str, Path], patch: pytest.MonkeyPatch) -> tuple[Study, Trial]:
    recipe = replace(mmimdb.RECIPE, epochs=2)
    study = mmimdb.MmimdbStudy(folders["mmimdb"], recipe=recipe, rows=(40, 20, 20))
    whole = mmimdb._read(study.data, study.rows)
    changed = replace(whole, test=scrambled(whole.test))
    patch.setattr(mmimdb, "_read", lambda *arguments: changed)
    return study, Trial("x", {"model": "released", "seed": 1})


def mosi_case(folders: dict[str, Path], patch: pytest.MonkeyPatch) -> tuple[Study, Trial]:
    study = mosi.MosiStudy(folders["mosi"], recipe=replace(mosi.RECIPE, epochs=2))
    whole = mosi._read(study.data, study.rows)
    changed = replace(whole, test=scrambled(whole.test))
    patch.setattr(mosi, "_read", lambda *arguments: changed)
    return study, Trial("x", {"model": "deq", "seed": 1})


def synthetic_case(folders: dict[str, Path], patch: pytest.MonkeyPatch) -> tuple[Study, Trial]:
    study = synthetic.SyntheticStudy(seeds=2, steps=6, evaluate_every=1)
    draw = synthetic.draw_problem

    def other_test_rows(size: synthetic.Size, *arguments: Any) -> synthetic.Problem:
        problem = draw(size, *arguments)
        problem.target[:, size.rows + synthetic.HELD :] += 5
        return problem

    patch.setattr(synthetic, "draw_problem", other_test_rows)
    return study, Trial("x", {"size": list(SIZE), "eta": 1.0, "sigma": 0.0, "model": "pro 2"})


@pytest.mark.parametrize(
    "case",
    [
        omics_case,
        stability_case,
        numerals_case,
        audiovisual_case,
        finance_case,
        pytest.param(mmimdb_case, marks=needs_h5py),
        mosi_case,
        synthetic_case,
    ],
)
def test_selection_never_reads_the_test_rows(
    case: Callable[..., tuple[Study, Trial]], folders: dict[str, Path]
) -> None:
    """With other test rows only what is measured on them changes."""
    with pytest.MonkeyPatch.context() as patch:
        study, trial = case(folders, patch)
        torch.manual_seed(0)
        changed = study.run(trial)
    torch.manual_seed(0)
    values = study.run(trial)
    times = {"step_ms", "processor_ms", "processor_ms_mean"}
    measured = {
        "test",
        "last_test",
        "test_mse",
        "mean_mse",
        "noise",
        "probes",
        "residuals",
        "stopped",
        *times,
    }
    assert {"chosen_epoch", "chosen_step"} & {*values}
    assert any(name.startswith("validation_") for name in values)
    for name in {*values} - measured:
        assert values[name] == changed[name], name
    assert any(values[name] != changed[name] for name in ("test", "test_mse") if name in values)
