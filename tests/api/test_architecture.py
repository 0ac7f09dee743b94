"""Imports go one way: the list in docs/explanation/architecture.md, as a test."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import deqfuse

ROOT = Path(deqfuse.__file__).parent
# Lowest first. A module imports from its own level and below, and never in a circle.
LEVELS = (
    ("errors", "outcome", "scalars", "torch_private", "triton_kernels"),
    ("solvers",),
    ("reporting", "checks"),
    ("diagnostics", "result"),
    ("backends",),
    ("operators.blocks",),
    ("operators.bodies", "operators.captures"),
    ("operators.rule",),
    ("operators.eager", "operators.registered"),
    ("operators.transforms",),
    ("operators.penalty",),
    ("operators",),
    ("equilibrium",),
    ("functional",),
    ("layer",),
    ("nn", "checkpoints"),
    ("testing", "data", "info", "robustness", "reports"),
    ("experiments",),
    ("cli",),
)


def modules(root: Path) -> dict[str, Path]:
    """Dotted name below the package -> file; ``__init__`` has its package's name."""
    found = {}
    beside = root.parent / "triton_kernels"  # of the package too, in a checkout
    for path in [*root.rglob("*.py"), *beside.rglob("*.py")]:
        above = root if path.is_relative_to(root) else root.parent
        parts = path.relative_to(above).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name:
            found[name] = path
    return found


def offers(root: Path) -> dict[str, str]:
    """Name that the root package offers -> module that it comes from."""
    start = root / "__init__.py"
    tree = ast.parse(start.read_text(encoding="utf-8")) if start.exists() else ast.Module([], [])
    return {
        alias.name: (node.module or "").removeprefix("deqfuse.")
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("deqfuse.")
        for alias in node.names
    }


def imports(root: Path) -> dict[str, set[str]]:
    """Module -> modules of the package that it imports, at any depth: in functions, for types too.

    ``from package import name`` is an import of the module ``name`` where there is one. A package
    counts only where something of its own ``__init__`` is asked for: that it runs before its
    modules is no dependency of those who import a module.
    """
    files, offered = modules(root), offers(root)
    graph: dict[str, set[str]] = {}
    for module, path in files.items():
        found = graph.setdefault(module, set())
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                source = node.module or ""
                if node.level:
                    above = ["deqfuse", *filter(None, package.split("."))]
                    kept = above[: len(above) - node.level + 1]
                    source = ".".join([*kept, *filter(None, [source])])
                names = [f"{source}.{alias.name}" for alias in node.names]
            else:
                continue
            for name in names:
                inside = name.removeprefix("deqfuse.")
                if inside == name:
                    continue  # another package, or deqfuse itself
                inside = offered.get(inside, inside)
                target = inside if inside in files else inside.rpartition(".")[0]
                if target in files:
                    found.add(target)
        found.discard(module)
    return graph


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


def upward(graph: Mapping[str, set[str]]) -> list[str]:
    """Imports from a higher level, as text."""
    return sorted(
        f"{module} imports {name}"
        for module, names in graph.items()
        for name in names
        if level(name) > level(module)
    )


def circle(graph: Mapping[str, set[str]]) -> list[str]:
    """The modules of one circle of imports, in order; empty when there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return [*error.args[1]]
    return []


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    """Of the whole package."""
    return imports(ROOT)


def test_imports_go_downwards(graph: dict[str, set[str]]) -> None:
    assert upward(graph) == []


def test_imports_close_no_circle(graph: dict[str, set[str]]) -> None:
    assert circle(graph) == []


@pytest.mark.parametrize(
    ("one", "other", "named"),
    [
        ("def f():\n    from deqfuse.cli import main\n", "", "data.one imports cli.main"),
        ("import deqfuse.cli.main\n", "", "data.one imports cli.main"),
        ("from deqfuse import run\n", "", "data.one imports cli.main"),
        ("from deqfuse.data.other import x\n", "from deqfuse.data import one\n", None),
        ("from . import other\n", "def f():\n    from deqfuse.data.one import y\n", None),
        ("import deqfuse.data.other\n", "from .one import y\n", None),
    ],
)
def test_what_it_finds(one: str, other: str, named: str | None, tmp_path: Path) -> None:
    """Imports upwards and circles are found however they are written."""
    for name, text in {"data/one": one, "data/other": other, "cli/main": ""}.items():
        path = tmp_path / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    (tmp_path / "__init__.py").write_text("from deqfuse.cli.main import run as run\n")
    found = imports(tmp_path)
    assert upward(found) == ([named] if named else [])
    assert set(circle(found)) == (set() if named else {"data.one", "data.other"})


def test_no_file_is_too_long() -> None:
    """What nobody reads in one sitting becomes two files; tests and C++ included."""
    root = Path(__file__).parents[2]
    files = [
        path
        for folder in (
            "deqfuse",
            "triton_kernels",
            "csrc",
            "benchmarks",
            "tools",
            "tests",
            "examples",
        )
        for path in (root / folder).rglob("*")
        if path.suffix in (".py", ".h", ".cpp", ".cuh", ".cu", ".inc")
    ]
    assert len(files) > 150
    lengths = {path.relative_to(root): len(path.read_text().splitlines()) for path in files}
    assert {path: n for path, n in lengths.items() if n > 400} == {}
