"""What every test run needs: skips with their reason, and one thread."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

# So that what is asserted there tells its values, as in the tests.
pytest.register_assert_rewrite(*(p.stem for p in Path(__file__).with_name("shared").glob("*.py")))


@pytest.hookimpl(tryfirst=True)  # pytest-benchmark reads its options in the same hook
def pytest_configure(config: pytest.Config) -> None:
    # Most products here are tiny: with more threads, waking them is most of the time.
    torch.set_num_threads(1)
    # Not in addopts: an unknown option would stop pytest where pytest-benchmark is missing.
    benchmark_asked_for = getattr(config.option, "benchmark_only", False)
    if config.pluginmanager.hasplugin("benchmark") and not benchmark_asked_for:
        config.option.benchmark_skip = True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reasons = {}
    if not torch.cuda.is_available():
        why = "sees none" if torch.version.cuda else "is built without CUDA"
        reasons["gpu"] = f"needs a CUDA device; torch {torch.__version__} {why}"
    if importlib.util.find_spec("triton") is None:
        reasons["triton"] = "needs triton: pip install 'deqfuse[triton]'"
    for item in items:
        for marker, reason in reasons.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test runs on is decided by the test."""
    monkeypatch.delenv("DEQFUSE_BACKEND", raising=False)
    # A pytest that a test starts is no worker: pytest-benchmark would refuse to measure in one.
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """``torch.set_num_threads`` for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
