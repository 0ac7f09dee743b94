"""`python -m deqfuse.info` names what there is, and for what is missing why and what would help."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from deqfuse import backends, info
from deqfuse.backends import cpu_native

needs_module = pytest.mark.skipif(
    cpu_native.module is None, reason="the C++ extension was not built"
)


def test_report_names_versions_devices_and_switches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEQFUSE_BACKEND", "reference")
    report = info.system_report()
    for title in ("versions:", "machine:", "CUDA devices:", "environment:", "backends:"):
        assert title in report
    assert torch.__version__ in report
    assert "DEQFUSE_BACKEND: reference" in report
    assert f"{torch.get_num_threads()} for torch" in report


def test_each_backend_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    status = backends.BackendStatus
    table = [
        status("reference", True, "plain PyTorch", ""),
        status("cpu", False, "it was not compiled", "install a C++ compiler"),
    ]
    monkeypatch.setattr(backends, "describe", lambda: table)
    report = info.system_report()
    words = " ".join(report.split())
    assert "reference: available plain PyTorch" in words
    assert "cpu: unavailable Reason: it was not compiled Remedy: install a C++ compiler" in words


def test_real_backends_say_why_they_are_unavailable() -> None:
    table = {backend.name: backend for backend in backends.describe()}
    assert set(table) == {"reference", "cpu", "cuda"}
    assert table["reference"].available
    for backend in table.values():
        assert backend.reason
        assert backend.available or backend.remedy


@needs_module
def test_compiled_module_says_how_it_was_built() -> None:
    assert cpu_native.module is not None
    build = cpu_native.module.build_info()
    assert build["torch_target"] == "2.11"
    assert build["instruction_set"] in ("base", "avx2", "avx512", "vnni", "amx")
    words = " ".join(info.system_report().split())
    assert f"Runs {build['instruction_set']} in vectors of {build['vector_bytes']} bytes" in words
    assert f"built with {build['compiler']} for torch >= 2.11" in words


@needs_module
def test_plan_counts_tiles_and_refuses_nonsense() -> None:
    module = cpu_native.module
    assert module is not None
    for rows in (0, 1, 33, 4096):
        plan = module.plan(rows, 64, itemsize=8, history=5)
        tile = plan["rows_per_tile"]
        assert tile % (module.build_info()["vector_bytes"] // 8) == 0
        assert plan["tiles"] == -(-rows // tile)
        assert plan["tile_bytes"] % (64 * tile * 8) == 0
    with pytest.raises(ValueError, match="itemsize 4 or 8"):
        module.plan(10, 64, itemsize=2)
    with pytest.raises(ValueError, match="num_groups >= 1"):
        module.host_plan(64, 0)
    with pytest.raises(ValueError, match="shared_limit: expected 0 or more, got -1"):
        module.host_device(-1)


@needs_module
@pytest.mark.parametrize("asked", ["base", "avx"])
def test_instruction_set_can_be_limited(asked: str) -> None:
    command = [sys.executable, "-m", "deqfuse.info"]
    environment = os.environ | {"DEQFUSE_ISA": asked}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    told = {
        "base": "Runs base in vectors",
        "avx": "expected base, avx2, avx512, vnni or amx, got 'avx'",
    }
    assert told[asked] in result.stdout


def test_missing_triton_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)  # makes `import triton` fail as if not there
    assert "pip install 'deqfuse[triton]'" in info.system_report()


def test_runs_as_a_command() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "DEQFUSE_BACKEND"}
    command = [sys.executable, "-m", "deqfuse.info"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    assert "not set (auto)" in result.stdout
    # runpy warns when `import deqfuse` has already imported the module that is to be run.
    assert "RuntimeWarning" not in result.stderr
