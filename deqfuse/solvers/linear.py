"""Row-wise linear solves of ``(I - A) x = b``, where A is known by its action on (R, n) rows.

Used for the adjoint (A = J^T at the equilibrium) and for Newton steps (A = J). Every method works
on all rows at once, stops each row by its own *true* residual ``|b - x + A x| <= tol |b|``, and
counts applications of A per row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from deqfuse.outcome import Outcome, failed
from deqfuse.solvers.anderson import Anderson, Picard, anderson, picard
from deqfuse.solvers.derivatives import MAX_FEATURES, columns_of, rows_at_once
from deqfuse.solvers.rows import Solution, rejudged, row_dot, row_norm, select

Operator = Callable[[Tensor], Tensor]
TINY = 1e-30
SINGULAR = 1e13  # a condition number beyond which factors in double precision say nothing
_LEAST = {"gmres": 2, "bicgstab": 3}  # applications of A below which nothing is done


def solve_linear(
    apply: Operator,
    b: Tensor,  # (R, n)
    method: str,
    tol: float,
    max_iter: int,
) -> Solution:
    """Solve ``(I - A) x = b`` by the named method (see :class:`deqfuse.Implicit`)."""
    scale, ratio = _scales(b)

    def scaled(x: Tensor) -> Tensor:
        return apply(x) if ratio is None else apply(x * ratio) / ratio

    found = _solve_scaled(scaled, b / scale, method, tol, max_iter)
    return dataclasses.replace(found, z=found.z * scale)


def _scales(b: Tensor) -> tuple[Tensor, Tensor | None]:
    """Powers of two that b is divided by: no absolute constant may matter, nor a square vanish.

    One for all rows, since A is only known to act on rows of one scale: whether it keeps them
    apart is what the solve is to find out. Rows smaller by 2^-40, whose squares would vanish, have
    their own, and what A is given is scaled back.

    Returns:
        the scale, (1, 1) or (R, 1), and its ratio to the common one, None where that is 1.
    """
    largest = b.abs().amax(1, keepdim=True) if b.shape[1] else b.new_zeros(len(b), 1)
    largest = torch.where(torch.isfinite(largest), largest, 0.0)
    common = _power_of_two(largest.amax(0, keepdim=True)) if len(b) else b.new_ones(1, 1)
    own = _power_of_two(largest)
    small = (largest > 0) & (own < common * 2.0**-40)
    if not small.any():
        return common, None
    ratio = torch.where(small, own / common, 1.0).clamp_min(2.0**-100)
    return common * ratio, ratio


def _power_of_two(a: Tensor) -> Tensor:
    """The one at or below each a >= 0, a normal number; 1 for 0."""
    exponent = torch.frexp(a).exponent - 1
    least = -1022 if a.dtype == torch.float64 else -126
    power = torch.ldexp(torch.ones_like(a), exponent.clamp_min(least))
    return torch.where(a > 0, power, 1.0)


def _solve_scaled(apply: Operator, b: Tensor, method: str, tol: float, max_iter: int) -> Solution:
    if method == "auto":
        found = _solve_scaled(apply, b, "gmres", tol, max_iter)
        return found if b.shape[1] > MAX_FEATURES else factorised(apply, b, tol, found)
    if max_iter < _LEAST.get(method, 1):  # too few for one cycle and its true residual
        method = "neumann"
    if method == "gmres":  # the fewest applications of all (docs/explanation/numerics.md)
        return gmres(apply, b, tol, max_iter)
    if method == "bicgstab":
        return bicgstab(apply, b, tol, max_iter)
    if method == "dense":
        return dense(apply, b, tol)
    affine = lambda x: apply(x) + b  # noqa: E731 - the fixed-point form x = A x + b
    if method == "anderson":
        return anderson(affine, b, Anderson(tol=tol, max_iter=max_iter, m=6), _safe_norm(b))
    return picard(affine, b, Picard(tol=tol, max_iter=max_iter), _safe_norm(b))


def _safe_norm(b: Tensor) -> Tensor:
    """|b| per row, 1 where b is zero: such a row is solved by x = 0."""
    norm = row_norm(b)
    return torch.where(norm > 0, norm, 1.0)


class _Budget:
    """Which rows are active, how many applications each has used, how each ended."""

    def __init__(
        self,
        b: Tensor,
        tol: float | Tensor,
        max_iter: int | Tensor,
        least: int,  # applications that any further attempt costs
        active: Tensor | None = None,
    ) -> None:
        self.tol, self.max_iter, self.least, self.scale = tol, max_iter, least, _safe_norm(b)
        self.nfe = torch.zeros(b.shape[0], dtype=torch.int32, device=b.device)
        self.residual = row_norm(b) / self.scale
        self.active = torch.ones_like(self.nfe, dtype=torch.bool) if active is None else active
        self.judge(b)

    def judge(self, residual: Tensor) -> bool:
        """Record the true residual vectors, of all rows; True while any row is active."""
        self.last = row_norm(residual) / self.scale
        self.residual = torch.where(self.active, self.last, self.residual)
        done = (self.residual <= self.tol) | ~torch.isfinite(self.residual)
        self.active = self.active & ~done & (self.nfe + self.least <= self.max_iter)
        return bool(self.active.any())

    def spend(self, rows: Tensor) -> None:
        self.nfe = self.nfe + rows.to(torch.int32)

    def solution(self, x: Tensor) -> Solution:
        outcome = torch.where(
            self.residual <= self.tol, int(Outcome.CONVERGED), int(Outcome.MAX_ITER)
        )
        finite = torch.isfinite(self.residual)
        outcome = torch.where(finite, outcome, int(Outcome.NON_FINITE))
        x = torch.where(finite[:, None], x, torch.nan)  # a poisoned row must not look solved
        found = Solution(x, self.residual, self.nfe, outcome.to(torch.int8))
        return rejudged(found, self.last, self.tol)


def gmres(
    apply: Operator,
    b: Tensor,  # (R, n)
    tol: float | Tensor,
    max_iter: int | Tensor,
    restart: int = 20,
    active: Tensor | None = None,  # (R,) rows to solve at all
) -> Solution:
    """Restarted GMRES (Saad & Schultz 1986); ``tol`` and ``max_iter`` may differ per row."""
    budget = _Budget(b, tol, max_iter, 2, active)
    x, r = torch.zeros_like(b), b
    while budget.active.any():
        x = select(budget.active, x + _gmres_cycle(apply, r, budget, restart), x)
        budget.spend(budget.active)
        true = b - (x - apply(x))  # in this order: a huge x must not swallow b
        r = select(budget.active, true, r)
        budget.judge(true)
    return budget.solution(x)


def _gmres_cycle(apply: Operator, r: Tensor, budget: _Budget, restart: int) -> Tensor:
    """One Arnoldi cycle from residual ``r``; each row uses as many basis vectors as it needs."""
    count, n = r.shape
    steps = min(restart, n)
    basis = r.new_zeros(count, steps + 1, n)
    upper = r.new_zeros(count, steps, steps)
    rhs = r.new_zeros(count, steps + 1)
    size = torch.zeros(
        count, dtype=torch.int32, device=r.device
    )  # basis vectors that each row uses
    rhs[:, 0] = row_norm(r)
    basis[:, 0] = r / rhs[:, :1].clamp_min(TINY)
    rotations: list[tuple[Tensor, Tensor]] = []
    running = budget.active
    for j in range(steps):
        budget.spend(running)
        size = size + running.to(torch.int32)
        w = basis[:, j] - apply(basis[:, j])
        column, w = _orthogonalise(basis[:, : j + 1], w)
        h_next = row_norm(w)
        basis[:, j + 1] = w / h_next.clamp_min(TINY)[:, None]
        entries = [*column.unbind(1), h_next]
        for i, (c, s) in enumerate(rotations):
            entries[i], entries[i + 1] = (
                c * entries[i] + s * entries[i + 1],
                c * entries[i + 1] - s * entries[i],
            )
        radius = torch.hypot(entries[j], entries[j + 1]).clamp_min(TINY)
        c, s = entries[j] / radius, entries[j + 1] / radius
        rotations.append((c, s))
        upper[:, : j + 1, j] = torch.stack([*entries[:j], radius], dim=1)
        rhs[:, j + 1], rhs[:, j] = -s * rhs[:, j], c * rhs[:, j]
        # One application is kept back for the true residual at the end of the cycle. The estimate
        # must clear the tolerance with some room, or rounding would cost a whole further cycle.
        estimate = rhs[:, j + 1].abs() / budget.scale
        enough = (estimate <= 0.5 * budget.tol) | (budget.nfe + 2 > budget.max_iter)
        running = running & ~enough
        if not running.any():
            break
    used = torch.arange(steps, device=r.device) < size[:, None]  # (R, steps)
    eye = torch.eye(steps, dtype=r.dtype, device=r.device)
    system = torch.where(used[:, None, :] & used[:, :, None], upper, eye)
    y = torch.linalg.solve_triangular(
        system, torch.where(used, rhs[:, :-1], 0.0)[:, :, None], upper=True
    )
    return (basis[:, :-1] * y).sum(1)


def _orthogonalise(basis: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Coefficients of ``w`` on ``basis`` (R, k, n) and what is left; twice, which is enough."""
    total = torch.zeros_like(basis[:, :, 0])
    for _ in range(2):
        part = torch.einsum("rkn,rn->rk", basis, w)
        w = w - torch.einsum("rkn,rk->rn", basis, part)
        total = total + part
    return total, w


