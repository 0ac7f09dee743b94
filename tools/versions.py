"""The tests with every supported version of Python and torch: `make test-versions`.

    python -m tools.versions [PAIR ...] [--python PATH ...] [--torch-pip OPTIONS] [--tests ARGS]
                             [--wheel FILE] [--keep] [--again] [--list] [--limit SECONDS]
                             [--out FOLDER]

A pair is named as in "3.12-2.11" (Python 3.12, torch 2.11), "*" stands for any text, and no name
means all. Each gets a copy of this tree below FOLDER, an environment of its own made by the
Makefile, the C++ module built there (a pair without it fails), and runs the tests that `make test`
runs. With a wheel of `make wheel`, its C++ module is put there instead of one built for the pair:
this proves that one wheel serves them all. versions.md and versions.json in FOLDER hold how each
pair ended, also those that have never run. A pair that has passed the same tests on these sources
is not run again. Exit status: 0 if every pair asked for has passed, 1 if not, an interpreter that
is missing included.
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import json
import shlex
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from tools.running import ROOT, key_of, last_line, run_command, save

PYTHONS = ("3.10", "3.11", "3.12", "3.13")
TORCHES = ("2.11", "2.12", "2.13")
# What a tree holds besides sources; tools and builds make it.
LEFT_OUT = (".git", ".venv*", "build", "dist", "__pycache__", "*.so", "*.egg-info", ".*_cache")
TESTS = ("-m", "not slow and not ci")


@dataclass(frozen=True)
class Result:
    """How a pair ended: passed, failed or not run; which torch that was; counts of tests."""

    status: str
    note: str
    torch: str = ""
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0
    key: str = ""  # sources and tests that it speaks of


def pairs() -> list[tuple[str, str]]:
    """Every supported (Python, torch), in the order in which they are run."""
    return [(python, torch) for torch in TORCHES for python in PYTHONS]


def interpreters(named: Sequence[str]) -> dict[str, str]:
    """Version -> interpreter: those named, else the ones called python3.X on PATH.

    Raises:
        ValueError: A named interpreter does not run or has a version that is not supported.
    """
    found = {}
    for version in PYTHONS:
        path = shutil.which(f"python{version}")
        if path is not None and _version_of(path) == version:  # a shim may stand for another
            found[version] = path
    for path in named:
        version = _version_of(path)
        if version not in PYTHONS:
            raise ValueError(
                f"--python: expected an interpreter of {', '.join(PYTHONS)}, got {path!r}, "
                f"which {'is ' + version if version else 'does not run'}"
            )
        found[version] = str(Path(path).absolute())
    return found


def _version_of(path: str) -> str:
    """Of an interpreter, such as "3.12"; empty if it does not run."""
    program = "import sys; print('%d.%d' % sys.version_info[:2])"
    try:
        result = subprocess.run([path, "-c", program], capture_output=True, text=True)
    except OSError:
        return ""
    return result.stdout.strip()


def run(
    python: str,
    torch: str,
    folder: Path,
    torch_pip: str,
    tests: Sequence[str],
    limit: float,
    wheel: Path | None,
) -> Result:
    """The tests of one pair in ``folder``, where environment, copy and log stay.

    An environment that is there already, kept or left by a run that was stopped, is used again.
    The C++ module is the wheel's, or without one is built.
    """
    start = time.monotonic()
    source, report = folder / "source", folder / "tests.xml"
    shutil.rmtree(source, ignore_errors=True)
    report.unlink(missing_ok=True)
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(*LEFT_OUT))
    environment = folder / "environment"
    own = environment / "bin" / "python"
    goal = "module" if wheel is None else str(environment / ".installed")
    make = ["make", goal, f"PYTHON={python}", f"VENV={environment}", f"TORCH=torch=={torch}.*"]
    spread = ["--numprocesses", "auto", "--maxprocesses", "8", "--dist", "worksteal"]
    pytest = [str(own), "-m", "pytest", "-q", "-rfE", *spread, f"--junitxml={report}", *tests]
    # A module that cannot be built is a failure. Options of a `make` above are none of this one's.
    settings = {"DEQFUSE_BUILD": "cpu", "MAKEFLAGS": ""}
    if wheel is not None:
        with zipfile.ZipFile(wheel) as archive:
            archive.extract("deqfuse/_cpu.so", source)
    status: int | None = 0
    with (folder / "log").open("w", encoding="utf-8") as log:
        for command in ([*make, f"TORCH_PIP={torch_pip}"], pytest):
            left = limit - (time.monotonic() - start)
            status = run_command(command, log, settings, left, source)
            if status != 0:
                break
    text = (folder / "log").read_text(encoding="utf-8", errors="replace")
    if status is None:
        return Result("not run", "no time left to end it: give the same command again")
    passed, failed, skipped = counted(report) if report.exists() else (0, 0, 0)
    proved = "passed" if status == 0 and passed else "failed"
    seconds = time.monotonic() - start
    return Result(proved, last_line(text), _torch_of(own), passed, failed, skipped, seconds)


def counted(report: Path) -> tuple[int, int, int]:
    """Passed, failed and skipped tests of a report in JUnit's form; errors count as failed."""
    found = {"tests": 0, "failures": 0, "errors": 0, "skipped": 0}
    for suite in ElementTree.parse(report).iter("testsuite"):
        for name in found:
            found[name] += int(suite.get(name, "0"))
    failed = found["failures"] + found["errors"]
    passed = found["tests"] - failed - found["skipped"]
    return passed, failed, found["skipped"]


