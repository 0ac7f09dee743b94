"""Right first: a variant is timed only after its answer and gradients passed here, in float64.

Residuals are those of the *naive joint map* (``deqfuse.testing``, no code shared with any solver),
evaluated in float64 at what the variant returned. So a variant that stops early is caught whatever
it says about itself. Where the map is contractive, answer and gradients, the forward value of the
training step included, are also compared with a float64 equilibrium solved to 1e-11.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.cases import MAX_ITER, Problem
from benchmarks.variants import Answer, Contender, deqfuse_variant
from deqfuse import Anderson, Implicit, testing

TRUTH_TOL = 1e-11
# An error is at most residual / (1 - contraction): ten times the tolerance up to a factor of 0.9.
ERROR_PER_TOL = 10.0
# Of each leaf's gradient; the whole gradient as one vector has ERROR_PER_TOL. An answer that is off
# by 1e-6 has a few relu signs other than the equilibrium's. In the leaves before a cell's first
# norm, a thousandth of the whole, that alone makes up to 2%, in every solver and in float64 alike.
LEAF_ERROR = 5e-2
NEGLIGIBLE = 1e-4  # of the largest leaf's gradient: below it, errors are relative to that
SOLVED_SLACK = 0.02  # share of rows by which solvers of equal budget may differ at torch's init


@dataclass(frozen=True)
class Limits:
    """What a variant has to reach where there is a truth; relative, of the worst row."""

    residual: float  # of the joint state
    block: float  # error of any block
    fused: float  # error of the fused output, forward and in the training step
    gradient: float  # error of the whole gradient

    @classmethod
    def at(cls, tol: float) -> Limits:
        """For a solve to ``tol``."""
        return cls(tol, ERROR_PER_TOL * tol, ERROR_PER_TOL * tol, ERROR_PER_TOL * tol)


@dataclass(frozen=True)
class Truth:
    """A float64 equilibrium, and the gradients there."""

    z: Tensor  # (B, d)
    cells: Tensor  # (N, B, d)
    gradients: dict[str, Tensor]


@dataclass(frozen=True)
class Verdict:
    """What the gate found. ``reason`` is None for a variant that may be timed."""

    reason: str | None
    residual: float  # of the worst row, joint state
    solved: float  # share of rows at the tolerance
    nfe_cells: float  # mean over rows
    nfe_fuse: float
    error: float | None = None  # of the worst row's fused output
    gradient_error: float | None = None  # of the whole gradient
    penalty_error: float | None = None  # of the Jacobian penalty's value
    penalty_gradient_error: float | None = None  # of its whole gradient

    def facts(self) -> dict[str, float | None]:
        """What is saved beside the times."""
        return {k: v for k, v in vars(self).items() if k != "reason"}


def find_truth(problem: Problem) -> Truth:
    """The float64 equilibrium and its gradients, by the reference.

    Raises:
        ArithmeticError: a row has no equilibrium to be found; then nothing can be compared.
    """
    twin = problem.double()
    layer = twin.layer
    layer.backend = "reference"
    layer.solver = Anderson(tol=TRUTH_TOL, max_iter=500, rescue=True)
    layer.adjoint = Implicit(tol=TRUTH_TOL, max_iter=500)
    features = [x.detach().requires_grad_() for x in twin.features]
    z, cells = layer(features, return_cells=True)
    answer = Answer(z.detach(), cells.detach(), torch.empty(0), torch.empty(0))
    worst = float(residuals(problem, answer).max())
    if not worst <= 100 * TRUTH_TOL:
        raise ArithmeticError(f"{problem.case.name}: no float64 equilibrium, residual {worst:.1e}")
    leaves = dict(layer.named_parameters()) | {f"features[{i}]": x for i, x in enumerate(features)}
    gradients = torch.autograd.grad(z, list(leaves.values()), twin.cotangent)
    return Truth(answer.z, answer.cells, dict(zip(leaves, gradients, strict=True)))


@torch.no_grad()
def residuals(problem: Problem, answer: Answer) -> Tensor:  # (B,)
    """``|f(z) - z| / |f(z)|`` per row of the joint state, by the naive map in float64."""
    twin = problem.double()
    x, x_fuse = testing.naive_injections(twin.layer, twin.features)
    state = torch.cat([answer.cells, answer.z[None]]).transpose(0, 1).double()
    image = testing.naive_map(twin.layer, state, x, x_fuse)
    return (image - state).flatten(1).norm(dim=1) / image.flatten(1).norm(dim=1)


def gradients(problem: Problem, contender: Contender) -> tuple[Tensor, dict[str, Tensor]]:
    """The forward value of a training step, and the gradients of ``<z, cotangent>``."""
    leaves = problem.leaves()
    z = contender.fused(problem.features)
    found = torch.autograd.grad(z, list(leaves.values()), problem.cotangent)
    return z.detach(), dict(zip(leaves, found, strict=True))


def row_error(z: Tensor, truth: Tensor) -> float:
    """Relative error of the worst row; NaN counts as infinite."""
    error = float(((z.double() - truth).norm(dim=-1) / truth.norm(dim=-1)).max())
    return error if error == error else float("inf")


def gradient_errors(found: dict[str, Tensor], truth: dict[str, Tensor]) -> tuple[float, str, float]:
    """Worst relative error of a leaf, its name, and the error of all leaves as one vector."""
    largest = max(float(g.norm()) for g in truth.values())
    off = {name: float((found[name].double() - g).norm()) for name, g in truth.items()}
    relative = {
        name: off[name] / max(float(g.norm()), NEGLIGIBLE * largest) for name, g in truth.items()
    }
    worst = max(relative, key=lambda name: (relative[name] != relative[name], relative[name]))
    total = sum(float(g.square().sum()) for g in truth.values()) ** 0.5
    return relative[worst], worst, sum(e * e for e in off.values()) ** 0.5 / total


def reference_share(problem: Problem) -> float:
    """Share of rows that the float64 reference solves with everybody's tolerance and budget."""
    twin = problem.double()
    with torch.no_grad():
        answer = deqfuse_variant("reference")(twin, problem.case.tol).answer(twin.features)
    return float((residuals(problem, answer) <= problem.case.tol).double().mean())


