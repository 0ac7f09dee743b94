"""What a backend is asked."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from deqfuse.solvers.options import GradientOption, SolverOption


@dataclass(frozen=True)
class Problem:
    """What a backend needs to know to accept or refuse a call."""

    device: torch.device
    dtype: torch.dtype
    dim: int
    num_groups: int
    solver: SolverOption
    adjoint: GradientOption
