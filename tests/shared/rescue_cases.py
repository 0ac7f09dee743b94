"""Rows that Anderson leaves, as problems for the tests of their rescue."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from deqfuse import Anderson, DEQFusion
from deqfuse.backends import cpu, reference
from deqfuse.backends.maps import (
    VARIANTS,
    CellParams,
    FuseParams,
    gate_constant,
    purify_combine,
    residual_cell,
)
from deqfuse.backends.problem import Solved
from deqfuse.outcome import left_behind


@dataclass(frozen=True)
class Hard:
    """A layer at torch's initialisation, where many rows are beyond Anderson's reach."""

    dim: int = 16
    n: int = 3
    groups: int = 4
    rows: int = 48
    variant: str = "paper"
    masked: bool = False
    dtype: torch.dtype = torch.float64
    tol: float = 1e-6
    seed: int = 0
    scale: float = 0.3

    def blocks(self) -> dict[str, Block]:
        """The cells, and a fuse step behind random cells."""
        torch.manual_seed(self.seed)
        layer = DEQFusion(
            self.dim, self.n, num_groups=self.groups, variant=self.variant, init="torch"
        )
        layer = layer.to(self.dtype).requires_grad_(False)
        x = self.scale * torch.randn(self.n, self.rows, self.dim, dtype=torch.float64)
        cell_sum = self.n**0.5 * torch.randn(self.rows, self.dim, dtype=torch.float64)
        mask = 1.25 * (torch.rand(self.rows, self.dim, dtype=torch.float64) < 0.8)
        x, cell_sum, mask = (t.to(self.dtype) for t in (x, cell_sum, mask))
        rest = (self.groups, VARIANTS[self.variant])
        cells = [t for cell in layer.cells for t in cell.flat()]
        drop = mask if self.masked else None
        return {
            "cells": Block("cells", self, (x, cells), (None,), rest),
            "fuse": Block(
                "fuse", self, (x.sum(0), cell_sum, layer.combine.flat(), drop), (None,),
                (self.n, *rest),
            ),
        }  # fmt: skip


@dataclass(frozen=True)
class Block:
    """One of the two solves: what it is given before and after the start z0."""

    kind: str
    case: Hard
    before: tuple[Any, ...]
    start: tuple[None]
    after: tuple[Any, ...]

    def found(self) -> Solved:
        """What Anderson leaves."""
        return self.solved(cpu, rescue=False)

    def rescued(self, backend: ModuleType = cpu, max_jacobians: int = 10_000) -> Solved:
        """The same, with the rows that it leaves solved otherwise."""
        return self.solved(backend, rescue=True, max_jacobians=max_jacobians)

    def solved(self, backend: ModuleType, **options: Any) -> Solved:
        solve = getattr(backend, f"solve_{self.kind}")
        solver = Anderson(tol=self.case.tol, max_iter=40, **options)
        return solve(*self.before, *self.start, *self.after, solver)

    def image(self, z: Tensor) -> Tensor:
        """f(z) by the equations, in the dtype of z."""
        if self.kind == "cells":
            x, flat = self.before
            params = CellParams.stack([p.to(z.dtype) for p in flat])
            return residual_cell(z, x.to(z.dtype), params, *self.after)
        x, cell_sum, flat, mask = self.before
        n, groups, variant = self.after
        params = FuseParams(*(p.to(z.dtype) for p in flat))
        mask = None if mask is None else mask.to(z.dtype)
        constant = gate_constant(cell_sum.to(z.dtype), n, params)
        return purify_combine(z, x.to(z.dtype), constant, mask, n, params, groups, variant)

    def residual(self, z: Tensor) -> Tensor:
        image = self.image(z)
        return (image - z).norm(dim=-1) / (image.norm(dim=-1) + 1e-5)

    def some_rows(self, rows: slice) -> Block:
        """The same with some of the batch's rows."""
        pick = [t[..., rows, :].contiguous() if isinstance(t, Tensor) else t for t in self.before]
        return Block(self.kind, self.case, tuple(pick), self.start, self.after)


def left(found: Solved) -> Tensor:
    return left_behind(found.outcome)


BACKENDS = {"cpu": cpu, "reference": reference}
