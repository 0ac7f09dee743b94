"""One entry for all forward solvers, and Anderson's rescue of the rows that it left behind."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from deqfuse.outcome import Outcome
from deqfuse.solvers.anderson import anderson, picard
from deqfuse.solvers.broyden import broyden
from deqfuse.solvers.newton_krylov import Linearize, Map, newton_krylov
from deqfuse.solvers.options import (
    RESCUE_STEPS,
    Anderson,
    Broyden,
    NewtonKrylov,
    Picard,
    SolverOption,
)
from deqfuse.solvers.rows import Solution, select


def solve(
    f: Callable[[Tensor], Tensor],
    z0: Tensor,  # (R, n)
    option: SolverOption,
    run_anderson: Callable[[Map, Tensor, Anderson], Solution] = anderson,
    linearize: Linearize | None = None,
) -> Solution:
    """Solve ``z = f(z)`` for every row.

    Args:
        f: row-wise map (R, n) -> (R, n).
        z0: start.
        option: the solver and its knobs.
        run_anderson: the implementation of Anderson mixing.
        linearize: ``z -> (v -> J(z) v)`` where a cheaper JVP than forward-mode autograd is known.
    """
    if isinstance(option, Anderson):
        found = run_anderson(f, z0, option)
        return rescue(f, z0, option, found, linearize) if option.rescue else found
    if isinstance(option, Picard):
        return picard(f, z0, option)
    if isinstance(option, Broyden):
        return broyden(f, z0, option)
    if isinstance(option, NewtonKrylov):
        return newton_krylov(f, z0, option, linearize)
    raise TypeError(f"solver: expected Anderson, Picard, Broyden or NewtonKrylov, got {option!r}")


def rescue(
    f: Callable[[Tensor], Tensor],
    z0: Tensor,
    option: Anderson,
    found: Solution,
    linearize: Linearize | None,
) -> Solution:
    """Up to 8 Newton-Krylov steps for the rows that did not converge, from their best iterate."""
    left = found.outcome != int(Outcome.CONVERGED)
    if not left.any():
        return found
    start = select(torch.isfinite(found.z).all(1), found.z, z0)
    newton = NewtonKrylov(tol=option.tol, max_iter=10_000, trace=option.trace)
    rescued = newton_krylov(f, start, newton, linearize, active=left, max_steps=RESCUE_STEPS)
    better = left & (rescued.residual < found.residual)
    trace = found.trace
    if trace is not None and rescued.trace is not None:
        trace = torch.cat([trace, rescued.trace])
    return Solution(
        select(better, rescued.z, found.z),
        torch.where(better, rescued.residual, found.residual),
        torch.where(left, found.nfe + rescued.nfe, found.nfe),
        torch.where(better, rescued.outcome, found.outcome),
        trace,
    )
