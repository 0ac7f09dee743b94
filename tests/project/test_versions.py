"""`make test-versions` on stand-ins: which pairs run, what is kept of them, when they run again."""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tools import running, versions
from tools.versions import Result

ENDLESS = float("inf")
REPORT = (
    '<testsuites><testsuite name="pytest" tests="9" failures="2" errors="1" skipped="3" time="1"/>'
    "</testsuites>"
)


def stand_in(folder: Path, version: str) -> str:
    """An interpreter that says it has this version."""
    path = folder / f"python{version}"
    path.write_text(f"#!/bin/sh\necho {version}\n")
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, list[str]]]:
    """The calls of ``run``, which pass except with torch 2.13."""
    calls: list[tuple[str, str, list[str]]] = []

    def run(python, torch, folder, torch_pip, tests, limit, wheel) -> Result:
        calls.append((python, torch, list(tests)))
        for made in ("environment", "source"):
            (folder / made).mkdir(parents=True, exist_ok=True)
        return Result("failed" if torch == "2.13" else "passed", "3 | 4", f"{torch}.1", passed=7)

    monkeypatch.setattr(versions, "run", run)
    return calls


def prove(out: Path, asked, found, **given) -> dict[str, Result]:
    options = {"torch_pip": "", "tests": "", "keep": False, "again": False, "limit": ENDLESS}
    options["wheel"] = None
    return versions.prove(asked, found, argparse.Namespace(out=out, **options | given))


def test_the_pairs_are_those_that_the_package_promises() -> None:
    metadata = (running.ROOT / "pyproject.toml").read_text(encoding="utf-8")
    classifiers = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', metadata)
    assert tuple(classifiers) == versions.PYTHONS
    assert f'"torch>={versions.TORCHES[0]}"' in metadata
    pinned = (running.ROOT / "constraints-dev.txt").read_text(encoding="utf-8")
    assert any(f"torch=={torch}." in pinned for torch in versions.TORCHES)


def test_interpreters_are_found_by_name_or_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "path"
    folder.mkdir()
    on_path = stand_in(folder, "3.11")
    Path(stand_in(folder, "3.9")).rename(folder / "python3.12")  # a shim that stands for another
    monkeypatch.setenv("PATH", str(folder))
    assert versions.interpreters([]) == {"3.11": on_path}
    named = stand_in(tmp_path, "3.13")
    assert versions.interpreters([named]) == {"3.11": on_path, "3.13": named}
    with pytest.raises(ValueError, match=r"--python: expected .* 3\.13, got .*, which is 3\.9"):
        versions.interpreters([stand_in(tmp_path, "3.9")])
    with pytest.raises(ValueError, match="got '/no/python', which does not run"):
        versions.interpreters(["/no/python"])


def test_a_run_is_taken_up_where_it_stopped(
    tmp_path: Path, ran: list[tuple[str, str, list[str]]], capsys: pytest.CaptureFixture[str]
) -> None:
    """What has passed is not run again, unless asked or with other tests; the rest is named."""
    asked = [("3.11", "2.11"), ("3.11", "2.13"), ("3.13", "2.11")]
    found = {"3.11": "/python3.11"}
    for _ in range(2):
        assert set(prove(tmp_path, asked, found)) == {"3.11-2.11"}
    assert [torch for _, torch, _ in ran] == ["2.11", "2.13", "2.13"]
    assert not any((tmp_path / "3.11-2.11").iterdir())
    saved = json.loads((tmp_path / "versions.json").read_text())
    assert saved["3.11-2.11"]["passed"] == 7
    lines = (tmp_path / "versions.md").read_text().splitlines()
    assert len(lines) == 2 + len(versions.pairs())
    assert "| 3.11 | 2.11.1 | passed | 7 | 0 | 0 | 0 | 3 / 4 |" in lines
    assert "| 3.11 | 2.13.1 | failed | 7 | 0 | 0 | 0 | 3 / 4 |" in lines
    assert "| 3.10 | 2.12 | not run | 0 | 0 | 0 | 0 | never |" in lines
    assert any("| 3.13 | 2.11 | not run |" in line and "no python3.13" in line for line in lines)
    assert "3.11-2.11: passed before" in capsys.readouterr().out

    assert set(prove(tmp_path, asked[:1], found, tests="tests/api -k 'a b'", keep=True))
    assert ran[-1][2] == [*versions.TESTS, "tests/api", "-k", "a b"]
    assert (tmp_path / "3.11-2.11" / "environment").exists()
    table = (tmp_path / "versions.md").read_text()
    assert "| 3.11 | 2.13.1 | failed (other sources or tests) |" in table
    prove(tmp_path, asked[:1], found, tests="tests/api -k 'a b'", again=True)
    assert len(ran) == 5
    wheel = tmp_path / "a.whl"
    for content in (b"one", b"one", b"other"):  # what another module has passed proves nothing
        wheel.write_bytes(content)
        prove(tmp_path, asked[:1], found, tests="tests/api -k 'a b'", wheel=wheel)
    assert len(ran) == 7


