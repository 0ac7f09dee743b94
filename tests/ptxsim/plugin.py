"""A pytest plugin: the library's own tests of its Triton kernels on the emulator.

    PYTHONPATH=tests/ptxsim pytest -p plugin tests/triton/test_triton_solve.py

A test fails by its own assertions, which compiled arithmetic has to meet, and by a finding of the
emulator in one of its launches.
"""

from __future__ import annotations

import os

os.environ.pop("TRITON_INTERPRET", None)
import importlib
import pkgutil

import launches  # imports triton: kernels are compiled
import pytest
from emulator import faults

from deqfuse import triton_kernels
from deqfuse.triton_kernels import launch

for _module in pkgutil.iter_modules(triton_kernels.__path__, f"{triton_kernels.__name__}."):
    importlib.import_module(_module.name)
launch._handler = launches.handler
os.environ["TRITON_INTERPRET"] = "1"  # what the test files ask for when they are imported


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> object:
    launches.found.clear()
    with launches.Unwritten():
        result = yield
    wrong = faults(launches.found)
    assert not wrong, "\n".join(wrong[:5])
    return result


def pytest_terminal_summary(terminalreporter: object) -> None:
    count = ", ".join(f"{n} {name}" for name, n in sorted(launches.launched.items()))
    terminalreporter.write_line(f"launches on the emulator: {count or 'none'}")
