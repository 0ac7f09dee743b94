"""Docstrings say all that a reader of ``help()`` needs: every argument, field, shape and error.

Names are those that users import, and those that a new solver or a new backend is written with
(docs/how-to/extend.md).
"""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import pytest
import torch
from docstring_cases import entries, members, omissions, sections
from torch import Tensor

import deqfuse

MODULES = (
    "deqfuse",
    "deqfuse.functional",
    "deqfuse.testing",
    "deqfuse.robustness",
    "deqfuse.diagnostics",
    "deqfuse.nn",
)
FOR_RECIPES = {
    "deqfuse.solvers.options": ("SolverOption", "GradientOption", "knob", "from_code"),
    "deqfuse.solvers.rows": ("Rows", "Solution", "row_norm", "row_dot", "select"),
    "deqfuse.solvers.solve": ("registered", "solve"),
    "deqfuse.backends": ("BackendStatus", "choose", "for_rows", "load"),
    "deqfuse.backends.backend": ("Backend", "Launchers"),
    "deqfuse.backends.problem": (
        "Problem", "Solved", "SolvedLayer", "Statistics", "LayerStatistics",
    ),
    "deqfuse.backends.maps": ("CellParams", "FuseParams", "Variant"),
    "deqfuse.backends.layer": ("LayerParams", "solve", "adjoint"),
    "deqfuse.backends.reference": (
        "unavailable", "refuses", "solve_cells", "adjoint_cells", "solve_fuse", "adjoint_fuse",
        "solve_layer", "adjoint_layer", "takes_rows",
    ),
    "deqfuse.operators": ("Block", "solve"),
}  # fmt: skip


def documented() -> dict[str, Any]:
    """Everything that needs a docstring, by its full name."""
    found: dict[str, Any] = {}
    names = {m: tuple(importlib.import_module(m).__all__) for m in MODULES}
    for module, wanted in {**names, **FOR_RECIPES}.items():
        for name in wanted:
            symbol = getattr(importlib.import_module(module), name)
            found[f"{module}.{name}"] = symbol
            if inspect.isclass(symbol):
                found |= {f"{module}.{key}": value for key, value in members(symbol).items()}
    return found


@pytest.mark.parametrize("name", documented())
def test_a_docstring_leaves_nothing_out(name: str) -> None:
    assert not omissions(documented()[name]), name


def test_the_search_finds_what_is_public() -> None:
    names = documented()
    assert {"deqfuse.DEQFusion.forward", "deqfuse.functional.solve_fuse"} <= set(names)
    assert {"deqfuse.BlockInfo.converged", "deqfuse.SolveInfo.jacobian_penalty"} <= set(names)


def scale(x: Tensor, by: float = 1.0) -> Tensor:
    """Rows of x times a factor.

    Args:
        x: (B, d) rows.
        by: the factor, which may be
            negative.

    Returns:
        (B, d).

    Raises:
        ValueError: never.
    """
    return x * by


def test_sections_and_entries() -> None:
    said = sections(scale.__doc__ or "")
    assert list(said) == ["", "Args", "Returns", "Raises"]
    assert entries(said["Args"]) == {
        "x": "(B, d) rows.", "by": "the factor, which may be negative.",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("removed", "instead", "found"),
    [
        ("by: the factor, which may be\n        negative.", "", "the entry of by"),
        ("x: (B, d) rows", "x: rows (of features)", "the shape of x"),
        ("(B, d).\n\nRaises", "those rows.\n\nRaises", "the shape of what it returns"),
        ("Returns:\n    (B, d).", "", "a section Returns"),
        ("by: the", "by:\n    factor: the", "the entry of by"),
        ("ValueError: never", "ValueError, TypeError: never", "one error as an entry of Raises"),
    ],
)
def test_an_omission_is_found(
    monkeypatch: pytest.MonkeyPatch, removed: str, instead: str, found: str
) -> None:
    text = inspect.cleandoc(scale.__doc__ or "")  # Python 3.13 takes the indentation off itself
    assert not omissions(scale)
    assert removed in text
    monkeypatch.setattr(scale, "__doc__", text.replace(removed, instead))
    assert any(found in omission for omission in omissions(scale))


def test_help_shows_them() -> None:
    text = inspect.getdoc(deqfuse.functional.solve_fuse) or ""
    assert torch.Tensor.__name__ not in text.splitlines()[0]
    assert "cell_sum: (B, d)" in text
