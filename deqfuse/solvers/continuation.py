"""Zeros of ``z - f(z)`` of one row where no iteration finds them, by continuation.

A bounded map has a fixed point in any case (Brouwer). The zeros of

    H(z, t) = z - t f(z) - (1 - t) a

are, for almost every start ``a``, a curve that leads from ``(a, 0)`` to ``(z*, 1)`` (Chow,
Mallet-Paret and Yorke 1978). It may turn back in t, so it is followed by arc length (Allgower and
Georg, "Numerical Continuation Methods", 1990): a step along the tangent, then Newton corrections.

The direction along the curve is that in which ``det [DH; tangent]`` is positive, as at the start:
an invariant of the curve, also across the kinks that relu makes, where the tangents of both sides
say nothing about each other. This is the plain form of ``csrc/cpu/continuation.h``, with the same
constants and without its ways of saving arithmetic; both may end at different zeros.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from deqfuse.solvers.rows import RESIDUAL_FLOOR

RowMap = Callable[[Tensor], Tensor]  # (n,) -> (n,)
RowJacobian = Callable[[Tensor], Tensor]  # (n,) -> (n, n)

MAX_JACOBIANS = 10_000  # of a row
STARTS = 8  # curves to try: from f(0), then from f of fixed random points
JACOBIANS_PER_START = 400, 5  # and so many for each feature, since a curve has more kinks
NEWTON_STEPS, LANDING_STEPS = 8, 8  # from the best iterate; at t = 1
PATH_TOLERANCE = 0.1  # of the tolerance; the rest is for rounding
ON_CURVE = 3e-3  # |H| / |f| of an accepted point; further away lie other curves
CLOSEST = 1e-6  # and after failures to land, each of which asks for a tenth
CHORD = 0.5  # a correction must bring |H| down by this much, or the Jacobian is made anew
LEAST_STEP = 1e-5  # below it a step has failed at a kink, which is stepped over
MAX_KINKS = 100
CORRECTIONS, NEWTONS = 10, 4  # at most, per step


@dataclass(frozen=True)
class Zero:
    """What was found for a row."""

    z: Tensor  # (n,)
    found: bool
    work: int  # evaluations and Jacobians


def find_zero(
    f: RowMap,
    jacobian: RowJacobian,
    best: Tensor,  # (n,)
    tol: float,
    max_jacobians: int = MAX_JACOBIANS,
) -> Zero:
    """A zero of ``z - f(z)``: Newton's method from ``best``, then curves from several starts.

    Args:
        f: the map of one row, bounded.
        jacobian: its dense Jacobian.
        best: where a solver has given up, float64.
        tol: residual ``|f(z) - z| / (|f(z)| + 1e-5)``, of which a tenth is aimed at.
        max_jacobians: bound on the work.
    """
    row = _Row(f, jacobian, PATH_TOLERANCE * tol, max_jacobians)
    z = row.newton(best, NEWTON_STEPS, 0.95) if bool(best.isfinite().all()) else None
    generator = torch.Generator().manual_seed(0)  # the answer depends on nothing but the row
    start = torch.zeros_like(best)
    for _ in range(STARTS):
        if z is not None:
            return Zero(z, True, row.work)
        a = row.evaluate(start)
        if not bool(a.isfinite().all()):
            break
        z = _follow(row, a)
        start = torch.randn(best.shape, generator=generator, dtype=best.dtype).to(best.device)
    return Zero(best if z is None else z, z is not None, row.work)


class _Row:
    """The map and its Jacobian with their count, and Newton's method."""

    def __init__(self, f: RowMap, jacobian: RowJacobian, tol: float, max_jacobians: int) -> None:
        self.f, self.jacobian, self.tol, self.left = f, jacobian, tol, max_jacobians
        self.work = 0

    def evaluate(self, z: Tensor) -> Tensor:
        self.work += 1
        return self.f(z)

    def linearise(self, z: Tensor) -> Tensor:
        self.work += 1
        self.left -= 1
        return self.jacobian(z)

    def newton(self, z: Tensor, steps: int, least: float) -> Tensor | None:
        """Newton's method with a line search, while a step leaves at most ``least``."""
        fz = self.evaluate(z)
        residual = _relative(fz - z, fz)
        for _ in range(steps):
            if residual <= self.tol:
                return z
            if self.left <= 0 or not math.isfinite(residual):
                return None
            step = _solve(torch.eye(len(z)).to(z) - self.linearise(z), fz - z)
            if step is None:
                return None
            for length in (1.0, 0.5, 0.25, 0.125):
                trial = z + length * step
                fz = self.evaluate(trial)
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
    def at(cls, row: _Row, a: Tensor, u: Tensor, fz: Tensor, tangent: Tensor) -> _System:
        z, t = u[:-1], u[-1]
        upper = torch.cat([torch.eye(len(z)).to(z) - t * row.linearise(z), (a - fz)[:, None]], 1)
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


