"""Kernels compiled ahead of time, without a GPU: they compile, fit, and a solve spills nothing.

What is compiled is what the launchers would launch; see ``deqfuse.triton_kernels.resources``. In a
process of its own, because under TRITON_INTERPRET kernels cannot be compiled.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from deqfuse.triton_kernels import tiles
from deqfuse.triton_kernels.resource_table import (
    SHARED,
    SMALL_BYTES,
    TRITON,
    cells,
    documented,
    markdown,
)

pytestmark = pytest.mark.triton

TABLE = Path(__file__).parents[2] / "docs/explanation/kernels-gpu-resources.md"
SMALL_DEVICES = SMALL_BYTES  # which get no whole solve of 128 columns
KERNELS = {
    "step": {
        "_residual_cell_kernel",
        "_residual_cell_vjp_kernel",
        "_gate_constant_kernel",
        "_purify_combine_kernel",
        "_purify_combine_vjp_kernel",
    },
    "penalty": {"_residual_cell_penalty_kernel", "_purify_combine_penalty_kernel"},
    "solve": {"_solve_cells_kernel", "_solve_fuse_kernel"},
    "anderson": {"_anderson_step_kernel"},
    "unit": {"_unit_size_kernel"},
}


def output(*arguments: str) -> str:
    """What Python prints where kernels are not interpreted."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, *arguments]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    return run.stdout


def compiled(*arguments: str) -> list[dict]:
    lines = output("-m", "deqfuse.triton_kernels.resources", *arguments).splitlines()
    return [json.loads(line) for line in lines]


# float32, in IEEE arithmetic but for the penalty's; none on sm_80 and sm_90.
SPILLED = {
    ("sm_100", "_purify_combine_kernel", 300): 16,
    ("sm_100", "_residual_cell_vjp_kernel", 1000): 16,
    ("sm_100", "_purify_combine_vjp_kernel", 1000): 32,
    ("sm_100", "_gate_constant_kernel", 1024): 16,
    ("sm_100", "_anderson_step_kernel", 512): 8,
    ("sm_100", "_residual_cell_penalty_kernel", 128): 48,
    ("sm_120", "_residual_cell_vjp_kernel", 128): 16,
}


def may_spill(entry: dict) -> int:
    """Bytes per thread that a kernel is known to spill: these, and no others.

    ptxas gives up a few numbers of a step now and then, for the sake of one more block on a
    multiprocessor; a limit on registers makes it more. Whole solves spill nothing.
    """
    kind, target, dtype = entry["kind"], entry["target"], entry["dtype"]
    if kind == "step" and entry["dim"] // entry["groups"] > 256:
        if target == "sm_100":
            return 56
        return 64 if dtype == "float64" and target != "gfx942" else 0
    if target == "gfx942":
        if kind == "solve":  # five residuals and a weight of 64 columns: over 256 registers
            return 128 if entry["m"] == 5 else 0
        cells = entry["kernel"] in ("_residual_cell_kernel", "_residual_cell_vjp_kernel")
        if cells and (dtype, entry["dim"]) == ("float64", 64):
            return 160
        return 404 if cells and entry["dim"] in (256, 512) else 0  # tiles of 32 rows
    if kind == "solve":
        return 0
    if dtype != "float32":
        if target == "sm_100":
            return 296 if (dtype, entry["dim"]) == ("float64", 32) else 48
        return 16
    if kind == "anderson" and entry["m"] not in (1, 3, 5):
        return 8
    return SPILLED.get((target, entry["kernel"], entry["dim"]), 0)


def assert_sound(table: list[dict], kinds: Iterable[str], targets: Iterable[str]) -> None:
    for kind in kinds:
        for target in targets:
            found = {e["kernel"] for e in table if (e["kind"], e["target"]) == (kind, target)}
            assert found == KERNELS[kind], (kind, target)
    for entry in table:
        assert entry["shared"] <= SHARED[entry["target"]], entry
        if entry["kind"] == "solve":  # what the backend takes for it when it chooses
            assert entry["shared"] <= tiles.solve_bytes(entry["dim"], entry["groups"]), entry
        else:
            assert entry["shared"] <= SMALL_DEVICES, entry
        # CDNA3 has as many accumulation registers again.
        assert 0 < entry["registers"] <= (512 if entry["target"] == "gfx942" else 255), entry
        if entry["target"] != "gfx942":  # all threads of a block, or it does not launch
            assert entry["registers"] * 32 * entry["warps"] <= tiles.REGISTERS, entry
        assert entry["spilled"] <= may_spill(entry), entry


