"""Whole solves and adjoints as compiled C++ on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from deqfuse.backends import cpu_native, layer
from deqfuse.backends.arguments import adjoint_numbers, prepare_all
from deqfuse.backends.backend import Backend, Launchers
from deqfuse.backends.maps import Variant
from deqfuse.backends.problem import (
    LayerStatistics,
    Problem,
    Solved,
    SolvedLayer,
    Statistics,
    compute_dtype,
)
from deqfuse.outcome import Outcome, left_behind
from deqfuse.solvers.anderson import Anderson, Picard
from deqfuse.solvers.derivatives import Map
from deqfuse.solvers.options import GradientOption, Implicit, Neumann, OneStep, SolverOption
from deqfuse.solvers.rows import Solution, rejudged, residual_of

MAX_HISTORY = 8  # csrc/cpu/mixing.h
ADJOINT_SOLVERS = ("auto", "anderson", "neumann")


def unavailable() -> tuple[str, str] | None:
    """Why this backend cannot run here, and what would change that."""
    if cpu_native.module is not None:
        return None
    return (
        f"the compiled module is missing or does not load ({cpu_native.load_error})",
        "install deqfuse where torch and a C++ compiler are: "
        "pip install --no-build-isolation . "
        "(DEQFUSE_BUILD=cpu makes a failed build an error that says why)",
    )


def refuses(problem: Problem) -> str | None:
    """Why this backend cannot take the problem."""
    solver, adjoint = problem.solver, problem.adjoint
    if problem.device.type != "cpu":
        return f"it runs on CPU tensors, not on {problem.device}"
    if not isinstance(solver, (Anderson, Picard)):
        return f"it solves with Anderson or Picard, not {type(solver).__name__}"
    if isinstance(solver, Anderson) and solver.m > MAX_HISTORY:
        return f"it keeps at most {MAX_HISTORY} residuals, not Anderson(m={solver.m})"
    if isinstance(adjoint, Implicit) and adjoint.solver not in ADJOINT_SOLVERS:
        return f"its adjoint solvers are {', '.join(ADJOINT_SOLVERS)}, not {adjoint.solver!r}"
    if not isinstance(adjoint, (Implicit, OneStep, Neumann)):
        return f"it does not differentiate through its steps, as {type(adjoint).__name__} asks"
    return None


def solve_cells(
    x: Tensor,  # (N, B, d)
    flat_params: list[Tensor],
    z0: Tensor | None,  # (N, B, d)
    num_groups: int,
    variant: Variant,
    solver: SolverOption,
) -> Solved:
    """Equilibria of all N residual cells."""
    found = Solved(
        *cpu_native.solve_cells(
            x, flat_params, z0, num_groups, variant.skip, *_forward(solver), _steps(solver)
        )
    )
    return _rescue_cells(found, x, flat_params, num_groups, variant, solver)


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
    problem = x_fuse, cell_sum, flat_params, mask
    found = Solved(
        *cpu_native.solve_fuse(
            *problem, z0, num_modalities, num_groups,
            variant.relu_last, *_forward(solver), _steps(solver),
        )
    )  # fmt: skip
    return _rescue_fuse(found, *problem, num_modalities, num_groups, variant, solver)


def solve_layer(
    x: list[Tensor],  # N tensors (B, d)
    flat_params: list[Tensor],  # backends/layer.py
    mask: Tensor | None,  # (B, d)
    z0_fuse: Tensor | None,  # (B, d)
    z0_cells: Tensor | None,  # (N, B, d)
    num_groups: int,
    variant: Variant,
    solver: SolverOption,
) -> SolvedLayer:
    """Equilibria of all cells and of the fuse step, in one call."""
    found = _layer(
        x, flat_params, mask, z0_fuse, z0_cells, None, num_groups, variant, solver
    )  # fmt: skip
    if found.all_converged or not (isinstance(solver, Anderson) and solver.rescues(found.z.device)):
        return found
    return layer.rescued(
        found, _rescue_cells, solve_fuse, _rescue_fuse,
        x, flat_params, mask, z0_fuse, num_groups, variant, solver,
    )  # fmt: skip


def solve_present(
    x: list[Tensor],  # N tensors (B, d)
    flat_params: list[Tensor],  # backends/layer.py
    mask: Tensor | None,  # (B, d)
    z0_fuse: Tensor | None,  # (B, d)
    z0_cells: Tensor | None,  # (N, B, d)
    present: Tensor,  # (N, B, 1), bool
    num_groups: int,
    variant: Variant,
    solver: SolverOption,
) -> SolvedLayer | None:
    """Equilibria of what is present, in one call; None where rows are to be rescued."""
    problem = x, flat_params, mask, z0_fuse, z0_cells, present.contiguous()
    found = _layer(*problem, num_groups, variant, solver)
    left = not found.all_converged and solver.rescues(found.z.device)
    return None if left and left_behind(found.outcome).any() else found


def prepare(
    params: list[Tensor],  # backends/layer.py
    num_groups: int,
    variant: Variant,
    solver: SolverOption,
) -> Callable[[list[Tensor], Tensor | None], SolvedLayer | None]:
    """A solve of these parameters for many calls: ``(x, present)``, in one call each.

    It returns None where rows are to be rescued, and where autocast has changed the dtype.
    """
    held = prepare_all(params, params[0])  # the addresses are theirs
    how = num_groups, variant.skip, variant.relu_last, *_forward(solver)
    prepared, addresses = cpu_native.prepare_layer(held, *how)
    steps, rescues = _steps(solver), solver.rescues(held[0].device)

    def solve(x: list[Tensor], present: Tensor | None) -> SolvedLayer | None:
        if compute_dtype(x[0].dtype) is not held[0].dtype:
            return None
        if present is not None:
            present = present.contiguous()
        found = SolvedLayer(
            *cpu_native.solve_prepared(x, prepared, addresses, present, *how, steps)
        )
        left = rescues and not found.all_converged
        return None if left and left_behind(found.outcome).any() else found

    return solve


def _layer(
    x: list[Tensor],
    flat_params: list[Tensor],
    mask: Tensor | None,
    z0_fuse: Tensor | None,
    z0_cells: Tensor | None,
    present: Tensor | None,
    num_groups: int,
    variant: Variant,
    solver: SolverOption,
) -> SolvedLayer:
    return SolvedLayer(
        *cpu_native.solve_layer(
            x, flat_params, mask, z0_fuse, z0_cells, present, num_groups,
            variant.skip, variant.relu_last, *_forward(solver), _steps(solver),
        )
    )  # fmt: skip


def _rescue_cells(
    found: Solved,
    x: Tensor,  # (N, B, d)
    flat_params: list[Tensor],
    num_groups: int,
    variant: Variant,
    solver: SolverOption,
) -> Solved:
    """``found`` with the rows that were left behind solved by continuation, where that succeeds."""
    rows = _left(found, solver)
    if rows.numel() == 0:
        return found
    assert isinstance(solver, Anderson)
    z, residual, nfe, outcome = cpu_native.rescue_cells(
        x, flat_params, *found[:4], rows, num_groups, variant.skip,
        solver.tol, solver.max_jacobians,
    )  # fmt: skip
    return Solved(z, residual, nfe, outcome, found.trace)


def _rescue_fuse(
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
    """As :func:`_rescue_cells`."""
    rows = _left(found, solver)
    if rows.numel() == 0:
        return found
    assert isinstance(solver, Anderson)
    z, residual, nfe, outcome = cpu_native.rescue_fuse(
        x_fuse, cell_sum, flat_params, mask, *found[:4], rows, num_modalities, num_groups,
        variant.relu_last, solver.tol, solver.max_jacobians,
    )  # fmt: skip
    return Solved(z, residual, nfe, outcome, found.trace)


def _left(found: Solved, solver: SolverOption) -> Tensor:
    """Numbers (int64) of the rows that are to be solved otherwise, all dimensions as one."""
    if not solver.rescues(found.z.device):
        return torch.empty(0, dtype=torch.int64)
    return torch.nonzero(left_behind(found.outcome.flatten())).flatten()


def anderson(f: Map, z0: Tensor, option: Anderson) -> Solution:
    """Anderson mixing on rows (R, n) of any map, one compiled call per evaluation."""
    rows, n = z0.shape
    m, steps = option.m, option.max_iter if option.trace else 0
    new = z0.new_zeros
    z = z0.detach().clone(memory_format=torch.contiguous_format)
    best = z.clone()
    images, residuals, gram = new(m, rows, n), new(m, rows, n), new(rows, m, m)
    best_residual, trace = new(rows).fill_(torch.inf), new(steps, rows).fill_(torch.nan)
    nfe, best_at = new(rows, dtype=torch.int32), new(rows, dtype=torch.int32)
    outcome = new(rows, dtype=torch.int8).fill_(int(Outcome.MAX_ITER))
    active, step, fz = torch.ones(rows, dtype=torch.bool), 0, f(z).contiguous()
    while cpu_native.anderson_step(
        fz, z, best, images, residuals, gram, best_residual,
        nfe, best_at, outcome, active, trace, step,
        option.tol, option.max_iter, option.beta, option.lam,
    ):  # fmt: skip
        step, fz = step + 1, f(z).contiguous()
    kept = trace[: step + 1] if option.trace else None
    found = Solution(best, best_residual, nfe, outcome, kept)
    return rejudged(found, residual_of(z, fz), option.tol)


def takes_rows(z0: Tensor, solver: SolverOption) -> bool:
    """Whether :func:`anderson` can run this solve."""
    return (
        unavailable() is None
        and z0.device.type == "cpu"
        and z0.dtype in (torch.float32, torch.float64)
        and isinstance(solver, Anderson)
        and solver.m <= MAX_HISTORY
    )


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
    dx, grads, *statistics = cpu_native.adjoint_cells(
        grad_z, z, x, flat_params, want_params,
        num_groups, variant.skip, *adjoint_numbers(adjoint),
    )  # fmt: skip
    return dx, grads, Statistics(*statistics)


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
    dx, dcell_sum, grads, *statistics = cpu_native.adjoint_fuse(
        grad_z, z, x_fuse, cell_sum, flat_params, want_params, mask,
        num_modalities, num_groups, variant.relu_last, *adjoint_numbers(adjoint),
    )  # fmt: skip
    return dx, dcell_sum, grads, Statistics(*statistics)


def adjoint_layer(*problem: Any) -> tuple[list[Tensor], list[Tensor], LayerStatistics]:
    """As :func:`adjoint_present`, with everything present and without that argument."""
    operands, how = problem[:6], problem[6:]
    return adjoint_present(*(*operands, None, *how))


def adjoint_present(
    grad_z: Tensor,  # (B, d)
    grad_cells: Tensor | None,  # (N, B, d)
    states: Tensor,  # (N + 1, B, d)
    x: list[Tensor],  # N tensors (B, d)
    flat_params: list[Tensor],  # backends/layer.py
    mask: Tensor | None,  # (B, d)
    present: Tensor | None,  # (N, B, 1), bool
    num_groups: int,
    variant: Variant,
    adjoint: GradientOption,
    want_params: bool,
) -> tuple[list[Tensor], list[Tensor], LayerStatistics]:
    """Gradients through what is present of a layer: dx, the parameters', the statistics."""
    dx, grads, *statistics = cpu_native.adjoint_layer(
        grad_z, grad_cells, states, x, flat_params, want_params, mask,
        None if present is None else present.contiguous(),
        num_groups, variant.skip, variant.relu_last, *adjoint_numbers(adjoint),
    )  # fmt: skip
    return dx, grads, LayerStatistics(*statistics)


