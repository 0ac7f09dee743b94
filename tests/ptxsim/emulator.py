"""The emulator as a library: built from ``src`` when it is imported, called through ctypes."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import shlex
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
BUILD = HERE.parents[1] / "build" / "ptxsim"
FLAGS = ["-std=c++20", "-O2", "-ffp-contract=off", "-fPIC"]
SEED = int(os.environ.get("PTXSIM_SEED", "1"))  # of the order in which warps take turns
u32, u64 = ctypes.c_uint32, ctypes.c_uint64


class SimError(RuntimeError):
    """PTX that the emulator does not know, or a launch that cannot be."""


def compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "c++"))


def built() -> Path:
    """The library of these sources; another process may be at it as well."""
    sources = sorted((HERE / "src").iterdir())
    digest = hashlib.sha256(" ".join([*compiler(), *FLAGS]).encode())
    for source in sources:
        digest.update(source.read_bytes())
    library = BUILD / f"libptxsim-{digest.hexdigest()[:12]}.so"
    if library.exists():
        return library
    BUILD.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=BUILD) as folder:

        def compile_one(source: Path) -> str:
            made = f"{folder}/{source.stem}.o"
            subprocess.run([*compiler(), *FLAGS, "-c", source, "-o", made], check=True)
            return made

        with ThreadPoolExecutor() as pool:
            objects = list(pool.map(compile_one, [s for s in sources if s.suffix == ".cpp"]))
        subprocess.run([*compiler(), "-shared", "-o", f"{folder}/made.so", *objects], check=True)
        os.replace(f"{folder}/made.so", library)
    return library


lib = ctypes.CDLL(str(built()), mode=ctypes.RTLD_GLOBAL)
lib.sim_error.restype = lib.sim_kernels.restype = lib.sim_reports.restype = ctypes.c_char_p
lib.sim_hits.restype = ctypes.c_char_p
lib.sim_hits.argtypes = [ctypes.c_int, ctypes.c_char_p]
lib.sim_load.argtypes = [ctypes.c_char_p]
lib.sim_region.argtypes = [u64, u64, u64, u32, ctypes.c_char_p]
lib.sim_poison.argtypes = lib.sim_clean.argtypes = lib.sim_poisoned.argtypes = [u64, u64]
lib.sim_forget.argtypes = [u64]
lib.sim_poisoned.restype = u64
lib.sim_launch.argtypes = [
    ctypes.c_int, ctypes.c_char_p, ctypes.POINTER(u32), ctypes.POINTER(u32), u32,
    ctypes.c_char_p, u32, u64, ctypes.c_int,
]  # fmt: skip
lib.sim_truncate(int(os.environ.get("PTXSIM_TRUNCATE", "0")))


def load(text: str) -> int:
    """A module of PTX, by its number.

    Raises:
        SimError: an instruction that is not known; none is skipped.
    """
    module = lib.sim_load(text.encode())
    if module < 0:
        raise SimError(lib.sim_error().decode())
    return module


def kernels(module: int) -> dict[str, list[tuple[int, int]]]:
    """Offset and size of each parameter, by kernel."""
    found = {}
    for line in lib.sim_kernels(module).decode().splitlines():
        name, *numbers = line.split()
        values = list(map(int, numbers))
        found[name] = list(zip(values[::2], values[1::2], strict=True))
    return found


def hits(module: int, kernel: str) -> set[int]:
    """Lines of PTX that have run."""
    return set(map(int, lib.sim_hits(module, kernel.encode()).decode().split()))


def reports() -> list[dict]:
    """Findings since the last call: kind, kernel, where, source, other, detail, count."""
    return json.loads(lib.sim_reports(1).decode(errors="replace"))


def launch(
    module: int,
    kernel: str,
    grid: Sequence[int],
    threads: int,
    shared: int,
    params: bytes,
    seed: int = SEED,
    strict: bool = True,
) -> None:
    """Run a kernel. ``strict``: only bar.sync and bar.warp.sync order memory, not shuffles.

    Raises:
        SimError: no such kernel, or more threads than it was compiled for.
    """
    grid_, block = ((u32 * 3)(*n, *[1] * (3 - len(n))) for n in (grid, (threads,)))
    if lib.sim_launch(
        module, kernel.encode(), grid_, block, shared, params, len(params), seed, int(strict)
    ):
        raise SimError(lib.sim_error().decode())


def faults(found: Sequence[dict]) -> list[str]:
    """What is wrong among the findings: a race that writes what was there already is not."""
    return [
        f"{r['kind']} in {r['kernel']}: {r['where']} ({r['source']}) "
        f"| {r['other']} ({r['other_source']}) | {r['detail']}"
        for r in found
        if "(same value)" not in r["kind"]
    ]
