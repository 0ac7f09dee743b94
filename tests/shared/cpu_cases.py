"""Problems that the tests of the compiled backend share."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os

import pytest
import torch
from parameters import scatter_norms
from torch import Tensor

from deqfuse import (
    Anderson,
    DEQFusion,
    Outcome,
    Picard,
    functional,
)
from deqfuse.backends import cpu
from deqfuse.backends.maps import VARIANTS
from deqfuse.result import BlockInfo

if (missing := cpu.unavailable()) is not None:
    if os.environ.get("CI", "").lower() == "true":
        pytest.fail(f"CI must test the compiled backend: {missing[0]}", pytrace=False)
    pytest.skip(missing[0], allow_module_level=True)

DTYPES = {
    "f64": torch.float64,
    "f32": torch.float32,
    "bf16": torch.bfloat16,
    "f16": torch.float16,
}
ROWS = (0, 1, 15, 16, 17, 33, 65, 130)
SIZES = ((4, 2), (12, 4), (20, 5), (50, 2), (300, 4), (500, 4))  # (d, groups)
TIGHT, LOOSE = Anderson(tol=1e-11, max_iter=200), Anderson(tol=1e-5)


@dataclasses.dataclass(frozen=True)
class Case:
    rows: int = 17
    dim: int = 12
    groups: int = 2
    n: int = 2
    variant: str = "paper"
    dtype: str = "f64"
    init: str = "contractive"

    def layer(self, **options) -> DEQFusion:
        """Every parameter is away from its initial zeros and ones."""
        torch.manual_seed(1000 * self.dim + self.n)
        given = {"num_groups": self.groups, "variant": self.variant, "init": self.init}
        given |= {"on_failure": "ignore", "injection_norm": False}  # x is what kernels are given
        layer = DEQFusion(self.dim, self.n, **{**given, **options})
        scatter_norms(layer)
        return layer.to(DTYPES[self.dtype])

    def draw(self, *shape: int) -> Tensor:
        return torch.randn(*shape, self.rows, self.dim, dtype=torch.float64).to(DTYPES[self.dtype])

    def blocks(self, mask: bool = False, start: bool = False) -> dict:
        """Both solves, as functions of the solver and the backend."""
        layer = self.layer().requires_grad_(False)
        x, cell_sum = self.draw(self.n), self.n**0.5 * self.draw()
        common = {"num_groups": self.groups, "variant": self.variant, "on_failure": "ignore"}
        drop = 2.0 * (self.draw() > 0).to(x.dtype) if mask else None
        z0 = self.draw(self.n) if start else None
        return {
            "cells": functools.partial(
                functional.solve_cells, x, flat_cells(layer), z0=z0, **common
            ),
            "fuse": functools.partial(
                functional.solve_fuse,
                x.sum(0),
                cell_sum,
                layer.combine.flat(),
                num_modalities=self.n,
                mask=drop,
                z0=None if z0 is None else z0[0],
                **common,
            ),
        }


def flat_cells(layer: DEQFusion) -> list[Tensor]:
    return [t for cell in layer.cells for t in cell.flat()]


def named(cases) -> dict:
    """Parametrisation with the fields that differ from the default as the id."""
    cases, default = list(cases), Case()

    def label(case: Case) -> str:
        fields = dataclasses.asdict(case).items()
        changed = [f"{k}={v}" for k, v in fields if v != getattr(default, k)]
        return ",".join(changed) or "default"

    return {"argvalues": cases, "ids": [label(case) for case in cases]}


def warms_up(solve, solver: Anderson | Picard) -> bool:
    """Whether a solve of the compiled backend begins with plain steps: csrc/cpu/anderson.h."""
    plain = isinstance(solver, Anderson) and solver.beta == 1 and solver.max_iter > 8
    return plain and solver.tol >= 1e-6 and solve.keywords.get("z0") is None


def as_reference(solve, solver) -> tuple[Tensor, BlockInfo]:
    return solve(solver=solver, backend="reference")[:2]


def as_compiled(solve, solver) -> tuple[Tensor, BlockInfo]:
    """What the compiled backend computes, on the reference path: cold starts begin plainly.

    Row by row, until the next evaluation is expected to solve it, while each halves the residual,
    and four evaluations at most.
    """
    if not warms_up(solve, solver):
        return as_reference(solve, solver)
    one = Picard(max_iter=1)
    z, info, _ = solve(solver=one, backend="reference")
    steps, ready = torch.ones_like(info.nfe), ~(info.residual > solver.tol)
    residuals = [info.residual]
    for _ in range(3):
        image, info, _ = solve(solver=one, backend="reference", z0=z)
        steps += ~ready
        residuals.append(torch.where(ready, torch.nan, info.residual))
        rate = residuals[-1] / residuals[-2]
        z = torch.where((ready | ~(rate < 1))[..., None], z, image)
        ready = ready | ~((rate < 0.5) & (rate * residuals[-1] > 1.5 * solver.tol))
    found = None
    for k in steps.unique().tolist():
        left = dataclasses.replace(solver, max_iter=solver.max_iter - k)
        answer, info, _ = solve(solver=left, backend="reference", z0=z)
        trace = None
        if info.trace is not None:
            trace = torch.cat([torch.stack(residuals[:k]), info.trace])
        info = dataclasses.replace(info, nfe=info.nfe + k, trace=trace)
        found = (answer, info) if found is None else _where(steps == k, (answer, info), found)
    assert found is not None or steps.numel() == 0
    return found or as_reference(solve, solver)


def _where(rows: Tensor, a: tuple, b: tuple) -> tuple[Tensor, BlockInfo]:
    fields = {
        name: None if new is None else torch.where(rows, new, getattr(b[1], name))
        for name, new in vars(a[1]).items()
    }
    return torch.where(rows[..., None], a[0], b[0]), BlockInfo(**fields)


def assert_same_solution(
    solve, solver, steps: int | None = 1, share: float = 1.0, wanted=as_compiled
) -> None:
    """Each answer lies within a few of its own residuals of the equilibrium.

    ``|z_a - z_b| <= L / (1 - L) (r_a + r_b) |z|``; the contraction factors L met here are below
    0.8. ``steps`` is by how many evaluations rounding may move the end of a row, ``share`` how many
    of the rows must agree: in float32 rounding decides what becomes of a very slow one. None: the
    counts are another test's.
    """
    z, info, name = solve(solver=solver, backend="cpu")
    expected, reference = wanted(solve, solver)
    assert name == "cpu"
    assert (z.shape, z.dtype) == (expected.shape, expected.dtype)
    for field in ("residual", "nfe", "outcome"):
        ours, theirs = getattr(info, field), getattr(reference, field)
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype), field
    both = (reference.outcome == Outcome.CONVERGED) & (info.outcome == Outcome.CONVERGED)
    # Narrow groups can be all zero after the relu: a few rows of small problems do not converge.
    assert both.sum() >= 0.9 * both.numel()
    assert (info.residual <= solver.tol)[both].all()
    same_end = (info.nfe - reference.nfe).abs() <= (solver.max_iter if steps is None else steps)
    assert (same_end & both).sum() >= share * both.sum()
    limit = 4 * (info.residual + reference.residual) + 64 * torch.finfo(z.dtype).eps
    near = (z - expected).norm(dim=-1) <= limit * expected.norm(dim=-1)
    assert (near & both).sum() >= share * both.sum()


def leaves_of(case: Case) -> tuple[list[Tensor], Tensor]:
    xs = [case.draw().requires_grad_() for _ in range(case.n)]
    return xs, case.draw(case.n + 1)


def assert_equal(given: list[Tensor], expected: list[Tensor]) -> None:
    for i, (a, b) in enumerate(zip(given, expected, strict=True)):
        assert torch.allclose(a, b, rtol=0, atol=0, equal_nan=True), i


FULL = [
    Case(rows, dim, groups, n, variant, dtype)
    for rows, (dim, groups), n, variant, dtype in itertools.product(
        ROWS, SIZES, range(1, 7), VARIANTS, DTYPES
    )
    if rows * dim <= 8500 or n == 2  # the widest problems with every N would add nothing
]