def _torch_of(python: Path) -> str:
    """The version of torch in an environment; empty where there is none."""
    program = "import importlib.metadata as m; print(m.version('torch'))"
    try:
        result = subprocess.run([python, "-c", program], capture_output=True, text=True)
    except OSError:
        return ""
    return result.stdout.strip()


def table(results: Mapping[str, Result], key: str) -> str:
    """Markdown, a line for each pair; results of other sources or tests say so."""
    lines = ["| Python | torch | status | passed | failed | skipped | seconds | note |"]
    lines.append("|---|---|---|---:|---:|---:|---:|---|")
    for python, torch in pairs():
        result = results.get(f"{python}-{torch}", Result("not run", "never"))
        status = result.status
        if status != "not run" and result.key != key:
            status += " (other sources or tests)"
        counts = f"{result.passed} | {result.failed} | {result.skipped} | {result.seconds:.0f}"
        note = result.note.replace("|", "/")[:120]
        lines.append(f"| {python} | {result.torch or torch} | {status} | {counts} | {note} |")
    return "\n".join(lines) + "\n"


def prove(
    asked: Sequence[tuple[str, str]], found: Mapping[str, str], args: argparse.Namespace
) -> dict[str, Result]:
    """Run the pairs that were asked for and have not passed yet; saved after every one."""
    out, end = args.out, time.monotonic() + args.limit
    tests = [*TESTS, *shlex.split(args.tests)]
    asked_for = {"tests": shlex.join(tests)}
    if args.wheel is not None:
        asked_for["wheel"] = hashlib.sha256(args.wheel.read_bytes()).hexdigest()
    key, state = key_of(asked_for), out / "versions.json"
    saved = json.loads(state.read_text(encoding="utf-8")) if state.exists() else {}
    results = {name: Result(**result) for name, result in saved.items()}
    for python, torch in asked:
        name, left = f"{python}-{torch}", end - time.monotonic()
        before = results.get(name)
        if before and before.status == "passed" and before.key == key and not args.again:
            print(f"== {name}: passed before", flush=True)
            continue
        if python not in found:
            result = Result("not run", f"no python{python} on PATH: --python names one elsewhere")
        elif left <= 0:
            result = Result("not run", "no time left: give the same command again")
        else:
            print(f"== {name} ... log: {out / name / 'log'}", flush=True)
            result = run(found[python], torch, out / name, args.torch_pip, tests, left, args.wheel)
            result = replace(result, seconds=round(result.seconds, 1), key=key)
            if not args.keep:
                for made in ("environment", "source"):
                    shutil.rmtree(out / name / made, ignore_errors=True)
        if result.status != "not run" or before is None:
            results[name] = result
        print(f"   {name}: {result.status}: {result.note}", flush=True)
        save(state, {name: asdict(result) for name, result in results.items()})
        (out / "versions.md").write_text(table(results, key), encoding="utf-8")
    print(f"\n{table(results, key)}")
    return {
        name: result
        for name, result in results.items()
        if result.status == "passed" and result.key == key
    }


def main() -> int:
    """Command line entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pairs", nargs="*", metavar="PAIR")
    python_help = "an interpreter that is not on PATH as python3.X; may be given several times"
    parser.add_argument("--python", action="append", default=[], metavar="PATH", help=python_help)
    pip_help = "options of pip where it installs torch, such as '--index-url ...' of CPU builds"
    parser.add_argument("--torch-pip", default="", metavar="OPTIONS", help=pip_help)
    parser.add_argument("--tests", default="", metavar="ARGS", help="more arguments of pytest")
    wheel_help = "a wheel whose C++ module all pairs get, instead of one that each builds"
    parser.add_argument("--wheel", type=Path, metavar="FILE", help=wheel_help)
    parser.add_argument("--keep", action="store_true", help="keep environments (some GB each)")
    parser.add_argument("--again", action="store_true", help="also what has passed already")
    parser.add_argument("--list", action="store_true", help="only the pairs and interpreters")
    limit_help = "seconds for this run; a pair that is not done by then is stopped"
    parser.add_argument("--limit", type=float, default=float("inf"), help=limit_help)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "versions")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # through `finally`: no child is left
    names = [f"{python}-{torch}" for python, torch in pairs()]
    for pattern in args.pairs:
        if not fnmatch.filter(names, pattern):
            parser.error(f"PAIR: expected one of {', '.join(names)} or a pattern, got {pattern!r}")
    try:
        found = interpreters(args.python)
    except ValueError as error:
        parser.error(str(error))
    # In the order of the names; each pair once.
    matches = [name for pattern in args.pairs or ["*"] for name in fnmatch.filter(names, pattern)]
    asked = [pairs()[names.index(name)] for name in dict.fromkeys(matches)]
    if args.list:
        for python, torch in asked:
            print(f"{python}-{torch}: {found.get(python, f'no python{python}')}")
        return 0
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    passed = prove(asked, found, args)
    return int(any("-".join(pair) not in passed for pair in asked))


if __name__ == "__main__":
    sys.exit(main())
