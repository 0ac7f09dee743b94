"""Adjoints on NVIDIA GPUs: the CUDA library, or, without it, Triton's VJPs under the Krylov loop.

The library solves each block in one launch (docs/explanation/kernels-gpu-adjoint.md). Where it is
missing, and for solvers that it does not know, the reference's linear solvers apply the step
kernels' VJP.
"""

from __future__ import annotations

import functools
import logging
import math
from typing import Any

import torch
from torch import Tensor

from deqfuse.backends import cuda_native, layer
from deqfuse.backends.arguments import (
    adjoint_numbers,
    aligned,
    aligned_all,
    like_all,
    prepare,
    prepare_all,
)
from deqfuse.backends.maps import Variant
from deqfuse.backends.presence import only
from deqfuse.backends.problem import LayerStatistics, Statistics
from deqfuse.outcome import Outcome
from deqfuse.solvers.adjoint import solve_adjoint
from deqfuse.solvers.options import GradientOption, Implicit
from deqfuse.solvers.rows import Solution

LIBRARY_SOLVERS = ("auto", "bicgstab", "neumann")

_log = logging.getLogger("deqfuse")
_announced: set[str] = set()


def adjoint_cells(
    grad_z: Tensor,  # (N, B, d)
    z: Tensor,  # (N, B, d)
    x: Tensor,  # (N, B, d)
    flat_params: list[Tensor],
    num_groups: int,
    variant: Variant,
    adjoint: GradientOption,
    want_params: bool,
) -> tuple[Tensor, list[Tensor], Statistics]:
    """Gradients through the cells' equilibria: dx, the parameters', the statistics."""
    skip, params = variant.skip, prepare_all(flat_params, z)
    shared = len(z) > 1 and grad_z.stride(0) == 0  # one cotangent for all: not copied N times
    g = prepare(grad_z[0], z).expand_as(z) if shared else prepare(grad_z, z)
    x_ = prepare(x, z)
    if library_takes(z.device, adjoint):
        dx, grads, *statistics = cuda_native.adjoint_cells(
            g, z, x_, params, want_params, num_groups, skip,
            *adjoint_numbers(adjoint), _allow_tf32(adjoint),
        )  # fmt: skip
        return dx.to(x.dtype), like_all(grads, flat_params), Statistics(*statistics)
    from deqfuse.triton_kernels import cell, cell_vjp

    packed, shape, tol = cell.pack_cells(params), z.shape, _tolerance(adjoint)
    z_, x_ = aligned(z), aligned(x_)

    def vjp(u: Tensor, want: bool = False) -> cell_vjp.CellGradients:
        u = aligned(u.reshape(shape))
        return cell_vjp.residual_cell_vjp(u, z_, x_, packed, num_groups, skip, want, tol)

    with torch.cuda.device_of(z):
        rows = g.reshape(-1, shape[-1])
        solution = solve_adjoint(lambda u: vjp(u).dz.flatten(0, 1), rows, adjoint)
        last = vjp(solution.z, want_params)
    flat = cell.flat_gradients(last.weight1, last.weight2, last.vectors)
    return last.dx.to(x.dtype), like_all(flat, flat_params), _statistics(solution, shape[:-1])


def adjoint_fuse(
    grad_z: Tensor,  # (B, d)
    z: Tensor,  # (B, d)
    x_fuse: Tensor,  # (B, d)
    cell_sum: Tensor,  # (B, d)
    flat_params: list[Tensor],
    mask: Tensor | None,  # (B, d)
    num_modalities: int,
    num_groups: int,
    variant: Variant,
    adjoint: GradientOption,
    want_params: bool,
    counts: Tensor | None = None,  # (B,), dtype of z; rows' own numbers of modalities
) -> tuple[Tensor, Tensor, list[Tensor], Statistics]:
    """Gradients through the fuse equilibrium: dx_fuse, dcell_sum, parameters', statistics."""
    relu_last, params = variant.relu_last, prepare_all(flat_params, z)
    g, x, total, mask = (prepare(t, z) for t in (grad_z, x_fuse, cell_sum, mask))
    if library_takes(z.device, adjoint):
        dx, dcell_sum, grads, *statistics = cuda_native.adjoint_fuse(
            g, z, x, total, params, want_params, mask, num_modalities, num_groups, relu_last,
            *adjoint_numbers(adjoint), _allow_tf32(adjoint), counts,
        )  # fmt: skip
        grads = like_all(grads, flat_params)
        return dx.to(x_fuse.dtype), dcell_sum.to(cell_sum.dtype), grads, Statistics(*statistics)
    from deqfuse.triton_kernels import fuse_vjp

    tol, z_ = _tolerance(adjoint), aligned(z)
    x, total, mask, params = aligned(x), aligned(total), aligned(mask), aligned_all(params)

    def vjp(u: Tensor, want: bool = False) -> fuse_vjp.FuseGradients:
        return fuse_vjp.purify_combine_vjp(
            aligned(u), z_, x, total, mask,
            num_modalities, params, num_groups, relu_last, want, tol, counts,
        )  # fmt: skip

    with torch.cuda.device_of(z):
        solution = solve_adjoint(lambda u: vjp(u).dz, g, adjoint)
        last = vjp(solution.z, want_params)
    grads = like_all(last.params or [], flat_params)
    statistics_ = _statistics(solution, z.shape[:-1])
    return last.dx_fuse.to(x_fuse.dtype), last.dcell_sum.to(cell_sum.dtype), grads, statistics_


