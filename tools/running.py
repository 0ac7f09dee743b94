"""What runners of many parts share: what a result speaks of, commands that leave no child."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("benchmarks", "csrc", "deqfuse", "tests", "tools", "triton_kernels")
SOURCES = (*FOLDERS, "setup.py", "pyproject.toml")
LANGUAGES = (".py", ".cpp", ".h", ".inc", ".cu", ".cuh", ".toml")


def key_of(circumstances: Mapping[str, str], root: Path = ROOT) -> str:
    """Changes with sources and circumstances: what was proved before proves nothing then."""
    digest = hashlib.sha256(json.dumps(circumstances, sort_keys=True).encode())
    for entry in (root / name for name in SOURCES):
        for path in sorted(entry.rglob("*")) if entry.is_dir() else [entry]:
            if path.suffix in LANGUAGES:
                digest.update(f"{path.relative_to(root)} {path.stat().st_size}\n".encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def run_command(
    command: Sequence[str],
    output: Any,
    environment: Mapping[str, str],
    limit: float,
    folder: Path = ROOT,
) -> int | None:
    """Runs a command in ``folder``, what it says in ``output``, for at most ``limit`` seconds.

    Returns:
        The exit status; None if it was stopped, with all that it had started.
    """
    output.write(f"$ {' '.join(command)}\n")
    output.flush()
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **environment}
    streams: Any = {"stdout": output, "stderr": subprocess.STDOUT}
    try:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, start_new_session=True, **streams
        )
    except OSError as error:
        output.write(f"{error}\n")
        output.flush()
        return 127
    try:
        return process.wait(max(limit, 0.1))
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:  # an interrupt, too, leaves nothing behind
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def last_line(text: str) -> str:
    """The last line that says something, without the rules that pytest draws around it."""
    return ([line.strip("= \n") for line in text.splitlines() if line.strip("= ")] or [""])[-1]


def save(path: Path, state: object) -> None:
    """Writes JSON; whoever stops this leaves a whole file."""
    new = path.with_suffix(".new")
    new.write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
    os.replace(new, path)
