"""What a backend is asked, and how it answers."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from deqfuse.solvers.options import GradientOption, SolverOption


class Problem(NamedTuple):
    """What a backend needs to know to accept or refuse a call.

    Attributes:
        device: of the features.
        dtype: of the features, 16-bit ones included.
        dim: features d of a row.
        num_groups: groups of every GroupNorm.
        solver: options of the forward solve.
        adjoint: options of the gradient.
    """

    device: torch.device
    dtype: torch.dtype
    dim: int
    num_groups: int
    solver: SolverOption
    adjoint: GradientOption


class Solved(NamedTuple):
    """Output of a forward solve; the statistics have the shape (...) of ``z`` less its last
    dimension.

    Attributes:
        z: (..., d) equilibria in the compute dtype: (N, B, d) of cells, (B, d) of the fuse step.
        residual: (...) relative residuals, compute dtype.
        nfe: (...) int32, evaluations of the map while the row was active.
        outcome: (...) int8, values of ``Outcome``.
        trace: (max_iter, ...) residual at each step, NaN where a row had stopped; (0, ...) when
            not asked for.
    """

    z: Tensor  # (..., d)
    residual: Tensor  # (...), as the others
    nfe: Tensor
    outcome: Tensor
    trace: Tensor  # (max_iter or 0, ...)


class SolvedLayer(NamedTuple):
    """Output of the solve of a whole layer. Blocks: the N cells, then the fuse step.

    Attributes:
        z: (B, d) the fused equilibrium, in memory of its own.
        states: (N + 1, B, d) all equilibria, compute dtype.
        residual: (N + 1, B) relative residuals, compute dtype.
        nfe: (N + 1, B) int32, evaluations of the map while the row was active.
        outcome: (N + 1, B) int8, values of ``Outcome``.
        trace: (max_iter, N + 1, B) residual at each step; (0, N + 1, B) when not asked for.
        all_converged: True only where the backend has looked, and no row failed.
    """

    z: Tensor  # (B, d)
    states: Tensor  # (N + 1, B, d)
    residual: Tensor  # (N + 1, B), as the others
    nfe: Tensor
    outcome: Tensor
    trace: Tensor  # (max_iter or 0, N + 1, B)
    all_converged: bool = False


class Statistics(NamedTuple):
    """How the linear solve of a backward pass went, per row.

    Attributes:
        residual: (...) relative residual ``|g + J^T u - u| / |g|``; NaN where none was computed.
        nfe: (...) int32, applications of J^T.
        outcome: (...) int8, values of ``Outcome``.
    """

    residual: Tensor
    nfe: Tensor
    outcome: Tensor


class LayerStatistics(NamedTuple):
    """:class:`Statistics` of a whole layer: the N cells, then the fuse step.

    Attributes:
        residual: (N + 1, B) relative residual ``|g + J^T u - u| / |g|``; NaN where none was
            computed.
        nfe: (N + 1, B) int32, applications of J^T.
        outcome: (N + 1, B) int8, values of ``Outcome``.
        all_converged: True only where the backend has looked, and no row failed.
    """

    residual: Tensor
    nfe: Tensor
    outcome: Tensor
    all_converged: bool = False


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """16-bit storage is computed in float32: states and norms never have fewer digits."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