def only_this_compiler() -> None:
    if importlib.metadata.version("triton") != TRITON:
        pytest.skip(f"not triton {TRITON}: other numbers; what must hold is asserted before")


def assert_documented(table: list[dict]) -> None:
    """Each kernel's line in the docs, as far as it is compiled here, is what it takes."""
    only_this_compiler()
    page = documented(TABLE.read_text())
    for key, row in cells(table).items():
        assert {target: page[key].get(target) for target in row} == row, key


@pytest.mark.ci
def test_the_shipped_kernels_compile_and_fit() -> None:
    targets = ("sm_80", "sm_90")
    table = compiled("--targets", ",".join(targets))
    assert_sound(table, KERNELS, targets)
    assert_documented(table)


@pytest.mark.ci
def test_steps_compile_and_fit_elsewhere() -> None:
    targets = ("sm_100", "gfx942")
    table = compiled("--kind", "step", "--dim", "128", "--targets", ",".join(targets))
    assert_sound(table, ["step"], targets)
    assert_documented(table)


@pytest.mark.ci
def test_one_size_of_each_kind_compiles_and_fits_on_consumer_cards() -> None:
    targets = ("sm_86", "sm_89", "sm_120")
    table = compiled("--targets", ",".join(targets))
    assert_sound(table, KERNELS, targets)
    assert_documented(table)


def test_whole_solves_are_offered_where_their_weights_fit() -> None:
    fit, none = (
        compiled("--kind", "solve", "--dim", dim, "--targets", "gfx942") for dim in ("50", "128")
    )
    assert {e["kernel"] for e in fit} == KERNELS["solve"]
    assert not none
    for shared, widest in ((SMALL_DEVICES, 64), (SHARED["sm_80"], 128)):
        assert tiles.fits_solve(widest, 4, torch.float32, 5, shared)
        assert not tiles.fits_solve(widest + 1, 1, torch.float32, 5, shared)
    only_this_compiler()  # 3.6 spills more on AMD
    assert_sound(fit, ["solve"], ["gfx942"])
    assert_documented(fit)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KERNELS)
def test_the_full_grid_compiles_and_fits(kind: str) -> None:
    """On every target; minutes on the first run, whose binaries Triton caches."""
    table = compiled("--set", "full", "--kind", kind)
    assert_sound(table, [kind], SHARED)
    only_this_compiler()
    names = {name.strip("_").removesuffix("_kernel") for name in KERNELS[kind]}
    page = documented(TABLE.read_text())
    assert {key: row for key, row in page.items() if key[0] in names} == cells(table)


def test_the_docs_page_is_a_generated_one() -> None:
    page = TABLE.read_text()
    assert page.startswith(markdown([], SHARED))
    assert {key[0] for key in documented(page)} == {
        name.strip("_").removesuffix("_kernel") for names in KERNELS.values() for name in names
    }


SPECIALIZATIONS = """
import dataclasses, json, sys
import torch
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature
from deqfuse import Anderson, DEQFusion, Implicit
from deqfuse.backends import BACKENDS, cuda, cuda_native
from deqfuse.backends.maps import PAPER
from deqfuse.triton_kernels.launch import intercept
from deqfuse.triton_kernels.resources import TARGETS

backend, seen = make_backend(TARGETS["sm_90"]), {}
def note(call):
    kernel = call.kernel
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    found = seen.setdefault(call.name, set())
    found.add(str(bind(*call.args, **call.options)[1]))

dim, groups = map(int, sys.argv[1:])
BACKENDS["cuda"] = dataclasses.replace(
    cuda.BACKEND, unavailable=lambda: None, refuses=cuda.refuses_problem
)
cuda_native.load_error = lambda: "the kernels of Triton are looked at"
layer = DEQFusion(dim, 3, num_groups=groups, on_failure="ignore", backend="cuda")
solver = Anderson(trace=True, max_iter=2)
stepped = DEQFusion(
    dim, 3, num_groups=groups, on_failure="ignore", backend="cuda", solver=solver
)
params = [t for part in (*layer.cells, layer.combine) for t in part.flat()]
params.append(layer.modality_weights)

def odd(t):
    # Begins 4 bytes behind a multiple of 16, as a slice of a flat buffer does.
    whole = torch.empty(t.numel() + 1)
    return whole[1:].view(t.shape).copy_(t)

def run(rows, place):
    x, states, probes = (torch.randn(*n, rows, dim) for n in ((3,), (4,), (2, 4)))
    given, flat = list(map(place, x)), list(map(place, params))
    z0, mask = place(torch.zeros(rows, dim)), place(torch.ones(rows, dim))
    layer.requires_grad_(False)
    for module in (layer, stepped):
        module(given, z0=(z0, place(torch.zeros(3, rows, dim))))
    rest = (flat, mask, z0, place(torch.zeros(3, rows, dim)), groups, PAPER)
    for option in (Anderson(), solver):
        cuda.solve_layer(given, *rest, option)
    cuda.BACKEND.penalty(place(probes), place(states), given, flat, mask, groups, PAPER, True)
    how = (groups, PAPER, Implicit(max_iter=3), True)
    cuda.BACKEND.layer.adjoint(place(x[0]), None, states, given, flat, mask, *how)

with intercept(note), torch.no_grad():
    for rows in range(30, 66):
        run(rows, torch.clone)
        if rows == 30:
            before = {name: len(found) for name, found in seen.items()}
    run(33, odd)
print(json.dumps({name: len(seen[name]) - count for name, count in before.items()}))
"""


