"""The floor: matrix products that a solve cannot do without, over the rate of this machine.

Products only. Norms, history and packing are not in the floor, so no real solve reaches it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from benchmarks import cases
from benchmarks.cases import Case, Problem
from benchmarks.timing import now
from benchmarks.variants import Answer, fastest_backend
from deqfuse import DEQFusion, Implicit, Picard
from deqfuse.backends import reference
from deqfuse.backends.maps import PAPER

KERNEL_CASE = Case("kernel", 1024, 2, 512)  # where our kernel's rate is measured for the peak


def forward_flops(case: Case, answer: Answer) -> float:
    """Of the evaluations that were made, per row and block, 2 products of 2 d^2 each.

    The first evaluation, from z0 = 0, needs no product with a row. The gate's constant is one more
    product per row.
    """
    evaluations = float((answer.nfe_cells.double() - 1).clamp_min(0).sum())
    evaluations += float((answer.nfe_fuse.double() - 1).clamp_min(0).sum())
    return case.dim**2 * (4 * evaluations + 2 * case.rows)


def joint_flops(case: Case, nfe: float) -> float:
    """Of a joint solver without the collapsed gate: per evaluation 3 N + 1 products per row."""
    return 2 * case.dim**2 * case.rows * (3 * case.modalities + 1) * nfe


def backward_flops(problem: Problem, answer: Answer, tol: float) -> float:
    """Linearise once, apply J^T as often as GMRES must, one VJP, the weight gradients.

    Of all linear solvers that were tried full GMRES needs the fewest applications; it is counted on
    the reference path, per row and block, to ``tol``.
    """
    case, layer = problem.case, problem.layer
    assert layer.combine is not None
    adjoint = Implicit(solver="gmres", tol=tol)
    cells, z = answer.cells.detach().contiguous(), answer.z.detach()
    x = torch.stack([f.detach() for f in problem.features])
    x_fuse = (layer.modality_weights[:, None, None].detach() * x).sum(0)
    groups = case.num_groups
    with torch.no_grad():
        _, d_sum, _, fuse = reference.adjoint_fuse(
            problem.cotangent, z, x_fuse, cells.sum(0), layer.combine.flat(), None,
            case.modalities, groups, PAPER, adjoint, False,
        )  # fmt: skip
        flat = [t for cell in layer.cells for t in cell.flat()]  # type: ignore[operator]
        grad = d_sum.expand_as(cells).contiguous()
        _, _, own = reference.adjoint_cells(grad, cells, x, flat, groups, PAPER, adjoint, False)
    applications = float(fuse.nfe.sum() + own.nfe.sum())
    rows = case.rows
    # Per row: 4 d^2 to linearise and 4 d^2 of weight gradients in every block; the VJP goes back
    # through one product in a cell (to W1's output) and through two in the fuse map (to S).
    rest = (case.modalities + 1) * rows * 8 + case.modalities * rows * 2 + rows * 4
    return case.dim**2 * (4 * applications + rest)


def penalty_flops(case: Case) -> float:
    """Of the Jacobian penalty with one probe at an equilibrium: 11 products per row and block.

    Two to linearise, two for J^T v, two back along the same way, one back through the evaluation;
    two matrices have a gradient each by J^T v and by the evaluation: four products over all rows.
    """
    return 22 * case.dim**2 * case.rows * (case.modalities + 1)


def least_bytes(case: Case) -> float:
    """Weights once, inputs once, answers once, in float32."""
    weights = (2 * case.modalities + 2) * case.dim**2
    rows = (2 * case.modalities + 1) * case.rows * case.dim
    return 4.0 * (weights + rows)


def best_seconds(call: Callable[[], object], budget: float = 0.4) -> float:
    """The fastest of as many calls as fit."""
    device = torch.device(cases.DEVICE)
    call()
    best, end = float("inf"), now(device) + budget
    while (start := now(device)) < end:
        call()
        best = min(best, now(device) - start)
    return best


@torch.no_grad()
def linear_rate(rows: int, dim: int, budget: float = 0.4) -> float:
    """Flops per second of ``F.linear`` (rows, dim) x (dim, dim) in float32."""
    with torch.device(cases.DEVICE):
        x, w, b = torch.randn(rows, dim), torch.randn(dim, dim), torch.randn(dim)
    return 2 * rows * dim**2 / best_seconds(lambda: F.linear(x, w, b), budget)


@torch.no_grad()
def onednn_rate(size: int) -> float:
    """The same through oneDNN with a packed weight."""
    x, w = torch.randn(size, size).to_mkldnn(), torch.randn(size, size)
    packed, bias = w.to_mkldnn(), torch.randn(size).to_mkldnn()
    return 2 * size**3 / best_seconds(lambda: F.linear(x, packed, bias))


@torch.no_grad()
def kernel_rate(case: Case = KERNEL_CASE, budget: float = 0.4, evaluations: int = 12) -> float:
    """Of our own micro-kernel, in plain iterations: norms are timed but not counted."""
    with torch.device(cases.DEVICE):
        features = [torch.randn(case.rows, case.dim) for _ in range(case.modalities)]
    layer = DEQFusion(
        case.dim,
        case.modalities,
        num_groups=case.num_groups,
        solver=Picard(tol=1e-30, max_iter=evaluations),
        injection_norm=False,  # its time would be counted
        on_failure="ignore",
        backend=fastest_backend().removeprefix("deqfuse-"),
    ).to(cases.DEVICE)
    with torch.no_grad():
        _, info = layer(features, return_info=True)
    # What was made, not what was asked for: a row may stall before.
    flops = forward_flops(case, Answer(info.fuse.nfe, info.fuse.nfe, info.cells.nfe, info.fuse.nfe))
    return flops / best_seconds(lambda: layer(features), budget)


def matmul_rates() -> dict[str, float]:
    """Every way to multiply float32 matrices that this machine has, flops per second."""
    rates = {f"F.linear, {size} square": linear_rate(size, size) for size in (1024, 2048)}
    if cases.DEVICE == "cpu" and torch.backends.mkldnn.is_available():
        rates |= {f"oneDNN, {size} square": onednn_rate(size) for size in (1024, 2048)}
    rates["deqfuse kernel, in a solve"] = kernel_rate()
    return rates


def bandwidth(bytes_moved: int = 3 * 2**28) -> float:
    """Bytes per second of ``a = b + c`` on arrays that no cache holds."""
    n = bytes_moved // 12
    with torch.device(cases.DEVICE):
        b, c, a = torch.ones(n), torch.ones(n), torch.empty(n)
    seconds = best_seconds(lambda: torch.add(b, c, out=a))
    return bytes_moved / seconds
