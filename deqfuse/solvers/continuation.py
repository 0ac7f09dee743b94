"""Zeros of ``z - f(z)`` of single rows where no iteration finds them, by continuation.

A bounded map has a fixed point in any case (Brouwer). The zeros of

    H(z, t) = z - t f(z) - (1 - t) a

are, for almost every start ``a``, a curve that leads from ``(a, 0)`` to ``(z*, 1)`` (Chow,
Mallet-Paret and Yorke 1978). It may turn back in t, so it is followed by arc length (Allgower and
Georg, "Numerical Continuation Methods", 1990): a step along the tangent, then Newton corrections.

The direction along the curve is that in which ``det [DH; tangent]`` is positive, as at the start:
an invariant of the curve, also across the kinks that relu makes, where the tangents of both sides
say nothing about each other. This is the plain form of ``csrc/cpu/continuation.h``, with the same
constants and without its ways of saving arithmetic; both may end at different zeros.

Each row is searched on its own, by a generator that asks for values and Jacobians; the answers come
from one evaluation of all rows (:func:`find_zeros`).
"""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from deqfuse.solvers.derivatives import Jacobian, Map, rows_at_once
from deqfuse.solvers.rows import RESIDUAL_FLOOR

STARTS = 4  # curves to try: from f(0), then from f of fixed random points; C++ can afford more
JACOBIANS_PER_START = 400, 15  # and so many for each feature, since a curve has more kinks
NEWTON_STEPS, LANDING_STEPS = 8, 8  # from the best iterate; at t = 1
PATH_TOLERANCE = 0.1  # of the tolerance; the rest is for rounding
ON_CURVE = 3e-4  # |H| / |f| of an accepted point; further away lie other curves
CLOSEST = 1e-6  # and after failures to land, each of which asks for a tenth
CHORD = 0.5  # a correction must bring |H| down by this much, or the Jacobian is made anew
LEAST_STEP = 1e-5  # below it a step has failed at a kink, which is jumped across
PAST_KINK = 1e-2  # a step as long as this ends the jumps, each twice as long as the last
MAX_JUMPS = 16
CORRECTIONS, NEWTONS = 10, 4  # at most, per step


class Zeros(NamedTuple):
    """What was found for each of the rows that were asked for.

    Attributes:
        z: (R, n) zeros, float64; where none was found, what the search began with.
        found: (R,) bool.
        work: (R,) int32, evaluations and Jacobians.
    """

    z: Tensor
    found: Tensor
    work: Tensor


class _Ask(NamedTuple):
    """What a row's search needs next: f(z), or the Jacobian there."""

    z: Tensor  # (n,)
    jacobian: bool


_Search = Generator[_Ask, Tensor, "_Zero"]


class _Zero(NamedTuple):
    z: Tensor | None  # (n,)
    work: int


def find_zeros(
    f: Map,
    jacobian: Jacobian,
    best: Tensor,  # (R, n)
    rows: list[int],
    tol: float,
    max_jacobians: int,
) -> Zeros:
    """Zeros of ``z - f(z)`` for some rows: Newton's method from ``best``, then curves.

    Args:
        f: row-wise map (R, n) -> (R, n), bounded; given float64, it returns float64.
        jacobian: its dense Jacobians in float64.
        best: where a solver has given up; the other rows stand still there.
        rows: numbers of the rows to search.
        tol: residual ``|f(z) - z| / (|f(z)| + 1e-5)``, of which a tenth is aimed at.
        max_jacobians: bound on the work of a row.
    """
    best = best.double()
    zeros = Zeros(
        best.clone(),
        torch.zeros(len(best), dtype=torch.bool, device=best.device),
        torch.zeros(len(best), dtype=torch.int32, device=best.device),
    )
    for some in rows_at_once(rows, best.shape[1]):
        searches = {row: _search(best[row], PATH_TOLERANCE * tol, max_jacobians) for row in some}
        for row, zero in _answered(searches, f, jacobian, best).items():
            zeros.work[row] = zero.work
            if zero.z is not None:
                zeros.z[row], zeros.found[row] = zero.z, True
    return zeros