@pytest.mark.ci
@pytest.mark.parametrize(("dim", "groups"), [(50, 2), (128, 4)])
def test_another_batch_or_place_in_memory_compiles_nothing(dim: int, groups: int) -> None:
    """What Triton specialises a launch on: alignment of pointers, divisors of numbers."""
    found = json.loads(output("-c", SPECIALIZATIONS, str(dim), str(groups)))
    assert set(found) == set().union(*KERNELS.values())
    assert set(found.values()) == {0}, found


BARRIERS = """
import collections, json, os, sys
os.environ["TRITON_CACHE_DIR"] = sys.argv[1]  # what is made here lacks the binary
from triton.backends.nvidia import compiler as nvidia
from deqfuse.triton_kernels import resources

def but_ptxas(add_stages):
    def add(self, stages, *rest):
        add_stages(self, stages, *rest)
        stages.pop("cubin")
    return add

def named(init):
    def make(self, *rest):
        init(self, *rest)
        self.binary_ext = "ptx"
    return make

nvidia.CUDABackend.add_stages = but_ptxas(nvidia.CUDABackend.add_stages)
nvidia.CUDABackend.__init__ = named(nvidia.CUDABackend.__init__)
found = collections.defaultdict(set)
resources._usage = lambda compiled: (found[name].add(
    compiled.asm["ttgir"].count("gpu.barrier") + compiled.asm["ttgir"].count("ttg.barrier")
), (0, 0))[1]
for kind, dim, groups in (
    ("step", 50, 2), ("step", 300, 4), ("solve", 50, 2), ("penalty", 50, 2), ("anderson", 30, 1)
):
    for released in (False, True):
        calls = []
        with resources.intercept(calls.append):
            resources.Problem(kind, dim, groups, m=3, released=released).run()
        for call in calls:
            name = f"{call.name} {'whole' if dim == 50 or kind == 'anderson' else 'wide'}"
            resources.compile_launch(call, "sm_90")
print(json.dumps({name: sorted(counts) for name, counts in found.items()}))
"""
# Between the stages of a launch, and between loads by several threads and the store of one of them.
# Two numbers: with the skip or weights and without; launches of one stage each. Three: of a
# penalty's probes the first has a stage more than the others, and the last has a sum more.
EXPECTED = {
    "_residual_cell_kernel whole": [1],
    "_residual_cell_kernel wide": [0],
    "_residual_cell_vjp_kernel whole": [3, 4],
    "_residual_cell_vjp_kernel wide": [0, 1],
    "_gate_constant_kernel whole": [0],
    "_gate_constant_kernel wide": [0],
    "_purify_combine_kernel whole": [1],
    "_purify_combine_kernel wide": [0],
    "_purify_combine_vjp_kernel whole": [4],
    "_purify_combine_vjp_kernel wide": [0, 1],
    "_solve_cells_kernel whole": [0],
    "_solve_fuse_kernel whole": [0, 1],
    "_anderson_step_kernel whole": [1],
    "_residual_cell_penalty_kernel whole": [11, 12, 13],
    "_purify_combine_penalty_kernel whole": [8, 9, 10],
}


@pytest.mark.ci
def test_barriers_are_where_they_should_be(tmp_path: Path) -> None:
    """What the compiler left of those in the sources; it may merge or drop none."""
    found = json.loads(output("-c", BARRIERS, str(tmp_path)))
    assert found == EXPECTED
