"""Plain PyTorch on any device: the readable path that every other one is checked against."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deqfuse.backends import layer
from deqfuse.backends.backend import Backend, Launchers
from deqfuse.backends.linearization import CellLinearization, FuseLinearization
from deqfuse.backends.maps import CellParams, FuseParams, Variant
from deqfuse.backends.penalty import penalty_layer
from deqfuse.backends.problem import (
    LayerStatistics,
    Problem,
    Solved,
    SolvedLayer,
    Statistics,
    compute_dtype,
)
from deqfuse.backends.rescue import rescue_cells, rescue_fuse
from deqfuse.backends.row_maps import cells_on_rows, fuse_on_rows
from deqfuse.solvers.adjoint import solve_adjoint
from deqfuse.solvers.anderson import Anderson, anderson
from deqfuse.solvers.derivatives import Linearize, Map
from deqfuse.solvers.options import GradientOption, SolverOption
from deqfuse.solvers.rows import Solution
from deqfuse.solvers.solve import registered


def unavailable() -> tuple[str, str] | None:
    """Why this backend cannot run here: it always can."""
    return None


def refuses(problem: Problem) -> str | None:
    """Why this backend cannot take the problem: it takes them all.

    Args:
        problem: what is to be solved, and how.

    Returns:
        None; another backend says in words what it cannot do.
    """
    return None


def solve_cells(
    x: Tensor,  # (N, B, d)
    flat_params: list[Tensor],
    z0: Tensor | None,  # (N, B, d)
    num_groups: int,
    variant: Variant,
    solver: SolverOption,
) -> Solved:
    """Equilibria of all N residual cells, every row of every modality on its own.

    Args:
        x: (N, B, d) injections; any floating dtype.
        flat_params: N * 10 tensors, (d, d) or (d,) each, in the order of ``CellParams``, cell after
            cell; any floating dtype.
        z0: (N, B, d) start, or None for zero.
        num_groups: groups of every GroupNorm.
        variant: the paper's equations or the released ones.
        solver: options of the forward solve.

    Returns:
        Equilibria (N, B, d) in the compute dtype and statistics (N, B).
    """
    x, flat_params = _to_compute(x, x), _to_compute(flat_params, x)
    step, linearize = cells_on_rows(x, flat_params, num_groups, variant)
    found = _solve(step, x, z0, solver, linearize)
    if not (isinstance(solver, Anderson) and solver.rescues(x.device)):
        return found
    return rescue_cells(found, x, flat_params, num_groups, variant, solver)


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
    """Equilibrium of the purify-then-combine step, the cells' equilibria held fixed.

    Args:
        x_fuse: (B, d) injection; any floating dtype.
        cell_sum: (B, d) sum of the cells' equilibria.
        flat_params: six tensors, (d, d) or (d,) each, in the order of ``FuseParams``; any floating
            dtype.
        mask: (B, d) dropout factors on W_f's output, or None.
        z0: (B, d) start, or None for zero.
        num_modalities: N, how many cells ``cell_sum`` adds up.
        num_groups: groups of the GroupNorm.
        variant: the paper's equations or the released ones.
        solver: options of the forward solve.

    Returns:
        The equilibrium (B, d) in the compute dtype and statistics (B,).
    """
    flat_params = _to_compute(flat_params, x_fuse)
    x_fuse, cell_sum, mask = (_to_compute(t, x_fuse) for t in (x_fuse, cell_sum, mask))
    problem = x_fuse, cell_sum, flat_params, mask, num_modalities, num_groups, variant
    step, linearize = fuse_on_rows(*problem)
    found = _solve(step, x_fuse, z0, solver, linearize)
    if not (isinstance(solver, Anderson) and solver.rescues(x_fuse.device)):
        return found
    return rescue_fuse(found, *problem, solver)


def solve_layer(*problem: Any) -> SolvedLayer:
    """Equilibria of the whole layer, from the two blocks.

    Args:
        *problem: the arguments of :func:`deqfuse.backends.layer.solve` from ``x`` on.

    Returns:
        Equilibria (N + 1, B, d) and statistics (N + 1, B).
    """
    return layer.solve(solve_cells, solve_fuse, *problem)


def takes_rows(z0: Tensor, solver: SolverOption) -> bool:
    """Whether the solvers can run on rows of any map: they always can.

    Args:
        z0: (R, n) start.
        solver: options of the forward solve.

    Returns:
        True.
    """
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
    """Gradients through the cells' equilibria.

    Args:
        grad_z: (N, B, d) cotangents g of the equilibria; may be expanded over N.
        z: (N, B, d) the equilibria, in the compute dtype.
        x: (N, B, d) injections of the solve.
        flat_params: N * 10 tensors, (d, d) or (d,) each, as in :func:`solve_cells`.
        num_groups: groups of every GroupNorm.
        variant: the paper's equations or the released ones.
        adjoint: options of the gradient.
        want_params: whether any parameter needs its gradient.

    Returns:
        The gradient (N, B, d) of ``x``; those of the parameters, (d, d) or (d,) each, or [] without
        ``want_params``; statistics (N, B). Gradients have the dtypes of what they belong to.
    """
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
    """Gradients through the fuse equilibrium.

    Args:
        grad_z: (B, d) cotangent g of the equilibrium.
        z: (B, d) the equilibrium, in the compute dtype.
        x_fuse: (B, d) injection of the solve.
        cell_sum: (B, d) sum of the cells' equilibria.
        flat_params: six tensors, (d, d) or (d,) each, as in :func:`solve_fuse`.
        mask: (B, d) dropout factors of the solve, or None.
        num_modalities: N, how many cells ``cell_sum`` adds up.
        num_groups: groups of the GroupNorm.
        variant: the paper's equations or the released ones.
        adjoint: options of the gradient.
        want_params: whether any parameter needs its gradient.

    Returns:
        The gradients (B, d) of ``x_fuse`` and of ``cell_sum``; those of the parameters, (d, d) or
        (d,) each, or [] without ``want_params``; statistics (B,). Gradients have the dtypes of what
        they belong to.
    """
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
    """Gradients through the whole layer, from the two blocks.

    Args:
        *problem: the arguments of :func:`deqfuse.backends.layer.adjoint` from ``grad_z`` on.

    Returns:
        Gradients (B, d) of the N injections; those of the parameters, each of its shape (...), or
        [] without ``want_params``; statistics (N + 1, B).
    """
    return layer.adjoint(adjoint_cells, adjoint_fuse, *problem)


BACKEND = Backend(
    summary="Plain PyTorch on any device, what every other backend is checked against.",
    unavailable=unavailable,
    refuses=refuses,
    cells=Launchers(solve_cells, adjoint_cells),
    fuse=Launchers(solve_fuse, adjoint_fuse),
    layer=Launchers(solve_layer, adjoint_layer),
    penalty=penalty_layer,
    takes_rows=takes_rows,
    anderson=anderson,
)


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
    found = registered(solver)(step, start.reshape(-1, like.shape[-1]), solver, linearize)
    shape = like.shape
    statistics = _statistics(found, shape[:-1])
    steps = solver.max_iter if solver.trace else 0
    trace = statistics.residual.new_full((steps, *shape[:-1]), torch.nan)
    if found.trace is not None:
        trace[: len(found.trace)] = found.trace.view(len(found.trace), *shape[:-1])
    return Solved(found.z.view(shape), *statistics, trace)
