"""Imports go one way: the drawing in docs/design.md, section 2, as a test."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import deqfuse

ROOT = Path(deqfuse.__file__).parent
# Lowest first. A module imports from its own level and below.
LEVELS = (
    ("errors", "outcome", "scalars", "triton_kernels"),
    ("solvers.options",),
    ("reporting", "checks"),
    ("diagnostics", "result", "solvers"),
    ("backends",),
    ("ops",),
    ("autograd",),
    ("eager",),
    ("transforms",),
    ("equilibrium",),
    ("functional",),
    ("nn", "checkpoints"),
    ("testing", "data", "info", "robustness"),
    ("cli", "experiments"),
)
LAZY = {"result": {"diagnostics"}, "nn.fusion": {"checkpoints"}}  # imported inside a function


def level(module: str) -> int:
    """Position in ``LEVELS`` of a module, by its longest prefix there."""
    matches = [
        (len(name), i)
        for i, names in enumerate(LEVELS)
        for name in names
        if module == name or module.startswith(f"{name}.")
    ]
    assert matches, f"{module} has no level in this test"
    return max(matches)[1]


def imported(path: Path) -> set[str]:
    """What a file imports from the package, at any depth, relative to the package."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "deqfuse":
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("deqfuse."):
            names.add((node.module or "").removeprefix("deqfuse."))
    return names


def modules() -> list[str]:
    found = (path.relative_to(ROOT).with_suffix("") for path in ROOT.rglob("*.py"))
    return sorted(".".join(p.parts) for p in found if p.parts != ("__init__",))


@pytest.mark.parametrize("module", modules())
def test_imports_go_downwards(module: str) -> None:
    path = ROOT.joinpath(*module.split(".")).with_suffix(".py")
    here = module.removesuffix(".__init__")
    known = {name.split(".")[0] for names in LEVELS for name in names}
    for name in imported(path):
        if name.split(".")[0] in known:  # others are names that the package re-exports
            lazy = name.split(".")[0] in LAZY.get(here, set())
            assert lazy or level(name) <= level(here), f"{here} imports {name}"
