"""Where numbers come from: machine, versions, commit, command."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch

import deqfuse

__all__ = ["machine_facts"]


def machine_facts(command: str, device: torch.device, backend: str) -> dict[str, str]:
    """What somebody needs to know to repeat or to doubt the numbers.

    Args:
        command: that made them.
        device: they were computed on.
        backend: of the equilibrium solves.
    """
    packages = ", ".join(
        f"{name} {metadata.version(name)}" for name in ("numpy", "matplotlib", "rich")
    )
    where = f"{_processor()}, {_usable_cores()} cores, torch threads: {torch.get_num_threads()}"
    if device.type == "cuda":
        where = f"{torch.cuda.get_device_name(device)}; {where}"
    return {
        "date": datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        "machine": where,
        "system": platform.platform(),
        "deqfuse": f"{deqfuse.__version__}, backend {backend}{_commit()}",
        "torch": torch.__version__,
        "Python": f"{platform.python_version()}; {packages}",
        "command": command,
    }


def _processor() -> str:
    with_names = Path("/proc/cpuinfo")
    if with_names.is_file():
        for line in with_names.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _usable_cores() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on every system
        return os.cpu_count() or 1


def _commit() -> str:
    """``", commit ..."`` where the package lies in a checkout of its source, else nothing."""
    package = Path(deqfuse.__file__).parent
    if not (package.parent / ".git").exists():
        return ""
    head = _git("rev-parse", "--short=12", "HEAD", folder=package)
    if head is None:
        return ""
    changed = _git("status", "--porcelain", "--untracked-files=no", ".", folder=package)
    return f", commit {head}{' with changes' if changed else ''}"


def _git(*arguments: str, folder: Path) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
