"""One step of every residual cell (Eq. 8), all modalities in each launch.

    z_i <- GN3(relu(GN2(W2 relu(GN1(W1 z_i + b1)) + b2 + x_i)))

With ``skip``, z_i is added before the last relu.

A kernel is cut into stages of one product each. Where a program holds whole rows, one launch runs
them all and features pass between stages through the program's own rows of a scratch tensor; wider
problems launch each stage, so that more programs share a weight's columns. Parameters travel
packed: per modality the ten tensors of ``CellParams``, one after the other.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment"

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from deqfuse.triton_kernels.launch import launch
from deqfuse.triton_kernels.rowmath import (
    WIDE,
    any_active,
    constants,
    group_norm,
    load_tile,
    load_vector,
    product,
    relu,
    store_tile,
    tile_columns,
    tile_rows,
)
from deqfuse.triton_kernels.tiles import TF32_TOL, stages_of, step_tile

VECTORS = 8  # biases and affine parameters of one cell


def pack_cells(flat_params: Sequence[Tensor]) -> Tensor:
    """``N * 10`` tensors, cell after cell, as one buffer: one launch for N up to 12."""
    return torch.cat([p.reshape(-1) for p in flat_params])


def flat_gradients(
    weight1: Tensor | None,  # (N, d, d)
    weight2: Tensor | None,  # (N, d, d)
    vectors: Tensor | None,  # (N, 8, d): b1, b2, then gamma and beta of the three norms
) -> list[Tensor]:
    """``N * 10`` slices in the order that :func:`pack_cells` takes; none where there are none."""
    flat: list[Tensor] = []
    if weight1 is not None and weight2 is not None and vectors is not None:
        for w1, w2, (b1, b2, *norms) in zip(weight1, weight2, vectors, strict=True):
            flat += [w1, b1, w2, b2, *norms]
    return flat


def packed_size(dim: int) -> int:
    """Numbers of one cell in the buffer."""
    return 2 * dim * dim + VECTORS * dim


@triton.jit
def second_weight(p_ptr, D: tl.constexpr):
    return p_ptr + D * D + D


@triton.jit
def cell_vectors(p_ptr, cols, real, D: tl.constexpr, T: tl.constexpr):
    """b1, b2, then gamma and beta of the three norms, (1, columns) each.

    They are loaded before a product, or in WIDE tiles, which need the registers there, after it.
    """
    rest = p_ptr + 2 * D * D + 2 * D
    out = (
        load_vector(p_ptr + D * D, cols, real, T),
        load_vector(p_ptr + 2 * D * D + D, cols, real, T),
    )
    for i in tl.static_range(6):
        out += (load_vector(rest + i * D, cols, real, T),)
    return out


@triton.jit(do_not_specialize=["rows"])
def _residual_cell_kernel(
    z_ptr,  # (N, rows, D)
    x_ptr,  # (N, rows, D)
    p_ptr,  # (N, packed_size)
    h_ptr,  # (N, rows, D) from stage 1 to stage 2
    out_ptr,  # (N, rows, D)
    active_ptr,  # (N, rows) or None: tiles without an active row are left as they are
    rows,
    SKIP: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    D: tl.constexpr,
    C: tl.constexpr,
    GT: tl.constexpr,
    C2: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    T: tl.constexpr,
    PREC: tl.constexpr,
):
    modality = tl.program_id(2).to(tl.int64)
    first, r, real_row = tile_rows(tl.program_id(0), rows, BM)
    first += modality * rows
    if active_ptr is not None:  # noqa: SIM102 - known when compiling
        if not any_active(active_ptr + first, r, real_row):
            return
    z_ptr += first * D
    x_ptr += first * D
    h_ptr += first * D
    out_ptr += first * D
    p_ptr += modality * (2 * D * D + 8 * D)
    cols, real = tile_columns(tl.program_id(1) * GT, D, C, GT, C2)
    if GT * C2 <= WIDE:
        vectors = cell_vectors(p_ptr, cols, real, D, T)
    if FIRST == 1:
        y = product(z_ptr, r, real_row, p_ptr, cols, real, True, D, BM, GT * C2, BK, T, PREC)
        if GT * C2 > WIDE:
            vectors = cell_vectors(p_ptr, cols, real, D, T)
        h = relu(group_norm(y + vectors[0], vectors[2], vectors[3], real, C, GT, C2, BM))
        store_tile(h_ptr, r, real_row, cols, real, h, D)
    if FIRST != LAST:
        tl.debug_barrier()  # threads read what others of the program wrote
    if LAST == 2:
        w2_ptr = second_weight(p_ptr, D)
        y = product(h_ptr, r, real_row, w2_ptr, cols, real, True, D, BM, GT * C2, BK, T, PREC)
        if GT * C2 > WIDE:
            vectors = cell_vectors(p_ptr, cols, real, D, T)
        y += vectors[1] + load_tile(x_ptr, r, real_row, cols, real, D, T)
        y = group_norm(y, vectors[4], vectors[5], real, C, GT, C2, BM)
        if SKIP:
            y += load_tile(z_ptr, r, real_row, cols, real, D, T)
        f = group_norm(relu(y), vectors[6], vectors[7], real, C, GT, C2, BM)
        store_tile(out_ptr, r, real_row, cols, real, f, D)


def residual_cell(
    z: Tensor,  # (N, B, d), compute dtype
    x: Tensor,  # (N, B, d)
    packed: Tensor,  # (N * packed_size(d),), see pack_cells
    num_groups: int,
    skip: bool,
    *,
    active: Tensor | None = None,  # (N, B) bool
    out: Tensor | None = None,  # (N, B, d)
    hidden: Tensor | None = None,  # (N, B, d) scratch
    tol: float = TF32_TOL,  # of the solve that the step serves
) -> Tensor:  # (N, B, d), compute dtype
    """One step of N cells: one launch where a program can hold a whole row, else two."""
    n, rows, d = z.shape
    out = torch.empty_like(z) if out is None else out
    hidden = torch.empty_like(z) if hidden is None else hidden
    tile = step_tile(d, num_groups, z.dtype)
    grid = (triton.cdiv(rows, tile.rows), triton.cdiv(num_groups, tile.groups), n)
    for first, last in stages_of(1, 2, d, num_groups):
        launch(
            _residual_cell_kernel, grid, z, x, packed, hidden, out, active, rows,
            SKIP=skip, FIRST=first, LAST=last, **constants(d, num_groups, z.dtype, tile, tol),
        )  # fmt: skip
    return out
