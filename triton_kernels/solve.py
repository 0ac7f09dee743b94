"""Whole solves: one launch finds the equilibria of all rows of one block kind.

A program owns a tile of whole rows, keeps both weights and the Anderson history at hand, and
iterates until its last row has ended: no other program and no host is asked. For rows of up to
``FUSED_WIDTH`` columns, ``MAX_HISTORY`` residuals and float32 arithmetic. Outcomes, counters and
best iterate as in ``deqfuse.solvers``; a row's answer does not depend on its tile.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from deqfuse.triton_kernels.launch import launch
from deqfuse.triton_kernels.rowmath import constants, precision
from deqfuse.triton_kernels.solve_kernels import _solve_cells_kernel, _solve_fuse_kernel
from deqfuse.triton_kernels.tiles import Knobs, columns, solve_tile


class Answer(NamedTuple):
    """As the operators return it; statistics have the shape of ``z`` less its last dimension."""

    z: Tensor
    residual: Tensor
    nfe: Tensor  # int32
    outcome: Tensor  # int8


def empty_answer(like: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Answer:
    """Results to be written. Nothing is filled, so nothing is launched."""
    rows = shape[:-1]
    return Answer(
        like.new_empty(shape, dtype=dtype),
        like.new_empty(rows, dtype=dtype),
        like.new_empty(rows, dtype=torch.int32),
        like.new_empty(rows, dtype=torch.int8),
    )


def solve_cells(
    x: Tensor,  # (N, B, d)
    packed: Tensor,  # (N * packed_size(d),)
    z0: Tensor | None,  # (N, B, d)
    num_groups: int,
    skip: bool,
    knobs: Knobs,
    present: Tensor | None = None,  # (N, B) bool
) -> Answer:
    """Equilibria of all N residual cells, or of those that are present, in float32: one launch."""
    answer = empty_answer(x, x.shape, torch.float32)
    _launch_cells(x, packed, z0, present, answer, num_groups, skip, knobs)
    return answer


def solve_fuse(
    x_fuse: Tensor,  # (B, d)
    cell_sum: Tensor,  # (B, d)
    params: Sequence[Tensor],  # FuseParams
    mask: Tensor | None,  # (B, d)
    z0: Tensor | None,  # (B, d)
    num_modalities: int,
    num_groups: int,
    relu_last: bool,
    knobs: Knobs,
    counts: Tensor | None = None,  # (B,) float32, rows' own numbers of modalities
) -> Answer:
    """Equilibrium of the purify-then-combine step in float32: one launch."""
    answer = empty_answer(x_fuse, x_fuse.shape, torch.float32)
    operands = (x_fuse, None, None, None, None, counts, cell_sum, mask, z0, *params)
    _launch_fuse(operands, answer, None, num_modalities, num_groups, relu_last, knobs)
    return answer


def solve_layer(
    x: Tensor,  # (N, B, d)
    packed: Tensor,  # (N * packed_size(d),)
    params: Sequence[Tensor],  # FuseParams
    weights: Tensor,  # (N,)
    bias: Tensor | None,  # (1,)
    mask: Tensor | None,  # (B, d)
    z0_fuse: Tensor | None,  # (B, d)
    z0_cells: Tensor | None,  # (N, B, d)
    num_groups: int,
    skip: bool,
    relu_last: bool,
    knobs: Knobs,
    present: Tensor | None = None,  # (N, B) bool
) -> tuple[Tensor, Answer]:
    """Equilibria of all cells, then of the fuse step: two launches, and one that counts.

    Only with ``present`` are a row's modalities counted.

    Returns the fused equilibrium (B, d) and, as one answer, the N cells' and it.
    """
    n, rows, d = x.shape
    both = empty_answer(x, (n + 1, rows, d), torch.float32)
    cells, fuse = Answer(*(t[:n] for t in both)), Answer(*(t[n] for t in both))
    z, cell_sum = torch.empty_like(fuse.z), torch.empty_like(fuse.z)
    _launch_cells(x, packed, z0_cells, present, cells, num_groups, skip, knobs)
    counts = None if present is None else present.sum(0, dtype=torch.float32)
    operands = (x, cells.z, weights, bias, present, counts, cell_sum, mask, z0_fuse, *params)
    _launch_fuse(operands, fuse, z, n, num_groups, relu_last, knobs)
    return z, both


def _launch_cells(
    x: Tensor,
    packed: Tensor,
    z0: Tensor | None,
    present: Tensor | None,
    answer: Answer,
    num_groups: int,
    skip: bool,
    knobs: Knobs,
) -> None:
    n, rows, d = x.shape
    common = _constants(d, num_groups, knobs)
    launch(
        _solve_cells_kernel, (triton.cdiv(rows, common["BM"]), n),
        x, z0, packed, present, *answer,
        rows, knobs.max_iter, knobs.tol, knobs.beta, knobs.lam,
        SKIP=skip, **common,
    )  # fmt: skip


def _launch_fuse(
    operands: Sequence[Tensor | None],
    answer: Answer,
    copy: Tensor | None,
    num_modalities: int,
    num_groups: int,
    relu_last: bool,
    knobs: Knobs,
) -> None:
    rows, d = answer.z.shape
    common = _constants(d, num_groups, knobs)
    launch(
        _solve_fuse_kernel, (triton.cdiv(rows, common["BM"]),),
        *operands, answer.z, copy, *answer[1:],
        rows, num_modalities, knobs.max_iter, knobs.tol, knobs.beta, knobs.lam,
        RELU_LAST=relu_last, **common,
    )  # fmt: skip


def _constants(dim: int, num_groups: int, knobs: Knobs) -> dict[str, Any]:
    """What a solve is compiled for."""
    tensor_cores = precision(torch.float32, knobs.tol) == "tf32"
    tile = solve_tile(columns(dim, num_groups), knobs.m, tensor_cores)
    common = constants(dim, num_groups, torch.float32, tile, knobs.tol)
    return common | {"M": knobs.m, "DAMPED": knobs.beta != 1}
