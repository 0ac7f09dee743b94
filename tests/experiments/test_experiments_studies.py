"""The studies: recipes, whole tiny runs, what reads the test rows."""

from __future__ import annotations

import json
import struct
import wave
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from deqfuse.cli.main import main
from deqfuse.data import MultiviewData
from deqfuse.experiments import audiovisual, numerals, omics, synthetic
from deqfuse.experiments.study import Study, Trial

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
    return {"data": root, "images": root, "audio": root / "audio"}


def test_omics_trains_by_the_stated_recipe(folders: dict[str, Path]) -> None:
    """The paper's numbers, and that the models of the study have them."""
    recipe = omics.PAPER
    assert (recipe.learning_rate, recipe.optimizer, recipe.schedule) == (1e-4, "adam", "step")
    assert (recipe.decay_every, recipe.decay_factor, recipe.epochs) == (500, 0.2, 1000)
    assert (recipe.jacobian_weight, recipe.batch_size, recipe.weight_decay) == (20.0, None, 1e-4)
    study = omics.OmicsStudy(folders["data"], seeds=1)
    learning = omics._read(folders["data"])[0]
    for fusion, dropout in (("deq", 0.2), ("deq without dropout", 0.0)):
        model = study._model(learning, fusion)
        assert model.fusion is not None
        assert model.fusion.dropout == dropout
        assert model.fused_gain == 1.0
    assert omics.RELEASED == {"released": "concat", "deq released": "deq"}
    assert study.settings()["dropout"] == 0.5
    released = study._splits([0, 1], 0, hold_out=False)
    assert released.train.num_rows == learning.num_rows
    assert released.validation.num_rows == 0
    assert {t.params["fusion"] for t in study.trials() if t.params.get("views") == [0, 1]} == {
        "released", "deq released", "concat", "deq", "deq without dropout"
    }  # fmt: skip


STUDIES = {
    "synthetic": ([], ["DEQ Fusion", "Pro-Fusion as published", "90%"]),
    "numerals": (
        [],
        ["no combine", "RobustAUC", "Table 10", "solver stops after", "5 of 6 absent"],
    ),
    "omics": (["data"], ["Minus concatenation", "reference", "1+2", "1 of 2 absent"]),
    "audiovisual": (["images", "audio"], ["recording only", "overhead"]),
}


@pytest.mark.parametrize("name", STUDIES)
def test_whole_run(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """A quick run of every study: the page, its pictures, the numbers behind it."""
    wanted, texts = STUDIES[name]
    arguments = [f"--{option}={folders[option]}" for option in wanted]
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
        ["audiovisual", "--images", str(tmp_path), "--audio", str(tmp_path)],
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
    study = omics.OmicsStudy(folders["data"], recipe=replace(omics.PAPER, epochs=20), dim=16)
    learning, test = omics._read(folders["data"])
    patch.setattr(omics, "_read", lambda folder: (learning, scrambled(test)))
    return study, Trial("x", {"views": [0, 1], "fusion": "deq", "seed": 1})


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


def synthetic_case(folders: dict[str, Path], patch: pytest.MonkeyPatch) -> tuple[Study, Trial]:
    study = synthetic.SyntheticStudy(seeds=2, steps=6, evaluate_every=1)
    draw = synthetic.draw_problem

    def other_test_rows(size: synthetic.Size, *arguments: Any) -> synthetic.Problem:
        problem = draw(size, *arguments)
        problem.target[:, size.rows + synthetic.HELD :] += 5
        return problem

    patch.setattr(synthetic, "draw_problem", other_test_rows)
    return study, Trial("x", {"size": list(SIZE), "eta": 1.0, "sigma": 0.0, "model": "pro 2"})


@pytest.mark.parametrize("case", [omics_case, numerals_case, audiovisual_case, synthetic_case])
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
    measured = {"test", "test_mse", "noise", "step_ms", "probes", "residuals", "stopped"}
    decided = {"chosen_epoch", "chosen_step", "validation_accuracy", "validation_mse"}
    assert decided & {*values}
    for name in {*values} - measured:
        assert values[name] == changed[name], name
    assert any(values[name] != changed[name] for name in ("test", "test_mse") if name in values)
