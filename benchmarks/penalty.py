"""Right first, of the Jacobian penalty: value and gradients of a variant against float64.

Every variant is asked which probes it draws, and is held to the value and the gradients that these
very probes have at the float64 equilibrium, by the naive equations of ``deqfuse.testing``, block by
block, differentiated twice. That the probes are Gaussian is looked at, too: so the expectation is
everybody's.

The penalty's gradient jumps wherever a relu has another sign than at the float64 equilibrium. An
equilibrium that is off by ``tol`` has a share of about ``tol`` of other signs, whose contributions,
independent of each other, move the gradient by ``sqrt(tol)``: its limit as one vector. (Taken at
the very equilibrium that a float32 solver found, the float64 gradient is 4e-7 from the solver's.)
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Problem
from benchmarks.gate import LEAF_ERROR, Limits, Truth, Verdict, gradient_errors, row_error
from benchmarks.variants import Contender
from deqfuse import testing

SEED = 1
STANDARD_ERRORS = 5.0  # of the probes' mean and mean square: once in a million seeds


def expected(
    problem: Problem,
    truth: Truth,
    probes: Tensor,  # (N + 1, B, d)
) -> tuple[float, dict[str, Tensor]]:
    """``sum_b |J_bb^T v|^2 / (B (N + 1) d)`` at a constant equilibrium, and its gradients."""
    twin = problem.double()
    layer = twin.layer
    features = [x.detach().requires_grad_() for x in twin.features]
    x, x_fuse = testing.naive_injections(layer, features)
    leaves = dict(layer.named_parameters()) | {f"features[{i}]": t for i, t in enumerate(features)}
    total = torch.zeros((), dtype=torch.float64, device=probes.device)
    for b, v in enumerate(probes.double()):
        last = b == problem.case.modalities
        z = (truth.z if last else truth.cells[b]).detach().requires_grad_()
        if last:
            assert layer.combine is not None
            image = testing.naive_combine(layer.combine, z, list(truth.cells), x_fuse)
        else:
            image = testing.naive_cell(layer.cells[b], z, x[:, b])  # type: ignore[arg-type]
        (pulled,) = torch.autograd.grad(image, z, v, create_graph=True)
        total = total + pulled.square().sum() / probes.numel()
    found = torch.autograd.grad(
        total, list(leaves.values()), allow_unused=True, materialize_grads=True
    )
    return float(total.detach()), dict(zip(leaves, found, strict=True))


def judge_penalty(
    problem: Problem, contender: Contender, truth: Truth, verdict: Verdict
) -> Verdict:
    """Whether a contender that passed the gate may be timed with the penalty.

    Output and penalty of the step that is timed, and the gradients of both, each by itself, have
    the limits that the gate has for a training step's, but for the penalty's gradient as a whole.

    Args:
        verdict: of the gate, without the penalty; what is found is added to it.
    """
    assert contender.penalized is not None
    leaves = problem.leaves()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        probes = contender.penalized.probes()
        torch.manual_seed(SEED)
        z, penalty = contender.penalized.run(problem.features)

    def errors(output: Tensor, grad: Tensor | None, right: dict[str, Tensor]) -> Any:
        found = torch.autograd.grad(
            output, list(leaves.values()), grad,
            retain_graph=True, allow_unused=True, materialize_grads=True,
        )  # fmt: skip
        return gradient_errors(dict(zip(leaves, found, strict=True)), right)

    value, gradients = expected(problem, truth, probes)
    off = abs(float(penalty.detach()) - value) / value
    off_output = row_error(z.detach(), truth.z)
    worst, leaf, whole = errors(penalty, None, gradients)
    worst_output, leaf_output, whole_output = errors(z, problem.cotangent, truth.gradients)
    limits, kinks = Limits.at(problem.case.tol), math.sqrt(problem.case.tol)
    reason = None
    if not _gaussian(probes):
        reason = "penalty: its probes are no Gaussian ones of unit variance"
    elif not off <= limits.fused:
        reason = f"penalty off by {off:.1e}, above {limits.fused:g}"
    elif not worst <= LEAF_ERROR:
        reason = f"penalty: gradient of {leaf} off by {worst:.1e}, above {LEAF_ERROR:g}"
    elif not whole <= kinks:
        reason = f"penalty: gradient off by {whole:.1e} as a whole, above {kinks:g}"
    elif not off_output <= limits.fused:
        reason = f"with penalty: output off by {off_output:.1e}, above {limits.fused:g}"
    elif not worst_output <= LEAF_ERROR or not whole_output <= limits.gradient:
        reason = (
            f"with penalty: gradient of the output off by {whole_output:.1e} as a whole and "
            f"{worst_output:.1e} at {leaf_output}, above {limits.gradient:g} or {LEAF_ERROR:g}"
        )
    return dataclasses.replace(
        verdict, reason=reason, penalty_error=off, penalty_gradient_error=whole
    )


def _gaussian(probes: Tensor) -> bool:
    """Mean and mean square, whose standard errors are 1 and sqrt(2) over the root of the count."""
    limit = STANDARD_ERRORS / math.sqrt(probes.numel())
    drawn = probes.double()
    square = abs(float(drawn.square().mean()) - 1)
    return abs(float(drawn.mean())) <= limit and square <= math.sqrt(2) * limit
