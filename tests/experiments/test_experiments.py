"""The studies' shared parts: running, resuming, seeding, choosing epochs, the page."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import deqfuse
from deqfuse.cli.main import main
from deqfuse.cli.studies import run_study
from deqfuse.experiments.statistics import describe, mean_error, paired, percent, versus
from deqfuse.experiments.store import TRIALS, TrialStore
from deqfuse.experiments.study import Record, Study, Trial, select
from deqfuse.experiments.synthetic import Size, SyntheticStudy
from deqfuse.reports.errors import UserError
from deqfuse.reports.folder import MANIFEST, OutputFolder, OutputRefused
from deqfuse.reports.page import Picture, Report, Section, Table
from deqfuse.reports.writer import MARKDOWN, write_report


@dataclass
class Draws(Study):
    """Trials that draw one number each; ``fails_at`` stands for whatever stops a run."""

    seeds: int = 4
    scale: float = 1.0
    fails_at: int | None = None
    name = "draws"

    def __post_init__(self) -> None:
        self.ran: list[int] = []

    def settings(self) -> dict[str, Any]:
        return {"scale": self.scale, "shape": (1, 2)}

    def trials(self) -> list[Trial]:
        last = Trial("mean", {"seed": -1}, alone=True)
        return [last, *(Trial(f"seed {seed}", {"seed": seed}) for seed in range(self.seeds))]

    def run(self, trial: Trial) -> dict[str, Any]:
        seed = trial.params["seed"]
        if seed == self.fails_at:
            raise KeyboardInterrupt
        self.ran.append(seed)
        unseeded = torch.rand(()).item()  # the runner seeds what the trial forgets to
        torch.manual_seed(seed)
        return {"drawn": self.scale * torch.rand(()).item(), "unseeded": unseeded}

    def report(self, records: Any) -> Report:
        values = [record.values["drawn"] for record in records]
        table = Table(
            ("trial", "drawn"), tuple((r.key, str(r.values["drawn"])) for r in records), ()
        )
        return Report("Draws", "Numbers.", [Section("All", (), table)], {"drawn": describe(values)})

    def files(self) -> list[str]:
        return []


def run(study: Study, out: Path, jobs: int = 1) -> dict[str, Any]:
    assert run_study(study, OutputFolder(out), jobs, 1, "deqfuse experiment draws") == 0
    return stored(out)


def stored(out: Path) -> dict[str, Any]:
    """Key -> values of the finished trials."""
    lines = [line for line in (out / TRIALS).read_text().splitlines() if "key" in line]
    return {record["key"]: record["values"] for record in map(json.loads, lines)}


# --- running and resuming ---


def test_interrupted_study_goes_on_with_the_same_result(tmp_path: Path) -> None:
    whole = run(Draws(), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(Draws(fails_at=2), tmp_path / "resumed")
    assert [*stored(tmp_path / "resumed")] == ["seed 0", "seed 1"]
    assert not (tmp_path / "resumed" / MARKDOWN.page).exists()
    study = Draws()
    assert run(study, tmp_path / "resumed") == whole
    assert study.ran == [2, 3, -1]  # nothing twice; what runs alone comes last
    pages = [(tmp_path / name / MARKDOWN.numbers).read_text() for name in ("whole", "resumed")]
    assert json.loads(pages[0])["drawn"] == json.loads(pages[1])["drawn"]


def test_more_seeds_keep_the_finished_ones(tmp_path: Path) -> None:
    first = run(Draws(seeds=2), tmp_path / "out")
    study = Draws(seeds=3)
    after = run(study, tmp_path / "out")
    assert study.ran == [2]
    assert first.items() <= after.items()


def test_line_cut_off_by_a_kill_is_run_again(tmp_path: Path) -> None:
    whole = run(Draws(), tmp_path / "out")
    path = tmp_path / "out" / TRIALS
    content = path.read_bytes()
    for cut in (len(content) - 5, content.index(b"\n") - 3):  # in the last line, in the first
        path.write_bytes(content[:cut])
        assert run(Draws(), tmp_path / "out") == whole


def test_killed_process_goes_on(tmp_path: Path) -> None:
    """A real kill between two trials, and the real command."""
    arguments = ["experiment", "synthetic", "--quick", "--seeds", "1", "--out"]
    assert main([*arguments, str(tmp_path / "whole")]) == 0
    out = tmp_path / "killed"
    environment = {**os.environ, "PYTHONPATH": str(Path(deqfuse.__file__).parents[1])}
    command = [sys.executable, "-W", "ignore", "-m", "deqfuse_command", *arguments, str(out)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment) as process:
        path = out / TRIALS
        while not path.exists() or path.read_bytes().count(b"\n") < 4:
            assert process.poll() is None
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    done = len(stored(out)) if path.read_bytes().endswith(b"\n") else 2
    assert 2 <= done < len(stored(tmp_path / "whole"))
    assert main([*arguments, str(out)]) == 0
    assert stored(out) == stored(tmp_path / "whole")


def test_processes_change_nothing(tmp_path: Path) -> None:
    study = SyntheticStudy(
        seeds=2, sizes=(Size(3, 20, 8),), etas=(0.0, 1.0), sigmas=(0.0, 1.0), more=(), steps=2
    )
    alone = run(study, tmp_path / "alone")
    assert run(study, tmp_path / "together", jobs=2) == alone


def test_random_state_of_the_caller_is_left_alone(tmp_path: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = run(Draws(), tmp_path / "a")
    assert torch.equal(torch.rand(3), expected)
    assert run(Draws(), tmp_path / "b") == first


def test_interrupt_says_that_trials_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(self: SyntheticStudy, trial: Trial) -> dict[str, Any]:
        raise KeyboardInterrupt

    monkeypatch.setattr(SyntheticStudy, "run", stop)
    assert main(["experiment", "synthetic", "--quick", "--out", str(tmp_path / "out")]) == 130
    assert "no report written. Finished trials are kept." in capsys.readouterr().err


# --- refusals ---


def test_other_settings_are_refused(tmp_path: Path) -> None:
    run(Draws(), tmp_path)
    with pytest.raises(UserError, match=r"was begun with scale = 1\.0, this command has 2\.0"):
        run(Draws(scale=2.0), tmp_path)
    other = SyntheticStudy()
    with pytest.raises(UserError, match="holds the study 'draws', not 'synthetic'"):
        run(other, tmp_path)
    (tmp_path / TRIALS).write_text("no trials\n")
    with pytest.raises(UserError, match="expected the trials of `deqfuse experiment draws`"):
        run(Draws(), tmp_path)


def test_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    run(Draws(), tmp_path)
    (tmp_path / TRIALS).write_bytes(b"\xff\xfe\x00\n")
    with pytest.raises(UserError, match="expected the trials of `deqfuse experiment draws`"):
        run(Draws(), tmp_path)


def test_second_run_in_the_folder_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    run(Draws(seeds=2), tmp_path)
    before = (tmp_path / TRIALS).read_bytes()
    with TrialStore(tmp_path) as other:
        other.load(Draws())
        with pytest.raises(UserError, match="another process is running this study"):
            run(Draws(), tmp_path)
    assert (tmp_path / TRIALS).read_bytes() == before
    run(Draws(), tmp_path)


def test_runs_are_recorded(tmp_path: Path) -> None:
    """Every trial knows its run; a page that is only written again keeps the runs' facts."""
    run(Draws(seeds=2), tmp_path)
    run(Draws(seeds=3), tmp_path)
    run(Draws(seeds=3), tmp_path)
    lines = [json.loads(line) for line in (tmp_path / TRIALS).read_text().splitlines()]
    assert sum("key" not in line for line in lines) == 3  # settings, two runs
    trials = {line["key"]: line for line in lines if "key" in line}
    assert [trials[f"seed {i}"]["run"] for i in range(3)] == [0, 0, 1]
    assert 0 <= trials["seed 0"]["elapsed"] <= trials["seed 1"]["elapsed"]
    page = (tmp_path / MARKDOWN.page).read_text()
    for text in ("run 1, trials", "run 2, trials", "wall time", "page written"):
        assert text in page


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(OutputRefused, match="was not written by deqfuse"):
        run(Draws(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_nan_is_not_written(tmp_path: Path) -> None:
    with TrialStore(tmp_path) as store:
        store.begin(Draws(), {})
        with pytest.raises(ValueError, match="not JSON compliant"):
            store.append(Record("seed 0", {}, 1.0, {"auc": float("nan")}))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: NAME"),
        (["dance"], "invalid choice: 'dance'"),
        (["omics"], "the following arguments are required: --data"),
        (["audiovisual"], "the following arguments are required: --images, --audio"),
        (["numerals", "--jobs", "0"], "expected a whole number >= 1, got '0'"),
        (["omics", "--learning-rates", "1e-3", "-1"], "expected a number > 0, got '-1'"),
    ],
)
def test_options_are_checked(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(["experiment", *arguments])
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["omics"], ["audiovisual"]])
def test_help_reads(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(["experiment", *arguments, "--help"])
    assert exit_info.value.code == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 100


# --- numbers and page ---


def test_statistics() -> None:
    assert describe([1.0, 3.0]) == {"mean": 2.0, "std": 2**0.5, "values": [1.0, 3.0]}
    assert describe([None])["mean"] is None
    assert percent([0.5, 0.7]) == "60.0 ± 14.1"
    assert percent([0.5, None]) == "-"
    assert versus([0.5, 0.75, 0.5], [0.25, 0.75, 0.0], 100) == "+25.0 ± 14.4 (2 up, 0 down)"
    assert mean_error([0.5, 0.7], 1, 100) == "60.0 ± 10.0"
    assert mean_error([0.5, None]) == "-"
    result = paired([0.5, 0.75, 0.5], [0.25, 0.75, 0.0], 100)
    assert result is not None
    assert result.interval() == "+25.0 [-3.9, +53.9]"


def test_page_has_tables_and_pictures(tmp_path: Path) -> None:
    table = Table(("a", "b"), (("x|y", "1"),), ("A note.",))
    picture = Picture(b"png", "Time against R", "Caption.")
    report = Report("Title", "Lead.", [Section("S", ("P.",), table, picture)], {"a": math.nan})
    page = write_report(OutputFolder(tmp_path / "out"), report, {"os": "x"}, MARKDOWN).read_text()
    assert (tmp_path / "out" / "time-against-r.png").read_bytes() == b"png"
    numbers = json.loads((tmp_path / "out" / MARKDOWN.numbers).read_text())
    assert numbers == {"a": None, "facts": {"os": "x"}}  # JSON knows no NaN
    for text in (
        "# Title",
        "## S",
        "| a | b |\n|---|---:|\n| x\\|y | 1 |",
        "A note.",
        "![Time against R](time-against-r.png)",
        "- os: `x`",
    ):
        assert text in page


def test_select_matches_parameters() -> None:
    records = [Record(str(i), {"a": i, "b": [i]}, 0.0, {}) for i in range(3)]
    assert select(records, a=1, b=[1]) == [records[1]]
    assert select(records, c=1) == []


def test_report_folder_holds_what_it_says(tmp_path: Path) -> None:
    run(Draws(), tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {MARKDOWN.page, MARKDOWN.numbers, TRIALS, MANIFEST}
    page = (tmp_path / MARKDOWN.page).read_text()
    assert "deqfuse experiment draws" in page
    assert "5 trials" in page
    summary = json.loads((tmp_path / MARKDOWN.numbers).read_text(), parse_constant=pytest.fail)
    assert summary["settings"]["scale"] == 1.0
