"""Rows are independent: batch, order, neighbours and poison change nobody else's answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from deqfuse import (
    DEQ,
    Anderson,
    Broyden,
    DEQFusion,
    Implicit,
    Neumann,
    NewtonKrylov,
    OneStep,
    Outcome,
    Picard,
    Unrolled,
)
from deqfuse.solvers.options import LINEAR_SOLVERS, GradientOption, SolverOption
from deqfuse.solvers.rows import Rows

ROWS, DIM = 12, 16
SOLVERS: list[SolverOption] = [
    Anderson(),
    Anderson(m=2, rescue=True, max_iter=12),
    Picard(),
    Broyden(),
    NewtonKrylov(),
]
GRADIENTS: list[GradientOption] = [
    *(Implicit(solver=name) for name in LINEAR_SOLVERS),
    OneStep(),
    Neumann(k=3),
]
ids = repr


def layer(dtype: torch.dtype = torch.float64, **options: object) -> DEQFusion:
    """A contractive layer; its gain is raised so that rows need different numbers of steps."""
    torch.manual_seed(0)
    fusion = DEQFusion(DIM, 2, num_groups=2, on_failure="ignore", **options)  # type: ignore[arg-type]
    return fusion.to(dtype)


def features(dtype: torch.dtype = torch.float64, rows: int = ROWS) -> list[Tensor]:
    gen = torch.Generator().manual_seed(1)
    sizes = torch.logspace(-0.5, 1, rows, dtype=torch.float64)[:, None]
    drawn = (torch.randn(rows, DIM, generator=gen, dtype=torch.float64) for _ in range(2))
    return [(sizes * x).to(dtype) for x in drawn]


def run(
    fusion: DEQFusion, xs: list[Tensor], cotangent: Tensor
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Output, evaluations per row, and gradients with respect to the inputs."""
    xs = [x.clone().requires_grad_() for x in xs]
    z, info = fusion(xs, return_info=True)
    return z.detach(), info.nfe, list(torch.autograd.grad(z, xs, cotangent))


def cotangent(dtype: torch.dtype = torch.float64, rows: int = ROWS) -> Tensor:
    return torch.randn(rows, DIM, generator=torch.Generator().manual_seed(2), dtype=dtype)


@pytest.mark.parametrize("solver", SOLVERS, ids=ids)
def test_a_row_alone_has_the_same_answer(solver: SolverOption) -> None:
    """To rounding: torch's own matrix product is not bitwise invariant to the batch."""
    fusion = layer(solver=replace(solver, tol=1e-7), adjoint=Implicit(tol=1e-7))
    xs, g = features(), cotangent()
    z, nfe, grads = run(fusion, xs, g)
    assert len(set(nfe.tolist())) > 1, "rows that all stop together test nothing"
    for row in range(ROWS):
        one = slice(row, row + 1)
        alone_z, alone_nfe, alone_grads = run(fusion, [x[one] for x in xs], g[one])
        assert torch.equal(alone_nfe, nfe[one])
        torch.testing.assert_close(alone_z, z[one], rtol=1e-9, atol=1e-10)
        for alone, together in zip(alone_grads, grads, strict=True):
            torch.testing.assert_close(alone, together[one], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("solver", SOLVERS, ids=ids)
def test_permuting_rows_permutes_answers(solver: SolverOption) -> None:
    fusion = layer(solver=replace(solver, tol=1e-7), adjoint=Implicit(tol=1e-7))
    xs, g = features(), cotangent()
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(3))
    z, nfe, grads = run(fusion, xs, g)
    permuted_z, permuted_nfe, permuted_grads = run(fusion, [x[order] for x in xs], g[order])
    assert torch.equal(permuted_nfe, nfe[order])
    torch.testing.assert_close(permuted_z, z[order], rtol=1e-9, atol=1e-10)
    for permuted, original in zip(permuted_grads, grads, strict=True):
        torch.testing.assert_close(permuted, original[order], rtol=1e-9, atol=1e-10)


def test_leading_dimensions_are_rows() -> None:
    fusion, xs = layer(), features()
    flat, info = fusion(xs, return_info=True)
    z, folded = fusion([x.view(3, 2, 2, DIM) for x in xs], return_info=True)
    assert torch.equal(z, flat.view(3, 2, 2, DIM))
    assert torch.equal(folded.fuse.nfe, info.fuse.nfe.view(3, 2, 2))
    assert folded.cells.outcome.shape == (2, 3, 2, 2)
    assert folded.converged.shape == folded.nfe.shape == (3, 2, 2)


# ---- poison -------------------------------------------------------------------------------------


