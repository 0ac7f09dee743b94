"""The command line: a whole small run, what it writes or refuses to, Ctrl-C, bad input."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from data_cases import write_mogonet

from deqfuse.cli.main import main
from deqfuse.cli.options import SHELLS
from deqfuse.experiments.comparison_report import PICTURES
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


@pytest.mark.parametrize("command", ["demo", "train"])
def test_what_takes_minutes_is_announced_before_torch_is_loaded(command: str) -> None:
    code = """
import sys
import deqfuse_command
assert not {"deqfuse", "torch"} & set(sys.modules)
sys.modules["deqfuse"] = None  # importing it is an error from here on
sys.argv[0] = "deqfuse"
deqfuse_command.main()
"""
    for arguments, announced in (([], True), (["--help"], False)):
        run = [sys.executable, "-c", code, command, *arguments]
        result = subprocess.run(run, timeout=120, capture_output=True, text=True)
        assert "'deqfuse' is not a package" in result.stderr
        assert result.stdout.startswith("Trains five fusions") == announced


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


def snapshot(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
