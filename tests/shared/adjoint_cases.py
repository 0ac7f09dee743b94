"""Adjoints of a layer's blocks that the cuda backend's two ways are compared on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from deqfuse import Anderson, DEQFusion, Implicit
from deqfuse.backends import Backend, reference
from deqfuse.backends.maps import VARIANTS
from deqfuse.solvers.options import GradientOption

DTYPES = {"f64": torch.float64, "f32": torch.float32, "bf16": torch.bfloat16}


@dataclasses.dataclass(frozen=True)
class Case:
    """A layer at its equilibria, with cotangents."""

    rows: int = 5
    dim: int = 12
    groups: int = 2
    n: int = 3
    variant: str = "paper"
    dtype: str = "f64"
    mask: bool = False

    def __str__(self) -> str:
        return ",".join(str(v) for v in dataclasses.astuple(self))

    def arguments(self, adjoint: GradientOption) -> dict[str, tuple]:
        """Of ``adjoint_cells``, ``adjoint_fuse`` and ``adjoint_layer``."""
        torch.manual_seed(self.dim + self.n)
        dtype = DTYPES[self.dtype]
        layer = DEQFusion(self.dim, self.n, num_groups=self.groups, variant=self.variant)
        layer = layer.requires_grad_(False).to(dtype)
        x = torch.randn(self.n, self.rows, self.dim).to(dtype)
        mask = 2 * (torch.rand(self.rows, self.dim) > 0.5).to(dtype) if self.mask else None
        cells = [t for cell in layer.cells for t in cell.flat()]
        fuse, weights = layer.combine.flat(), torch.rand(self.n).to(dtype) + 0.5
        flat = [*cells, *fuse, weights]
        if self.variant != "paper":
            flat.append(torch.tensor([0.1]).to(dtype))
        how = (self.groups, VARIANTS[self.variant])
        tol = 1e-12 if self.dtype == "f64" else 1e-6
        solver = Anderson(tol=tol, max_iter=200)
        found = reference.solve_layer(list(x), flat, mask, None, None, *how, solver)
        states, z = found.states, found.z
        g = torch.randn(self.n, self.rows, self.dim).to(states.dtype)
        rest = (*how, adjoint, True)
        total, x_fuse = states[:-1].sum(0), x.sum(0)
        return {
            "cells": (g, states[:-1], x, cells, *rest),
            "shared": (g[:1].expand_as(g), states[:-1], x, cells, *rest),
            "fuse": (g[0], z, x_fuse, total, fuse, mask, self.n, *rest),
            "layer": (g[0], g, states, list(x), flat, mask, *rest),
        }


def adjoint_of(backend: Backend, kind: str) -> Callable[..., Any]:
    """Its adjoint of a kind of block; "shared" is that of cells with one cotangent for all."""
    blocks = {"cells": backend.cells, "fuse": backend.fuse, "layer": backend.layer}
    return blocks["cells" if kind == "shared" else kind].adjoint


def flatten(found: tuple) -> list[Tensor]:
    """The gradients, without the statistics."""
    return [t for part in found[:-1] for t in (part if isinstance(part, list) else [part])]


def assert_equal(given: tuple, expected: tuple, tol: float) -> None:
    """Each gradient to ``tol`` of its largest entry, or of a thousandth of the largest of all."""
    wanted = flatten(expected)
    floor = 1e-3 * max(float(t.abs().max()) for t in wanted)
    for i, (a, b) in enumerate(zip(flatten(given), wanted, strict=True)):
        assert (a.shape, a.dtype) == (b.shape, b.dtype), i
        error = float((a.double() - b.double()).abs().max())
        assert error <= tol * max(float(b.abs().max()), floor), (i, error)


def exact(case: Case) -> Implicit:
    return Implicit(tol=1e-12 if case.dtype == "f64" else 1e-5, max_iter=200)


CASES = [
    Case(),
    Case(variant="released", mask=True),
    Case(variant="released-mmimdb", n=1, mask=True),
    Case(rows=17, dim=20, groups=5, dtype="f32"),
    Case(dtype="bf16", variant="released"),
]
# Of the largest entry. In 16 bits the gradients are rounded once, from float32 solves.
TOLERANCE = {"f64": 1e-9, "f32": 2e-4, "bf16": 2e-2}
