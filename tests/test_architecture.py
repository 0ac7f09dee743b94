"""Imports go one way: the drawing in docs/design.md, section 2, as a test."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import deqfuse

ROOT = Path(deqfuse.__file__).parent
# Lowest first. A module imports from its own level and below.
LEVELS = (
    ("errors", "outcome", "scalars", "torch_private", "triton_kernels"),
    ("solvers.options",),
    ("solvers", "reporting"),
    ("checks",),
    ("diagnostics", "result"),
    ("backends",),
    ("operators.blocks",),
    ("operators.bodies", "operators.rule"),
    ("operators.eager",),
    ("operators.registered", "operators.transforms"),
    ("operators",),
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
            package = (node.module or "").removeprefix("deqfuse.")
            for alias in node.names:  # a module of a package, or what a module holds
                inner = ROOT.joinpath(*package.split("."), f"{alias.name}.py")
                names.add(f"{package}.{alias.name}" if inner.exists() else package)
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
        if name in (*deqfuse.__all__, "__version__"):  # the package itself, which is the top
            assert here.split(".")[0] in LEVELS[-1], f"{here} imports the package's own {name}"
            continue
        assert name.split(".")[0] in known, f"{name}, imported by {here}, has no level in this test"
        lazy = name.split(".")[0] in LAZY.get(here, set())
        assert lazy or level(name) <= level(here), f"{here} imports {name}"