def test_no_pair_begins_when_the_time_is_up(tmp_path: Path, ran: list) -> None:
    assert prove(tmp_path, [("3.11", "2.11")], {"3.11": "/python3.11"}, limit=0) == {}
    assert ran == []
    assert "no time left" in (tmp_path / "versions.md").read_text()


def test_counts_of_a_report(tmp_path: Path) -> None:
    (tmp_path / "tests.xml").write_text(REPORT)
    assert versions.counted(tmp_path / "tests.xml") == (3, 3, 3)


@pytest.mark.parametrize("from_wheel", [False, True])
@pytest.mark.parametrize(("status", "passes"), [(0, "passed"), (1, "failed"), (None, "not run")])
def test_a_pair_is_set_up_by_make_and_tested_in_a_copy(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    status: int | None,
    passes: str,
    from_wheel: bool,
) -> None:
    root, commands = tmp_path / "root", []
    (root / "deqfuse").mkdir(parents=True)
    (root / ".venv").mkdir()
    for name in ("Makefile", "deqfuse/_cpu.so", "deqfuse/layer.py"):
        (root / name).touch()

    def run_command(command, output, environment, limit, folder):
        commands.append((command, environment))
        if "pytest" in command:
            (tmp_path / "pair" / "tests.xml").write_text(REPORT)
            output.write("=== 3 passed in 1s ===\n")
        return status if "pytest" in command else 0

    monkeypatch.setattr(versions, "ROOT", root)
    monkeypatch.setattr(versions, "run_command", run_command)
    pair = tmp_path / "pair"
    for left in ("source/stale", "environment/kept"):  # by a run that was stopped
        (pair / left).mkdir(parents=True)
    (pair / "tests.xml").write_text("of that run")
    wheel = tmp_path / "a.whl" if from_wheel else None
    if wheel is not None:
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("deqfuse/_cpu.so", "the wheel's")
            archive.writestr("deqfuse/layer.py", "not the tree's")
    result = versions.run(
        sys.executable, "2.12", pair, "--index-url x", ["-k", "a"], ENDLESS, wheel
    )
    assert result.status == passes
    if status is not None:
        assert (result.note, result.passed, result.failed) == ("3 passed in 1s", 3, 3)
    (make, settings), (pytest_command, _) = commands
    environment = pair / "environment"
    assert make[:2] == ["make", str(environment / ".installed") if from_wheel else "module"]
    assert {"TORCH=torch==2.12.*", "TORCH_PIP=--index-url x"} <= set(make)
    assert settings["DEQFUSE_BUILD"] == "cpu"
    assert pytest_command[0] == str(environment / "bin" / "python")
    assert pytest_command[-2:] == ["-k", "a"]
    copied = {p.relative_to(pair / "source").as_posix() for p in (pair / "source").rglob("*")}
    module = pair / "source" / "deqfuse" / "_cpu.so"
    assert copied == {"Makefile", "deqfuse", "deqfuse/layer.py"} | (
        {"deqfuse/_cpu.so"} if from_wheel else set()
    )
    assert not from_wheel or module.read_text() == "the wheel's"
    assert (pair / "source" / "deqfuse" / "layer.py").read_text() == ""
    assert (pair / "environment" / "kept").exists()


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_an_environment_gets_a_setuptools_that_builds(tmp_path: Path) -> None:
    """Python 3.10 and 3.11 put an older one into it, which pip leaves there unless told more."""
    venv, needed = tmp_path / "venv", "setuptools>=77.0.3"
    assert f'requires = ["{needed}"]' in (versions.ROOT / "pyproject.toml").read_text()
    command = ["make", "-n", f"{venv}/.installed", f"VENV={venv}", f"PYTHON={sys.executable}"]
    command += ["TORCH=torch==2.12.*"]
    text = subprocess.run(command, capture_output=True, text=True, cwd=versions.ROOT).stdout
    assert f"constraints.txt torch '{needed}'" in text


def test_unknown_pairs_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["versions", "3.9-2.11"])
    with pytest.raises(SystemExit):
        versions.main()
    assert "PAIR: expected one of 3.10-2.11" in capsys.readouterr().err


def test_pairs_run_in_the_order_of_their_names(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["3.13-2.13", "3.12-*", "3.12-2.11", "--list"]
    monkeypatch.setattr(sys, "argv", ["versions", *arguments])
    assert versions.main() == 0
    listed = [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()]
    assert listed == ["3.13-2.13", "3.12-2.11", "3.12-2.12", "3.12-2.13"]
