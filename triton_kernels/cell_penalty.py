"""The Jacobian penalty of every residual cell and its gradients, in eight stages; see ``cell``.

The equations are those of ``backends/penalty.py``. Stages 1 and 2 evaluate the map at z, once; 3 to
5 compute w = 2 J^T v for a probe v; 6 and 7 go back along the same way, to the inputs of the norms;
8 takes what the probes have left there through the evaluation, once. Each has one product, but the
third, which has none. What the norms make of their inputs is computed again wherever it is needed:
so little is kept between stages, and relu's signs are always those of the evaluation.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from deqfuse.triton_kernels.cell import VECTORS, second_weight
from deqfuse.triton_kernels.launch import launch
from deqfuse.triton_kernels.rowmath import (
    add_to_tile,
    constants,
    load_tile,
    load_vector,
    normalize,
    product,
    relu,
    rounded,
    slope,
    store_squares,
    store_sum,
    store_tile,
    symmetric,
    tile_columns,
    tile_rows,
)
from deqfuse.triton_kernels.tiles import stages_of, step_tile


@triton.jit(
    do_not_specialize=["rows", "probe"],
    # Slices of the layer's probes and states, and of sums: where they begin depends on the batch.
    do_not_specialize_on_alignment=["v_ptr", "value_ptr", "probe_sums_ptr", "sums_ptr"],
)
def _residual_cell_penalty_kernel(
    v_ptr,  # (N, rows, D)
    z_ptr,  # (N, rows, D)
    x_ptr,  # (N, rows, D)
    p_ptr,  # (N, packed_size)
    y1_ptr,  # (N, rows, D) scratch: what GN1 normalises
    h_ptr,  # (N, rows, D): relu(GN1(.)), which dW2 needs
    y2_ptr,  # (N, rows, D) scratch: what GN2 normalises
    e_ptr,  # (N, rows, D) scratch: what the last relu is given
    q_ptr,  # (N, rows, D) scratch: cotangent of e
    t2_ptr,  # (N, rows, D): of W2's output
    s_ptr,  # (N, rows, D) scratch: of GN1's output
    t1_ptr,  # (N, rows, D): of W1's output
    w_ptr,  # (N, rows, D): gradient with respect to J^T v
    r_ptr,  # (N, rows, D): gradient with respect to t2 W2
    dy1_ptr,  # (N, rows, D): gradient with respect to W1's output, summed over probes
    dx_ptr,  # (N, rows, D): with respect to W2's output and to x, summed over probes
    value_ptr,  # (N, column tiles, rows): |J^T v|^2
    probe_sums_ptr,  # (N, row tiles, 8, D) or None: the vectors' gradients of this probe, per tile
    sums_ptr,  # (N, row tiles, 8, D) or None: those through the evaluation
    rows,
    probe,
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
    value_ptr += (modality * tl.num_programs(1) + tl.program_id(1)) * rows + first
    first += modality * rows
    v_ptr += first * D
    z_ptr += first * D
    x_ptr += first * D
    y1_ptr += first * D
    h_ptr += first * D
    y2_ptr += first * D
    e_ptr += first * D
    q_ptr += first * D
    t2_ptr += first * D
    s_ptr += first * D
    t1_ptr += first * D
    w_ptr += first * D
    r_ptr += first * D
    dy1_ptr += first * D
    dx_ptr += first * D
    p_ptr += modality * (2 * D * D + 8 * D)
    w2_ptr = second_weight(p_ptr, D)
    b2_ptr = w2_ptr + D * D
    norms_ptr = b2_ptr + D  # gamma and beta of the three norms
    cols, real = tile_columns(tl.program_id(1) * GT, D, C, GT, C2)
    if sums_ptr is not None:
        tile = modality * tl.num_programs(0) + tl.program_id(0)
        probe_sums_ptr += tile * (8 * D)
        sums_ptr += tile * (8 * D)
    if FIRST == 1:
        y = product(z_ptr, r, real_row, p_ptr, cols, real, True, D, BM, GT * C2, BK, T, PREC)
        y += load_vector(p_ptr + D * D, cols, real, T)
        x_hat1, rstd1 = normalize(y, real, C, GT, C2, BM)
        h = x_hat1 * load_vector(norms_ptr, cols, real, T)
        h = relu(h + load_vector(norms_ptr + D, cols, real, T))
        store_tile(y1_ptr, r, real_row, cols, real, y, D)
        store_tile(h_ptr, r, real_row, cols, real, h, D)
    if (FIRST == 1) & (LAST > 1):
        tl.debug_barrier()  # threads read what others of the program wrote
    if (FIRST <= 2) & (LAST >= 2):
        y = product(h_ptr, r, real_row, w2_ptr, cols, real, True, D, BM, GT * C2, BK, T, PREC)
        y += load_vector(b2_ptr, cols, real, T) + load_tile(x_ptr, r, real_row, cols, real, D, T)
        x_hat2, rstd2 = normalize(y, real, C, GT, C2, BM)
        e = x_hat2 * load_vector(norms_ptr + 2 * D, cols, real, T)
        e += load_vector(norms_ptr + 3 * D, cols, real, T)
        if SKIP:
            e += load_tile(z_ptr, r, real_row, cols, real, D, T)
        store_tile(y2_ptr, r, real_row, cols, real, y, D)
        store_tile(e_ptr, r, real_row, cols, real, e, D)
    if FIRST < LAST:
        tl.debug_barrier()
    if (FIRST <= 3) & (LAST >= 3):
        e = load_tile(e_ptr, r, real_row, cols, real, D, T)
        x_hat3, rstd3 = normalize(relu(e), real, C, GT, C2, BM)
        v = load_tile(v_ptr, r, real_row, cols, real, D, T)
        q = v * load_vector(norms_ptr + 4 * D, cols, real, T)
        q = tl.where(e > 0, symmetric(q, x_hat3, rstd3, C, GT, C2, BM), 0.0)
        y2 = load_tile(y2_ptr, r, real_row, cols, real, D, T)
        x_hat2, rstd2 = normalize(y2, real, C, GT, C2, BM)
        t2 = q * load_vector(norms_ptr + 2 * D, cols, real, T)
        t2 = symmetric(t2, x_hat2, rstd2, C, GT, C2, BM)
        store_tile(q_ptr, r, real_row, cols, real, q, D)
        store_tile(t2_ptr, r, real_row, cols, real, t2, D)
    if FIRST < LAST:
        tl.debug_barrier()
    if (FIRST <= 4) & (LAST >= 4):
        s = product(t2_ptr, r, real_row, w2_ptr, cols, real, False, D, BM, GT * C2, BK, T, PREC)
        h = load_tile(h_ptr, r, real_row, cols, real, D, T)
        s = tl.where(h > 0, s, 0.0)
        y1 = load_tile(y1_ptr, r, real_row, cols, real, D, T)
        x_hat1, rstd1 = normalize(y1, real, C, GT, C2, BM)
        t1 = s * load_vector(norms_ptr, cols, real, T)
        t1 = symmetric(t1, x_hat1, rstd1, C, GT, C2, BM)
        store_tile(s_ptr, r, real_row, cols, real, s, D)
        store_tile(t1_ptr, r, real_row, cols, real, t1, D)
    if FIRST < LAST:
        tl.debug_barrier()
    if (FIRST <= 5) & (LAST >= 5):
        w = product(t1_ptr, r, real_row, p_ptr, cols, real, False, D, BM, GT * C2, BK, T, PREC)
        if SKIP:
            w += load_tile(q_ptr, r, real_row, cols, real, D, T)
        store_squares(value_ptr, r, real_row, w)
        store_tile(w_ptr, r, real_row, cols, real, 2 * w, D)
    if FIRST < LAST:
        tl.debug_barrier()
    if (FIRST <= 6) & (LAST >= 6):
        p = product(w_ptr, r, real_row, p_ptr, cols, real, True, D, BM, GT * C2, BK, T, PREC)
        gamma1 = load_vector(norms_ptr, cols, real, T)
        s = load_tile(s_ptr, r, real_row, cols, real, D, T)
        t1 = load_tile(t1_ptr, r, real_row, cols, real, D, T)
        y1 = load_tile(y1_ptr, r, real_row, cols, real, D, T)
        x_hat1, rstd1 = normalize(y1, real, C, GT, C2, BM)
        p, dy1 = slope(p, s * gamma1, t1, x_hat1, rstd1, C, GT, C2, BM)
        h = load_tile(h_ptr, r, real_row, cols, real, D, T)
        store_tile(r_ptr, r, real_row, cols, real, tl.where(h > 0, p * gamma1, 0.0), D)
        if sums_ptr is not None:
            store_sum(probe_sums_ptr + 2 * D, rounded(s, p), cols, real)
            add_to_tile(dy1_ptr, r, real_row, cols, real, dy1, probe > 0, D, T)
    if FIRST < LAST:
        tl.debug_barrier()
    if (FIRST <= 7) & (LAST >= 7):
        p = product(r_ptr, r, real_row, w2_ptr, cols, real, True, D, BM, GT * C2, BK, T, PREC)
        gamma2 = load_vector(norms_ptr + 2 * D, cols, real, T)
        y2 = load_tile(y2_ptr, r, real_row, cols, real, D, T)
        x_hat2, rstd2 = normalize(y2, real, C, GT, C2, BM)
        q = load_tile(q_ptr, r, real_row, cols, real, D, T)
        t2 = load_tile(t2_ptr, r, real_row, cols, real, D, T)
        p, dy2 = slope(p, q * gamma2, t2, x_hat2, rstd2, C, GT, C2, BM)
        dgamma2 = tl.sum(rounded(q, p), 0)
        p *= gamma2
        if SKIP:
            p += load_tile(w_ptr, r, real_row, cols, real, D, T)
        # Stored and loaded again, so that not all of it takes registers at once.
        add_to_tile(dx_ptr, r, real_row, cols, real, dy2, probe > 0, D, T)
        tl.debug_barrier()
        e = load_tile(e_ptr, r, real_row, cols, real, D, T)
        x_hat3, rstd3 = normalize(relu(e), real, C, GT, C2, BM)
        v = load_tile(v_ptr, r, real_row, cols, real, D, T)
        s = v * load_vector(norms_ptr + 4 * D, cols, real, T)
        q = load_tile(q_ptr, r, real_row, cols, real, D, T)
        p, de = slope(tl.where(e > 0, p, 0.0), s, q, x_hat3, rstd3, C, GT, C2, BM)
        de = tl.where(e > 0, de, 0.0)
        if sums_ptr is not None:
            store_sum(probe_sums_ptr + 5 * D, de, cols, real)
            store_sum(probe_sums_ptr + 6 * D, rounded(v, p), cols, real)
        tl.debug_barrier()
        y2 = load_tile(y2_ptr, r, real_row, cols, real, D, T)
        x_hat2, rstd2 = normalize(y2, real, C, GT, C2, BM)
        if sums_ptr is not None:
            dgamma2 += tl.sum(rounded(de, x_hat2), 0)
            tl.store(probe_sums_ptr + 4 * D + cols, dgamma2, mask=real)
        dy2 = symmetric(de * gamma2, x_hat2, rstd2, C, GT, C2, BM)
        add_to_tile(dx_ptr, r, real_row, cols, real, dy2, True, D, T)
    if FIRST < LAST:
        tl.debug_barrier()
    if LAST == 8:
        dn1 = product(dx_ptr, r, real_row, w2_ptr, cols, real, False, D, BM, GT * C2, BK, T, PREC)
        h = load_tile(h_ptr, r, real_row, cols, real, D, T)
        dn1 = tl.where(h > 0, dn1, 0.0)
        y1 = load_tile(y1_ptr, r, real_row, cols, real, D, T)
        x_hat1, rstd1 = normalize(y1, real, C, GT, C2, BM)
        dy1 = dn1 * load_vector(norms_ptr, cols, real, T)
        dy1 = symmetric(dy1, x_hat1, rstd1, C, GT, C2, BM)
        dy1 = add_to_tile(dy1_ptr, r, real_row, cols, real, dy1, True, D, T)
        store_sum(sums_ptr, dy1, cols, real)
        dy2 = load_tile(dx_ptr, r, real_row, cols, real, D, T)
        store_sum(sums_ptr + 1 * D, dy2, cols, real)
        store_sum(sums_ptr + 2 * D, rounded(dn1, x_hat1), cols, real)
        store_sum(sums_ptr + 3 * D, dn1, cols, real)


class CellPenalty(NamedTuple):
    """Values, and gradients of their sum. Those of parameters are None when not wanted."""

    value: Tensor  # (N, B)
    dx: Tensor  # (N, B, d)
    weight1: Tensor | None  # (N, d, d)
    weight2: Tensor | None  # (N, d, d)
    vectors: Tensor | None  # (N, 8, d): b1, b2, then gamma and beta of the three norms


def residual_cell_penalty(
    probes: Tensor,  # (K, N, B, d), compute dtype; each probe contiguous
    z: Tensor,  # (N, B, d), compute dtype
    x: Tensor,  # (N, B, d)
    packed: Tensor,  # (N * packed_size(d),), see cell.pack_cells
    num_groups: int,
    skip: bool,
    want_params: bool,
) -> CellPenalty:
    """``sum_k |J^T v_k|^2`` per row of N cells, J at the state z, and its gradients.

    Per probe one launch, or five, and the weights' two products; two launches more before the first
    probe and one more after the last where stages are launched one by one.
    """
    n, rows, d = z.shape
    tile = step_tile(d, num_groups, z.dtype, vjp=True)
    grid = (triton.cdiv(rows, tile.rows), triton.cdiv(num_groups, tile.groups), n)
    y1, h, y2, e, q, t2, s, t1, w, r, dy1, dx = (torch.empty_like(z) for _ in range(12))
    value = z.new_empty(len(probes), n, grid[1], rows)
    weight1, weight2 = (z.new_empty(n, d, d) for _ in range(2)) if want_params else (None, None)
    sums = z.new_zeros(len(probes) + 1, n, grid[0], VECTORS, d) if want_params else None
    for k, v in enumerate(probes):
        begin = 1 if k == 0 else 3
        end = 8 if want_params and k == len(probes) - 1 else 7
        of_probe, of_evaluation = (None, None) if sums is None else (sums[k], sums[-1])
        for first, last in stages_of(begin, end, d, num_groups):
            launch(
                _residual_cell_penalty_kernel, grid,
                v, z, x, packed, y1, h, y2, e, q, t2, s, t1, w, r, dy1, dx,
                value[k], of_probe, of_evaluation, rows, k,
                SKIP=skip, FIRST=first, LAST=last, **constants(d, num_groups, z.dtype, tile),
            )  # fmt: skip
        if weight1 is not None and weight2 is not None:
            weight1.baddbmm_(t1.mT, w, beta=min(k, 1))
            weight2.baddbmm_(t2.mT, r, beta=min(k, 1))
    if weight1 is None or weight2 is None or sums is None:
        return CellPenalty(value.sum((0, 2)), dx, None, None, None)
    weight1.baddbmm_(dy1.mT, z)
    weight2.baddbmm_(dx.mT, h)
    return CellPenalty(value.sum((0, 2)), dx, weight1, weight2, sums.sum((0, 2)))
