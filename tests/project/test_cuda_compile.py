"""The CUDA sources compile, without a GPU and without a torch that has CUDA, and nothing spills."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from deqfuse.backends import cpu_native

ROOT = Path(__file__).resolve().parents[2]


def load_build() -> ModuleType:
    spec = importlib.util.spec_from_file_location("cuda_build", ROOT / "csrc/cuda/build.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


build = load_build()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        build.toolkit()
    except build.ToolkitMissing as missing:
        if os.environ.get("CI", "").lower() == "true":
            pytest.fail(f"CI must compile the CUDA kernels: {missing}")
        pytest.skip(f"needs a CUDA toolkit: {missing}")
    return tmp_path_factory.mktemp("cuda")


def check_resources(arch: str, folder: Path) -> None:
    """Warnings are errors in there."""
    found = build.all_resources(arch, folder / arch)
    assert len(found) == 20
    assert [r.kernel for r in found if r.spilled or r.stack] == []
    # As the document says: run `python csrc/cuda/build.py --table` after a change.
    written = build.columns(build.written("resources"))
    assert written["kernel"] == [f"`{r.kernel}`" for r in found]
    if build.toolkit_version() == build.written_with():  # another compiler takes other registers
        name = f"sm_{arch.replace('.', '')}"
        assert written[name] == [f"{r.registers} / {r.spilled}" for r in found]


@pytest.mark.ci
def test_kernels_for_sm_90_spill_nothing(folder: Path) -> None:
    check_resources("9.0", folder)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["8.0", "10.0"])
def test_kernels_for_other_architectures_spill_nothing(folder: Path, arch: str) -> None:
    check_resources(arch, folder)


MIXING = """
#define DEQFUSE_ISA gpu
#include "common/cholesky.h"
template <class T>
__global__ void mix(const T* gram, int count, T lam, T* weights) {
  T from[5][5], alpha[5];
  for (int i = 0; i < 25; ++i) from[i / 5][i % 5] = gram[i];
  deqfuse::gpu::mixing_weights<deqfuse::gpu::ScalarLane<T>, 5>(from, T(count), lam, alpha);
  for (int i = 0; i < 5; ++i) weights[i] = alpha[i];
}
template __global__ void mix<float>(const float*, int, float, float*);
template __global__ void mix<double>(const double*, int, double, double*);
"""


def test_row_mathematics_that_no_cuda_kernel_uses_yet_compiles_for_one(folder: Path) -> None:
    source = folder / "mix.cu"
    source.write_text(MIXING)
    command = [build.toolkit() / "bin" / "nvcc", "-std=c++17", "-Werror=all-warnings"]
    build.run(
        [
            *command,
            *build.targets("9.0"),
            f"-I{ROOT / 'csrc'}",
            "-c",
            source,
            "-o",
            folder / "mix.o",
        ]
    )


ASK = """
import ctypes, os, sys
from deqfuse.backends import cuda_native
print(*cuda_native.versions(ctypes.CDLL(sys.argv[1], os.RTLD_LAZY)))
"""


@pytest.mark.ci
def test_library_needs_nothing_of_torch_but_its_stable_interface(folder: Path) -> None:
    """Linked from the operators and the kernels; with sm_90 alone, to be quick."""
    library = build.build_library("9.0", folder / "9.0", ["c++"], strict=True)
    command = ["nm", "-D", "--undefined-only", str(library)]
    needed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    torch_names = [n for n in needed if re.search("torch|c10|aten", n, re.IGNORECASE)]
    assert torch_names
    assert [n for n in torch_names if not re.match(r"(aoti_torch_|torch_)", n)] == []
    # Its CUDA and the driver's can be asked for where torch has no CUDA, and without a driver.
    asked = subprocess.run(
        [sys.executable, "-c", ASK, str(library)], capture_output=True, text=True, check=True
    )
    major, minor = map(int, build.toolkit_version().split(".")[:2])
    assert asked.stdout.split()[1] == str(1000 * major + 10 * minor)


# ---- the build's own decisions -------------------------------------------------------------------


def test_architectures_are_told_to_the_compiler() -> None:
    assert build.targets("8.0;9.0a 10.0+PTX") == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_100,code=sm_100",
        "-gencode=arch=compute_100,code=compute_100",
    ]
    with pytest.raises(ValueError, match="got 'Hopper'"):
        build.targets("Hopper")


def test_a_compiler_without_a_runtime_is_no_toolkit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").touch()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(build.ToolkitMissing, match=f"in {tmp_path}; set CUDA_HOME"):
        build.toolkit()
    (tmp_path / "lib64").mkdir()
    (tmp_path / "lib64" / "libcudart_static.a").touch()
    assert build.toolkit() == tmp_path


@pytest.mark.parametrize(
    ("of_torch", "expected"), [("12.6", "cuda-12.8"), (None, "cuda-13.0"), ("11.8", "cuda-13.0")]
)
def test_the_toolkit_is_of_the_cuda_that_torch_has(
    of_torch: str | None, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(build, "LOCAL", tmp_path)
    monkeypatch.setattr("torch.version.cuda", of_torch)
    for name in ("cuda-12.4", "cuda-12.8", "cuda-13.0", "cuda-9.2"):
        for file in ("bin/nvcc", "lib64/libcudart_static.a"):
            (tmp_path / name / file).parent.mkdir(parents=True)
            (tmp_path / name / file).touch()
    assert build.toolkit() == tmp_path / expected


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        ("70 75 80 86 90 100 120", "8.0;9.0;10.0+PTX"),
        ("70 75 80 86 89 90", "8.0;9.0+PTX"),  # before CUDA 12.8
        ("70 75 80", "8.0+PTX"),
    ],
)
def test_the_default_architectures_are_those_that_the_compiler_knows(
    known: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(f"#!/bin/sh\nprintf 'compute_%s\\n' {known}\n")
    nvcc.chmod(0o755)
    monkeypatch.setattr(build, "toolkit", lambda: tmp_path)
    assert build.default_archs() == expected


def test_a_compiler_that_knows_no_architecture_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "toolkit", lambda: Path("/toolkit"))
    monkeypatch.setattr(build, "toolkit_version", lambda: "10.2.89")
    monkeypatch.setattr(build, "run", lambda command: "compute_30\ncompute_75\n")
    with pytest.raises(RuntimeError, match=r"10.2.89 knows none of 8.0, 9.0, 10.0; set CUDA_HOME"):
        build.default_archs()


def test_what_a_compiler_says_becomes_numbers() -> None:
    said = (
        "ptxas info    : Compiling entry function '_ZN7deqfuse3gpu20adjoint_whole_kernelINS0_"
        "8CellTileEdLi8ELb0EEEvNS0_14AdjointProblemIT0_EE' for 'sm_90'\n"
        "ptxas info    : Function properties for it\n"
        "    32 bytes stack frame, 8 bytes spill stores, 16 bytes spill loads\n"
        "ptxas info    : Used 255 registers, used 1 barriers, 32 bytes cumulative stack size\n"
    )
    (found,) = build.resources(said)
    assert found.kernel == "adjoint_whole_kernel cell float64 streamed 8 rows"
    assert (found.registers, found.spilled, found.stack) == (255, 24, 32)


@pytest.mark.skipif(cpu_native.module is None, reason="the C++ extension was not built")
def test_the_table_of_tiles_is_that_of_the_code() -> None:
    assert build.written("tiles") == build.tiles()


@pytest.fixture
def small_source(tmp_path: Path) -> Path:
    """The tree with an extension that compiles at once."""
    built = shutil.ignore_patterns("__pycache__", "*.so")
    for name in ("csrc", "deqfuse", "triton_kernels"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=built)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, tmp_path)
    for source in (tmp_path / "csrc" / "cpu").glob("*.cpp"):
        source.write_text("")
    return tmp_path


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler called c++")
def test_cuda_asked_for_and_not_to_be_had_is_an_error(small_source: Path) -> None:
    stale = small_source / "deqfuse" / "_cuda.so"
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    environment = {k: v for k, v in os.environ.items() if k not in ("CI", "CXX")}
    environment["CUDA_HOME"] = str(small_source / "nowhere")
    for switch, ok in (("cuda", False), ("cpu", True)):
        stale.write_text("of an earlier build")
        environment["DEQFUSE_BUILD"] = switch
        result = subprocess.run(
            command, capture_output=True, text=True, cwd=small_source, env=environment
        )
        assert (result.returncode == 0) == ok, result.stderr
        assert not stale.exists()
        said = "cannot build the CUDA library: no nvcc with libcudart in" in result.stderr
        assert said != ok
