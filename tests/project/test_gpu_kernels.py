"""What `make gpu` runs to look for races and to profile, on the CPU."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from interpreter import needs_interpreter

from benchmarks import gpu_profile
from deqfuse.backends import cpu_native, cuda_native
from tools import gpu_kernels, running

ROOT = running.ROOT
SMALL = """
import sys, torch
from tools import gpu_kernels as k
k.ROWS = 3
k.FORWARD = {torch.float32: ((32, 4), (100, 20)), torch.bfloat16: ((32, 4),), torch.float64: ()}
sys.exit(k.main())
"""
KERNEL = re.compile(r"^def (_\w+_kernel)\(", re.MULTILINE)


@pytest.mark.triton
@needs_interpreter
@pytest.mark.skipif(cpu_native.module is None, reason="needs the compiled module's host policy")
@pytest.mark.parametrize(
    "program",
    [
        pytest.param(["-c", SMALL], id="small"),
        pytest.param(["-m", "tools.gpu_kernels"], id="whole", marks=pytest.mark.slow),
    ],
)
def test_every_kernel_runs_under_the_interpreter(program: list[str]) -> None:
    run = subprocess.run(
        [sys.executable, *program],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stdout + run.stderr
    last = run.stdout.splitlines()[-1]
    kernels = {
        name
        for path in (ROOT / "triton_kernels").rglob("*.py")
        for name in KERNEL.findall(path.read_text())
    }
    assert len(kernels) >= 8
    assert set(re.findall(r"_\w+_kernel\b", last)) == kernels


@pytest.mark.skipif(cpu_native.module is None, reason="needs the compiled module's host policy")
def test_the_adjoint_is_cut_in_every_way() -> None:
    """Within an H100's shared memory, which the host policy plays, and an A100's."""
    for limit in (227 * 1024, 163 * 1024):
        cpu_native.module.host_device(limit)
        for dtype, widths in gpu_kernels.ADJOINT.items():
            plans = [cpu_native.module.host_plan(d, 4, dtype.itemsize)["cut"] for d in widths]
            assert tuple(plans) == gpu_kernels.CUTS
    cpu_native.module.host_device()


def test_a_wrong_kernel_is_reported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = [("one", lambda: 1e-3, 1e-4), ("two", lambda: float("nan"), 1.0)]
    monkeypatch.setattr(gpu_kernels, "runs", lambda device: wrong)
    monkeypatch.setattr(cuda_native, "device_error", lambda index: None)
    before = torch.backends.cuda.matmul.fp32_precision
    assert gpu_kernels.main() == 1
    torch.backends.cuda.matmul.fp32_precision = before
    said = capsys.readouterr().out
    assert "one, ieee: 1.0e-03 is more than 1e-04" in said
    assert "two, ieee: nan is more than 1e+00" in said


def test_profile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All but the device's events, which stand in here: one of each kind, 10 us each."""
    names = {
        "_residual_cell_kernel": "cells",
        "_purify_combine_kernel": "fuse",
        "_anderson_step_kernel": "anderson",
        "void deqfuse::gpu::adjoint_stage_kernel<deqfuse::gpu::CellTile, float>(p)": "adjoint",
        "_purify_combine_vjp_kernel": "adjoint",
        "sm90_xmma_gemm_f32f32": "weight gradients",
        "nvjet_tst_128x64": "weight gradients",
        "Memcpy DtoD": "packing and the rest",
    }

    def events(call, repeats):
        call()
        return [(name, 1e-5) for name in names for _ in range(repeats)]

    monkeypatch.setattr(gpu_profile, "device_events", events)
    monkeypatch.setattr(gpu_profile.cases, "DEVICE", "cpu")
    arguments = ["--device", "cpu", "--json", str(tmp_path / "p.json"), "rosmap"]
    monkeypatch.setattr("sys.argv", ["gpu_profile", *arguments])
    assert gpu_profile.main() == 0
    (one,) = json.loads((tmp_path / "p.json").read_text())
    found = {name: kind for kind, e in one["kinds"].items() for name in e["kernels"]}
    assert found == names
    assert one["kinds"]["adjoint"]["seconds"] == pytest.approx(2e-5)
    assert one["kinds"]["adjoint"]["launches"] == pytest.approx(2)
    for kind, entry in one["kinds"].items():
        assert ("floor" in entry) == (kind != "packing and the rest")
        if "floor" in entry:
            sides = entry["flops"] / one["rate"], entry["bytes"] / one["bandwidth"]
            assert entry["floor"] == pytest.approx(max(sides))
    assert one["kinds"]["weight gradients"]["flops"] == 4 * 300**2 * 245 * 4
    assert "| rosmap (245, 3, 300) | adjoint | 2 | 20.0 |" in capsys.readouterr().out


def test_bytes_of_anderson_steps() -> None:
    """Rows of 1 and 3 evaluations, m = 2: windows of 1, then 1 and twice 2."""
    numbers = (2 + 0 + 1 + 4) * 2 + (2 + 1 + 2 + 4) * 2
    assert gpu_profile.anderson_bytes(torch.tensor([1.0, 3.0]), 10, 2) == 4 * 10 * numbers