def _answered(
    searches: dict[int, _Search], f: Map, jacobian: Jacobian, best: Tensor
) -> dict[int, _Zero]:
    """Runs all searches to their ends, evaluating f for all of them at once."""
    z, ended = best.clone(), {}
    asked = {row: next(search) for row, search in searches.items()}
    while asked:
        for row, ask in asked.items():
            z[row] = ask.z
        images = f(z) if not all(ask.jacobian for ask in asked.values()) else z
        steep = [row for row, ask in asked.items() if ask.jacobian]
        slopes = dict(zip(steep, jacobian(z, steep), strict=True)) if steep else {}
        for row in list(asked):
            answer = slopes[row] if asked[row].jacobian else images[row]
            try:
                asked[row] = searches[row].send(answer)
            except StopIteration as end:
                ended[row] = end.value
                del asked[row]
    return ended


def _search(best: Tensor, tol: float, max_jacobians: int) -> _Search:
    """The search for one row's zero."""
    row = _Row(tol, max_jacobians)
    finite = bool(best.isfinite().all())
    z = (yield from row.newton(best, NEWTON_STEPS, 0.95)) if finite else None
    generator = torch.Generator().manual_seed(0)  # the answer depends on nothing but the row
    start = torch.zeros_like(best)
    for _ in range(STARTS):
        if z is not None or row.left <= 0:
            break
        a = yield from row.evaluate(start)
        if not bool(a.isfinite().all()):
            break
        z = yield from _follow(row, a)
        start = torch.randn(best.shape, generator=generator, dtype=best.dtype).to(best.device)
    return _Zero(z, row.work)


class _Row:
    """Counted questions for values and Jacobians, and Newton's method."""

    def __init__(self, tol: float, max_jacobians: int) -> None:
        self.tol, self.left = tol, max_jacobians
        self.work = 0

    def evaluate(self, z: Tensor) -> Generator[_Ask, Tensor, Tensor]:
        self.work += 1
        return (yield _Ask(z, False))

    def linearise(self, z: Tensor) -> Generator[_Ask, Tensor, Tensor]:
        self.work += 1
        self.left -= 1
        return (yield _Ask(z, True))

    def newton(self, z: Tensor, steps: int, least: float) -> Generator[_Ask, Tensor, Tensor | None]:
        """Newton's method with a line search, while a step leaves at most ``least``."""
        fz = yield from self.evaluate(z)
        residual = _relative(fz - z, fz)
        for _ in range(steps):
            if residual <= self.tol:
                return z
            if self.left <= 0 or not math.isfinite(residual):
                return None
            slope = yield from self.linearise(z)
            step = _solve(torch.eye(len(z)).to(z) - slope, fz - z)
            if step is None:
                return None
            for length in (1.0, 0.5, 0.25, 0.125):
                trial = z + length * step
                fz = yield from self.evaluate(trial)
                size = _relative(fz - trial, fz)
                if size <= (1 - 0.1 * length) * residual:
                    break
            if not size <= least * residual:
                return None
            z, residual = trial, size
        return z if residual <= self.tol else None


def _relative(difference: Tensor, image: Tensor) -> float:
    return float(difference.norm() / (image.norm() + RESIDUAL_FLOOR))


def _solve(matrix: Tensor, b: Tensor) -> Tensor | None:
    solution, info = torch.linalg.solve_ex(matrix, b)
    return solution if int(info) == 0 and bool(solution.isfinite().all()) else None


@dataclass
class _System:
    """``[[I - t J, dH/dt], [tangent]]`` at a point."""

    matrix: Tensor  # (n + 1, n + 1)

    @classmethod
    def at(
        cls, row: _Row, a: Tensor, u: Tensor, fz: Tensor, tangent: Tensor
    ) -> Generator[_Ask, Tensor, _System]:
        z, t = u[:-1], u[-1]
        slope = yield from row.linearise(z)
        upper = torch.cat([torch.eye(len(z)).to(z) - t * slope, (a - fz)[:, None]], 1)
        return cls(torch.cat([upper, tangent[None]]))

    def tangent(self) -> Tensor | None:
        """The unit vector along the curve in which the determinant is positive."""
        along = torch.zeros_like(self.matrix[0])
        along[-1] = 1
        tangent = _solve(self.matrix, along)
        if tangent is None:
            return None
        sign = torch.linalg.slogdet(self.matrix).sign  # that with the solution as last row, too
        return sign * tangent / tangent.norm()

    def correction(self, residual: Tensor) -> Tensor | None:
        """What takes H to zero, to first order, within the plane that the tangent stands on."""
        return _solve(self.matrix, torch.cat([-residual, residual.new_zeros(1)]))