def adjoint_layer(*problem: Any) -> tuple[list[Tensor], list[Tensor], LayerStatistics]:
    """Gradients through the layer; arguments as in :func:`deqfuse.backends.layer.adjoint`."""
    return layer.adjoint(adjoint_cells, adjoint_fuse, *problem)


def adjoint_present(
    grad_z: Tensor,  # (B, d)
    grad_cells: Tensor | None,  # (N, B, d)
    states: Tensor,  # (N + 1, B, d)
    x: list[Tensor],  # N tensors (B, d)
    flat_params: list[Tensor],
    mask: Tensor | None,  # (B, d)
    present: Tensor,  # (N, B, 1), bool
    *how: Any,
) -> tuple[list[Tensor], list[Tensor], LayerStatistics]:
    """Gradients through what is present; nothing but a Krylov loop on the host looks at the device.

    Absent cells and empty rows get a cotangent of zero, which is solved before the first step and
    adds nothing to any gradient; their states and features, whatever they hold, become zeros.
    """
    counts = present.sum(0, dtype=states.dtype)
    some = counts > 0
    there = torch.cat([present, some[None]])

    def of_cells(g: Tensor, *rest: Any) -> Any:
        return adjoint_cells(torch.where(present, g, 0.0), *rest)

    dx, grads, (residual, nfe, outcome, _) = layer.adjoint(
        of_cells, functools.partial(adjoint_fuse, counts=counts[:, 0]),
        torch.where(some, grad_z, 0.0), grad_cells, torch.where(there, states, 0.0),
        only(x, present), flat_params, mask, *how,
    )  # fmt: skip
    there = there[..., 0]
    statistics = LayerStatistics(
        torch.where(there, residual, 0.0),
        torch.where(there, nfe, 0),
        torch.where(there, outcome, int(Outcome.CONVERGED)),
    )
    return only(dx, present), grads, statistics


def library_takes(device: torch.device, adjoint: GradientOption) -> bool:
    """Whether the CUDA library serves the device and knows the solver; says once if it does not."""
    missing = cuda_native.device_error(device.index or 0)
    if missing is not None and missing not in _announced:
        _announced.add(missing)
        _log.warning(
            "deqfuse: backward passes on CUDA run on Triton kernels, a launch and more for each "
            "application of J^T: %s. Remedy: DEQFUSE_BUILD=cuda pip install --no-build-isolation .",
            missing,
        )
    known = not isinstance(adjoint, Implicit) or adjoint.solver in LIBRARY_SOLVERS
    return missing is None and known


def _allow_tf32(adjoint: GradientOption) -> bool:
    """torch's switch allows TF32 products, and they can reach the tolerance."""
    from deqfuse.triton_kernels.tiles import TF32_TOL

    switch = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return switch and _tolerance(adjoint) >= TF32_TOL


def _tolerance(adjoint: GradientOption) -> float:
    """What the products have to reach; infinite for gradients that promise no accuracy."""
    return adjoint.tol if isinstance(adjoint, Implicit) else math.inf


def _statistics(solution: Solution, shape: torch.Size) -> Statistics:
    found = (solution.residual, solution.nfe, solution.outcome)
    return Statistics(*(t.view(shape) for t in found))
