"""The kernels, outside Python, under the address and undefined-behaviour sanitizers."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def has_sanitizers(folder: Path) -> bool:
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        return False
    (folder / "empty.cpp").write_text("int main() {}")
    command = [compiler, "-fsanitize=address,undefined", "empty.cpp", "-o", "empty"]
    return subprocess.run(command, cwd=folder, capture_output=True).returncode == 0


@pytest.mark.ci
def test_kernels_are_clean(tmp_path: Path) -> None:
    if not has_sanitizers(tmp_path):
        pytest.skip("needs a C++ compiler with ASan and UBSan")
    result = subprocess.run([HERE / "run"], capture_output=True, text=True, errors="replace")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "base: " in result.stdout
    assert "base: penalty, " in result.stdout
    assert "base: rescue, " in result.stdout
    assert "bodies of the CUDA kernels: " in result.stdout