_Point = tuple[Tensor, Tensor, float]  # H, f(z), |H| / |f| at u = (z, t)


def _curve(row: _Row, a: Tensor, u: Tensor) -> Generator[_Ask, Tensor, _Point]:
    fz = yield from row.evaluate(u[:-1])
    h = u[:-1] - u[-1] * fz - (1 - u[-1]) * a
    return h, fz, _relative(h, fz)


def _follow(row: _Row, a: Tensor) -> Generator[_Ask, Tensor, Tensor | None]:
    """The zero at the end of the curve from ``a``, or None."""
    least, each = JACOBIANS_PER_START
    end = row.left - least - each * len(a)
    u = torch.cat([a, a.new_zeros(1)])
    upwards = torch.zeros_like(u)
    upwards[-1] = 1
    fz = yield from row.evaluate(a)
    system = yield from _System.at(row, a, u, fz, upwards)
    tangent = system.tangent()
    step, jumps, may_land, on_curve = 0.1 * math.sqrt(len(a)), 0, True, ON_CURVE
    while tangent is not None and row.left > max(end, 0):
        if may_land and u[-1] + step * tangent[-1] >= 1:
            step = float((1 - u[-1]) / tangent[-1])
            z = yield from row.newton((u + step * tangent)[:-1], LANDING_STEPS, 0.5)
            if z is not None:
                return z
            may_land = False
        reached, newtons, corrections = yield from _correct(
            row, a, u, tangent, step, system, on_curve
        )
        if reached is None:
            step *= 0.35
            if step >= LEAST_STEP:
                continue
            jumps += 1
            if jumps > MAX_JUMPS:
                return None
            jump = LEAST_STEP * 2**jumps
            u, step = u + jump * tangent, 10 * jump
        elif reached[-1] >= 1:  # the curve has crossed t = 1
            crossing = u + (1 - u[-1]) / (reached[-1] - u[-1]) * (reached - u)
            z = yield from row.newton(crossing[:-1], LANDING_STEPS, 0.5)
            step, on_curve = 0.35 * step, max(on_curve / 10, CLOSEST)
            if z is not None or step < LEAST_STEP:
                return z
            continue
        else:
            u, may_land = reached, True
            jumps = 0 if step > PAST_KINK else jumps
            if newtons == 0 and corrections <= 2:
                step *= 2
            elif newtons > 1:
                step *= 0.7
        if u[-1] < -0.5:  # far behind the start: another curve
            return None
        fz = yield from row.evaluate(u[:-1])
        system = yield from _System.at(row, a, u, fz, tangent)
        tangent = system.tangent()
    return None


def _correct(
    row: _Row,
    a: Tensor,
    u: Tensor,
    tangent: Tensor,
    step: float,
    system: _System,
    on_curve: float,
) -> Generator[_Ask, Tensor, tuple[Tensor | None, int, int]]:
    """From a step along the tangent back to the curve, with the system that there is while it
    serves; and how many Jacobians and corrections that took."""
    now, newtons = u + step * tangent, 0
    h, fz, size = yield from _curve(row, a, now)
    before = size
    for corrections in range(CORRECTIONS):
        if size <= on_curve:
            return now, newtons, corrections
        if not math.isfinite(size):
            break
        if corrections > 0 and size > CHORD * before:
            stuck = newtons > 0 and size > 0.9 * before
            if newtons == NEWTONS or row.left <= 0 or stuck:
                break
            system = yield from _System.at(row, a, now, fz, tangent)
            newtons += 1
        move = system.correction(h)
        if move is None or not (now + move - u).norm() <= 4 * step + 1e-2:
            break
        now, before = now + move, size
        h, fz, size = yield from _curve(row, a, now)
    return None, newtons, CORRECTIONS
