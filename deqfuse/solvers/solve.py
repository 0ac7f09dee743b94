"""One entry for all forward solvers, and the rescue of the rows that one left behind."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from deqfuse.outcome import Outcome, left_behind
from deqfuse.solvers.anderson import Anderson, Picard, anderson, picard
from deqfuse.solvers.broyden import Broyden, broyden
from deqfuse.solvers.continuation import find_zeros
from deqfuse.solvers.derivatives import (
    MAX_FEATURES,
    Jacobian,
    Linearize,
    Map,
    columns_of,
    jvp_of,
)
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
    run: Solver | None = None,
) -> Solution:
    """Solve ``z = f(z)`` for every row.

    Args:
        f: row-wise map (R, n) -> (R, n).
        z0: (R, n) start.
        option: the solver and its knobs.
        run: another implementation of the option's solver than the registered one.

    Returns:
        The answers (R, n) and their statistics.

    Raises:
        TypeError: no solver is registered for options of this class.
        ValueError: rows of more than 1024 numbers with ``Anderson(rescue=True)``.
    """
    found = (run or registered(option))(f, z0, option, None)
    if not (isinstance(option, Anderson) and option.rescue):
        return found
    if z0.shape[1] > MAX_FEATURES:
        raise ValueError(
            f"Anderson(rescue=True): expected rows of at most {MAX_FEATURES} numbers, got "
            f"{z0.shape[1]}: a dense Jacobian takes as many products. Remedy: NewtonKrylov()"
        )
    given = lambda z: f(z.to(z0.dtype)).to(z.dtype)  # noqa: E731
    return rescue(given, option, found, columns_of(jvp_of(given)))


def rescue(f: Map, option: Anderson, found: Solution, jacobian: Jacobian) -> Solution:
    """Continuation for the rows that were left behind, from their best iterate.

    Args:
        f: row-wise map (R, n) -> (R, n), in the dtype of what it is given.
        option: tolerance and bound on the work.
        found: what the solver found.
        jacobian: dense Jacobians of f in float64.

    Returns:
        The solution in which such rows have a better answer, or their old one.
    """
    left = left_behind(found.outcome)
    rows = torch.nonzero(left).flatten().tolist()
    if not rows:
        return found
    first = f(found.z)
    zeros = find_zeros(f, jacobian, found.z, rows, option.tol, option.max_jacobians)
    z = zeros.z.to(found.z.dtype)
    last = f(z)
    residual = residual_of(z, last)
    # The rows that had converged stood still meanwhile: if f moved there, it couples rows.
    found = rejudged(found, residual_of(first, last), option.tol)
    solved = left & zeros.found & (residual <= option.tol)
    better = left & zeros.found & ((residual < found.residual) | solved)
    return dataclasses.replace(
        found,
        z=select(better, z, found.z),
        residual=torch.where(better, residual, found.residual),
        nfe=found.nfe + zeros.work,
        outcome=torch.where(solved, int(Outcome.RESCUED), found.outcome).to(torch.int8),
    )
