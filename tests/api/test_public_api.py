"""The public names, their documentation, and the option objects as values."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import inspect
import pickle
import pkgutil
from pathlib import Path

import pytest

import deqfuse
from deqfuse import (
    Anderson,
    Broyden,
    Implicit,
    Neumann,
    NewtonKrylov,
    OneStep,
    Outcome,
    Picard,
    Unrolled,
)
from deqfuse.solvers.options import LINEAR_SOLVERS, GradientOption, SolverOption, from_code

PUBLIC = [
    "DEQ",
    "Anderson",
    "BackendUnavailable",
    "BlockInfo",
    "Broyden",
    "ConvergenceError",
    "ConvergenceWarning",
    "DEQFusion",
    "DoubleBackwardError",
    "Implicit",
    "ModalityDropout",
    "Neumann",
    "NewtonKrylov",
    "OneStep",
    "Outcome",
    "Picard",
    "ProFusion",
    "PurifyCombine",
    "ResidualCell",
    "SolveInfo",
    "Unrolled",
    "WarmStart",
    "present_from_nan",
]
FUNCTIONAL = [
    "fixed_point",
    "output_norm",
    "purify_combine",
    "residual_cell",
    "solve_cells",
    "solve_fuse",
]


def test_public_names() -> None:
    assert sorted(deqfuse.__all__) == sorted(PUBLIC)
    assert sorted(importlib.import_module("deqfuse.functional").__all__) == FUNCTIONAL


@pytest.mark.parametrize("name", [*PUBLIC, "__version__"])
def test_names_resolve(name: str) -> None:
    assert getattr(deqfuse, name) is not None


def test_star_import_gives_exactly_them() -> None:
    namespace: dict[str, object] = {}
    exec("from deqfuse import *", namespace)
    assert sorted(set(namespace) - {"__builtins__"}) == sorted(PUBLIC)


def _documented(owner: type, name: str, member: object) -> bool:
    if isinstance(member, (staticmethod, classmethod)):
        member = member.__func__
    if isinstance(member, property):
        member = member.fget
    if not inspect.isfunction(member):
        return True
    inherited = any(name in base.__dict__ for base in owner.__mro__[1:])
    return bool(inspect.getdoc(member)) or inherited


@pytest.mark.parametrize("name", PUBLIC)
def test_docstrings(name: str) -> None:
    symbol = getattr(deqfuse, name)
    text = symbol.__doc__ if inspect.isfunction(symbol) else vars(symbol).get("__doc__")
    assert text is not None
    assert len(text.split()) > 3, "a docstring of its own"
    assert not text.startswith(f"{name}("), "and not the signature that dataclasses makes up"
    silent = [
        member
        for member, value in vars(symbol).items()
        if not member.startswith("_") and not _documented(symbol, member, value)
    ]
    assert not silent, f"{name}: without docstring: {silent}"


@pytest.mark.parametrize("name", FUNCTIONAL)
def test_functional_docstrings(name: str) -> None:
    assert inspect.getdoc(getattr(importlib.import_module("deqfuse.functional"), name))


def test_every_module_says_what_it_is() -> None:
    package = [m.name for m in pkgutil.walk_packages(deqfuse.__path__, "deqfuse.")]
    # Triton may be missing; the compiled libraries are no modules of Python.
    others = ("deqfuse.triton_kernels", "deqfuse._")
    ours = [name for name in package if not name.startswith(others)]
    assert len(ours) > 20
    silent = [name for name in ours if not importlib.import_module(name).__doc__]
    assert not silent


def test_a_library_of_cuda_kernels_is_no_module(tmp_path: Path, monkeypatch) -> None:
    """It lies beside the modules wherever there is a GPU, and cannot be imported."""
    (tmp_path / "_cuda.so").write_bytes(b"not a module of Python")
    monkeypatch.setattr(deqfuse, "__path__", [*deqfuse.__path__, str(tmp_path)])
    assert "deqfuse._cuda" in [m.name for m in pkgutil.walk_packages(deqfuse.__path__, "deqfuse.")]
    test_every_module_says_what_it_is()


def test_exception_types() -> None:
    assert issubclass(deqfuse.ConvergenceWarning, UserWarning)
    assert issubclass(deqfuse.ConvergenceError, RuntimeError)
    assert issubclass(deqfuse.BackendUnavailable, RuntimeError)
    assert issubclass(deqfuse.DoubleBackwardError, RuntimeError)


# ---- options as values --------------------------------------------------------------------------

OPTIONS: list[SolverOption | GradientOption] = [
    Anderson(),
    Anderson(tol=1e-7, max_iter=99, trace=True, m=3, beta=0.5, lam=0.0, rescue=True),
    Picard(),
    Picard(tol=1e-300, beta=1.5),
    Broyden(m=7),
    NewtonKrylov(restart=3),
    *(Implicit(solver=name, tol=0.1 + 0.2, max_iter=7) for name in LINEAR_SOLVERS),
    OneStep(),
    Neumann(k=9),
    Unrolled(),
]


@pytest.mark.parametrize("option", OPTIONS, ids=repr)
def test_code_round_trip(option: SolverOption | GradientOption) -> None:
    again = from_code(option.code)
    assert again == option
    assert type(again) is type(option)
    assert again.code == option.code


@pytest.mark.parametrize("option", OPTIONS, ids=repr)
@pytest.mark.parametrize(
    "clone",
    [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o)), dataclasses.replace],
    ids=["deepcopy", "pickle", "replace"],
)
def test_copies_are_equal(option, clone) -> None:  # type: ignore[no-untyped-def]
    twin = clone(option)
    assert twin == option
    assert hash(twin) == hash(option)
    assert twin.code == option.code


def test_options_are_different_values() -> None:
    assert len(set(OPTIONS)) == len(OPTIONS)
    assert len({option.code for option in OPTIONS}) == len(OPTIONS)


@pytest.mark.parametrize("option", OPTIONS, ids=repr)
def test_options_are_frozen(option: SolverOption | GradientOption) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        option.tol = 1.0  # type: ignore[union-attr,misc]


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        (Anderson(), {"tol": 1e-4, "max_iter": 50, "m": 5, "beta": 1.0, "lam": 1e-6}),
        (Implicit(), {"tol": 1e-4, "max_iter": 60, "solver": "auto"}),
    ],
)
def test_documented_defaults(option: object, expected: dict[str, object]) -> None:
    assert {name: getattr(option, name) for name in expected} == expected


def test_implicit_is_at_least_as_tight_as_the_forward() -> None:
    assert Implicit(tol=1e-4).for_forward(Anderson(tol=1e-8)).tol == 1e-8
    assert Implicit(tol=1e-8).for_forward(Anderson(tol=1e-4)).tol == 1e-8
    assert OneStep().for_forward(Anderson()) == OneStep()


def test_values_of_the_outcomes() -> None:
    assert [o.value for o in Outcome] == [*range(9)], "stored as int8: part of the interface"
