"""Plain PyTorch on any device: the readable path that every other one is checked against."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from deqfuse.backends import layer
from deqfuse.backends.linearization import CellLinearization, FuseLinearization
from deqfuse.backends.maps import (
    CellParams,
    FuseParams,
    Variant,
    gate_constant,
    purify_combine,
    residual_cell,
)
from deqfuse.backends.problem import (
    LayerStatistics,
    Problem,
    Solved,
    SolvedLayer,
    Statistics,
    compute_dtype,
)
from deqfuse.outcome import Outcome
from deqfuse.solvers.adjoint import solve_adjoint
from deqfuse.solvers.anderson import anderson as anderson
from deqfuse.solvers.continuation import RowJacobian, RowMap, find_zero
from deqfuse.solvers.newton_krylov import Linearize, Map
from deqfuse.solvers.options import Anderson, GradientOption, SolverOption
from deqfuse.solvers.rows import RESIDUAL_FLOOR, Solution
from deqfuse.solvers.solve import rescue, solve


def unavailable() -> tuple[str, str] | None:
    """Why this backend cannot run here: it always can."""
    return None


def refuses(problem: Problem) -> str | None:
    """Why this backend cannot take the problem: it takes them all."""
    return None


def solve_cells(
    x: Tensor,  # (N, B, d)
    flat_params: list[Tensor],
    z0: Tensor | None,  # (N, B, d)
    num_groups: int,
    variant: Variant,
    solver: SolverOption,
) -> Solved:
    """Equilibria of all N residual cells, every row of every modality on its own."""
    x, flat_params = _to_compute(x, x), _to_compute(flat_params, x)
    step, linearize = cells_problem(x, flat_params, num_groups, variant)
    return _solve(step, x, z0, solver, linearize)


def solve_fuse(
    x_fuse: Tensor,  # (B, d)
    cell_sum: Tensor,  # (B, d)
    flat_params: list[Tensor],
    mask: Tensor | None,  # (B, d)
    z0: Tensor | None,  # (B, d)
    num_modalities: int,
    num_groups: int,
    variant: Variant,
    solver: SolverOption,
) -> Solved:
    """Equilibrium of the purify-then-combine step, the cells' equilibria held fixed."""
    flat_params = _to_compute(flat_params, x_fuse)
    x_fuse, cell_sum, mask = (_to_compute(t, x_fuse) for t in (x_fuse, cell_sum, mask))
    step, linearize = fuse_problem(
        x_fuse, cell_sum, flat_params, mask, num_modalities, num_groups, variant
    )
    return _solve(step, x_fuse, z0, solver, linearize)


def solve_layer(*problem: Any) -> SolvedLayer:
    """Equilibria of the whole layer; arguments as in :func:`deqfuse.backends.layer.solve`."""
    return layer.solve(solve_cells, solve_fuse, *problem)


def cells_problem(
    x: Tensor, flat_params: list[Tensor], num_groups: int, variant: Variant
) -> tuple[Map, Linearize]:
    """The cells' map on rows (N * B, d) and its JVPs, everything in the compute dtype."""
    params, shape = CellParams.stack(flat_params), x.shape

    def step(z: Tensor) -> Tensor:
        return residual_cell(z.view(shape), x, params, num_groups, variant).flatten(0, 1)

    def linearize(z: Tensor) -> Map:
        at = CellLinearization(z.view(shape), x, params, num_groups, variant)
        return lambda v: at.jvp(v.view(shape)).flatten(0, 1)

    return step, linearize


def fuse_problem(
    x_fuse: Tensor,
    cell_sum: Tensor,
    flat_params: list[Tensor],
    mask: Tensor | None,
    num_modalities: int,
    num_groups: int,
    variant: Variant,
) -> tuple[Map, Linearize]:
    """The fuse map on rows (B, d) and its JVPs, everything in the compute dtype."""
    params = FuseParams(*flat_params)
    constant = gate_constant(cell_sum, num_modalities, params)
    rest = (num_modalities, params, num_groups, variant)

    def step(z: Tensor) -> Tensor:
        return purify_combine(z, x_fuse, constant, mask, *rest)

    def linearize(z: Tensor) -> Map:
        return FuseLinearization(z, x_fuse, cell_sum, mask, *rest).jvp

    return step, linearize


