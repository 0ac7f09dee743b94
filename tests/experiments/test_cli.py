"""The command line: a whole small run, what it writes or refuses to, Ctrl-C, bad input."""

from __future__ import annotations

import json
import math
import re
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from data_cases import write_mogonet

from deqfuse import ConvergenceWarning
from deqfuse.cli.main import main
from deqfuse.cli.options import SHELLS
from deqfuse.experiments import metrics, training
from deqfuse.experiments.comparison import KINDS, Run
from deqfuse.experiments.comparison_report import PICTURES
from deqfuse.experiments.comparison_tables import comparison_text
from deqfuse.experiments.measurements import Curve
from deqfuse.reports.folder import MANIFEST, OutputFolder, OutputRefused
from deqfuse.reports.writer import HTML

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def quick_report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of one quick demo, run in this process."""
    out = tmp_path_factory.mktemp("demo") / "report"
    assert main(["demo", "--quick", "--out", str(out)]) == 0
    return out


# --- a whole run ---


def test_demo_writes_its_report(quick_report: Path) -> None:
    assert {path.name for path in quick_report.iterdir()} == {*HTML.files, *PICTURES, MANIFEST}
    for name in PICTURES:
        assert (quick_report / name).read_bytes().startswith(PNG)
    results = json.loads((quick_report / "results.json").read_text())
    assert [run["fusion"] for run in results["runs"]] == [
        "concatenation",
        "weighted sum",
        "Pro-Fusion",
        "5 tied steps",
        "DEQ Fusion",
    ]
    assert results["gradient_check"]["worst"] <= 1e-8
    assert results["gradient_check"]["gradients"] > 40
    for values in results["noise_accuracy"].values():
        assert torch.tensor(values).shape == (1, 6, 5)  # seeds, views, levels


def test_page_opens_offline(quick_report: Path) -> None:
    """Everything the page loads is inside it; the only links left are text."""
    loads: list[str] = []

    class Loads(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            assert tag not in ("script", "link", "iframe")
            loads.extend(v or "" for k, v in attrs if k in ("src", "href", "srcset", "data"))

    page = (quick_report / "index.html").read_text(encoding="utf-8")
    Loads().feed(page)
    assert len(loads) == 3
    assert all(load.startswith("data:image/png;base64,") for load in loads)
    assert "url(" not in page
    assert "@import" not in page
    for text in ("DEQ Fusion", "converged", "deqfuse demo --quick", torch.__version__, "10.24432"):
        assert text in page


def test_undefined_metrics_are_shown_as_missing(tmp_path: Path) -> None:
    """A test part with one class only has no AUC; JSON knows no NaN."""
    write_mogonet(tmp_path / "data", classes=2)
    (tmp_path / "data" / "labels_te.csv").write_text("1\n" * 10)
    arguments = ["train", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "out")]
    assert main([*arguments, "--seeds", "2", "--epochs", "1"]) == 0
    results = (tmp_path / "out" / "results.json").read_text()
    assert json.loads(results, parse_constant=pytest.fail)["runs"][0]["test"]["auc"] is None


def test_log_is_plain_text_without_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_mogonet(tmp_path / "data", classes=2)
    arguments = ["train", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "out")]
    assert main([*arguments, "--quick"]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "\r" not in out
    assert "Training ..." in out
    for column in ("accuracy %", "F1 %", "AUC %", "ms/epoch"):
        assert column in out
    assert (tmp_path / "out" / "index.html").is_file()


def test_rerun_replaces_its_own_files_only(quick_report: Path, tmp_path: Path) -> None:
    folder = OutputFolder(tmp_path / "report")
    files = {path.name: path.read_bytes() for path in quick_report.iterdir()}
    del files[MANIFEST]
    folder.write(files)
    (tmp_path / "report" / "notes.txt").write_text("mine")
    folder.write({**files, "index.html": b"new"})
    assert (tmp_path / "report" / "index.html").read_bytes() == b"new"
    assert (tmp_path / "report" / "notes.txt").read_text() == "mine"


# --- refusals ---


def _foreign_folder(out: Path) -> None:
    out.mkdir()
    (out / "thesis.tex").write_text("mine")


def _foreign_file_beside_ours(out: Path) -> None:
    OutputFolder(out).write({"results.json": b"{}"})
    (out / "index.html").write_text("mine")


def _changed_file(out: Path) -> None:
    OutputFolder(out).write({"index.html": b"page"})
    (out / "index.html").write_text("page with my notes")


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (_foreign_folder, "is not empty and was not written by deqfuse"),
        (_foreign_file_beside_ours, r"index\.html was not written by deqfuse"),
        (_changed_file, r"index\.html was changed since deqfuse wrote it"),
        (lambda out: out.write_text("file"), "out is a file"),
    ],
)
def test_demo_refuses_to_overwrite(
    prepare: Callable[[Path], object],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    prepare(out)
    before = snapshot(tmp_path)
    assert main(["demo", "--quick", "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert re.search(rf"^deqfuse demo: .*{message}.*Choose another folder with --out\.\n$", error)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--device", "toaster"], "--device: expected cpu or cuda, got 'toaster'"),
        (["demo", "--device", "meta"], "--device: expected cpu or cuda, got 'meta'"),
        (["demo", "--device", "cuda:99"], "--device cuda:99: this machine or this build of torch"),
        (["train", "--data", "nowhere"], "nowhere: no such folder"),
    ],
)
def test_user_errors_are_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["dance"], "invalid choice: 'dance'"),
        (["train"], "the following arguments are required: --data"),
        (["demo", "--seeds", "0"], "expected a whole number >= 1, got '0'"),
        (["demo", "--epochs", "many"], "expected a whole number >= 1, got 'many'"),
        (["train", "--data", ".", "--validation", "1.5"], "expected a number between 0 and 1"),
        (["demo", "--seed", "2"], "unrecognized arguments: --seed"),  # no guessing of options
    ],
)
def test_options_are_checked(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(arguments)
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [
        [], ["demo"], ["train"], ["info"], ["completion"], ["experiment"],
        ["experiment", "synthetic"], ["experiment", "numerals"], ["experiment", "omics"],
        ["experiment", "audiovisual"], ["experiment", "finance"], ["experiment", "mmimdb"],
        ["experiment", "mosi"],
    ],
)  # fmt: skip
def test_help_reads(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main([*command, "--help"])
    assert exit_info.value.code == 0
    out = capsys.readouterr().out
    assert "usage: deqfuse" in out
    assert max(map(len, out.splitlines())) <= 100
    assert re.search(rf"^  (eval \"\$\()?{' '.join(['deqfuse', *command])} ?", out, re.MULTILINE)


def test_what_is_to_come_is_said_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "deqfuse.cli.commands", None)  # what loads the rest
    monkeypatch.delattr("deqfuse.cli.commands", raising=False)
    with pytest.raises(ModuleNotFoundError):
        main(["demo"])
    assert "about 2 minutes" in capsys.readouterr().out.splitlines()[0]


@pytest.mark.parametrize("shell", SHELLS)
def test_shells_complete_commands_and_options(
    shell: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("shtab", reason="needs shtab: pip install 'deqfuse[cli]'")
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert "experiment" in script
    assert "split-seed" in script


def test_without_shtab_completion_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["completion", "bash"]) == 2
    assert "needs the Python package shtab" in capsys.readouterr().err


def test_version_and_info(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(["--version"])
    assert exit_info.value.code == 0
    assert re.match(r"deqfuse \S+\n", capsys.readouterr().out)
    assert main(["info"]) == 0
    assert torch.__version__ in capsys.readouterr().out


def test_help_does_not_import_plotting() -> None:
    code = (
        "import sys\nfrom deqfuse.cli.main import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "sys.exit(any(name in sys.modules for name in ('matplotlib', 'rich')))"
    )
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], check=True, timeout=120, capture_output=True
    )


def test_missing_package_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [*sys.modules]:
        if name.partition(".")[0] == "rich" or name.startswith("deqfuse.cli."):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.delattr("deqfuse.cli.commands", raising=False)
    assert main(["demo", "--quick"]) == 2
    told = capsys.readouterr().err
    assert "needs the Python package rich" in told
    assert "pip install 'deqfuse[cli]'" in told


# --- Ctrl-C ---


def test_interrupted_process_ends_cleanly(tmp_path: Path) -> None:
    # Where the tests run in the background, Ctrl-C is ignored, and child processes inherit that.
    script = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from deqfuse.cli.main import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-W", "ignore", "-u", "-c", script, "demo"]
    with subprocess.Popen(
        [*command, "--epochs", "100000", "--out", str(tmp_path / "out")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert any(line.startswith("Training") for line in process.stdout)
        time.sleep(0.5)  # somewhere in the middle of training
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error == "\ndeqfuse: interrupted, no report written.\n"
    assert not (tmp_path / "out").exists()


def test_interrupted_writing_leaves_the_old_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = OutputFolder(tmp_path / "out")
    folder.write({"a": b"1", "b": b"1"})
    before = snapshot(tmp_path)

    def stop(path: Path, content: bytes) -> int:
        if path.name.startswith(".b"):
            raise KeyboardInterrupt
        with path.open("wb") as file:
            return file.write(content)

    monkeypatch.setattr(Path, "write_bytes", stop)
    with pytest.raises(KeyboardInterrupt):
        folder.write({"a": b"2", "b": b"2"})
    assert snapshot(tmp_path) == before
    with pytest.raises(KeyboardInterrupt):
        OutputFolder(tmp_path / "new").write({"b": b"2"})
    assert not (tmp_path / "new").exists()


def test_full_disk_is_a_user_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path, content: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(OutputRefused, match=r"cannot write the report to .*No space left"):
        OutputFolder(tmp_path / "new").write({"b": b"2"})
    assert not (tmp_path / "new").exists()


# --- parts ---


def test_metrics_against_hand_counted_values() -> None:
    labels = torch.tensor([0, 0, 0, 1, 1, 2])
    predicted = torch.tensor([0, 0, 1, 1, 2, 2])
    f1, support = metrics.f1_scores(predicted, labels, 4)
    assert f1.tolist() == pytest.approx([0.8, 0.5, 2 / 3, 0.0])
    assert support.tolist() == [3, 2, 1, 0]
    logits = torch.nn.functional.one_hot(predicted, 3).double()
    scores = metrics.evaluate_metrics(logits, labels)
    assert scores["accuracy"] == pytest.approx(4 / 6)
    assert scores["macro_f1"] == pytest.approx((0.8 + 0.5 + 2 / 3) / 3)
    assert scores["weighted_f1"] == pytest.approx((3 * 0.8 + 2 * 0.5 + 2 / 3) / 6)


def test_calibration_error_against_hand_counted_values() -> None:
    """Of 15 bins, 0.61 to 0.65 share one and 0.9 has its own."""
    sure = torch.tensor([0.61, 0.65, 0.65, 0.9]).double()
    logits = torch.stack([sure, 1 - sure], 1).log()
    labels = torch.tensor([0, 0, 1, 1])
    expected = (abs(0.61 + 0.65 + 0.65 - 2) + abs(0.9 - 0)) / 4
    assert metrics.calibration_error(logits, labels) == pytest.approx(expected)
    one = metrics.calibration_error(logits, labels, bins=1)
    assert one == pytest.approx(abs(0.61 + 0.65 + 0.65 + 0.9 - 2) / 4)
    scores = metrics.probability_metrics(logits, labels)
    assert scores["ece"] == pytest.approx(expected)
    chances = 0.61 * 0.65 * (1 - 0.65) * (1 - 0.9)
    assert scores["cross_entropy"] == pytest.approx(-math.log(chances) / 4)
    certain = torch.tensor([[0.0, 500.0]])  # probability 1: the last bin holds it
    assert metrics.calibration_error(certain, torch.tensor([1])) == 0.0


def test_auc_counts_pairs_and_halves_ties() -> None:
    scores = torch.tensor([0.1, 0.4, 0.4, 0.8])
    positive = torch.tensor([False, False, True, True])
    assert metrics.auc(scores, positive) == pytest.approx(3.5 / 4)
    assert metrics.auc(-scores, positive) == pytest.approx(0.5 / 4)
    nothing = metrics.auc(scores, torch.zeros(4, dtype=torch.bool))
    assert nothing != nothing


def test_rivals_of_the_best_are_listed() -> None:
    """Whoever lies within the spread of the best mean is named with it."""
    scores = {"concat": 0.95, "weighted": 0.949, "progressive": 0.951, "tied": 0.8, "deq": 0.948}
    runs = [
        Run(kind, seed, torch.nn.Identity(), training.History(), {"accuracy": scores[kind.key] + d})  # type: ignore[arg-type]
        for kind in KINDS
        for seed, d in enumerate((-0.005, 0.005))
    ]
    text = comparison_text(runs)
    assert "Pro-Fusion (concatenation, weighted sum and DEQ Fusion within the spread of it)" in text
    assert "lowest: 5 tied steps, 15.1 points below" in text


def test_curve_holds_the_last_residual_of_stopped_rows() -> None:
    nan = float("nan")
    trace = torch.tensor([[0.5, 0.4, 0.3], [nan, 0.2, 0.1], [nan, nan, 0.01]])
    curve = Curve.of("Anderson", "fuse", trace)
    assert curve.median.tolist() == pytest.approx([0.4, 0.2, 0.2])
    assert trace.isnan().sum() == 3  # the caller's trace is left alone


def test_convergence_warnings_are_counted_and_others_pass() -> None:
    def count() -> list[str]:
        with training.collect_warnings(ConvergenceWarning) as messages:
            for category in (ConvergenceWarning, ConvergenceWarning, RuntimeWarning):
                warnings.warn(f"a {category.__name__}", category, stacklevel=1)
        return messages

    with pytest.warns(RuntimeWarning, match="a RuntimeWarning"):
        seen = count()
    assert seen == ["a ConvergenceWarning"] * 2


def snapshot(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
