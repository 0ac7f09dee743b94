"""What a backend is asked, and how it answers."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from deqfuse.solvers.options import GradientOption, SolverOption


class Problem(NamedTuple):
    """What a backend needs to know to accept or refuse a call."""

    device: torch.device
    dtype: torch.dtype
    dim: int
    num_groups: int
    solver: SolverOption
    adjoint: GradientOption


class Solved(NamedTuple):
    """Output of a forward solve; the statistics have the shape of ``z`` less its last dimension."""

    z: Tensor  # compute dtype
    residual: Tensor
    nfe: Tensor  # int32
    outcome: Tensor  # int8
    trace: Tensor  # (trace_length, ...) padded with NaN at the end; (0, ...) when not asked for


class SolvedLayer(NamedTuple):
    """Output of the solve of a whole layer. Blocks: the N cells, then the fuse step."""

    z: Tensor  # (B, d) the fused equilibrium, in memory of its own
    states: Tensor  # (N + 1, B, d) all equilibria, compute dtype
    residual: Tensor  # (N + 1, B), as the others
    nfe: Tensor
    outcome: Tensor
    trace: Tensor  # (trace_length or 0, N + 1, B)
    all_converged: bool = False  # True only where the backend has looked, and no row failed


class Statistics(NamedTuple):
    """How the linear solve of a backward pass went, per row."""

    residual: Tensor
    nfe: Tensor
    outcome: Tensor


class LayerStatistics(NamedTuple):
    """:class:`Statistics` of a whole layer, (N + 1, B)."""

    residual: Tensor
    nfe: Tensor
    outcome: Tensor
    all_converged: bool = False  # as in SolvedLayer


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """16-bit storage is computed in float32: states and norms never have fewer digits."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
