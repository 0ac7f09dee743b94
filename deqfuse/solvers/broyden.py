"""Limited-memory "good" Broyden, per row (Broyden 1965; Bai et al. 2019 use it for DEQs)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from deqfuse import scalars
from deqfuse.solvers.options import SolverOption, knob
from deqfuse.solvers.rows import Rows, Solution, row_dot, row_norm, select


@dataclass(frozen=True)
class Broyden(SolverOption):
    """Limited-memory "good" Broyden on ``f(z) - z = 0``, per row (Broyden 1965; Bai et al. 2019).

    Args:
        tol: relative residual at which a row stops: ``|f(z) - z| / (|f(z)| + 1e-5) <= tol``.
        max_iter: evaluations of f per row after which it stops in any case.
        trace: whether to record the residual of every row at every step (``info.*.trace``).
        m: how many rank-one updates of the inverse Jacobian are kept.

    Raises:
        TypeError: a value of a wrong type.
        ValueError: a value out of range.
    """

    m: int = knob(20, scalars.positive_int)

    def remedies(self) -> list[str]:
        return [*super().remedies(), "Anderson(rescue=True)", "NewtonKrylov()"]


class _InverseJacobian:
    """``B = -I + sum_i u_i v_i^T``, approximates the inverse Jacobian of ``g(z) = f(z) - z``."""

    def __init__(self, memory: int) -> None:
        self.memory = memory
        self.us: list[Tensor] = []
        self.vs: list[Tensor] = []

    def apply(self, y: Tensor) -> Tensor:
        out = -y
        for u, v in zip(self.us, self.vs, strict=True):
            out = out + u * row_dot(v, y)[:, None]
        return out

    def apply_transposed(self, s: Tensor) -> Tensor:
        out = -s
        for u, v in zip(self.us, self.vs, strict=True):
            out = out + v * row_dot(u, s)[:, None]
        return out

    def update(self, s: Tensor, y: Tensor) -> None:
        """Make ``B y = s`` hold, by the rank-one change that alters B least."""
        by, v = self.apply(y), self.apply_transposed(s)
        denominator = row_dot(v, y)
        # A vanishing denominator would throw the row far away: it keeps its old B for this step.
        safe = denominator.abs() > 1e-8 * row_norm(s) * row_norm(by)
        u = select(
            safe, (s - by) / torch.where(safe, denominator, 1.0)[:, None], torch.zeros_like(s)
        )
        self.us = [*self.us[-(self.memory - 1) :], u] if self.memory > 1 else [u]
        self.vs = [*self.vs[-(self.memory - 1) :], v] if self.memory > 1 else [v]


def broyden(f: Callable[[Tensor], Tensor], z0: Tensor, option: Broyden) -> Solution:
    """Solve ``z = f(z)``; z0 is (R, n)."""
    rows = Rows(z0, option.tol, option.max_iter, trace=option.trace)
    inverse = _InverseJacobian(option.m)
    z, fz = z0, f(z0)
    while rows.observe(z, fz):
        g = fz - z
        z_new = select(rows.active, z - inverse.apply(g), z)
        fz_new = f(z_new)
        # Rows that stand still (s = 0) keep their B: `update` sees a zero denominator.
        inverse.update(z_new - z, (fz_new - z_new) - g)
        z, fz = z_new, fz_new
    return rows.solution()
