"""The VJP of one step of every residual cell, in four stages of one product each; see ``cell``."""
# mypy: allow-untyped-defs, allow-incomplete-defs

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from deqfuse.triton_kernels.cell import VECTORS, cell_vectors, second_weight
from deqfuse.triton_kernels.launch import launch
from deqfuse.triton_kernels.rowmath import (
    WIDE,
    constants,
    load_groups,
    load_tile,
    normalize,
    product,
    relu,
    rounded,
    store_groups,
    store_sum,
    store_tile,
    symmetric,
    tile_columns,
    tile_rows,
)
from deqfuse.triton_kernels.tiles import TF32_TOL, stages_of, step_tile


@triton.jit(do_not_specialize=["rows"])
def _residual_cell_vjp_kernel(
    u_ptr,  # (N, rows, D)
    z_ptr,  # (N, rows, D)
    x_ptr,  # (N, rows, D)
    p_ptr,  # (N, packed_size)
    h_ptr,  # (N, rows, D): relu(GN1(.)), which dW2 needs
    x_hat_ptr,  # (N, rows, D) scratch: GN1's
    rstd_ptr,  # (N, rows, G) scratch: GN1's
    dy1_ptr,  # (N, rows, D): cotangent of W1's output
    dx_ptr,  # (N, rows, D): cotangent of x and of W2's output
    dz_ptr,  # (N, rows, D); with SKIP, stage 2 leaves the skip's share here
    sums_ptr,  # (N, row tiles, 8, D) or None: the vectors' gradients, per tile
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
    u_ptr += first * D
    z_ptr += first * D
    x_ptr += first * D
    h_ptr += first * D
    x_hat_ptr += first * D
    rstd_ptr += first * (D // C)
    dy1_ptr += first * D
    dx_ptr += first * D
    dz_ptr += first * D
    p_ptr += modality * (2 * D * D + 8 * D)
    w2_ptr = second_weight(p_ptr, D)
    group = tl.program_id(1) * GT
    cols, real = tile_columns(group, D, C, GT, C2)
    if GT * C2 <= WIDE:
        vectors = cell_vectors(p_ptr, cols, real, D, T)
    if sums_ptr is not None:
        sums_ptr += (modality * tl.num_programs(0) + tl.program_id(0)) * (8 * D)
    if FIRST == 1:
        y = product(z_ptr, r, real_row, p_ptr, cols, real, True, D, BM, GT * C2, BK, T, PREC)
        if GT * C2 > WIDE:
            vectors = cell_vectors(p_ptr, cols, real, D, T)
        x_hat, rstd = normalize(y + vectors[0], real, C, GT, C2, BM)
        h = relu(x_hat * vectors[2] + vectors[3])
        store_tile(h_ptr, r, real_row, cols, real, h, D)
        store_tile(x_hat_ptr, r, real_row, cols, real, x_hat, D)
        store_groups(rstd_ptr, r, real_row, group, rstd, D, C, GT)
    if FIRST < LAST:
        tl.debug_barrier()
    if (FIRST <= 2) & (LAST >= 2):
        y = product(h_ptr, r, real_row, w2_ptr, cols, real, True, D, BM, GT * C2, BK, T, PREC)
        if GT * C2 > WIDE:
            vectors = cell_vectors(p_ptr, cols, real, D, T)
        y += vectors[1] + load_tile(x_ptr, r, real_row, cols, real, D, T)
        x_hat2, rstd2 = normalize(y, real, C, GT, C2, BM)
        e = x_hat2 * vectors[4] + vectors[5]
        if SKIP:
            e += load_tile(z_ptr, r, real_row, cols, real, D, T)
        x_hat3, rstd3 = normalize(relu(e), real, C, GT, C2, BM)
        u = load_tile(u_ptr, r, real_row, cols, real, D, T)
        de = symmetric(u * vectors[6], x_hat3, rstd3, C, GT, C2, BM)
        de = tl.where(e > 0, de, 0.0)
        dy2 = symmetric(de * vectors[4], x_hat2, rstd2, C, GT, C2, BM)
        store_tile(dx_ptr, r, real_row, cols, real, dy2, D)
        if SKIP:
            store_tile(dz_ptr, r, real_row, cols, real, de, D)
        if sums_ptr is not None:
            store_sum(sums_ptr + 1 * D, dy2, cols, real)
            store_sum(sums_ptr + 4 * D, rounded(de, x_hat2), cols, real)
            store_sum(sums_ptr + 5 * D, de, cols, real)
            store_sum(sums_ptr + 6 * D, rounded(u, x_hat3), cols, real)
            store_sum(sums_ptr + 7 * D, u, cols, real)
    if FIRST < LAST:
        tl.debug_barrier()
    if (FIRST <= 3) & (LAST >= 3):
        t = product(dx_ptr, r, real_row, w2_ptr, cols, real, False, D, BM, GT * C2, BK, T, PREC)
        if GT * C2 > WIDE:
            vectors = cell_vectors(p_ptr, cols, real, D, T)
        h = load_tile(h_ptr, r, real_row, cols, real, D, T)
        dn1 = tl.where(h > 0, t, 0.0)
        x_hat1 = load_tile(x_hat_ptr, r, real_row, cols, real, D, T)
        rstd1 = load_groups(rstd_ptr, r, real_row, group, D, C, GT, T)
        dy1 = symmetric(dn1 * vectors[2], x_hat1, rstd1, C, GT, C2, BM)
        store_tile(dy1_ptr, r, real_row, cols, real, dy1, D)
        if sums_ptr is not None:
            store_sum(sums_ptr, dy1, cols, real)
            store_sum(sums_ptr + 2 * D, rounded(dn1, x_hat1), cols, real)
            store_sum(sums_ptr + 3 * D, dn1, cols, real)
    if FIRST < LAST:
        tl.debug_barrier()
    if LAST == 4:
        dz = product(dy1_ptr, r, real_row, p_ptr, cols, real, False, D, BM, GT * C2, BK, T, PREC)
        if SKIP:
            dz += load_tile(dz_ptr, r, real_row, cols, real, D, T)
            tl.debug_barrier()  # several threads may hold a number that one of them replaces
        store_tile(dz_ptr, r, real_row, cols, real, dz, D)


class CellGradients(NamedTuple):
    """The VJP of a step. Gradients of parameters are sums over rows; None when not wanted."""

    dz: Tensor  # (N, B, d)
    dx: Tensor  # (N, B, d)
    weight1: Tensor | None  # (N, d, d)
    weight2: Tensor | None  # (N, d, d)
    vectors: Tensor | None  # (N, 8, d): b1, b2, then gamma and beta of the three norms


def residual_cell_vjp(
    u: Tensor,  # (N, B, d), compute dtype
    z: Tensor,  # (N, B, d), compute dtype
    x: Tensor,  # (N, B, d)
    packed: Tensor,  # (N * packed_size(d),)
    num_groups: int,
    skip: bool,
    want_params: bool = True,
    tol: float = TF32_TOL,  # of the solve that the product serves
) -> CellGradients:
    """Cotangents of one step of N cells: one launch, or four, and the weights' two products."""
    n, rows, d = z.shape
    tile = step_tile(d, num_groups, z.dtype, vjp=True)
    tiles = triton.cdiv(rows, tile.rows)
    h, x_hat, dy1, dx, dz = (torch.empty_like(z) for _ in range(5))
    rstd = z.new_empty(n, rows, num_groups)
    sums = z.new_empty(n, tiles, VECTORS, d) if want_params else None
    grid = (tiles, triton.cdiv(num_groups, tile.groups), n)
    for first, last in stages_of(1, 4, d, num_groups):
        launch(
            _residual_cell_vjp_kernel, grid,
            u, z, x, packed, h, x_hat, rstd, dy1, dx, dz, sums, rows,
            SKIP=skip, FIRST=first, LAST=last, **constants(d, num_groups, z.dtype, tile, tol),
        )  # fmt: skip
    if sums is None:
        return CellGradients(dz, dx, None, None, None)
    return CellGradients(dz, dx, torch.bmm(dy1.mT, z), torch.bmm(dx.mT, h), sums.sum(1))