def bicgstab(apply: Operator, b: Tensor, tol: float, max_iter: int) -> Solution:
    """BiCGStab (van der Vorst 1992) with a restart of the shadow residual on breakdown."""
    budget = _Budget(b, tol, max_iter, 3)
    x, r = torch.zeros_like(b), b
    while budget.active.any():
        x_new = _bicgstab_run(apply, x, r, budget)
        r_new = b - (x_new - apply(x_new))
        # The residual of BiCGStab is not monotone: a run that ends worse than it began is undone.
        undone = budget.active & (row_norm(r_new) >= row_norm(r))
        taken = budget.active & ~undone
        x, true = select(taken, x_new, x), select(undone, r, r_new)
        r = select(taken, r_new, r)
        budget.spend(budget.active)
        budget.judge(true)
    return budget.solution(x)


def _bicgstab_run(apply: Operator, x: Tensor, r: Tensor, budget: _Budget) -> Tensor:
    """Iterate from residual ``r`` until the recurrence says done; the caller checks the truth."""
    shadow, p, rho, running = r, r, row_dot(r, r), budget.active
    floor = torch.finfo(r.dtype).eps ** 2
    while True:
        v = p - apply(p)
        alpha = _divide(rho, row_dot(shadow, v))
        s = r - alpha[:, None] * v
        t = s - apply(s)
        omega = _divide(row_dot(t, s), row_dot(t, t))
        budget.spend(2 * running)
        x = select(running, x + alpha[:, None] * p + omega[:, None] * s, x)
        r = select(running, s - omega[:, None] * t, r)
        enough = (row_norm(r) <= 0.5 * budget.tol * budget.scale) | ~torch.isfinite(row_norm(r))
        running = running & ~enough & (budget.nfe + 3 <= budget.max_iter)
        if not running.any():
            return x
        rho_new = row_dot(shadow, r)
        broken = (rho_new.abs() <= floor * row_norm(shadow) * row_norm(r)) | (omega == 0)
        beta = _divide(rho_new, rho) * _divide(alpha, omega)
        p = select(broken, r, r + beta[:, None] * (p - omega[:, None] * v))
        shadow = select(broken, r, shadow)
        rho = torch.where(broken, row_dot(r, r), rho_new)


