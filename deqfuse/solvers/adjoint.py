"""Cotangents of an equilibrium: ``u = (I - J^T)^-1 g``, exactly or by a chosen approximation."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from deqfuse.outcome import Outcome
from deqfuse.solvers.linear import solve_linear
from deqfuse.solvers.options import GradientOption, Implicit, Neumann, OneStep
from deqfuse.solvers.rows import Solution


def solve_adjoint(
    vjp: Callable[[Tensor], Tensor],  # (R, n) -> (R, n), u -> J^T u
    g: Tensor,  # (R, n)
    option: GradientOption,
) -> Solution:
    """Adjoint solution ``u`` per row.

    ``OneStep`` and ``Neumann`` have no tolerance to meet: their residual is NaN (not computed) and
    their outcome is MAX_ITER, the budget they were given.
    """
    if isinstance(option, Implicit):
        return solve_linear(vjp, g, option.solver, option.tol, option.max_iter)
    if isinstance(option, OneStep):
        return _truncated(g, 0)
    if isinstance(option, Neumann):
        u = g
        for _ in range(option.k):
            u = g + vjp(u)
        return _truncated(u, option.k)
    raise TypeError(f"adjoint: expected Implicit, OneStep, Neumann or Unrolled, got {option!r}")


def _truncated(u: Tensor, nfe: int) -> Solution:
    return Solution(
        u,
        residual=torch.full_like(u[:, 0], torch.nan) if u.shape[1] else u.new_zeros(len(u)),
        nfe=torch.full((len(u),), nfe, dtype=torch.int32, device=u.device),
        outcome=torch.full((len(u),), int(Outcome.MAX_ITER), dtype=torch.int8, device=u.device),
    )
