"""Rows of unit size by the kernel, under Triton's interpreter, against torch's operations."""

from __future__ import annotations

import pytest
import torch
from triton_cases import (
    DTYPES,
    poison,  # noqa: F401 - a fixture
)

from deqfuse.backends import cuda
from deqfuse.backends.problem import compute_dtype
from deqfuse.operators import unit as operations
from deqfuse.triton_kernels import unit
from deqfuse.triton_kernels.launch import counted

pytestmark = [pytest.mark.triton, pytest.mark.usefixtures("poison")]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "dim"), [(1, 1), (5, 12), (70, 50), (3, 1024), (3, 1300)], ids=str
)
def test_kernel_and_operations_agree(rows: int, dim: int, dtype: str) -> None:
    """The last width takes two tiles of columns."""
    torch.manual_seed(dim)
    x, grad = (s * torch.randn(rows, dim, dtype=torch.float64) for s in (30.0, 1.0))
    x, grad = x.to(DTYPES[dtype]), grad.to(DTYPES[dtype])
    y, dx = unit.unit_size(x, None), unit.unit_size(x, grad)
    assert y.dtype == dx.dtype == x.dtype
    x, grad = x.double(), grad.double()
    right = x * operations._scale(x)
    # Sums of d terms by halves, rounded some ten times; 16 bits are rounded once more at the end.
    eps = 16 * torch.finfo(compute_dtype(y.dtype)).eps + torch.finfo(y.dtype).eps
    torch.testing.assert_close(y.double(), right, rtol=eps, atol=0)
    size = operations._scale(x) * 5  # of the terms of which the gradient is a difference
    assert ((dx.double() - operations._gradient(x, grad)).abs() <= eps * size).all()


@pytest.mark.filterwarnings(
    "ignore:(divide by zero|invalid value|overflow):RuntimeWarning"
)  # numpy's
def test_what_has_no_direction_becomes_zeros_and_what_overflows_nan() -> None:
    x = torch.randn(5, 8)
    x[1], x[2], x[3], x[4, 2] = 0.0, 1e-13, 1e30, torch.nan
    for found in (unit.unit_size(x, None), unit.unit_size(x, torch.randn(5, 8))):
        assert found[0].isfinite().all()
        assert (found[1:3] == 0).all()
        assert found[3:].isnan().all()


def test_one_launch_a_modality_and_no_rows() -> None:
    x = [torch.randn(3, 2 * 6)[:, ::2] for _ in range(2)]  # strided
    with counted() as names:
        y = cuda.unit_size(x, [])
        cuda.unit_size(x, [torch.ones(3, 6)] * 2)
    assert names == ["_unit_size_kernel"] * 4
    torch.testing.assert_close(y[1], x[1] * operations._scale(x[1]))
    with counted() as names:
        assert cuda.unit_size([torch.randn(0, 6)], [])[0].shape == (0, 6)
    assert names == []


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    x = torch.randn(300, 33)
    whole = unit.unit_size(x, None)
    for i in (0, 64, 299):
        assert torch.equal(unit.unit_size(x[i : i + 1], None)[0], whole[i])
