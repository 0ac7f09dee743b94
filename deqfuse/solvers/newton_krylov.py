"""Newton-Krylov with a backtracking line search, per row, on matrix-free JVPs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from deqfuse import scalars
from deqfuse.solvers.derivatives import Linearize, Map, jvp_of
from deqfuse.solvers.linear import gmres
from deqfuse.solvers.options import SolverOption, knob
from deqfuse.solvers.rows import Rows, Solution, row_norm, select

HALVINGS = 5
SUFFICIENT_DECREASE = 1e-4


@dataclass(frozen=True)
class NewtonKrylov(SolverOption):
    """Newton steps by GMRES on matrix-free JVPs, with a backtracking line search, per row.

    The robust choice for rows near or beyond spectral radius 1. A JVP is a product J v of the map's
    Jacobian with a vector; it counts as one evaluation.

    Args:
        tol: relative residual at which a row stops: ``|f(z) - z| / (|f(z)| + 1e-5) <= tol``.
        max_iter: evaluations of f per row, JVPs included, hence more than other solvers have.
        trace: whether to record the residual of every row at every step (``info.*.trace``).
        restart: length of a Krylov cycle of GMRES; there is one cycle per Newton step.

    Raises:
        TypeError: a value of a wrong type.
        ValueError: a value out of range.
    """

    max_iter: int = knob(200, scalars.positive_int)
    restart: int = knob(20, scalars.positive_int)

    @property
    def unrolls(self) -> bool:
        return False

    def remedies(self) -> list[str]:
        return [*super().remedies(), "Anderson(rescue=True)"]


def newton_krylov(
    f: Map,
    z0: Tensor,  # (R, n)
    option: NewtonKrylov,
    linearize: Linearize | None = None,
) -> Solution:
    """Solve ``z = f(z)``: each step solves ``(I - J) s = f(z) - z`` and moves along ``s``.

    The inner tolerance follows the residual (an inexact Newton method), so early steps are cheap
    and the last ones converge fast. A row whose line search fails takes a plain step ``z <- f(z)``.
    """
    linearize = linearize or jvp_of(f)
    rows = Rows(z0, option.tol, option.max_iter, trace=option.trace)
    z, fz, first = z0, f(z0), True
    cost = torch.ones_like(rows.nfe)  # of the step that led to z
    while rows.observe(z, fz, cost):
        if first:  # a cold start says nothing about J at the solution
            z, cost = select(rows.active, fz, z), torch.ones_like(rows.nfe)
            fz, first = f(z), False
            continue
        g = fz - z
        size = row_norm(g)
        forcing = (size / row_norm(fz).clamp_min(1e-30)).clamp(1e-4, 0.1)
        left = option.max_iter - rows.nfe
        cycle = (left - 1).clamp_max(option.restart + 1)  # one Krylov cycle per step
        inner = gmres(linearize(z), g, forcing, cycle, option.restart, rows.active)
        z_new, fz_new, cost = _line_search(f, z, fz, inner.z, size, rows.active, left - inner.nfe)
        cost = cost + inner.nfe
        z, fz = select(rows.active, z_new, z), fz_new
    return rows.solution()


def _line_search(
    f: Map,
    z: Tensor,
    fz: Tensor,
    step: Tensor,
    size: Tensor,
    active: Tensor,
    left: Tensor,  # (R,) evaluations that the row may still spend, >= 1 where active
) -> tuple[Tensor, Tensor, Tensor]:
    """Halve each row's step until ``|f(z) - z|`` decreases; z, f(z) and the cost per row.

    The f(z) returned is that of all rows at once, those that stand still included.
    """
    best_z = z
    open_rows, cost = active, torch.zeros_like(active, dtype=torch.int32)
    for halving in range(HALVINGS + 1):
        t = 0.5**halving
        last = (cost + 1 >= left) | (halving == HALVINGS)  # then z <- f(z), whatever it brings
        trial = select(open_rows, select(last & (halving > 0), fz, z + t * step), best_z)
        f_trial = f(trial)
        cost = cost + open_rows.to(torch.int32)
        accept = row_norm(f_trial - trial) <= (1 - SUFFICIENT_DECREASE * t) * size
        accept = accept | last
        best_z = select(accept, trial, best_z)
        open_rows = open_rows & ~accept
        if not open_rows.any():
            break
    return best_z, f_trial, cost
