"""Cells and injections of a user's own, for layers of three modalities."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from deqfuse import Anderson, DEQFusion, Implicit

DIM, N, T = 8, 3, 4
TIGHT: dict[str, Any] = {
    "solver": Anderson(tol=1e-12, max_iter=300),
    "adjoint": Implicit(tol=1e-12, max_iter=300),
}


class TanhCell(nn.Module):
    """``tanh(W z + x)``, row by row, |W| = gain."""

    def __init__(self, gain: float = 0.6, dim: int = DIM) -> None:
        super().__init__()
        self.linear, self.gain = nn.Linear(dim, dim), gain
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.linear.reset_parameters()
        with torch.no_grad():
            weight = self.linear.weight
            weight *= self.gain / torch.linalg.matrix_norm(weight, 2)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(z) + x)


class AttentionCell(nn.Module):
    """Positions of a sample that attend to each other, (R, T, d)."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(DIM, 2, batch_first=True)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return 0.5 * torch.tanh(self.attention(z, z, z, need_weights=False)[0] + x)


class ConvCell(nn.Module):
    """1x1 convolutions over (R, T, d) with a GroupNorm over all T positions of a sample."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv1d(DIM, DIM, 1), nn.Conv1d(DIM, DIM, 1)
        self.norm = nn.GroupNorm(2, DIM)
        with torch.no_grad():
            self.conv2.weight *= 0.3

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        z, x = z.mT, x.mT
        return torch.relu(self.conv2(self.norm(self.conv1(z) + x))).mT


class ScaleCell(nn.Module):
    """``a z + x``: J = a I."""

    def __init__(self, a: float) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(a))

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return self.a * z + x


class JointInjection(nn.Module):
    """``tanh(W [x_1 .. x_N])``, and with T positions the mean over them beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(N * DIM, DIM)

    def forward(self, xs: list[Tensor]) -> Tensor:
        h = torch.tanh(self.linear(torch.cat(xs, -1)))
        return h + h.mean(1, keepdim=True) if h.dim() == 3 else h


# Cells of modalities 0 and 2, and how many dimensions they see at once.
KINDS: dict[str, tuple[type[nn.Module], int]] = {
    "tanh": (TanhCell, 1),
    "attention": (AttentionCell, 2),
    "convolution": (ConvCell, 2),
}


def layer_of(kind: str = "tanh", **options: Any) -> DEQFusion:
    """A float64 layer whose middle cell is its own."""
    torch.manual_seed(0)
    make, dims = KINDS[kind]
    options = {"cells": [make(), None, make()], "cell_dims": dims, "num_groups": 2, **options}
    return DEQFusion(DIM, N, **options).double()


def features(kind: str = "tanh", rows: int = 5, width: int = DIM) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = (rows, T, width) if KINDS[kind][1] == 2 else (rows, width)
    return [torch.randn(shape, dtype=torch.float64, generator=generator) for _ in range(N)]
