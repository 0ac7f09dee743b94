"""Refusals of ``DEQ`` and of the functions, as in test_errors.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from error_cases import DIM, ROWS, N, refused
from torch import Tensor

from deqfuse import (
    DEQ,
    PurifyCombine,
    ResidualCell,
    functional,
)

# ---- DEQ ----------------------------------------------------------------------------------------

Z0 = torch.zeros(ROWS, 2)


def test_deq_needs_a_callable() -> None:
    with refused(TypeError, "f", "callable", "Tensor"):
        DEQ(torch.zeros(3))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("z0", "error", "parts"),
    [
        ((), ValueError, ("z0", "non-empty tuple", "()")),
        ([Z0], TypeError, ("z0", "a tensor or a tuple of them", "list", "tuple(z0)")),
        (None, TypeError, ("z0", "torch.Tensor", "NoneType")),
        (1.0, TypeError, ("z0", "torch.Tensor", "float")),
        (torch.zeros(()), ValueError, ("z0", "(B, ...)", "()")),
        (torch.zeros(3, dtype=torch.long), TypeError, ("z0", "floating-point", "int64")),
        ((Z0, None), TypeError, ("z0[1]", "torch.Tensor", "NoneType")),
        ((Z0, torch.zeros(4, 1)), ValueError, ("z0[1]", "B = 3", "(4, 1)")),
        ((Z0, torch.zeros(())), ValueError, ("z0[1]", "(B, ...)", "()")),
        ((Z0, Z0.double()), TypeError, ("z0[1]", "float32", "float64")),
        ((Z0, Z0.to("meta")), ValueError, ("z0[1]", "device cpu", "meta")),
    ],
)
def test_deq_starts(z0: Any, error: type[Exception], parts: tuple[str, ...]) -> None:
    with refused(error, *parts):
        DEQ(lambda z: z)(z0)


@pytest.mark.parametrize(
    ("f", "error", "parts"),
    [
        (lambda z: None, TypeError, ("f(z, *args)", "torch.Tensor", "NoneType")),
        (lambda z: (z,), TypeError, ("f(z, *args)", "a tensor like z0", "tuple")),
        (lambda z: [z], TypeError, ("f(z, *args)", "torch.Tensor", "list")),
        (lambda z: z[:1], ValueError, ("f(z, *args)", "(3, 2)", "(1, 2)")),
        (lambda z: z.sum(1), ValueError, ("f(z, *args)", "(3, 2)", "(3,)")),
        (lambda z: z.sum(), ValueError, ("f(z, *args)", "(3, 2)", "()")),
        (lambda z: z.long(), TypeError, ("f(z, *args)", "floating-point", "int64")),
        (lambda z: z.double(), TypeError, ("f(z, *args)", "float32", "float64")),
        (lambda z: z.to("meta"), ValueError, ("f(z, *args)", "device cpu", "meta")),
    ],
)
def test_what_f_returns(
    f: Callable[[Tensor], Any], error: type[Exception], parts: tuple[str, ...]
) -> None:
    with refused(error, *parts):
        DEQ(f)(Z0)


@pytest.mark.parametrize(
    ("f", "parts"),
    [
        (lambda z: z[0], ("a tuple of 2 tensors", "Tensor")),
        (lambda z: (z[0],), ("a tuple of 2 tensors", "tuple")),
        (lambda z: list(z), ("a tuple of 2 tensors", "list", "Remedy: return a tuple")),
        (lambda z: (z[0], None), ("torch.Tensor", "NoneType")),
    ],
)
def test_what_f_returns_for_a_tuple(f: Callable[[Any], Any], parts: tuple[str, ...]) -> None:
    with refused(TypeError, "f(z, *args)", *parts):
        DEQ(f)((Z0, Z0))


# ---- functional twins ---------------------------------------------------------------------------


def cell_params(**kind: Any) -> list[Tensor]:
    return [p.detach().to(**kind) for p in ResidualCell(DIM, num_groups=2).flat()]


def fuse_params(**kind: Any) -> list[Tensor]:
    return [p.detach().to(**kind) for p in PurifyCombine(DIM, N, num_groups=2).flat()]


X = torch.zeros(1, ROWS, DIM)


@pytest.mark.parametrize(
    ("changes", "error", "parts"),
    [
        ({"x": X[0]}, ValueError, ("x", "(N, B, d)", "(3, 8)")),
        ({"x": X.long()}, TypeError, ("x", "floating-point", "int64")),
        ({"x": None}, TypeError, ("x", "torch.Tensor", "NoneType")),
        ({"params": cell_params()[:-1]}, ValueError, ("params", "10 tensors", "1 cells", "9")),
        ({"params": [None] * 10}, TypeError, ("params[0]", "torch.Tensor", "NoneType")),
        ({"params": [p[:4] for p in cell_params()]}, ValueError, ("params[0]", "(8, 8)", "(4, 8)")),
        ({"params": cell_params(device="meta")}, ValueError, ("params[0]", "device cpu", "meta")),
        ({"z0": torch.zeros(ROWS, DIM)}, ValueError, ("z0", "(1, 3, 8)", "(3, 8)")),
        ({"z0": X.long()}, TypeError, ("z0", "floating-point", "int64")),
        ({"z0": X.to("meta")}, ValueError, ("z0", "device cpu", "meta")),
        ({"num_groups": 3}, ValueError, ("num_groups", "divisor of dim=8", "3")),
        ({"variant": "bogus"}, ValueError, ("variant", "'bogus'")),
        ({"backend": "bogus"}, ValueError, ("backend", "'bogus'")),
        ({"on_failure": "bogus"}, ValueError, ("on_failure", "'bogus'")),
        ({"solver": None}, TypeError, ("solver", "None")),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_solve_cells(
    changes: dict[str, Any], error: type[Exception], parts: tuple[str, ...]
) -> None:
    with refused(error, *parts):
        functional.solve_cells(**{"x": X, "params": cell_params(), "num_groups": 2, **changes})


@pytest.mark.parametrize(
    ("changes", "error", "parts"),
    [
        ({"x_fuse": X}, ValueError, ("x_fuse", "(B, d)", "(1, 3, 8)")),
        ({"cell_sum": X}, ValueError, ("cell_sum", "(3, 8)", "(1, 3, 8)")),
        ({"cell_sum": None}, TypeError, ("cell_sum", "torch.Tensor", "NoneType")),
        ({"cell_sum": X[0].long()}, TypeError, ("cell_sum", "floating-point", "int64")),
        ({"cell_sum": X[0].to("meta")}, ValueError, ("cell_sum", "device cpu", "meta")),
        ({"mask": X}, ValueError, ("mask", "(3, 8)", "(1, 3, 8)")),
        ({"mask": X[0].bool()}, TypeError, ("mask", "floating-point", "bool")),
        ({"params": fuse_params()[:-1]}, ValueError, ("params", "6 tensors", "5")),
        ({"params": [p[:4] for p in fuse_params()]}, ValueError, ("params[0]", "(8, 8)", "(4, 8)")),
        ({"z0": X}, ValueError, ("z0", "(3, 8)", "(1, 3, 8)")),
        ({"num_modalities": 0}, ValueError, ("num_modalities", ">= 1", "0")),
        ({"num_groups": 5}, ValueError, ("num_groups", "divisor", "5")),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_solve_fuse(
    changes: dict[str, Any], error: type[Exception], parts: tuple[str, ...]
) -> None:
    good = {"x_fuse": X[0], "cell_sum": X[0], "params": fuse_params(), "num_modalities": N}
    with refused(error, *parts):
        functional.solve_fuse(**{**good, "num_groups": 2, **changes})


@pytest.mark.parametrize(
    ("f", "z0", "error", "parts"),
    [
        (lambda z: z, torch.zeros(3), ValueError, ("z0", "(B, n)", "(3,)")),
        (lambda z: z, torch.zeros(3, 2, 2), ValueError, ("z0", "(B, n)", "(3, 2, 2)")),
        (lambda z: z, None, TypeError, ("z0", "torch.Tensor", "NoneType")),
        (lambda z: z[:, :1], Z0 + 1, ValueError, ("f(z)", "(3, 2)", "(3, 1)")),
        (lambda z: None, Z0, TypeError, ("f(z)", "torch.Tensor", "NoneType")),
        (5, Z0, TypeError, ("f", "callable", "int")),
    ],
)
def test_fixed_point(f: Any, z0: Any, error: type[Exception], parts: tuple[str, ...]) -> None:
    with refused(error, *parts):
        functional.fixed_point(f, z0)


@pytest.mark.parametrize(
    ("z", "x", "error", "parts"),
    [
        (torch.ones(ROWS, 7), torch.ones(ROWS, DIM), ValueError, ("z", "(3, 8)", "(3, 7)")),
        (torch.ones(ROWS, DIM), torch.ones(4, DIM), ValueError, ("expected", "(3, 8)")),
        (torch.ones(ROWS, DIM).long(), torch.ones(ROWS, DIM), TypeError, ("z", "int64")),
        (torch.ones(DIM), torch.ones(DIM), ValueError, ("(B, d)", "(8,)")),
        (torch.ones(ROWS, DIM).double(), torch.ones(ROWS, DIM), TypeError, ("z", "float64")),
    ],
)
def test_one_step_of_a_cell(
    z: Tensor, x: Tensor, error: type[Exception], parts: tuple[str, ...]
) -> None:
    with refused(error, *parts):
        ResidualCell(DIM, num_groups=2)(z, x)


@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("cells", [torch.ones(N, 4, DIM), torch.ones(N + 1, ROWS, DIM)],
                         ids=["rows", "modalities"])  # fmt: skip
def test_one_step_of_the_combination(cells: Tensor, gate: bool) -> None:
    block = PurifyCombine(DIM, N, num_groups=2, gate=gate)
    with refused(ValueError, "cells", "(2, 3, 8)", str(tuple(cells.shape))):
        block(torch.ones(ROWS, DIM), cells, torch.ones(ROWS, DIM))


# ---- single steps as functions -------------------------------------------------------------------

CELL = ResidualCell(8, num_groups=2)
COMBINE = PurifyCombine(8, 3, num_groups=2)
ROWS_8 = torch.randn(4, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"variant": "foo"}, r"variant: expected one of 'paper'"),
        ({"num_groups": 3}, r"num_groups: expected a divisor of dim=8, got 3"),
        ({"params": CELL.flat()[:9]}, r"params: expected 10 tensors, got 9"),
    ],
    ids=["variant", "groups", "count"],
)
def test_residual_cell_as_a_function(change: dict[str, Any], message: str) -> None:
    options = {"params": CELL.flat(), "num_groups": 2, **change}
    with pytest.raises(ValueError, match=message):
        functional.residual_cell(ROWS_8, ROWS_8, **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"variant": "foo"}, r"variant: expected one of 'paper'"),
        ({"cells": torch.randn(3, 1, 8)}, r"cells: expected shape .* got \(3, 1, 8\)"),
        ({"mask": torch.ones(1, 8)}, r"mask: expected shape .* got \(1, 8\)"),
        ({"params": COMBINE.flat()[:5]}, r"params: expected 6 tensors, got 5"),
    ],
    ids=["variant", "cells", "mask", "count"],
)
def test_purify_combine_as_a_function(change: dict[str, Any], message: str) -> None:
    options = {"cells": torch.randn(3, 4, 8), "params": COMBINE.flat(), "num_groups": 2, **change}
    with pytest.raises(ValueError, match=message):
        functional.purify_combine(ROWS_8, x_fuse=ROWS_8, **options)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"e": torch.ones(8)}, ValueError, r"e: expected \(B, d\), got shape \(8,\)"),
        ({"num_groups": 3}, ValueError, r"num_groups: expected a divisor of dim=8, got 3"),
        ({"variant": "foo"}, ValueError, r"variant: expected one of 'paper'"),
        ({"weight": torch.ones(7)}, ValueError, r"weight: expected shape \(8,\) .* got \(7,\)"),
        ({"bias": None}, TypeError, r"bias: expected a torch.Tensor, got NoneType"),
    ],
    ids=["rows", "groups", "variant", "weight", "bias"],
)
def test_output_norm_as_a_function(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    good = {"e": ROWS_8, "weight": torch.ones(8), "bias": torch.zeros(8), "num_groups": 2}
    assert functional.output_norm(**good).shape == (4, 8)
    with pytest.raises(error, match=message):
        functional.output_norm(**{**good, **change})