def rescue_cells(
    found: Solved,
    x: Tensor,  # (N, B, d)
    flat_params: list[Tensor],
    num_groups: int,
    variant: Variant,
    solver: SolverOption,
) -> Solved:
    """``found`` with the rows that did not converge solved by continuation, where that succeeds."""
    params = CellParams.stack(_to_compute(flat_params, x))
    x, rows = _to_compute(x, x), x.shape[1]

    def problem(row: int, dtype: torch.dtype) -> tuple[RowMap, RowJacobian]:
        i, at = row // rows, x[row // rows, row % rows].to(dtype)[None, None]
        own = CellParams(*(t[i : i + 1].to(dtype) for t in params))
        rest = (at, own, num_groups, variant)
        return (
            lambda z: residual_cell(z[None, None], *rest)[0, 0],
            lambda z: CellLinearization(z[None, None], *rest).jacobian()[0, 0],
        )

    return _mended(found, problem, solver.tol)


def rescue_fuse(
    found: Solved,
    x_fuse: Tensor,  # (B, d)
    cell_sum: Tensor,  # (B, d)
    flat_params: list[Tensor],
    mask: Tensor | None,  # (B, d)
    num_modalities: int,
    num_groups: int,
    variant: Variant,
    solver: SolverOption,
) -> Solved:
    """``found`` with the rows that did not converge solved by continuation, where that succeeds."""
    flat_params = _to_compute(flat_params, x_fuse)
    x_fuse, cell_sum, mask = (_to_compute(t, x_fuse) for t in (x_fuse, cell_sum, mask))

    def problem(row: int, dtype: torch.dtype) -> tuple[RowMap, RowJacobian]:
        x, total = (t[row : row + 1].to(dtype) for t in (x_fuse, cell_sum))
        dropout = None if mask is None else mask[row : row + 1].to(dtype)
        params = [p.to(dtype) for p in flat_params]
        step, _ = fuse_problem(x, total, params, dropout, num_modalities, num_groups, variant)
        rest = (num_modalities, FuseParams(*params), num_groups, variant)
        return (
            lambda z: step(z[None])[0],
            lambda z: FuseLinearization(z[None], x, total, dropout, *rest).jacobian()[0],
        )

    return _mended(found, problem, solver.tol)


def rows_left(found: Solved) -> Tensor:
    """Numbers (int64) of the rows that did not converge, over all dimensions but the last."""
    return torch.nonzero(found.outcome.flatten() != int(Outcome.CONVERGED)).flatten()


def _mended(
    found: Solved,
    problem: Callable[[int, torch.dtype], tuple[RowMap, RowJacobian]],
    tol: float,
) -> Solved:
    """Row by row in float64; an answer is judged as it is stored."""
    mended = Solved(*(t.clone() for t in found))
    z, rows = mended.z, mended.z.view(-1, mended.z.shape[-1])
    residual, nfe, outcome = (t.view(-1) for t in mended[1:4])
    for row in rows_left(found).tolist():
        zero = find_zero(*problem(row, torch.float64), rows[row].double(), tol)
        nfe[row] += zero.work
        if not zero.found:
            continue
        answer = zero.z.to(z.dtype)
        image = problem(row, z.dtype)[0](answer)
        size = (image - answer).norm() / (image.norm() + RESIDUAL_FLOOR)
        if not (size <= tol or size < residual[row]):
            continue
        rows[row], residual[row] = answer, size
        outcome[row] = int(Outcome.CONVERGED if size <= tol else Outcome.STALLED)
    return mended


def takes_rows(z0: Tensor, solver: SolverOption) -> bool:
    """Whether the solvers can run on rows of any map: they always can."""
    return True


def adjoint_cells(
    grad_z: Tensor,  # (N, B, d)
    z: Tensor,  # (N, B, d)
    x: Tensor,  # (N, B, d)
    flat_params: list[Tensor],
    num_groups: int,
    variant: Variant,
    adjoint: GradientOption,
    want_params: bool,
) -> tuple[Tensor, list[Tensor], Statistics]:
    """Gradients through the cells' equilibria: dx, the parameters', the statistics."""
    params = CellParams.stack(_to_compute(flat_params, z))
    at = CellLinearization(z, _to_compute(x, z), params, num_groups, variant)
    shape = z.shape
    solution = solve_adjoint(
        lambda u: at.vjp(u.reshape(shape)).flatten(0, 1), grad_z.reshape(-1, shape[-1]), adjoint
    )
    dx, dparams = at.vjp_operands(solution.z.view(shape), want_params)
    grads = [] if dparams is None else _like(dparams.unstack(), flat_params)
    return dx.to(x.dtype), grads, _statistics(solution, shape[:-1])


