"""What `make gpu` would run on a bare machine, as far as it goes without a GPU: each mistake there
costs ten minutes of one."""

from __future__ import annotations

import argparse
import importlib
import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tools import gpu_parts, gpu_proof

ROOT = Path(gpu_proof.__file__).parents[1]
GPU = {"name": "some GPU", "capability": "9.0", "torch": "2.11.0"}
# What a machine with torch, pytest and a compiler need not have.
ABSENT = ("matplotlib", "rich", "pytest_benchmark", "xdist", "torchdeq", "ruff", "mypy")
BARE = """
import os, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in sys.argv[1].split(","):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # they may import what is absent
import pytest
sys.exit(pytest.main(sys.argv[2:]))
"""


def parts(tmp_path: Path, prefix: str) -> list[gpu_parts.Part]:
    return [p for p in gpu_parts.all_parts(tmp_path, GPU) if p.name.startswith(prefix)]


@pytest.mark.ci
@pytest.mark.parametrize("name", ["solves", "steps", "cuda", "slow"])
def test_tests_are_collected_on_a_bare_machine(name: str, tmp_path: Path) -> None:
    """In the folder and by the arguments of the part, where nothing optional can be imported."""
    (part,) = parts(tmp_path, f"tests-{name}")
    (command,) = part.commands
    arguments = command[command.index("pytest") + 1 :]
    run = subprocess.run(
        [sys.executable, "-c", BARE, ",".join(ABSENT), *arguments, "-q", "--collect-only"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-1000:]
    assert "error" not in run.stdout.splitlines()[-1]
    assert re.search(r"[1-9]\d*(/\d+)? tests? (collected|selected)", run.stdout)


def programs() -> dict[str, argparse.ArgumentParser]:
    """Stand-ins: the options that the manuals of the real programs have, and a command."""
    found = {}
    for name, options in {
        "compute-sanitizer": {
            "tool": gpu_parts.SANITIZERS, "error-exitcode": None, "report-api-errors": ("no",),
        },
        "ncu": {
            "clock-control": ("none",), "log-file": None, "kernel-name": None, "section": None,
            "filter-mode": ("global", "per-gpu", "per-launch-config"), "launch-count": None,
        },
    }.items():  # fmt: skip
        found[name] = argparse.ArgumentParser(name, exit_on_error=False, allow_abbrev=False)
        for option, choices in options.items():
            found[name].add_argument(f"--{option}", choices=choices and tuple(choices))
        found[name].add_argument("--csv", action="store_true")
        found[name].add_argument("command", nargs=argparse.REMAINDER)
    return found


@pytest.mark.parametrize("prefix", ["sanitize", "ncu"])
def test_programs_are_given_options_that_they_have(prefix: str, tmp_path: Path) -> None:
    for part in parts(tmp_path, prefix):
        (program,) = part.programs
        for command in part.commands:
            given, unknown = programs()[program].parse_known_args(command[1:])
            assert not unknown, part.name
            python, dash, module, *_ = given.command
            assert (python, dash) == (sys.executable, "-m")
            importlib.import_module(module)


def test_every_part_runs_something_that_is_there(tmp_path: Path) -> None:
    """Programs are named, so that one that is missing is said; modules can be found."""
    for part in gpu_parts.all_parts(tmp_path, GPU):
        for program, *arguments in part.commands:
            named = {Path(program).name} & {*part.programs, Path(sys.executable).name}
            assert named, (part.name, program)
            if arguments[0] == "-m" and arguments[1] == "pytest":
                assert "pytest" in part.modules
            elif arguments[0] == "-m":
                assert (ROOT / f"{arguments[1].replace('.', '/')}.py").is_file()


GPU_TEST = re.compile(r"mark\.gpu|pytestmark = MARK|import every_device|Machine\(\"cuda\"\)")


def test_all_tests_on_a_gpu_are_in_a_part(tmp_path: Path) -> None:
    """Other folders are not even collected: what they import may be missing on a bare machine."""
    parts = gpu_parts.all_parts(tmp_path, GPU)
    words = {w for p in parts if p.name.startswith("tests") for c in p.commands for w in c}
    folders = {w for w in words if re.fullmatch(r"tests/\w+", w)}
    files = [p for p in (ROOT / "tests").glob("*/*.py") if GPU_TEST.search(p.read_text())]
    on_gpus = {f"tests/{p.parent.name}" for p in files} - {"tests/shared", "tests/project"}
    assert folders == on_gpus
    modules = "matplotlib", "rich", "pytest_benchmark", "torchdeq"
    imports = re.compile(rf"^(?:from|import) ({'|'.join(modules)}|deqfuse\.cli|benchmarks)", re.M)
    for path in itertools.chain.from_iterable((ROOT / f).glob("*.py") for f in folders):
        assert not imports.search(path.read_text()), path
