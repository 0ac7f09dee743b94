"""The example of a cell of one's own, as a program."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "conv_cell.py"


def test_example_learns(capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("conv_cell", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.main(steps=20) > 0.75
    out = capsys.readouterr().out
    assert "100% of all rows converged" in out
    assert "evaluations per sample" in out