def penalty_layer(*problem: Any) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """As :func:`penalty_present`, with everything present and without that argument."""
    operands, how = problem[:5], problem[5:]
    return penalty_present(*(*operands, None, *how))


def penalty_present(
    probes: Tensor,  # (K, N + 1, B, d)
    states: Tensor,  # (N + 1, B, d)
    x: list[Tensor],  # N tensors (B, d)
    flat_params: list[Tensor],  # backends/layer.py
    mask: Tensor | None,  # (B, d)
    present: Tensor | None,  # (N, B, 1), bool
    num_groups: int,
    variant: Variant,
    want_params: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The Jacobian penalty of what is present, as ``presence.penalty_layer``, in one call."""
    return cpu_native.penalty_layer(
        probes, states, x, flat_params, want_params, mask,
        None if present is None else present.contiguous(),
        num_groups, variant.skip, variant.relu_last,
    )  # fmt: skip


BACKEND = Backend(
    summary="Whole solves and adjoints as compiled C++ on the CPU.",
    unavailable=unavailable,
    refuses=refuses,
    cells=Launchers(solve_cells, adjoint_cells),
    fuse=Launchers(solve_fuse, adjoint_fuse),
    layer=Launchers(solve_layer, adjoint_layer),
    solve_present=solve_present,
    adjoint_present=adjoint_present,
    penalty_present=penalty_present,
    prepare=prepare,
    penalty=penalty_layer,
    takes_rows=takes_rows,
    anderson=anderson,
)


def _forward(solver: SolverOption) -> tuple[float, int, int, float, float]:
    """tol, max_iter, history, beta, lam."""
    if isinstance(solver, Anderson):
        return solver.tol, solver.max_iter, solver.m, solver.beta, solver.lam
    assert isinstance(solver, Picard)
    return solver.tol, solver.max_iter, 0, solver.beta, 0.0


def _steps(solver: SolverOption) -> int:
    return solver.max_iter if solver.trace else 0
