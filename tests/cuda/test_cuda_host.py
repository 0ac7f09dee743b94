"""The CUDA adjoint's kernel bodies, run on the CPU by the host policy, against the CPU backend.

``torch.ops.deqfuse.cuda_adjoint_*`` on CPU tensors run what the CUDA kernels are made of, one lane
after the other: races, barriers and the layout of tensor-core fragments are not tested by this.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cpu_cases import Case, assert_equal, named
from cuda_cases import A100, CUTS, H100, Problem, device, distance, limit_for

from deqfuse import Implicit, Outcome
from deqfuse.backends import cpu_native, cuda_adjoint, cuda_native
from deqfuse.backends.maps import VARIANTS

ROOT = Path(__file__).resolve().parents[2]

SMALL = [
    *(Case(rows=rows) for rows in (0, 1, 7, 8, 9, 16, 17, 33)),
    *(Case(rows=17, dim=d, groups=g) for d, g in ((20, 5), (50, 2), (64, 4), (66, 33), (93, 31))),
    *(Case(rows=9, n=n) for n in (1, 3, 17)),
    Case(rows=3, dim=8, groups=1),
]
GRID = [
    Case(rows, dim, groups, n)
    for rows, (dim, groups), n in itertools.product(
        (1, 15, 16, 17, 40), ((4, 2), (12, 4), (20, 5), (96, 4), (128, 4), (250, 2)), (1, 2, 5)
    )
]


def check_against_cpu(case: Case, cut: str, mask: bool) -> None:
    """Both solve to 1e-12; narrow groups stretch what is left by up to 300 (float64)."""
    problem = Problem(case, mask)
    for kind in ("cells", "fuse"):
        expected, before = problem.run(kind, cpu_native)
        with device(limit_for(cut, case)):
            given, (residual, nfe, outcome) = problem.run(kind, cuda_native)
        assert residual.shape == before[0].shape
        solved = (before[2] == Outcome.CONVERGED).all() and (outcome == Outcome.CONVERGED).all()
        if not solved:  # a group that is all zero after the relu
            assert case.dim // case.groups <= 2
            continue
        assert (residual <= problem.tol).all()
        assert (nfe >= 1).all()
        assert distance(given, expected) <= (1e-9 if case.dim // case.groups > 2 else 1e-7)


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", **named(SMALL))
def test_gradients_are_those_of_the_cpu_backend(case, variant, cut):
    mask = (case.rows + len(variant)) % 2 == 0
    check_against_cpu(dataclasses.replace(case, variant=variant), cut, mask)


@pytest.mark.slow
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_are_those_of_the_cpu_backend_on_the_full_grid(variant, cut):
    for case in GRID:
        if cut != "resident" or case.dim <= 96:
            check_against_cpu(dataclasses.replace(case, variant=variant), cut, case.n != 2)


def check_float32(case: Case, limit: int, **how: bool) -> None:
    """Both measured against the float64 gradient at the same (rounded) inputs."""
    problem = Problem(case, mask=True)
    for kind in ("cells", "fuse"):
        truth, _ = problem.run(kind, cpu_native, dtype=torch.float64, tol=1e-13)
        ours = distance(problem.run(kind, cpu_native)[0], truth)
        with device(limit, **how):
            given, (*_, outcome) = problem.run(kind, cuda_native)
        assert (outcome == Outcome.CONVERGED).all()
        assert distance(given, truth) <= 4 * ours + 64 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dim", [12, 50])
def test_float32_is_as_exact_as_the_cpu_backend(dim, variant, cut):
    case = Case(rows=33, dim=dim, groups=2, variant=variant, dtype="f32")
    check_float32(case, limit_for(cut, case))


@pytest.mark.slow
@pytest.mark.parametrize("limit", [A100, H100])
@pytest.mark.parametrize("dim", [64, 128, 192, 256, 300])
def test_float32_at_the_sizes_of_use(dim, limit):
    check_float32(Case(rows=33, dim=dim, groups=4, dtype="f32"), limit)


@pytest.mark.parametrize(("dim", "cut"), [(64, "resident"), (200, "streamed"), (300, "steps")])
def test_float32_is_as_exact_on_tensor_cores_that_cut_off(dim, cut):
    """By what is published about them, their sums lose up to a unit at every step."""
    case = Case(rows=5, dim=dim, groups=4, n=1, dtype="f32")
    check_float32(case, limit_for(cut, case), tensor_cores=True)


def test_products_of_tensor_cores_that_cut_off_keep_their_digits(tmp_path: Path):
    """Each sum of 256 products adds 32 steps, every one exact to half a unit and cut off once."""
    source, program = Path(__file__).with_name("check_exact.cpp"), tmp_path / "exact"
    command = ["c++", "-std=c++17", "-O2", f"-I{ROOT / 'csrc'}", source, "-o", program]
    subprocess.run(command, check=True)
    said = subprocess.run([program], capture_output=True, text=True, check=True).stdout
    ours, left_in_the_unit = map(float, said.split())
    unit = 2.0**-23
    assert ours <= 4 * unit
    assert left_in_the_unit > 8 * unit, "as sums would be that stay there"


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("kind", ["cells", "fuse"])
def test_lanes_and_rows_may_come_in_any_order(kind, cut):
    """Where two of them raced, the orders would differ."""
    case = Case(rows=37, dim=50, variant="released-mmimdb", dtype="f32")
    problem, limit = Problem(case, mask=True), limit_for(cut, case)
    with device(limit):
        forwards, statistics = problem.run(kind, cuda_native)
    with device(limit, reverse=True):
        backwards, others = problem.run(kind, cuda_native)
    assert_equal([*forwards.values(), *statistics], [*backwards.values(), *others])


def test_what_the_kernels_cannot_read_is_refused():
    problem = Problem(Case())
    g, z, x, flat = problem.cells
    for bad, message in [
        ((g[:, :5], z, x, flat), "grad_z"),
        ((g, z, x.float(), flat), "x"),
        ((g, z, x, flat[:-1]), "params"),
        ((g, z.half(), x, flat), "float32 or float64"),
        ((g, z.mT.contiguous().mT, x, flat), "z: expected 408 contiguous values"),
    ]:
        for backend in (cpu_native, cuda_native):
            if message == "x" and backend is cpu_native:
                continue  # which casts it
            with pytest.raises(RuntimeError, match=message):
                problem.run("cells", backend, given=bad)
    g, z, *rest = problem.fuse
    for backend in (cpu_native, cuda_native):
        with pytest.raises(RuntimeError, match="z: expected 204 contiguous values"):
            problem.run("fuse", backend, given=(g, z.mT.contiguous().mT, *rest))
    layer = [*flat, *problem.fuse[4], torch.ones(2, dtype=z.dtype)]
    states = torch.cat([problem.cells[1], z[None]])
    how = (2, False, False, -1, 1e-9, 100, 6, 1.0, 1e-6)
    with pytest.raises(RuntimeError, match="states: expected 612 contiguous values"):
        cpu_native.adjoint_layer(
            g, None, states.mT.contiguous().mT, list(x), layer, True, None, None, *how
        )


@pytest.mark.parametrize(
    ("dim", "size", "limit", "cut", "rows"),
    [
        (64, 4, H100, "resident", 16),
        (128, 4, H100, "resident", 16),
        (128, 4, A100, "streamed", 16),
        (256, 4, H100, "streamed", 16),
        (256, 4, A100, "streamed", 8),
        (300, 4, H100, "steps", 16),
        (64, 8, H100, "resident", 8),
        (128, 8, H100, "streamed", 8),
        (256, 8, H100, "streamed", 8),
        (256, 8, A100, "steps", 16),
    ],
)
def test_how_problems_are_cut(dim, size, limit, cut, rows):
    with device(limit):
        plan = cpu_native.module.host_plan(dim, 4, size)
    assert (plan["cut"], plan["rows"]) == (cut, rows)
    assert plan["bytes"] <= limit or cut == "steps"


# ---- the library of CUDA kernels -----------------------------------------------------------------


def test_a_library_that_cannot_be_had_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def error() -> str:
        cuda_native.load_error.cache_clear()
        return cuda_native.load_error()

    monkeypatch.setattr(torch.version, "cuda", None)
    assert "is built without CUDA" in error()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    library = tmp_path / "_cuda.so"
    monkeypatch.setattr(cuda_native, "_LIBRARY", library)
    assert "was not built" in error()
    library.write_text("not a library")
    assert "_cuda.so does not load" in error()
    assert "too short" in error() or "invalid" in error()
    cuda_native.load_error.cache_clear()


@pytest.mark.parametrize(
    ("driver", "runtime", "reason"),
    [
        (13000, 13000, None),
        (12080, 12090, None),  # an older driver of the same major version runs compiled kernels
        (13010, 12060, None),
        (12080, 13000, "built with CUDA 13.0 and the NVIDIA driver knows CUDA 12.8"),
        (0, 13000, "built with CUDA 13.0 and there is no NVIDIA driver"),
    ],
)
def test_a_driver_that_cannot_run_the_library_is_a_reason(driver, runtime, reason):
    class Library:
        @staticmethod
        def deqfuse_cuda_versions(first, second):
            first._obj.value, second._obj.value = driver, runtime

    said = cuda_native._driver_error(*cuda_native.versions(Library()))
    assert said is None if reason is None else reason in said


def test_a_card_of_another_architecture_is_a_reason(monkeypatch: pytest.MonkeyPatch):
    """Said before a backward pass is tried, which would end with "no kernel image"."""

    class Library:
        def __init__(self, path: str) -> None:
            def ask(index):
                return b"no kernel image is available" if index.value == 1 else None

            self.deqfuse_cuda_cannot_run = ask

    monkeypatch.setattr(cuda_native, "load_error", lambda: None)
    monkeypatch.setattr(cuda_native.ctypes, "CDLL", Library)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 9))
    cuda_native._architecture_error.cache_clear()
    try:
        assert cuda_native.device_error(0) is None
        assert cuda_native.device_error(1) == (
            "_cuda.so holds no kernel for compute capability 8.9: no kernel image is available"
        )
        taken = [cuda_adjoint.library_takes(torch.device("cuda", i), Implicit()) for i in (0, 1)]
        assert taken == [True, False]
    finally:
        cuda_native._architecture_error.cache_clear()


def test_the_runtime_is_asked_once_and_errors_do_not_stick(tmp_path: Path):
    """``runtime.h`` on a stand-in for the CUDA runtime, several threads at once."""
    spec = importlib.util.spec_from_file_location("cuda_build", ROOT / "csrc/cuda/build.py")
    build = sys.modules.setdefault(spec.name, importlib.util.module_from_spec(spec))
    spec.loader.exec_module(build)
    try:
        include = build.toolkit() / "include"
    except build.ToolkitMissing as missing:
        pytest.skip(f"needs the headers of a CUDA toolkit: {missing}")
    command = ["c++", "-std=c++17", "-pthread", "-Wall", f"-I{include}", f"-I{ROOT / 'csrc'}"]
    source = Path(__file__).with_name("check_runtime.cpp")
    subprocess.run([*command, source, "-o", tmp_path / "runtime"], check=True)
    ran = subprocess.run([tmp_path / "runtime"], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout
