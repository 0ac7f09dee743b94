"""Bookkeeping that every solver shares: who is still active, what was best, how it ended.

A *row* is one independent problem. Solvers propose iterates for all rows at once; `Rows.observe`
looks at each row alone, so a row's answer never depends on its neighbours. Maps that couple rows
all the same are found out by :func:`rejudged`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from deqfuse.outcome import Outcome

STALL_STEPS = 20
RESIDUAL_FLOOR = 1e-5
# A row that has stopped keeps its iterate, and with it its residual, up to rounding and up to the
# order of a device's atomic sums. Twice the tolerance is beyond both wherever a row can converge.
MOVED = 2.0


@dataclass(frozen=True)
class Solution:
    """Answer and statistics of a row-wise solve; R rows of n numbers.

    Args:
        z: (R, n) the answers: f of each row's best iterate; of a linear solve the iterate itself.
        residual: (R,) relative residual of that iterate, in the dtype of ``z``.
        nfe: (R,) int32, evaluations of f while the row was active.
        outcome: (R,) int8, values of :class:`deqfuse.Outcome`.
        trace: (steps, R) residual at each step, NaN where a row had stopped; None where not asked
            for.
    """

    z: Tensor  # (R, n)
    residual: Tensor  # (R,)
    nfe: Tensor  # (R,) int32
    outcome: Tensor  # (R,) int8
    trace: Tensor | None = None  # (steps, R), NaN where a row had stopped


def row_norm(v: Tensor) -> Tensor:
    """Euclidean norm of each row.

    Args:
        v: (R, n) rows.

    Returns:
        (R,).
    """
    return torch.linalg.vector_norm(v, dim=1)


def row_dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner product of each row of one tensor with that of another.

    Args:
        a: (R, n) rows.
        b: (R, n) rows.

    Returns:
        (R,).
    """
    return (a * b).sum(1)


def residual_of(
    z: Tensor,  # (R, n)
    fz: Tensor,  # (R, n)
) -> Tensor:  # (R,)
    """``|f(z) - z| / (|f(z)| + 1e-5)`` per row, by which a row is judged.

    NaN where |f(z)| overflows: any residual over an infinite number would be none.
    """
    norm = row_norm(fz)
    return row_norm(fz - z) / (norm + RESIDUAL_FLOOR + (norm - norm))


def rejudged(
    found: Solution,
    last: Tensor,  # (R,)
    tol: float | Tensor,
) -> Solution:
    """The solution after a look at every converged row with all rows at their final iterates.

    A row that stops is frozen, while others go on. If rows are separate problems, its residual
    stays what it was; if the map couples them, it does not, and what was judged is no longer true.
    The solve's last evaluation covers all rows, so that this look costs none.

    Args:
        found: as the rows were judged when they stopped.
        last: relative residuals at the last evaluation.
        tol: what they were judged by.
    """
    moved = (found.outcome == int(Outcome.CONVERGED)) & ~(last <= MOVED * tol)
    return dataclasses.replace(
        found,
        residual=torch.where(moved, last, found.residual),
        outcome=torch.where(moved, int(Outcome.COUPLED), found.outcome).to(torch.int8),
    )


def select(mask: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Row-wise choice: ``a`` where ``mask``, else ``b``.

    Args:
        mask: (R,) bool.
        a: (R, n) rows.
        b: (R, n) rows.

    Returns:
        (R, n). A NaN in what is not chosen does no harm, as it would in a product with the mask.
    """
    return torch.where(mask[:, None], a, b)


class Rows:
    """State of all rows of one solve, through which a solver learns which rows are still active.

    A solver calls :meth:`observe` once per step, moves the rows that are :attr:`active` only, and
    returns :meth:`solution` when no row is.

    Args:
        z0: (R, n) start.
        tol: residual at which a row is converged.
        max_iter: evaluations after which a row stops.
        scale: (R,) denominator of the residual; ``|f(z)| + 1e-5`` when not given.
        trace: whether to keep the residual of every observation.

    Attributes:
        active: (R,) bool, the rows that have not ended.
        nfe: (R,) int32, evaluations of each row so far.
    """

    def __init__(
        self,
        z0: Tensor,
        tol: float,
        max_iter: int,
        *,
        scale: Tensor | None = None,
        trace: bool = False,
    ) -> None:
        count, device = z0.shape[0], z0.device
        self.tol, self.max_iter, self.scale = tol, max_iter, scale
        self.active = torch.ones(count, dtype=torch.bool, device=device)
        self.best = z0
        self.best_residual = torch.full((count,), float("inf"), dtype=z0.dtype, device=device)
        self._last = self.best_residual  # of every row, active or not
        self.nfe = torch.zeros(count, dtype=torch.int32, device=device)
        self.outcome = torch.full((count,), int(Outcome.MAX_ITER), dtype=torch.int8, device=device)
        self._steps = 0
        self._best_at = self.nfe  # step of the best iterate
        self._trace: list[Tensor] | None = [] if trace else None

    def observe(self, z: Tensor, fz: Tensor, cost: Tensor | int = 1) -> bool:
        """Note ``fz = f(z)``: judge every active row by its residual and end those that are done.

        Args:
            z: (R, n) iterates of all rows: those that have stopped stay at their last one.
            fz: (R, n) their images.
            cost: evaluations that this took, for all rows alike or (R,) int32.

        Returns:
            True while any row is active.
        """
        with torch.no_grad():
            scale = self.scale
            residual = residual_of(z, fz) if scale is None else row_norm(fz - z) / scale
            self._last = residual
            self.nfe = torch.where(self.active, self.nfe + cost, self.nfe).to(torch.int32)
            # A NaN compares false: a poisoned row never becomes "better".
            self._steps += 1
            better = self.active & (residual < self.best_residual)
            self.best_residual = torch.where(better, residual, self.best_residual)
            self._best_at = torch.where(better, self._steps, self._best_at).to(torch.int32)
            if self._trace is not None:
                self._trace.append(torch.where(self.active, residual, torch.nan))
        # The first f(z) is kept whatever it is: a poisoned row returns NaN and not its start.
        kept = fz if self.scale is None else z  # linear solves vouch for the iterate itself
        kept = select(torch.isfinite(residual), kept, fz)
        self.best = select(better if self._steps > 1 else self.active, kept, self.best)
        with torch.no_grad():
            return self._stop_rows(residual)

    def _stop_rows(self, residual: Tensor) -> bool:
        self._end(residual <= self.tol, Outcome.CONVERGED)
        self._end(~torch.isfinite(residual), Outcome.NON_FINITE)
        self._end(self.nfe >= self.max_iter, Outcome.MAX_ITER)
        self._end(self._steps - self._best_at >= STALL_STEPS, Outcome.STALLED)
        return bool(self.active.any())

    def _end(self, rows: Tensor, outcome: Outcome) -> None:
        self.outcome = torch.where(self.active & rows, int(outcome), self.outcome).to(torch.int8)
        self.active = self.active & ~rows

    def solution(self) -> Solution:
        """Answers and statistics as they stand: z (R, n), statistics (R,)."""
        trace = None if self._trace is None else torch.stack(self._trace)
        found = Solution(self.best, self.best_residual, self.nfe, self.outcome, trace)
        return rejudged(found, self._last, self.tol)
