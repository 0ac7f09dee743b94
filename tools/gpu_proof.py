"""The proof on a GPU, in parts: build, tests, sanitizers, profile, benchmarks.

What they prove: docs/how-to/gpu-proof.md.

    python -m tools.gpu_proof [PART ...] [--again] [--limit SECONDS] [--out FOLDER] [--state FILE]
                              [--check]

A part is named whole ("tests-cuda") or by its beginning ("tests"); no name means all. Each has a
log in FOLDER. A part that has passed on these sources and this GPU is not run again; one that fails
stops none of those behind it, and is run again after those that never were. FOLDER/proof.tar.gz
holds all that a run left, FOLDER/state.json what has passed; on a machine that forgets the folder,
``--state`` names such a file of the run before. Exit status: 0 if every part asked for has passed,
1 if not, 2 where there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import signal
import sys
import tarfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tools.gpu_parts import Part, all_parts, find_gpu, missing
from tools.running import ROOT, key_of, last_line, run_command, save

START = time.monotonic()  # of this process: what it does before the first part counts, too
LIMIT = 570  # seconds for one part


@dataclass(frozen=True)
class Result:
    """How a part ended: passed, failed or not run, with the reason or the log's last line."""

    status: str
    note: str
    seconds: float = 0.0
    key: str = ""  # sources and GPU that it speaks of


def stopped(limit: float) -> str:
    """What is said of a part that took longer."""
    return f"took more than {limit:.0f} s, stopped"


def run(part: Part, log: Path, limit: float) -> Result:
    """All commands of a part, their output in ``log``."""
    if reason := missing(part):
        return Result("not run", reason)
    start, codes = time.monotonic(), []
    with log.open("w", encoding="utf-8") as output:
        for command in part.commands:
            left = limit - (time.monotonic() - start)
            codes.append(run_command(command, output, part.environment, left))
    text = log.read_text(encoding="utf-8", errors="replace")
    seconds = time.monotonic() - start
    note = last_line(text)
    if None in codes:
        return Result("failed", stopped(limit), seconds)
    if any(codes):
        return Result("failed", f"exit status {next(filter(None, codes))}: {note}", seconds)
    if part.says and not re.search(part.says, text):
        return Result("failed", f"exit status 0, but the log lacks {part.says!r}", seconds)
    return Result("passed", note, seconds)


def prove(
    parts: Sequence[Part], asked: Sequence[Part], out: Path, key: str, again: bool, limit: float
) -> list[Result]:
    """Run what was asked for and has not passed yet; the state is saved after every part."""
    state, end = out / "state.json", time.monotonic() + limit
    saved = json.loads(state.read_text(encoding="utf-8")) if state.exists() else {}
    known = {part.name: _known(part, saved, key) for part in parts}
    found = {}
    for part in sorted(parts, key=lambda part: _turn(part, known[part.name])):
        before = known[part.name]
        left = min(end - time.monotonic(), LIMIT)
        if part not in asked:
            found[part.name] = before or Result("not run", "not asked for")
        elif before and before.status == "passed" and not again:
            found[part.name] = before
            print(f"== {part.name}: passed before", flush=True)
        elif left <= 0:
            no_time = Result("not run", "no time left: give the same command again")
            found[part.name] = before or no_time
        else:
            print(f"== {part.name} ...", flush=True)
            result = run(part, out / f"{part.name}.log", left)
            if left < LIMIT and result.note == stopped(left):
                result = replace(result, status="not run", note="no time left to end it")
            result = replace(result, seconds=round(result.seconds, 1), key=key)
            found[part.name] = result
            saved[part.name] = asdict(result)
            save(state, saved)
            print(f"   {result.status} in {result.seconds:.0f} s: {result.note}", flush=True)
    return [found[part.name] for part in parts]


def _known(part: Part, saved: dict[str, Any], key: str) -> Result | None:
    """How the part ended before, if that was on these sources and what it left is still there."""
    before = Result(**saved[part.name]) if part.name in saved else None
    there = all(any(ROOT.glob(pattern)) for pattern in part.leaves)
    return before if before and before.key == key and there else None


def _turn(part: Part, before: Result | None) -> tuple[bool, bool, bool]:
    """The build, what never ran, what failed, and last what only repeats: time may not suffice."""
    failed = before is not None and before.status == "failed"
    return part.name != "build", "-again-" in part.name, failed


def archive(out: Path) -> Path:
    """Everything that the runs left in one file: a remote machine may return few of them."""
    made = out / "proof.tar.gz"
    made.unlink(missing_ok=True)
    files = sorted(path for path in out.rglob("*") if path.is_file())
    with tarfile.open(made, "w:gz") as tar:
        for path in files:
            tar.add(path, path.relative_to(out))
    return made


def summary(parts: Sequence[Part], found: Sequence[Result], out: Path, gpu: dict[str, str]) -> str:
    """A table: each part, how it ended, its log."""
    lines = [f"{gpu['name']}, torch {gpu['torch']}; logs in {out}", ""]
    lines += ["| part | status | seconds | log | last line or reason |", "|---|---|---:|---|---|"]
    for part, result in zip(parts, found, strict=True):
        note = result.note.replace("|", "/")[:120]
        log = f"{part.name}.log" if result.status != "not run" else ""
        lines.append(f"| {part.name} | {result.status} | {result.seconds:g} | {log} | {note} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Command line entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART")
    parser.add_argument("--again", action="store_true", help="also what has passed already")
    limit_help = "seconds for this run; 540 ends `make` within ten minutes"
    parser.add_argument("--limit", type=float, default=float("inf"), help=limit_help)
    parser.add_argument("--check", action="store_true", help="only whether there is a GPU")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu")
    parser.add_argument("--state", type=Path, help="state.json of the run that this one goes on")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # through `finally`: no child is left
    if isinstance(gpu := find_gpu(), str):
        print(f"The proof needs an NVIDIA GPU, and nothing was run: {gpu}.", file=sys.stderr)
        return 2
    if args.check:
        return 0
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if args.state is not None and not (out / "state.json").exists():
        shutil.copy(args.state, out / "state.json")
    parts = all_parts(out, gpu)
    for asked in args.parts:
        if not any(part.name.startswith(asked) for part in parts):
            names = ", ".join(part.name for part in parts)
            parser.error(f"PART: expected the beginning of one of {names}, got {asked!r}")
    asked = [p for p in parts if not args.parts or p.name.startswith(tuple(args.parts))]
    left = args.limit - (time.monotonic() - START)
    found = prove(parts, asked, out, key_of(gpu), args.again, left)
    text = summary(parts, found, out, gpu)
    (out / "summary.md").write_text(text, encoding="utf-8")
    archive(out)
    print(f"\n{text}")
    passed = {part.name for part, r in zip(parts, found, strict=True) if r.status == "passed"}
    must = [p for p in asked if not p.optional or p.name in args.parts]
    return int(any(part.name not in passed for part in must))


if __name__ == "__main__":
    sys.exit(main())
