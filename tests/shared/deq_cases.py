"""A small map and its dense implicit gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from deqfuse import (
    Anderson,
    Implicit,
)

TIGHT = Anderson(tol=1e-12, max_iter=200)
EXACT = Implicit(tol=1e-12, max_iter=200)
B, N = 4, 5
ids = repr


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Map(nn.Module):
    """``tanh(W z + scale * x + b)`` with |W| = gain; a contraction for gain < 1."""

    def __init__(self, gain: float = 0.7) -> None:
        super().__init__()
        weight = randn(N, N, seed=1)
        self.weight = nn.Parameter(gain * weight / torch.linalg.matrix_norm(weight, 2))
        self.bias = nn.Parameter(randn(N, seed=2))

    def forward(self, z: Tensor, x: Tensor, scale: Tensor | float = 1.0) -> Tensor:
        return torch.tanh(z @ self.weight.mT + scale * x + self.bias)


def dense_gradients(
    f: Callable[[Tensor], Tensor],
    z_star: Tensor,  # (B, n)
    wanted: list[Tensor],
    g: Tensor,  # (B, n)
) -> list[Tensor]:
    """Implicit gradients by factorising ``I - J`` of every row."""
    jacobian = torch.func.jacrev(lambda z: f(z).sum(0))(z_star).movedim(0, 1).detach()
    eye = torch.eye(z_star.shape[1], dtype=z_star.dtype)
    u = torch.stack(
        [torch.linalg.solve((eye - j).mT, row) for j, row in zip(jacobian, g, strict=True)]
    )
    with torch.enable_grad():
        return list(torch.autograd.grad(f(z_star.detach()), wanted, u, materialize_grads=True))


def assert_gradients(found: list[Tensor], expected: list[Tensor], tol: float = 1e-8) -> None:
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max() <= tol * max(1.0, float(b.abs().max()))
