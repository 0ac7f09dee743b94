"""Injections of unit size: a backend's kernel against torch's operations, in both directions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deqfuse import DEQFusion
from deqfuse.backends import cpu_native
from deqfuse.backends.problem import compute_dtype
from deqfuse.operators import unit, unit_size

pytestmark = pytest.mark.skipif(cpu_native.module is None, reason="no compiled module")
SHAPES = [(1, 1), (3, 7), (5, 16), (4, 33), (300, 128)]  # the last is shared over threads


def drawn(rows: int, dim: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Two modalities of very different size."""
    torch.manual_seed(rows + dim)
    return [(s * torch.randn(rows, dim)).to(dtype).requires_grad_() for s in (1e-3, 50.0)]


def both(x: list[Tensor]) -> list[tuple[list[Tensor], list[Tensor]]]:
    """Answers and gradients of the kernel, and of torch's operations."""
    found = []
    for backend in ("cpu", "reference"):
        y = unit_size(x, backend)
        torch.manual_seed(0)
        grads = torch.autograd.grad(y, x, [torch.randn_like(t) for t in y])
        found.append((y, list(grads)))
    return found


@pytest.mark.parametrize(("rows", "dim"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_kernel_and_operations_agree(rows: int, dim: int, dtype: torch.dtype) -> None:
    x = drawn(rows, dim, dtype)
    (y, grads), (other_y, other_grads) = both(x)
    # Sums of d terms, rounded some ten times; 16 bits are rounded once more at the end.
    unit = 16 * torch.finfo(compute_dtype(dtype)).eps
    stored = 2 * torch.finfo(dtype).eps
    for t, mine, wanted, grad, other in zip(x, y, other_y, grads, other_grads, strict=True):
        assert mine.dtype == grad.dtype == dtype
        torch.testing.assert_close(mine, wanted, rtol=unit + stored, atol=0)
        # A difference of terms of this size.
        size = (dim**0.5 / t.detach().double().norm(dim=-1, keepdim=True)) * 5
        assert ((grad.double() - other.double()).abs() <= (unit + stored) * size).all()
    size = y[0].double().square().mean(-1).sqrt()
    torch.testing.assert_close(size, torch.ones_like(size), rtol=unit + stored, atol=0)


def test_what_has_no_direction_becomes_zeros_and_what_overflows_nan() -> None:
    x = [torch.randn(4, 8)]
    x[0][1], x[0][2], x[0][3] = 0.0, 1e-13, 1e30
    x[0].requires_grad_()
    for y, grads in both(x):
        assert (y[0][1:3] == 0).all()
        assert (grads[0][1:3] == 0).all()
        assert y[0][3].isnan().all()
        assert grads[0][3].isnan().all()
        assert y[0][0].isfinite().all()


def test_gradients_of_both_orders() -> None:
    x = drawn(3, 5)
    assert torch.autograd.gradcheck(lambda *x: unit_size(x, "cpu"), x, eps=1e-7)
    assert torch.autograd.gradgradcheck(lambda *x: unit_size(x, "cpu"), x, eps=1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_gradient_is_the_same_where_it_is_to_be_differentiated_again(dtype: torch.dtype) -> None:
    """Products of x and its cotangent, which 16 bits do not hold, included."""
    x = [(300 * torch.randn(4, 9)).to(dtype).requires_grad_()]
    y, g = unit_size(x, "cpu"), [(300 * torch.randn(4, 9)).to(dtype)]
    (once,) = torch.autograd.grad(y, x, g, retain_graph=True)
    (again,) = torch.autograd.grad(y, x, g, create_graph=True)
    assert once.isfinite().all()
    torch.testing.assert_close(again, once, rtol=4 * torch.finfo(dtype).eps, atol=1e-5)


def test_one_gradient_of_two_and_none() -> None:
    x = drawn(3, 5)
    (grad,) = torch.autograd.grad(unit_size(x, "cpu")[1].sum(), x[1])
    assert grad.abs().max() > 0
    given = [t.detach() for t in x]
    assert not any(t.requires_grad for t in unit_size(given, "cpu"))
    frozen = unit_size([given[0], x[1]], "cpu")
    torch.autograd.grad(frozen[1].sum(), x[1])


def test_rows_do_not_depend_on_the_batch_and_strides() -> None:
    x = [torch.randn(300, 2 * 96)[:, ::2] for _ in range(2)]
    whole = unit_size(x, "cpu")
    for i in (0, 150, 299):
        for some, all_rows in zip(unit_size([t[i : i + 1] for t in x], "cpu"), whole, strict=True):
            assert torch.equal(some[0], all_rows[i])


def test_no_rows() -> None:
    assert unit_size([torch.randn(0, 5), torch.randn(0, 5)], "cpu")[1].shape == (0, 5)


def test_the_layer_takes_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """And torch's operations where they are to be followed."""
    x = [torch.randn(2, 8) for _ in range(2)]
    fusion = DEQFusion(8, 2, num_groups=2)
    monkeypatch.setattr(unit, "_scale", lambda t: pytest.fail("torch's operations were taken"))
    fusion(x).sum().backward()
    monkeypatch.undo()
    called: list[int] = []
    scale = unit._scale
    monkeypatch.setattr(unit, "_scale", lambda t: called.append(1) or scale(t))
    torch.func.vmap(lambda a, b: fusion([a, b]), randomness="error")(*[t[None] for t in x])
    assert called