def _divide(a: Tensor, b: Tensor) -> Tensor:
    """a / b, and 0 where b is 0: a breakdown that the caller sees as a zero step."""
    return torch.where(b == 0, 0.0, a / torch.where(b == 0, 1.0, b))


def dense(apply: Operator, b: Tensor, tol: float) -> Solution:
    """Every row by LU factors of its I - A."""
    return factorised(apply, b, tol, _Budget(b, tol, 0, 1).solution(torch.zeros_like(b)))


def factorised(apply: Operator, b: Tensor, tol: float, found: Solution) -> Solution:
    """The solution with the rows that did not converge solved by LU factors of their I - A.

    A is made of its products with the unit vectors. Rows are factorised one at a time: batched
    ``torch.linalg.solve`` is wrong for n > 128 on some MKL builds once the thread count was set. A
    row that even so misses the tolerance is singular, and its residual the condition number.
    """
    n = b.shape[1]
    # An iteration that overflowed says nothing about its row.
    left = failed(found.outcome) & (found.outcome != int(Outcome.COUPLED)) & b.isfinite().all(1)
    if n == 0 or not left.any():
        return found
    x, residual, outcome = found.z.clone(), found.residual.clone(), found.outcome.clone()
    unit = torch.eye(n, dtype=torch.float64, device=b.device)
    for rows in rows_at_once(torch.nonzero(left).flatten().tolist(), n):
        matrices = unit - columns_of(lambda _: apply)(b, rows).double()
        for row, matrix in zip(rows, matrices, strict=True):
            if not matrix.isfinite().all():
                x[row], residual[row] = torch.nan, torch.nan
                outcome[row] = int(Outcome.NON_FINITE)
                continue
            wanted = b[row].double()
            answer = torch.linalg.solve_ex(matrix, wanted).result
            error = (matrix @ answer - wanted).norm() / _safe_norm(wanted[None])[0]
            # As exact as the arithmetic allows, unless the matrix is singular in it.
            condition = error.new_zeros(()) if error <= tol else torch.linalg.cond(matrix)
            solved = bool(condition < SINGULAR)
            if error < residual[row] or not residual[row].isfinite():
                x[row] = answer.to(x.dtype)
            residual[row] = error if solved else condition
            outcome[row] = int(Outcome.CONVERGED if solved else Outcome.SINGULAR)
    nfe = torch.where(left, found.nfe + n + 1, found.nfe).to(torch.int32)
    # What was factorised is A itself if rows are separate problems.
    image = apply(x)
    judged = row_norm(b - (x - image)) / _safe_norm(b)
    rounding = 16 * torch.finfo(b.dtype).eps * (row_norm(x) + row_norm(image)) / _safe_norm(b)
    return rejudged(Solution(x, residual, nfe, outcome), judged, tol + rounding)
