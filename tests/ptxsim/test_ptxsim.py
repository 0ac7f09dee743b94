"""Compiled kernels on the emulator, in processes of their own; see README.md.

Triton decides when it is imported whether kernels are compiled, and the adjoint's host code brings
a CUDA runtime of its own.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from deqfuse.backends import cpu_native

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CXX = shlex.split(os.environ.get("CXX", "c++"))[0]
needs_compiler = pytest.mark.skipif(shutil.which(CXX) is None, reason="needs a C++ compiler")
# The library's own tests that hold for compiled arithmetic, too; README.md tells of the others.
OWN = {"anderson": "", "solve": "", "unit": "", "presence": "not has_the_bits"}


def emulate(*arguments: str, **environment: str) -> None:
    """pytest in a new process, where the emulator's modules are found."""
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", *arguments],
        env={**inherited, "PYTHONPATH": str(HERE), **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert " passed" in run.stdout


@pytest.mark.ci
@pytest.mark.triton
@needs_compiler
@pytest.mark.parametrize("seed", ["1", "2"])
def test_triton_kernels(seed: str) -> None:
    emulate("-p", "plugin", "tests/ptxsim/emulated.py", PTXSIM_SEED=seed)


@pytest.mark.slow
@pytest.mark.triton
@needs_compiler
def test_triton_kernels_for_sm_90() -> None:
    emulate("-p", "plugin", "tests/ptxsim/emulated.py", PTXSIM_ARCH="90")


@pytest.mark.slow
@pytest.mark.triton
@needs_compiler
@pytest.mark.parametrize(("name", "chosen"), OWN.items())
def test_the_librarys_own_tests_of_its_triton_kernels(name: str, chosen: str) -> None:
    file = f"tests/triton/test_triton_{name}.py"
    emulate("-p", "plugin", "-m", "not slow", "-k", chosen, file)


@pytest.mark.parametrize(
    ("marks", "environment"),
    [
        pytest.param("not slow", {}, marks=pytest.mark.ci),
        pytest.param("not slow", {"PTXSIM_TRUNCATE": "1"}, marks=pytest.mark.slow),
        pytest.param("not slow", {"PTXSIM_ARCH": "90"}, marks=pytest.mark.slow),
        pytest.param("slow", {}, marks=pytest.mark.slow),
    ],
    ids=["small", "small, sums cut off", "small, sm_90", "wide"],
)
@needs_compiler
def test_the_cuda_adjoint(marks: str, environment: dict[str, str]) -> None:
    spec = importlib.util.spec_from_file_location("cuda_build", ROOT / "csrc/cuda/build.py")
    build = sys.modules.setdefault(spec.name, importlib.util.module_from_spec(spec))
    spec.loader.exec_module(build)
    try:
        build.toolkit()
    except build.ToolkitMissing as missing:
        if os.environ.get("CI", "").lower() == "true":
            pytest.fail(f"CI must run the CUDA kernels: {missing}")
        pytest.skip(f"needs a CUDA toolkit: {missing}")
    if cpu_native.module is None:
        pytest.skip("needs the compiled module's host policy")
    emulate("-m", marks, "tests/ptxsim/emulated_adjoint.py", **environment)