def judge(
    problem: Problem,
    contender: Contender,
    truth: Truth | None,
    limits: Limits | None = None,
    share: float = 1.0,
) -> Verdict:
    """Whether a contender may be timed.

    Args:
        truth: the float64 equilibrium; None at torch's init, where rows may have none or several.
        limits: what every row must reach; those of the case's tolerance when not given.
        share: without a truth, the share of rows that the reference solves. A contender that solves
            clearly fewer must at least have spent its whole budget on each of the others.
    """
    tol = problem.case.tol
    limits = Limits.at(tol) if limits is None else limits
    with torch.no_grad():
        answer = contender.answer(problem.features)
        timed = contender.fused(problem.features)
    found = residuals(problem, answer._replace(z=timed))  # of the very call that is timed
    good = found <= limits.residual
    facts = {
        "residual": float(found.max()),
        "solved": float(good.double().mean()),
        "nfe_cells": float(answer.nfe_cells.double().mean()),
        "nfe_fuse": float(answer.nfe_fuse.double().mean()),
    }
    if truth is None:
        return Verdict(_early(answer, good, share), **facts)
    error = row_error(timed, truth.z)
    worst_block = max(error, row_error(answer.cells, truth.cells))
    reason = None
    if not good.all():
        reason = f"residual {facts['residual']:.1e} in the worst row, above {limits.residual:g}"
    elif not worst_block <= limits.block:
        reason = f"error {worst_block:.1e} in the worst row, above {limits.block:g}"
    elif not error <= limits.fused:
        reason = f"error {error:.1e} in the worst row's output, above {limits.fused:g}"
    if reason is not None or not contender.differentiable:
        return Verdict(reason, **facts, error=error)
    stepped, own = gradients(problem, contender)
    off = row_error(stepped, truth.z)
    worst, leaf, whole = gradient_errors(own, truth.gradients)
    if not off <= limits.fused:
        reason = f"step: error {off:.1e} in the worst row's output, above {limits.fused:g}"
    elif not worst <= LEAF_ERROR:
        reason = f"gradient of {leaf} off by {worst:.1e}, above {LEAF_ERROR:g}"
    elif not whole <= limits.gradient:
        reason = f"gradient off by {whole:.1e} as a whole, above {limits.gradient:g}"
    return Verdict(reason, **facts, error=error, gradient_error=whole)


def _early(answer: Answer, good: Tensor, share: float) -> str | None:
    """Without a truth: whether too few rows are good, and some of the others had evaluations left.

    A fused solve says itself what each row used; a joint one's calls of f are counted for it.
    """
    cells = answer.nfe_cells.amax(0) if answer.nfe_cells.ndim == 2 else answer.nfe_cells
    lazy = ~good & (torch.maximum(cells, answer.nfe_fuse).expand(good.shape) < MAX_ITER)
    solved = float(good.double().mean())
    if solved >= share - SOLVED_SLACK or not lazy.any():
        return None
    return (
        f"stopped early: {solved:.0%} of rows solved, the reference has {share:.0%}, and "
        f"{int(lazy.sum())} of the others used fewer than {MAX_ITER} evaluations"
    )
