"""Anderson mixing and damped Picard iteration, per row.

Written without in-place updates, so that the same code is the solver and, under grad mode, the
thing that ``Unrolled`` backpropagates through.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from deqfuse import scalars
from deqfuse.solvers.options import SolverOption, knob
from deqfuse.solvers.rows import Rows, Solution, row_dot, select

PIVOT_FLOOR = 2.4e-7  # relative to the largest diagonal; without it float32 Cholesky gives NaN
TINY = 1e-30


@dataclass(frozen=True)
class Anderson(SolverOption):
    """Anderson mixing over the last ``m`` residuals (Walker & Ni 2011), per row. The default.

    The next iterate mixes the last ``m`` ones, ``z <- sum_i alpha_i (z_i + beta (f(z_i) - z_i))``,
    with the weights of sum 1 that make ``|sum_i alpha_i (f(z_i) - z_i)|`` least.

    On the ``cpu`` backend a layer's start from zero begins with plain steps (beta = 1, max_iter
    above 8, tol 1e-6 or looser), until a row's next evaluation is expected to solve it, while each
    halves the residual, four evaluations at most. They count, but no row ends there.

    Args:
        tol: relative residual at which a row stops: ``|f(z) - z| / (|f(z)| + 1e-5) <= tol``.
        max_iter: evaluations of f per row after which it stops in any case.
        trace: whether to record the residual of every row at every step (``info.*.trace``).
        m: history length; m = 1 is plain (damped) iteration.
        beta: mixing factor in (0, 2]; 1 mixes the images f(z_i) alone.
        lam: ridge *relative* to the largest diagonal entry of the Gram matrix. An absolute ridge
            swamps the Gram matrix as soon as residuals are small and turns the method into
            averaging.
        rescue: whether rows that the method gives up are solved by continuation
            (:mod:`deqfuse.solvers.continuation`), at 10 to 1000 dense Jacobians for most rows.
            None: for the layer's own maps yes on the CPU, and no on a GPU, where a look at the
            outcomes waits for the device; for ``DEQ(f)`` no, as nobody knows whether f is bounded.
            With True a row of ``DEQ(f)`` may have up to 1024 numbers. ``Unrolled()`` has none.
        max_jacobians: bound on the work of the rescue, per row. There is none for a whole solve: a
            row's answer would depend on its neighbours.

    Raises:
        TypeError: a value of a wrong type.
        ValueError: a value out of range.
    """

    m: int = knob(5, scalars.positive_int)
    beta: float = knob(1.0, scalars.mixing)
    lam: float = knob(1e-6, scalars.non_negative_float)
    rescue: bool | None = knob(None, scalars.flag_or_none)
    max_jacobians: int = knob(20_000, scalars.positive_int)

    def rescues(self, device: torch.device) -> bool:
        return device.type == "cpu" if self.rescue is None else self.rescue

    def settled(self, rescue: bool) -> Anderson:
        return self if self.rescue is not None else dataclasses.replace(self, rescue=rescue)

    @property
    def unrolls(self) -> bool:
        return not self.rescue

    def remedies(self) -> list[str]:
        rescue = [] if self.rescue else ["Anderson(rescue=True)"]
        return [*super().remedies(), *rescue, "NewtonKrylov()"]


@dataclass(frozen=True)
class Picard(SolverOption):
    """Damped fixed-point iteration ``z <- z + beta (f(z) - z)``, per row.

    Args:
        tol: relative residual at which a row stops: ``|f(z) - z| / (|f(z)| + 1e-5) <= tol``.
        max_iter: evaluations of f per row after which it stops in any case.
        trace: whether to record the residual of every row at every step (``info.*.trace``).
        beta: damping factor in (0, 2]; 1 is the plain iteration ``z <- f(z)``.

    Raises:
        TypeError: a value of a wrong type.
        ValueError: a value out of range.
    """

    beta: float = knob(1.0, scalars.mixing)

    def remedies(self) -> list[str]:
        return [*super().remedies(), "Anderson(rescue=True)", "NewtonKrylov()"]


def mixing_weights(
    gram: Tensor,  # (R, k, k)
    lam: float,
) -> Tensor:  # (R, k)
    """Weights that minimise ``|sum_i alpha_i g_i|`` with sum 1, from the Gram matrix of the g_i.

    ``alpha = A^-1 1 / (1^T A^-1 1)`` with ``A = gram + lam max(diag gram) I``, by a Cholesky
    factorisation whose pivots are kept above a relative floor.
    """
    k = gram.shape[1]
    largest = gram.diagonal(dim1=1, dim2=2).amax(1)
    # A row that stopped exactly has an empty Gram matrix. Its weights are never used, but Unrolled
    # differentiates them, and 0 * inf is NaN: give it the identity instead.
    empty = largest <= TINY
    gram = torch.where(
        empty[:, None, None], torch.eye(k, dtype=gram.dtype, device=gram.device), gram
    )
    largest = torch.where(empty, 1.0, largest)
    floor = PIVOT_FLOOR * largest
    work = gram + torch.diag_embed((lam * largest)[:, None].expand(-1, k))
    rhs = torch.ones_like(gram[:, 0])
    columns, y = [], []
    for _ in range(k):  # right-looking: factor and forward-substitute in one sweep
        inv = torch.maximum(work[:, 0, 0], floor).rsqrt()
        column = work[:, 1:, 0] * inv[:, None]
        y.append(rhs[:, 0] * inv)
        rhs = rhs[:, 1:] - column * y[-1][:, None]
        work = work[:, 1:, 1:] - column[:, :, None] * column[:, None, :]
        columns.append((inv, column))
    solved: list[Tensor] = []  # entries i..k-1 of A^-1 1
    for (inv, column), value in zip(reversed(columns), reversed(y), strict=True):
        for j, later in enumerate(solved):
            value = value - column[:, j] * later
        solved.insert(0, value * inv)
    alpha = torch.stack(solved, dim=1)
    return alpha / alpha.sum(1, keepdim=True)


def _extend_gram(gram: Tensor | None, residuals: list[Tensor]) -> Tensor:
    """Gram matrix of ``residuals`` (newest first) from that of the step before: one new row."""
    row = torch.stack([row_dot(residuals[0], g) for g in residuals], dim=1)
    if gram is None:
        return row[:, :, None]
    keep = len(residuals) - 1
    lower = torch.cat([row[:, 1:, None], gram[:, :keep, :keep]], dim=2)
    return torch.cat([row[:, None, :], lower], dim=1)


def anderson(
    f: Callable[[Tensor], Tensor],
    z0: Tensor,  # (R, n)
    option: Anderson,
    scale: Tensor | None = None,  # (R,)
) -> Solution:
    """Solve ``z = f(z)`` by Anderson mixing; see :class:`Anderson` for the knobs."""
    rows = Rows(z0, option.tol, option.max_iter, scale=scale, trace=option.trace)
    images: list[Tensor] = []  # f of the last m iterates, newest first
    residuals: list[Tensor] = []
    z, gram = z0, None
    while True:
        fz = f(z)
        if not rows.observe(z, fz):
            return rows.solution()
        images = [fz, *images[: option.m - 1]]
        residuals = [fz - z, *residuals[: option.m - 1]]
        gram = _extend_gram(gram, residuals)
        alpha = mixing_weights(gram, option.lam)
        mixed = torch.zeros_like(z)
        for i, (image, g) in enumerate(zip(images, residuals, strict=True)):
            step = image if option.beta == 1 else image - (1 - option.beta) * g
            mixed = mixed + alpha[:, i : i + 1] * step
        z = select(rows.active, mixed, z)


def picard(
    f: Callable[[Tensor], Tensor],
    z0: Tensor,  # (R, n)
    option: Picard,
    scale: Tensor | None = None,  # (R,)
) -> Solution:
    """Solve ``z = f(z)`` by ``z <- z + beta (f(z) - z)``."""
    rows = Rows(z0, option.tol, option.max_iter, scale=scale, trace=option.trace)
    z = z0
    while True:
        fz = f(z)
        if not rows.observe(z, fz):
            return rows.solution()
        z = select(rows.active, z + option.beta * (fz - z), z)
