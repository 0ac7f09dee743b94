"""One entry for all forward solvers, and Anderson's rescue of the rows that it left behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from deqfuse.outcome import Outcome
from deqfuse.solvers.anderson import RESCUE_STEPS, Anderson, Picard, anderson, picard
from deqfuse.solvers.broyden import Broyden, broyden
from deqfuse.solvers.derivatives import Linearize, Map, jvp_of
from deqfuse.solvers.newton_krylov import NewtonKrylov, newton_krylov
from deqfuse.solvers.options import SolverOption
from deqfuse.solvers.rows import Solution, rejudged, residual_of, select

Solver = Callable[[Map, Tensor, Any, "Linearize | None"], Solution]  # f, z0, option, linearize

# A solver is registered here, by the class of its options.
SOLVERS: dict[type[SolverOption], Solver] = {
    Anderson: lambda f, z0, option, linearize: anderson(f, z0, option),
    Picard: lambda f, z0, option, linearize: picard(f, z0, option),
    Broyden: lambda f, z0, option, linearize: broyden(f, z0, option),
    NewtonKrylov: newton_krylov,
}


def registered(option: SolverOption) -> Solver:
    """The solver that these options belong to.

    Args:
        option: options of a forward solver.

    Returns:
        The function ``(f, z0, option, linearize) -> Solution`` of ``SOLVERS``.

    Raises:
        TypeError: no solver is registered for options of this class.
    """
    solver = SOLVERS.get(type(option))
    if solver is None:
        *first, last = (f"{kind.__name__}(...)" for kind in SOLVERS)
        raise TypeError(f"solver: expected {', '.join(first)} or {last}, got {option!r}")
    return solver


def solve(
    f: Map,
    z0: Tensor,  # (R, n)
    option: SolverOption,
    linearize: Linearize | None = None,
    run: Solver | None = None,
) -> Solution:
    """Solve ``z = f(z)`` for every row.

    Args:
        f: row-wise map (R, n) -> (R, n).
        z0: (R, n) start.
        option: the solver and its knobs.
        linearize: ``z -> (v -> J(z) v)`` where a cheaper JVP than forward-mode autograd is known.
        run: another implementation of the option's solver than the registered one.

    Returns:
        The answers (R, n) and their statistics.

    Raises:
        TypeError: no solver is registered for options of this class.
    """
    found = (run or registered(option))(f, z0, option, linearize)
    if isinstance(option, Anderson) and option.rescue:
        return rescue(f, z0, option, found, linearize)
    return found


def rescue(
    f: Map,
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
    images: list[Tensor] = []  # the first and the last f(z), of all rows

    def observed(z: Tensor) -> Tensor:
        fz = f(z)
        images[1:] = [fz.detach()]
        return fz

    rescued = newton_krylov(
        observed, start, newton, linearize or jvp_of(f), active=left, max_steps=RESCUE_STEPS
    )
    # The rows that had converged stood still meanwhile: if f moved there, it couples rows.
    found = rejudged(found, residual_of(images[0], images[-1]), option.tol)
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