@pytest.mark.parametrize("poison", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
@pytest.mark.parametrize("solver", SOLVERS, ids=ids)
def test_poisoned_input_stays_in_its_row(
    solver: SolverOption, dtype: torch.dtype, poison: float
) -> None:
    fusion, xs, g = layer(dtype, solver=solver), features(dtype), cotangent(dtype)
    clean_z, clean_nfe, clean_grads = run(fusion, xs, g)
    xs[1][4, 3] = poison
    z, info = fusion(xs, return_info=True)
    assert info.fuse.outcome[4] == Outcome.NON_FINITE
    assert info.cells.outcome[1, 4] == Outcome.NON_FINITE
    assert info.cells.outcome[0, 4] == Outcome.CONVERGED, "the other modality's cell is fine"
    assert not info.converged[4]
    assert z[4].isnan().any()
    dirty_z, dirty_nfe, dirty_grads = run(fusion, xs, g)
    others = torch.arange(ROWS) != 4
    assert torch.equal(dirty_z[others], clean_z[others])
    assert torch.equal(dirty_nfe[others], clean_nfe[others])
    for dirty, clean in zip(dirty_grads, clean_grads, strict=True):
        assert torch.equal(dirty[others], clean[others])


@pytest.mark.parametrize("adjoint", GRADIENTS, ids=ids)
def test_poisoned_cotangent_stays_in_its_row(adjoint: GradientOption) -> None:
    fusion, xs, g = layer(adjoint=adjoint), features(), cotangent()
    _, _, clean = run(fusion, xs, g)
    g[4, 3] = torch.nan
    _, _, dirty = run(fusion, xs, g)
    others = torch.arange(ROWS) != 4
    for after, before in zip(dirty, clean, strict=True):
        assert torch.equal(after[others], before[others])
        assert after[4].isnan().any(), "a NaN loss must not turn into a finite gradient"


@pytest.mark.parametrize("adjoint", GRADIENTS, ids=ids)
def test_poison_reaches_parameter_gradients(adjoint: GradientOption) -> None:
    """They sum over rows, as torch's own do: the NaN is visible, not dropped."""
    fusion, xs = layer(adjoint=adjoint), features()
    xs[0][4, 3] = torch.nan
    (fusion(xs) * cotangent()).sum().backward()
    assert fusion.cells[0].linear2.weight.grad.isnan().any()
    assert fusion.combine.fuse.weight.grad.isnan().any()


# ---- rows that stop early -----------------------------------------------------------------------


def affine_rows(slopes: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda z: slopes[:, None] * torch.sin(z) + 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
@pytest.mark.parametrize("solver", [Anderson(), Anderson(m=2), Picard(), Broyden()], ids=ids)
def test_unrolled_gradient_of_rows_that_stopped_exactly(
    solver: SolverOption, dtype: torch.dtype
) -> None:
    """A row with a residual of exactly zero stays frozen for many steps: its Gram matrix is zero,
    and differentiating through what the frozen row would have done must not give NaN."""
    slopes = torch.tensor([0.0, 0.5, 0.95], dtype=dtype, requires_grad=True)
    solver = replace(solver, tol=1e-6, max_iter=200)
    deq = DEQ(
        lambda z, s: affine_rows(s)(z), solver=solver, adjoint=Unrolled(), on_failure="ignore"
    )
    z, info = deq(torch.zeros(3, 4, dtype=dtype), slopes)
    assert info.fuse.nfe[0] <= 2
    assert info.fuse.nfe.max() >= 8, "the others must go on for longer than the history"
    g = cotangent(dtype, 3)[:, :4]
    (grad,) = torch.autograd.grad(z, slopes, g)
    star = z.detach().double()
    exact = star.sin() / (1 - slopes.detach().double()[:, None] * star.cos()) * g.double()
    # Backpropagation through steps that have converged to 1e-6 is as exact as they are, up to the
    # condition number 1 / (1 - slope cos z) of the row; Anderson's weights differentiate worse.
    torch.testing.assert_close(grad.double(), exact.sum(1), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("solver", SOLVERS, ids=ids)
def test_an_early_row_is_not_moved_by_late_ones(solver: SolverOption) -> None:
    fast = torch.full((1,), 0.1, dtype=torch.float64)
    slow = torch.tensor([0.1, 0.97, 1.6], dtype=torch.float64)
    start = torch.zeros(3, 4, dtype=torch.float64)
    alone, alone_info = DEQ(affine_rows(fast), solver=solver, on_failure="ignore")(start[:1])
    mixed, mixed_info = DEQ(affine_rows(slow), solver=solver, on_failure="ignore")(start)
    assert mixed_info.fuse.nfe[0] < mixed_info.fuse.nfe.max()
    assert torch.equal(mixed[0], alone[0])
    assert torch.equal(mixed_info.fuse.nfe[0], alone_info.fuse.nfe[0])


# ---- the bookkeeping itself ---------------------------------------------------------------------


def test_rows_counts_costs_and_keeps_the_best() -> None:
    rows = Rows(torch.zeros(3, 1, dtype=torch.float64), tol=1e-3, max_iter=10, trace=True)
    z = torch.zeros(3, 1, dtype=torch.float64)
    images = [[0.5, 1.0, 1.0], [1e-5, 0.0, 2.0], [0.75, 5.0, torch.nan]]
    costs = [1, torch.tensor([2, 3, 4]), 1]
    for image, cost in zip(images, costs, strict=True):
        fz = torch.tensor(image, dtype=torch.float64)[:, None]
        rows.observe(z, fz, cost)
    found = rows.solution()
    # The second row had stopped at 0 before f(0) became 5: it keeps its answer, and it is told.
    assert found.outcome.tolist() == [Outcome.MAX_ITER, Outcome.COUPLED, Outcome.NON_FINITE]
    assert found.nfe.tolist() == [4, 4, 6]
    assert found.z.flatten().tolist() == [1e-5, 0.0, 1.0]
    assert found.trace is not None
    assert found.trace[2, 1].isnan(), "stopped at the second step"


def test_rows_stall_after_twenty_observations_without_progress() -> None:
    rows = Rows(torch.zeros(1, 1), tol=1e-6, max_iter=1000)
    z, fz = torch.zeros(1, 1), torch.ones(1, 1)
    seen = 1
    while rows.observe(z, fz):
        seen += 1
    assert seen == 20 + 1
    assert rows.solution().outcome.tolist() == [Outcome.STALLED]


def test_warm_start_at_the_answer_costs_one_evaluation() -> None:
    fusion, xs = layer(solver=Anderson(tol=1e-9)), features()
    z, zs = fusion(xs, return_cells=True)
    again, info = fusion(xs, z0=(z, zs), return_info=True)
    assert (info.nfe == 1).all()
    torch.testing.assert_close(again, z, rtol=1e-7, atol=1e-8)