def _follow(row: _Row, a: Tensor) -> Tensor | None:
    """The zero at the end of the curve from ``a``, or None."""
    least, each = JACOBIANS_PER_START
    end, on_curve = row.left - least - each * len(a), ON_CURVE

    def curve(u: Tensor) -> tuple[Tensor, Tensor, float]:  # H, f(z), |H| / |f|
        fz = row.evaluate(u[:-1])
        h = u[:-1] - u[-1] * fz - (1 - u[-1]) * a
        return h, fz, _relative(h, fz)

    u = torch.cat([a, a.new_zeros(1)])
    upwards = torch.zeros_like(u)
    upwards[-1] = 1
    system = _System.at(row, a, u, row.evaluate(a), upwards)
    tangent = system.tangent()
    step, kinks, may_land = 0.1 * math.sqrt(len(a)), 0, True
    while tangent is not None and row.left > max(end, 0):
        if may_land and u[-1] + step * tangent[-1] >= 1:
            step = float((1 - u[-1]) / tangent[-1])
            z = row.newton((u + step * tangent)[:-1], LANDING_STEPS, 0.5)
            if z is not None:
                return z
            may_land = False
        reached, newtons, corrections = _correct(row, a, curve, u, tangent, step, system, on_curve)
        if reached is None:
            step *= 0.35
            if step >= LEAST_STEP:
                continue
            kinks += 1
            if kinks > MAX_KINKS:
                return None
            u, step = u + 2 * LEAST_STEP * tangent, 20 * LEAST_STEP
        elif reached[-1] >= 1:  # the curve has crossed t = 1
            crossing = u + (1 - u[-1]) / (reached[-1] - u[-1]) * (reached - u)
            z = row.newton(crossing[:-1], LANDING_STEPS, 0.5)
            step, on_curve = 0.35 * step, max(on_curve / 10, CLOSEST)
            if z is not None or step < LEAST_STEP:
                return z
            continue
        else:
            u, may_land = reached, True
            if newtons == 0 and corrections <= 2:
                step *= 2
            elif newtons > 1:
                step *= 0.7
        if u[-1] < -0.5:  # far behind the start: another curve
            return None
        system = _System.at(row, a, u, row.evaluate(u[:-1]), tangent)
        tangent = system.tangent()
    return None


def _correct(
    row: _Row,
    a: Tensor,
    curve: Callable[[Tensor], tuple[Tensor, Tensor, float]],
    u: Tensor,
    tangent: Tensor,
    step: float,
    system: _System,
    on_curve: float,
) -> tuple[Tensor | None, int, int]:
    """From a step along the tangent back to the curve, with the system that there is while it
    serves; and how many Jacobians and corrections that took."""
    now, newtons = u + step * tangent, 0
    h, fz, size = curve(now)
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
            system = _System.at(row, a, now, fz, tangent)
            newtons += 1
        move = system.correction(h)
        if move is None or not (now + move - u).norm() <= 4 * step + 1e-2:
            break
        now, before = now + move, size
        h, fz, size = curve(now)
    return None, newtons, CORRECTIONS
