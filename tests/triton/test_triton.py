"""Triton's kernels without a GPU: the interpreter's tests in a process of their own, and imports.

Triton decides when it is imported whether kernels are compiled or interpreted, so one process
cannot do both. ``TRITON_INTERPRET=1 pytest tests/triton/test_triton_steps.py`` runs one file of
them directly.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from interpreter import needs_interpreter

HERE = Path(__file__).parent
INTERPRETED = (
    "test_triton_steps.py",
    "test_triton_anderson.py",
    "test_triton_solve.py",
    "test_triton_launches.py",
    "test_triton_graphs.py",
    "test_triton_gpu.py",
    "test_triton_gpu_steps.py",
    "test_triton_adjoint.py",
    "test_triton_penalty.py",
    "test_triton_gpu_penalty.py",
    "test_triton_presence.py",
    "test_triton_unit.py",
)
SLOW = (
    "test_triton_steps.py",
    "test_triton_solve.py",
    "test_triton_gpu.py",
    "test_triton_gpu_steps.py",
    "test_triton_penalty.py",
    "test_triton_gpu_penalty.py",
)
LONG = (  # half a minute and more
    "test_triton_penalty.py",
    "test_triton_presence.py",
    "test_triton_gpu_steps.py",
    "test_triton_graphs.py",
)
interpreted_already = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.mark.triton
@needs_interpreter
@pytest.mark.skipif(interpreted_already, reason="this process is under the interpreter already")
@pytest.mark.parametrize(
    ("file", "marks"),
    [
        *(
            pytest.param(file, "not slow", marks=[pytest.mark.ci] if file in LONG else [])
            for file in INTERPRETED
        ),
        *(pytest.param(file, "slow", marks=pytest.mark.slow) for file in SLOW),
    ],
)
def test_under_the_interpreter(file: str, marks: str) -> None:
    """Their slow tests are run by slow ones of this file: by ``-m slow``, and without ``-m``."""
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", marks, "--tb=short", HERE / file],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert " passed" in run.stdout


def test_every_interpreted_file_is_run() -> None:
    """And those with slow tests once more, for these."""
    shared = ("from triton_cases", "from gpu_cases")
    texts = {p.name: p.read_text() for p in HERE.glob("test_triton*.py")}
    files = {name for name, text in texts.items() if any(s in text for s in shared)}
    assert files == set(INTERPRETED) | {Path(__file__).name}
    slow = re.compile("mark.slow|WIDE|PATHS|LONG_REHEARSAL")
    assert {name for name in INTERPRETED if slow.search(texts[name])} == set(SLOW)


def test_importing_deqfuse_does_not_import_triton() -> None:
    program = (
        "import sys, deqfuse, deqfuse.triton_kernels, deqfuse.triton_kernels.tiles;"
        "import deqfuse.triton_kernels.launch, deqfuse.backends.cuda;"
        "import deqfuse.triton_kernels.resource_table;"
        "deqfuse.backends.cuda.unavailable();"
        "sys.exit('triton' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
