"""Maps whose fixed points are known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from deqfuse import ResidualCell
from deqfuse.solvers.rows import Solution

# Part of the contract, therefore not imported.
FLOOR = 1e-5  # in the residual's denominator
STALL_STEPS = 20


@dataclass
class Affine:
    """``f(z) = M z + c`` per row, with its exact fixed point."""

    matrix: Tensor  # (R, n, n)
    constant: Tensor  # (R, n)

    def __call__(self, z: Tensor) -> Tensor:
        return torch.einsum("rij,rj->ri", self.matrix, z) + self.constant

    @property
    def solution(self) -> Tensor:
        eye = torch.eye(self.constant.shape[1], dtype=self.constant.dtype)
        pairs = zip(self.matrix, self.constant, strict=True)
        return torch.stack([torch.linalg.solve(eye - m, c) for m, c in pairs])

    def error_bound(self, found: Solution) -> Tensor:
        """Largest possible ``|z - z*|`` of the returned ``z = f(best)``, given its residual.

        ``f(b) - z* = -M (I - M)^-1 (f(b) - b)`` and ``|f(b) - b| = residual (|f(b)| + 1e-5)``.
        """
        eye = torch.eye(self.constant.shape[1], dtype=self.constant.dtype)
        gain = torch.stack(
            [torch.linalg.matrix_norm(m @ torch.inverse(eye - m), 2) for m in self.matrix]
        )
        rounding = 100 * torch.finfo(self.constant.dtype).eps * (1 + gain)
        return (gain * found.residual + rounding) * (found.z.norm(dim=1) + FLOOR)


def affine(radius: float, rows: int = 9, n: int = 6, dtype: torch.dtype = torch.float64) -> Affine:
    """Random dense matrices whose spectral radius is exactly ``radius``."""
    gen = torch.Generator().manual_seed(7)
    matrix = torch.randn(rows, n, n, generator=gen, dtype=torch.float64)
    matrix *= radius / torch.linalg.eigvals(matrix).abs().amax(1)[:, None, None]
    return Affine(
        matrix.to(dtype), torch.randn(rows, n, generator=gen, dtype=torch.float64).to(dtype)
    )


def rotation(radius: float = 0.995, rows: int = 5, dtype: torch.dtype = torch.float64) -> Affine:
    """Three planes turned by different angles: complex eigenvalues of modulus ``radius``."""
    angles = torch.linspace(0.3, 2.9, 3, dtype=torch.float64)
    blocks = [torch.stack([a.cos(), -a.sin(), a.sin(), a.cos()]).view(2, 2) for a in angles]
    matrix = (radius * torch.block_diag(*blocks)).expand(rows, 6, 6)
    gen = torch.Generator().manual_seed(3)
    return Affine(
        matrix.to(dtype), torch.randn(rows, 6, generator=gen, dtype=torch.float64).to(dtype)
    )


def cell_at_torch_init(rows: int = 16, dim: int = 32) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    torch.manual_seed(11)
    cell = ResidualCell(dim, init="torch").double().requires_grad_(False)
    x = torch.randn(rows, dim, dtype=torch.float64)
    return lambda z: cell(z, x), torch.zeros_like(x)


ids = lambda option: repr(option)  # noqa: E731
