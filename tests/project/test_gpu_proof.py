"""`make gpu` without a GPU: the runner on stand-ins, and what it runs on the CPU."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch

from tools import gpu_parts, gpu_proof, running
from tools.gpu_parts import Part

ROOT = running.ROOT
GPU = {"name": "some GPU", "capability": "9.0", "torch": "2.11.0"}
KEY, ENDLESS = "key", float("inf")


def python(program: str) -> list[list[str]]:
    return [[sys.executable, "-c", program]]


def counting(folder: Path, name: str, status: int = 0) -> Part:
    """Says hello, and leaves a letter in a file whenever it runs."""
    program = f"print('hello'); open({str(folder / name)!r}, 'a').write('x'); exit({status})"
    return Part(name, python(program))


def prove(parts, out, asked=None, key=KEY, again=False, limit=ENDLESS):
    found = gpu_proof.prove(parts, parts if asked is None else asked, out, key, again, limit)
    return [result.status for result in found]


def times(folder: Path, *names: str) -> list[int]:
    return [len((folder / name).read_text()) for name in names]


def test_a_run_is_taken_up_where_it_stopped(tmp_path: Path) -> None:
    """What failed is run again, what passed is not, unless asked or proved of something else."""
    parts = [counting(tmp_path, name, status) for name, status in (("a", 0), ("b", 3), ("c", 0))]
    for _ in range(2):
        assert prove(parts, tmp_path) == ["passed", "failed", "passed"]
    assert times(tmp_path, "a", "b", "c") == [1, 2, 1]
    assert prove(parts, tmp_path, asked=parts[:1], again=True) == ["passed", "failed", "passed"]
    assert times(tmp_path, "a", "b", "c") == [2, 2, 1]
    assert prove(parts, tmp_path, asked=parts[1:2], key="other") == ["not run", "failed", "not run"]
    assert prove(parts, tmp_path, key="other") == ["passed", "failed", "passed"]
    assert times(tmp_path, "a", "b", "c") == [3, 4, 2]


def test_what_never_ran_comes_before_what_failed_and_repeats_come_last(tmp_path: Path) -> None:
    """Time comes ten minutes at a time: a part that fails slowly must not eat each of them."""
    names = ("build", "slow", "tests-again-a", "fast", "tests-a")
    parts = [counting(tmp_path, name, int(name in ("build", "slow"))) for name in names]
    asked = [parts[0], parts[1], parts[3]]
    prove(parts, tmp_path, asked=asked)
    log = tmp_path / "order"
    program = f"open({str(log)!r}, 'a').write('{{}} ')"
    parts = [Part(name, python(program.format(name))) for name in names]
    assert prove(parts, tmp_path) == ["passed"] * 5
    assert log.read_text().split() == ["build", "tests-a", "slow", "tests-again-a"]
    prove(parts, tmp_path, key="new")
    assert log.read_text().split()[4:] == ["build", "slow", "fast", "tests-a", "tests-again-a"]


def test_a_failure_is_told_although_there_is_no_time_to_repeat_it(tmp_path: Path) -> None:
    part = counting(tmp_path, "a", 3)
    prove([part], tmp_path)
    assert prove([part], tmp_path, limit=0) == ["failed"]


def test_a_run_comes_back_as_two_files_and_goes_on_from_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = [counting(tmp_path, "a"), counting(tmp_path, "b", 1)]
    monkeypatch.setattr(gpu_proof, "find_gpu", lambda: GPU)
    monkeypatch.setattr(gpu_proof, "all_parts", lambda *_: parts)
    there, here = tmp_path / "there", tmp_path / "here"
    assert run_main(monkeypatch, "--out", str(there)) == 1
    with tarfile.open(there / "proof.tar.gz") as proof:
        assert {"a.log", "b.log", "state.json", "summary.md"} == set(proof.getnames())
    state = shutil.copy(there / "state.json", tmp_path / "carried.json")
    shutil.rmtree(there)
    assert run_main(monkeypatch, "--out", str(here), "--state", str(state)) == 1
    assert times(tmp_path, "a", "b") == [1, 2]


def test_what_a_part_left_must_still_be_there(tmp_path: Path) -> None:
    part = counting(tmp_path, "a")
    prove([part], tmp_path)
    prove([Part("a", part.commands, leaves=["setup.py"])], tmp_path)
    assert times(tmp_path, "a") == [1]
    prove([Part("a", part.commands, leaves=["setup.py", "no-such-file"])], tmp_path)
    assert times(tmp_path, "a") == [2]


def test_no_part_begins_when_the_time_is_up(tmp_path: Path) -> None:
    parts = [Part("a", python("import time; time.sleep(0.3)")), counting(tmp_path, "b")]
    assert prove(parts, tmp_path, limit=0.2) == ["not run", "not run"]
    assert not (tmp_path / "b").exists()
    assert prove(parts, tmp_path) == ["passed", "passed"]


def test_a_part_that_takes_too_long_is_stopped_with_its_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = "import os, time; open('{}', 'w').write(str(os.getpid())); time.sleep(100)"
    inner = inner.format(tmp_path / "pid")
    program = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}])"
    monkeypatch.setattr(gpu_proof, "LIMIT", 2)
    (result,) = gpu_proof.prove(*[[Part("a", python(program))]] * 2, tmp_path, KEY, False, ENDLESS)
    assert (result.status, result.note) == ("failed", "took more than 2 s, stopped")
    child = int((tmp_path / "pid").read_text())
    end = time.monotonic() + 30  # a signal is not obeyed at once
    while alive(child):
        assert time.monotonic() < end
        time.sleep(0.05)


STOPPED = """
import sys
from pathlib import Path
from tools import gpu_proof
from tools.gpu_parts import Part
child = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(100)"
folder = Path(sys.argv.pop())
gpu_proof.find_gpu = lambda: {"name": "some GPU", "torch": "2.11.0"}
command = [sys.executable, "-c", child, str(folder / "pid")]
gpu_proof.all_parts = lambda *_: [Part("a", [command])]
sys.argv[1:] = ["--out", str(folder)]
sys.exit(gpu_proof.main())
"""


def test_a_runner_that_is_terminated_leaves_no_child(tmp_path: Path) -> None:
    runner = subprocess.Popen([sys.executable, "-c", STOPPED, str(tmp_path)], cwd=ROOT)
    pid, end = tmp_path / "pid", time.monotonic() + 60
    while not (pid.exists() and pid.read_text()):
        assert time.monotonic() < end
        time.sleep(0.05)
    runner.terminate()
    assert runner.wait(30) == 143
    assert not alive(int(pid.read_text()))


def alive(process: int) -> bool:
    try:
        stat = Path(f"/proc/{process}/stat").read_text()
    except FileNotFoundError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    part = Part("a", python("1 / 0"), programs=["no-such-program"], modules=["json", "no_such"])
    result = gpu_proof.run(part, tmp_path / "a.log", 10)
    assert result.status == "not run"
    assert "no no-such-program on PATH or in a CUDA toolkit" in result.note
    assert result.note.endswith("has no no_such")


def test_programs_are_found_in_a_toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    tool = tmp_path / "bin" / "deqfuse-sanitizer"
    tool.parent.mkdir()
    assert gpu_parts.find_program(tool.name) is None
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    assert gpu_parts.find_program(tool.name) == str(tool)


def test_a_log_without_the_proof_is_a_failure(tmp_path: Path) -> None:
    """compute-sanitizer on a device that it cannot attach to, say."""
    says = next(p.says for p in gpu_parts.all_parts(tmp_path, GPU) if p.name.endswith("racecheck"))
    summaries = {
        "RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)": "passed",
        "RACECHECK SUMMARY: 1 hazard displayed (0 errors, 1 warning)": "failed",
        "Error: Device not supported": "failed",
    }
    for line, status in summaries.items():
        part = Part("a", python(f"print('every kernel ran'); print('========= {line}')"), says=says)
        assert gpu_proof.run(part, tmp_path / "a.log", 10).status == status, line
    part = Part("a", python(f"print('{next(iter(summaries))}')"), says=says)
    assert gpu_proof.run(part, tmp_path / "a.log", 10).status == "failed", "nothing was looked at"


def test_tests_that_are_all_skipped_prove_nothing(tmp_path: Path) -> None:
    tests = [p for p in gpu_parts.all_parts(tmp_path, GPU) if p.name.startswith("tests-")]
    assert len(tests) == 8
    for says in {part.says for part in tests}:
        for line, status in (("89 skipped in 7s", "failed"), ("3 passed, 1 skipped", "passed")):
            part = Part("a", python(f"print('=== {line} ===')"), says=says)
            assert gpu_proof.run(part, tmp_path / "a.log", 10).status == status, line


def test_commands_all_run_and_one_that_fails_counts(tmp_path: Path) -> None:
    """A benchmark that is refused fails the part, after its report is written."""
    part = Part("a", [*python("exit(1)"), *python("print('report')")])
    result = gpu_proof.run(part, tmp_path / "a.log", 10)
    assert (result.status, result.note) == ("failed", "exit status 1: report")
    missing = gpu_proof.run(Part("a", [["/no/such/program"]]), tmp_path / "a.log", 10)
    assert missing.status == "failed"
    assert "No such file" in missing.note


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["gpu_proof", *arguments])
    monkeypatch.setattr(gpu_proof.signal, "signal", lambda *_: None)  # pytest keeps its own
    return gpu_proof.main()


def test_summary_and_exit_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = [
        counting(tmp_path, "tests-a"),
        counting(tmp_path, "bench", 1),
        Part("ncu", python(""), programs=["no-such-program"], optional=True),
    ]
    monkeypatch.setattr(gpu_proof, "find_gpu", lambda: GPU)
    monkeypatch.setattr(gpu_proof, "all_parts", lambda *_: parts)
    out = ["--out", str(tmp_path)]
    assert run_main(monkeypatch, *out, "tests") == 0
    assert run_main(monkeypatch, *out, "tests", "ncu") == 1, "asked for by name"
    parts[1] = counting(tmp_path, "bench")
    assert run_main(monkeypatch, *out) == 0, "ncu is optional"
    (tmp_path / "state.json").unlink()
    parts[1] = counting(tmp_path, "bench", 1)
    assert run_main(monkeypatch, *out) == 1
    text = (tmp_path / "summary.md").read_text()
    assert text in capsys.readouterr().out
    assert re.search(r"\| tests-a \| passed \| [\d.]+ \| tests-a.log \| hello \|", text)
    assert re.search(r"\| bench \| failed \| [\d.]+ \| bench.log \| exit status 1: hello \|", text)
    assert "| ncu | not run | 0 |  | no no-such-program" in text
    with pytest.raises(SystemExit):
        run_main(monkeypatch, *out, "no-such-part")
    assert "expected the beginning of one of tests-a, bench, ncu" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_without_a_gpu_nothing_is_run(tmp_path: Path) -> None:
    command = ["make", "gpu", f"PYTHON={sys.executable}", f"GPU_OUT={tmp_path / 'out'}"]
    # The tests may themselves be run by make, which would hand its options on.
    alone = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=alone)
    assert run.returncode == 2
    assert run.stdout == ""
    said = run.stderr.splitlines()
    assert re.fullmatch(r"The proof needs an NVIDIA GPU, and nothing was run: torch .*", said[0])
    assert all(line.startswith("make") for line in said[1:])
    assert not (tmp_path / "out").exists()


def test_another_source_or_gpu_is_another_proof(tmp_path: Path) -> None:
    for file in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / file, tmp_path)
    for folder in running.FOLDERS:
        (tmp_path / folder).mkdir()
    key = running.key_of(GPU, tmp_path)
    assert key == running.key_of(dict(GPU), tmp_path)
    assert key != running.key_of(GPU | {"torch": "2.12.0"}, tmp_path)
    (tmp_path / "csrc" / "some.log").write_text("no source")
    assert key == running.key_of(GPU, tmp_path)
    (tmp_path / "csrc" / "new.cuh").write_text("// new")
    assert key != running.key_of(GPU, tmp_path)
    key = running.key_of(GPU, tmp_path)
    (tmp_path / "csrc" / "new.cuh").rename(tmp_path / "csrc" / "newer.cuh")
    assert key != running.key_of(GPU, tmp_path), "the same text elsewhere"


def test_parts_name_what_there_is(tmp_path: Path) -> None:
    parts = gpu_parts.all_parts(tmp_path, GPU)
    words = [word for part in parts for command in part.commands for word in command]
    modules = {w for before, w in itertools.pairwise(words) if before == "-m"}
    for module in (m for m in modules if "." in m):
        assert (ROOT / f"{module.replace('.', '/')}.py").is_file()
    files = {w.removeprefix("--ignore=") for w in words if "tests/" in w or w == "setup.py"}
    assert files
    assert all((ROOT / file).exists() for file in files)
    build = next(part for part in parts if part.name == "build")
    assert build.environment["TORCH_CUDA_ARCH_LIST"] == "9.0"
    table = (ROOT / "docs" / "how-to" / "gpu-proof.md").read_text()
    kinds = {part.name.partition("-")[0] for part in parts}
    assert kinds == set(re.findall(r"^\| `(\w+)", table, re.MULTILINE))