def adjoint_fuse(
    grad_z: Tensor,  # (B, d)
    z: Tensor,  # (B, d)
    x_fuse: Tensor,  # (B, d)
    cell_sum: Tensor,  # (B, d)
    flat_params: list[Tensor],
    mask: Tensor | None,  # (B, d)
    num_modalities: int,
    num_groups: int,
    variant: Variant,
    adjoint: GradientOption,
    want_params: bool,
) -> tuple[Tensor, Tensor, list[Tensor], Statistics]:
    """Gradients through the fuse equilibrium: dx_fuse, dcell_sum, parameters', statistics."""
    params = FuseParams(*_to_compute(flat_params, z))
    at = FuseLinearization(
        z,
        _to_compute(x_fuse, z),
        _to_compute(cell_sum, z),
        _to_compute(mask, z),
        num_modalities,
        params,
        num_groups,
        variant,
    )
    solution = solve_adjoint(at.vjp, grad_z, adjoint)
    dx, dcell_sum, dparams = at.vjp_operands(solution.z, want_params)
    grads = [] if dparams is None else _like(list(dparams), flat_params)
    statistics = _statistics(solution, z.shape[:-1])
    return dx.to(x_fuse.dtype), dcell_sum.to(cell_sum.dtype), grads, statistics


def adjoint_layer(*problem: Any) -> tuple[list[Tensor], list[Tensor], LayerStatistics]:
    """Gradients through the layer; arguments as in :func:`deqfuse.backends.layer.adjoint`."""
    return layer.adjoint(adjoint_cells, adjoint_fuse, *problem)


def _to_compute(value: Any, like: Tensor) -> Any:
    """A tensor, a list of tensors or None in the compute dtype that belongs to ``like``."""
    if value is None:
        return None
    dtype = compute_dtype(like.dtype)
    if isinstance(value, list):
        return [t.to(dtype) for t in value]
    return value.to(dtype)


def _like(grads: list[Tensor], params: list[Tensor]) -> list[Tensor]:
    return [g.to(p.dtype) for g, p in zip(grads, params, strict=True)]


def _statistics(solution: Solution, shape: torch.Size) -> Statistics:
    return Statistics(
        solution.residual.view(shape), solution.nfe.view(shape), solution.outcome.view(shape)
    )


def _solve(
    step: Map, like: Tensor, z0: Tensor | None, solver: SolverOption, linearize: Linearize
) -> Solved:
    start = torch.zeros_like(like) if z0 is None else z0.to(like.dtype)
    found = solve(step, start.reshape(-1, like.shape[-1]), solver, linearize=linearize)
    return solved(found, like.shape, solver)


def rescued(
    left: Solved, step: Map, z0: Tensor | None, solver: Anderson, linearize: Linearize
) -> Solved:
    """Newton-Krylov for the rows that another backend's solve left behind."""
    trace = None
    if solver.trace and left.nfe.numel():
        trace = left.trace[: int(left.nfe.max())].flatten(1)
    statistics = (left.residual.flatten(), left.nfe.flatten(), left.outcome.flatten())
    start = torch.zeros_like(left.z) if z0 is None else z0.to(left.z.dtype)
    flat = Solution(left.z.flatten(0, -2), *statistics, trace)
    found = rescue(step, start.flatten(0, -2), solver, flat, linearize)
    return solved(found, left.z.shape, solver)


def solved(found: Solution, shape: torch.Size, solver: SolverOption) -> Solved:
    """A solution over flat rows as an operator's output, whose trace has a fixed length."""
    stats = _statistics(found, shape[:-1])
    steps = solver.trace_length if solver.trace else 0
    trace = stats.residual.new_full((steps, *shape[:-1]), torch.nan)
    if found.trace is not None:
        trace[: len(found.trace)] = found.trace.view(len(found.trace), *shape[:-1])
    return Solved(found.z.view(shape), *stats, trace)
