"""Kernels compiled ahead of time, without a GPU: they compile, fit, and a solve spills nothing.

What is compiled is what the launchers would launch; see ``deqfuse.triton_kernels.resources``. In a
process of its own, because under TRITON_INTERPRET kernels cannot be compiled.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable

import pytest

pytestmark = pytest.mark.triton

# Shared memory that a block may have, in bytes (CUDA C++ programming guide; CDNA3's LDS).
SHARED_LIMIT = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}
KERNELS = {
    "step": {
        "_residual_cell_kernel",
        "_residual_cell_vjp_kernel",
        "_gate_constant_kernel",
        "_purify_combine_kernel",
        "_purify_combine_vjp_kernel",
    },
    "solve": {"_solve_cells_kernel", "_solve_fuse_kernel"},
    "anderson": {"_anderson_step_kernel"},
}


def compiled(*arguments: str) -> list[dict]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-m", "deqfuse.triton_kernels.resources", *arguments],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


def assert_sound(table: list[dict], kinds: Iterable[str], targets: Iterable[str]) -> None:
    for kind in kinds:
        for target in targets:
            found = {e["kernel"] for e in table if (e["kind"], e["target"]) == (kind, target)}
            assert found == KERNELS[kind], (kind, target)
    for entry in table:
        assert entry["shared"] <= SHARED_LIMIT[entry["target"]], entry
        if entry["target"].startswith("sm_"):
            assert 0 < entry["registers"] <= 255, entry
            # In float64, ptxas gives up two to four numbers of a step now and then, for the sake of
            # one more block on a multiprocessor.
            double = entry["dtype"] == "float64"
            assert entry["spilled"] <= (16 if double else 0), entry


def test_the_shipped_kernels_compile_and_fit() -> None:
    targets = ("sm_80", "sm_90")
    assert_sound(compiled("--targets", ",".join(targets)), KERNELS, targets)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("kind", KERNELS)
def test_the_full_grid_compiles_and_fits(kind: str, target: str) -> None:
    table = compiled("--set", "full", "--kind", kind, "--targets", target)
    assert_sound(table, [kind], [target])


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_100", "gfx942"])
def test_other_architectures_compile(target: str) -> None:
    kinds = ("step", "anderson") if target == "gfx942" else KERNELS
    for kind in kinds:
        table = compiled("--kind", kind, "--targets", target)
        assert {entry["kernel"] for entry in table} == KERNELS[kind]
