"""Rows of the layer that a solve left behind, by continuation in plain PyTorch on any device.

The path is followed in float64 whatever the storage; an answer is judged as it is stored.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from deqfuse.backends.maps import CellParams, Variant
from deqfuse.backends.problem import Solved
from deqfuse.backends.row_maps import cells_on_rows, fuse_on_rows
from deqfuse.outcome import left_behind
from deqfuse.solvers.anderson import Anderson
from deqfuse.solvers.derivatives import Linearize, Map, columns_of
from deqfuse.solvers.rows import Solution
from deqfuse.solvers.solve import rescue

MakeRows = Callable[[Tensor, torch.dtype], tuple[Map, Linearize]]  # rows (R,) int64, dtype


def rescue_cells(
    found: Solved,
    x: Tensor,  # (N, B, d)
    flat_params: list[Tensor],
    num_groups: int,
    variant: Variant,
    solver: Anderson,
) -> Solved:
    """``found`` with the rows that were left behind solved by continuation, where that succeeds."""
    blocks: list[Solution | None] = []
    size = len(CellParams._fields)
    for i in range(x.shape[0]):

        def make(rows: Tensor, dtype: torch.dtype, i: int = i) -> tuple[Map, Linearize]:
            params = [p.to(dtype) for p in flat_params[size * i : size * (i + 1)]]
            return cells_on_rows(x[i : i + 1, rows].to(dtype), params, num_groups, variant)

        own = Solution(found.z[i], found.residual[i], found.nfe[i], found.outcome[i])
        blocks.append(_mended(own, make, solver))
    if all(block is None for block in blocks):
        return found
    z, residual, nfe, outcome = (t.clone() for t in found[:4])
    for i, block in enumerate(blocks):
        if block is not None:
            z[i], residual[i], nfe[i], outcome[i] = (
                block.z, block.residual, block.nfe, block.outcome,
            )  # fmt: skip
    return Solved(z, residual, nfe, outcome, found.trace)


def rescue_fuse(
    found: Solved,
    x_fuse: Tensor,  # (B, d)
    cell_sum: Tensor,  # (B, d)
    flat_params: list[Tensor],
    mask: Tensor | None,  # (B, d)
    num_modalities: int,
    num_groups: int,
    variant: Variant,
    solver: Anderson,
) -> Solved:
    """``found`` with the rows that were left behind solved by continuation, where that succeeds."""

    def make(rows: Tensor, dtype: torch.dtype) -> tuple[Map, Linearize]:
        x, total = x_fuse[rows].to(dtype), cell_sum[rows].to(dtype)
        factors = None if mask is None else mask[rows].to(dtype)
        params = [p.to(dtype) for p in flat_params]
        return fuse_on_rows(x, total, params, factors, num_modalities, num_groups, variant)

    block = _mended(Solution(*found[:4]), make, solver)
    if block is None:
        return found
    return Solved(block.z, block.residual, block.nfe, block.outcome, found.trace)


def _mended(block: Solution, make: MakeRows, solver: Anderson) -> Solution | None:
    """The block (B, d) with its rows mended; None where none was left behind."""
    rows = torch.nonzero(left_behind(block.outcome)).flatten()
    if rows.numel() == 0:
        return None
    some = Solution(block.z[rows], block.residual[rows], block.nfe[rows], block.outcome[rows])
    forms = {dtype: make(rows, dtype) for dtype in {some.z.dtype, torch.float64}}

    def jacobian(z: Tensor, asked: list[int]) -> Tensor:
        _, linearize = make(rows[asked], torch.float64)
        return columns_of(linearize)(z[asked], list(range(len(asked))))

    mended = rescue(lambda z: forms[z.dtype][0](z), solver, some, jacobian)
    z, residual, nfe, outcome = (
        t.clone() for t in (block.z, block.residual, block.nfe, block.outcome)
    )
    z[rows], residual[rows], nfe[rows], outcome[rows] = (
        mended.z, mended.residual, mended.nfe, mended.outcome,
    )  # fmt: skip
    return Solution(z, residual, nfe, outcome)
