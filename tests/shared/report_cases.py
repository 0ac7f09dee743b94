"""A map of which some rows do not converge: what reports of failures are tested with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deqfuse import DEQ, Picard


def rotating(slopes: list[float]) -> Any:
    """Rows turned by 90 degrees and stretched: Picard converges for |slope| < 1 only."""
    size = torch.tensor(slopes)[:, None]

    def f(z: Tensor, x: Tensor) -> Tensor:
        return size * torch.stack([-z[:, 1], z[:, 0]], 1) + x

    return f


X = torch.tensor([[1.0, 2.0], [3.0, -1.0], [0.5, 0.5]])
START = torch.zeros(3, 2)
SLOPES = [0.1, 1.0, 2.0]  # the first row converges


def failing(on_failure: str, **options: Any) -> DEQ:
    solver = Picard(tol=1e-3, max_iter=12)
    return DEQ(rotating(SLOPES), **{"solver": solver, "on_failure": on_failure, **options})
