"""The whole layer from a backend's two blocks, for backends without a kernel for all of it.

The parameters of a layer travel as one list: ten for each of the N cells, the six of the fuse step,
``modality_weights`` (N,) and, in the released variants, ``injection_bias`` (1,).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deqfuse.backends.maps import CellParams, FuseParams, Variant
from deqfuse.backends.problem import LayerStatistics, Solved, SolvedLayer, compute_dtype
from deqfuse.solvers.anderson import Anderson
from deqfuse.solvers.options import GradientOption, SolverOption


class LayerParams(NamedTuple):
    """The parts of the list in which a layer's parameters travel.

    Attributes:
        cells: N * 10 tensors, (d, d) or (d,) each, in the order of ``CellParams``, cell after cell.
        fuse: six tensors, (d, d) or (d,) each, in the order of ``FuseParams``.
        weights: (N,) weights w_i of the injection x_f.
        bias: (1,) of x_f; None in the variant "paper".
    """

    cells: list[Tensor]
    fuse: list[Tensor]
    weights: Tensor  # (N,)
    bias: Tensor | None  # (1,)

    @classmethod
    def split(cls, flat: list[Tensor], num_modalities: int) -> LayerParams:
        """The parts of ``flat``.

        Args:
            flat: the list, tensors of (d, d), (d,), (N,) and perhaps (1,).
            num_modalities: N.

        Returns:
            The same tensors, by what they belong to.
        """
        cells = num_modalities * len(CellParams._fields)
        fuse = cells + len(FuseParams._fields)
        bias = flat[fuse + 1] if len(flat) > fuse + 1 else None
        return cls(list(flat[:cells]), list(flat[cells:fuse]), flat[fuse], bias)


def fuse_injection(x: Tensor, weights: Tensor, bias: Tensor | None) -> Tensor:
    """``x_f = sum_i w_i x_i (+ bias)``: (B, d) from (N, B, d), in the compute dtype."""
    x_fuse = (weights[:, None, None] * x.to(compute_dtype(x.dtype))).sum(0)
    return x_fuse if bias is None else x_fuse + bias


def solve(
    solve_cells: Callable[..., Solved],
    solve_fuse: Callable[..., Solved],
    x: list[Tensor],  # N tensors (B, d)
    flat_params: list[Tensor],
    mask: Tensor | None,  # (B, d)
    z0_fuse: Tensor | None,  # (B, d)
    z0_cells: Tensor | None,  # (N, B, d)
    num_groups: int,
    variant: Variant,
    solver: SolverOption,
) -> SolvedLayer:
    """The cells first, then the fuse step with their equilibria held fixed.

    Args:
        solve_cells: a backend's launcher, as ``reference.solve_cells``.
        solve_fuse: a backend's launcher, as ``reference.solve_fuse``.
        x: N tensors (B, d), the injections.
        flat_params: the list that :class:`LayerParams` splits, tensors of (d, d), (d,), (N,), (1,).
        mask: (B, d) dropout factors on W_f's output, or None.
        z0_fuse: (B, d) start of the fuse step, or None for zero.
        z0_cells: (N, B, d) start of the cells, or None for zero.
        num_groups: groups of every GroupNorm.
        variant: the paper's equations or the released ones.
        solver: options of the forward solve.

    Returns:
        Equilibria (N + 1, B, d) and statistics (N + 1, B).
    """
    stacked, params = torch.stack(list(x)), LayerParams.split(flat_params, len(x))
    cells = solve_cells(stacked, params.cells, z0_cells, num_groups, variant, solver)
    x_fuse = fuse_injection(stacked, params.weights, params.bias)
    fuse = solve_fuse(
        x_fuse, cells.z.sum(0), params.fuse, mask, z0_fuse, len(x), num_groups, variant, solver
    )
    states, residual, nfe, outcome = (
        torch.cat([c, f[None]]) for c, f in zip(cells[:4], fuse[:4], strict=True)
    )
    trace = torch.cat([cells.trace, fuse.trace[:, None]], 1)
    return SolvedLayer(fuse.z, states, residual, nfe, outcome, trace)


def rescued(
    found: SolvedLayer,
    rescue_cells: Callable[..., Solved],
    solve_fuse: Callable[..., Solved],
    rescue_fuse: Callable[..., Solved],
    x: list[Tensor],  # N tensors (B, d)
    flat_params: list[Tensor],
    mask: Tensor | None,  # (B, d)
    z0_fuse: Tensor | None,  # (B, d)
    num_groups: int,
    variant: Variant,
    solver: Anderson,
) -> SolvedLayer:
    """The layer with its left rows solved by continuation: the cells', then the fuse step's.

    The fuse step of a row one of whose cells has another answer now is solved anew.

    Args:
        found: what a solve of all blocks at once found.
        rescue_cells, rescue_fuse: (found, arguments of the solve without its start) -> Solved.
        solve_fuse: a backend's launcher, as ``reference.solve_fuse``.
        x, flat_params, mask, z0_fuse, num_groups, variant, solver: as in :func:`solve`.

    Returns:
        Equilibria (N + 1, B, d) and statistics (N + 1, B).
    """
    stacked, params = torch.stack(list(x)), LayerParams.split(flat_params, len(x))
    cells, fuse = (
        Solved(*(t[at].clone() for t in found[1:5]), trace=found.trace)  # type: ignore[misc]
        for at in (slice(None, -1), -1)
    )
    before = cells.z
    cells = rescue_cells(cells, stacked, params.cells, num_groups, variant, solver)
    x_fuse = fuse_injection(stacked, params.weights, params.bias)
    # One after the other, as in the kernels: sum() adds in an order that depends on the shape.
    cell_sum = functools.reduce(torch.add, cells.z.unbind())
    again = torch.nonzero(((cells.z - before).abs() > 0).any(-1).any(0)).flatten()
    if again.numel():
        some = [None if t is None else t[again] for t in (x_fuse, cell_sum, mask, z0_fuse)]
        plain = dataclasses.replace(solver, rescue=False)  # they have theirs with the others
        once_more = solve_fuse(
            *some[:2], params.fuse, *some[2:], len(x), num_groups, variant, plain
        )
        for t, new in zip(fuse[:4], once_more[:4], strict=True):
            t[again] = new
        fuse.nfe[again] += found.nfe[-1][again]
        found.trace[:, -1, again] = once_more.trace
    fuse = rescue_fuse(
        fuse, x_fuse, cell_sum, params.fuse, mask, len(x), num_groups, variant, solver
    )
    states, residual, nfe, outcome = (
        torch.cat([c, f[None]]) for c, f in zip(cells[:4], fuse[:4], strict=True)
    )
    return SolvedLayer(fuse.z, states, residual, nfe, outcome, found.trace)


def adjoint(
    adjoint_cells: Callable[..., Any],
    adjoint_fuse: Callable[..., Any],
    grad_z: Tensor,  # (B, d)
    grad_cells: Tensor | None,  # (N, B, d) from other uses of the cells' equilibria
    states: Tensor,  # (N + 1, B, d)
    x: list[Tensor],  # N tensors (B, d)
    flat_params: list[Tensor],
    mask: Tensor | None,  # (B, d)
    num_groups: int,
    variant: Variant,
    option: GradientOption,
    want_params: bool,
) -> tuple[list[Tensor], list[Tensor], LayerStatistics]:
    """Backwards: the fuse step, then the cells, whose cotangents are its gradient of their sum.

    Args:
        adjoint_cells: a backend's launcher, as ``reference.adjoint_cells``.
        adjoint_fuse: a backend's launcher, as ``reference.adjoint_fuse``.
        grad_z: (B, d) cotangent of the fused equilibrium.
        grad_cells: (N, B, d) cotangents from other uses of the cells' equilibria, or None for zero.
        states: (N + 1, B, d) the equilibria.
        x: N tensors (B, d), the injections.
        flat_params: the list that :class:`LayerParams` splits, tensors of (d, d), (d,), (N,), (1,).
        mask: (B, d) dropout factors on W_f's output, or None.
        num_groups: groups of every GroupNorm.
        variant: the paper's equations or the released ones.
        option: options of the gradient.
        want_params: whether any parameter needs its gradient.

    Returns:
        Gradients (B, d) of the N injections; those of the parameters, each of its shape (...), or
        none of them; statistics (N + 1, B).
    """
    stacked = torch.stack(list(x)).to(states.dtype)
    params = LayerParams.split(flat_params, len(x))
    zs, z = states[:-1], states[-1]
    x_fuse = fuse_injection(stacked, params.weights, params.bias)
    how = (num_groups, variant, option, want_params)
    dx_fuse, dcell_sum, dfuse, fuse = adjoint_fuse(
        grad_z, z, x_fuse, zs.sum(0), params.fuse, mask, len(x), *how
    )
    g = dcell_sum.expand_as(zs) if grad_cells is None else grad_cells + dcell_sum
    dx, dcells, cells = adjoint_cells(g, zs, stacked, params.cells, *how)
    dx = dx + params.weights[:, None, None] * dx_fuse
    grads = [*dcells, *dfuse]
    if want_params:
        grads.append((stacked * dx_fuse).sum((1, 2)).to(params.weights.dtype))
        if params.bias is not None:
            grads.append(dx_fuse.sum().to(params.bias.dtype).reshape(params.bias.shape))
    residual, nfe, outcome = (torch.cat([c, f[None]]) for c, f in zip(cells, fuse, strict=True))
    own = [d.to(t.dtype, copy=True) for d, t in zip(dx, x, strict=True)]  # results do not alias
    return own, grads, LayerStatistics(residual, nfe, outcome)
