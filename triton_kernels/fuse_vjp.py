"""The VJP of one purify-then-combine step, in four stages of one product each; see ``fuse``."""
# mypy: allow-untyped-defs, allow-incomplete-defs

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from deqfuse.triton_kernels.fuse import fuse_grid, gate_input_of
from deqfuse.triton_kernels.launch import launch
from deqfuse.triton_kernels.rowmath import (
    constants,
    load_tile,
    load_vector,
    modalities_of,
    normalize,
    product,
    relu,
    rounded,
    store_sum,
    store_tile,
    symmetric,
    tile_columns,
    tile_rows,
)
from deqfuse.triton_kernels.tiles import TF32_TOL, fuse_vjp_tile, stages_of


@triton.jit(do_not_specialize=["rows", "modalities"])
def _purify_combine_vjp_kernel(
    u_ptr,  # (rows, D)
    z_ptr,  # (rows, D)
    x_ptr,  # (rows, D)
    s_ptr,  # (rows, D): n z + S, the gate's input
    mask_ptr,  # (rows, D) or None
    wa_ptr,  # (D, D)
    ba_ptr,  # (D,)
    wf_ptr,  # (D, D)
    bf_ptr,  # (D,)
    gamma_ptr,  # (D,)
    beta_ptr,  # (D,)
    gate_ptr,  # (rows, D) scratch
    q_ptr,  # (rows, D): z * gate, which dWf needs
    dx_ptr,  # (rows, D)
    dy_ptr,  # (rows, D): cotangent of Wf's output; dx where there is no mask
    dgate_ptr,  # (rows, D)
    dsum_ptr,  # (rows, D): cotangent of S
    dz_ptr,  # (rows, D); between stages 3 and 4 the share of the factor z
    sums_ptr,  # (row tiles, 4, D) or None: gradients of ba / N, bf, gamma, beta, per tile
    counts_ptr,  # (rows,) or None: rows' own n, with which the first sum is ba's gradient
    rows,
    modalities,
    RELU_LAST: tl.constexpr,
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
    first, r, real_row = tile_rows(tl.program_id(0), rows, BM)
    u_ptr += first * D
    z_ptr += first * D
    x_ptr += first * D
    s_ptr += first * D
    if mask_ptr is not None:
        mask_ptr += first * D
    gate_ptr += first * D
    q_ptr += first * D
    dx_ptr += first * D
    dy_ptr += first * D
    dgate_ptr += first * D
    dsum_ptr += first * D
    dz_ptr += first * D
    cols, real = tile_columns(tl.program_id(1) * GT, D, C, GT, C2)
    if sums_ptr is not None:
        sums_ptr += tl.program_id(0).to(tl.int64) * (4 * D)
    if FIRST == 1:
        gate = product(s_ptr, r, real_row, wa_ptr, cols, real, True, D, BM, GT * C2, BK, T, PREC)
        n = modalities_of(counts_ptr, modalities, first, r, real_row, T)
        gate += n * load_vector(ba_ptr, cols, real, T)
        q = load_tile(z_ptr, r, real_row, cols, real, D, T) * gate
        store_tile(gate_ptr, r, real_row, cols, real, gate, D)
        store_tile(q_ptr, r, real_row, cols, real, q, D)
    if FIRST < LAST:
        tl.debug_barrier()
    if (FIRST <= 2) & (LAST >= 2):
        e = product(q_ptr, r, real_row, wf_ptr, cols, real, True, D, BM, GT * C2, BK, T, PREC)
        e += load_vector(bf_ptr, cols, real, T)
        if mask_ptr is not None:
            e *= load_tile(mask_ptr, r, real_row, cols, real, D, T)
        e += load_tile(x_ptr, r, real_row, cols, real, D, T)
        gamma = load_vector(gamma_ptr, cols, real, T)
        u = load_tile(u_ptr, r, real_row, cols, real, D, T)
        if RELU_LAST:
            x_hat, rstd = normalize(e, real, C, GT, C2, BM)
            u = tl.where(x_hat * gamma + load_vector(beta_ptr, cols, real, T) > 0, u, 0.0)
            de = symmetric(u * gamma, x_hat, rstd, C, GT, C2, BM)
        else:
            x_hat, rstd = normalize(relu(e), real, C, GT, C2, BM)
            de = symmetric(u * gamma, x_hat, rstd, C, GT, C2, BM)
            de = tl.where(e > 0, de, 0.0)
        store_tile(dx_ptr, r, real_row, cols, real, de, D)
        if sums_ptr is not None:
            store_sum(sums_ptr + 2 * D, rounded(u, x_hat), cols, real)
            store_sum(sums_ptr + 3 * D, u, cols, real)
        if mask_ptr is not None:
            de *= load_tile(mask_ptr, r, real_row, cols, real, D, T)
            store_tile(dy_ptr, r, real_row, cols, real, de, D)
        if sums_ptr is not None:
            store_sum(sums_ptr + D, de, cols, real)
    if FIRST < LAST:
        tl.debug_barrier()
    if (FIRST <= 3) & (LAST >= 3):
        dq = product(dy_ptr, r, real_row, wf_ptr, cols, real, False, D, BM, GT * C2, BK, T, PREC)
        dgate = dq * load_tile(z_ptr, r, real_row, cols, real, D, T)
        dz = dq * load_tile(gate_ptr, r, real_row, cols, real, D, T)
        store_tile(dgate_ptr, r, real_row, cols, real, dgate, D)
        store_tile(dz_ptr, r, real_row, cols, real, dz, D)
        if sums_ptr is not None:
            if counts_ptr is not None:
                n = modalities_of(counts_ptr, modalities, first, r, real_row, T)
                dgate = rounded(dgate, n)
            store_sum(sums_ptr, dgate, cols, real)
    if FIRST < LAST:
        tl.debug_barrier()
    if LAST == 4:
        t = product(dgate_ptr, r, real_row, wa_ptr, cols, real, False, D, BM, GT * C2, BK, T, PREC)
        store_tile(dsum_ptr, r, real_row, cols, real, t, D)
        dz = load_tile(dz_ptr, r, real_row, cols, real, D, T)
        dz += modalities_of(counts_ptr, modalities, first, r, real_row, T) * t
        tl.debug_barrier()  # several threads may hold a number that one of them replaces
        store_tile(dz_ptr, r, real_row, cols, real, dz, D)


class FuseGradients(NamedTuple):
    """The VJP of a step. Gradients of parameters are sums over rows; None when not wanted."""

    dz: Tensor  # (B, d)
    dx_fuse: Tensor  # (B, d)
    dcell_sum: Tensor  # (B, d)
    params: list[Tensor] | None  # in the order of FuseParams


def purify_combine_vjp(
    u: Tensor,  # (B, d), compute dtype
    z: Tensor,  # (B, d), compute dtype
    x_fuse: Tensor,  # (B, d)
    cell_sum: Tensor,  # (B, d)
    mask: Tensor | None,  # (B, d)
    num_modalities: int,
    params: Sequence[Tensor],  # FuseParams
    num_groups: int,
    relu_last: bool,
    want_params: bool = True,
    tol: float = TF32_TOL,  # of the solve that the product serves
    counts: Tensor | None = None,  # (B,), compute dtype; in place of num_modalities
) -> FuseGradients:
    """Cotangents of one step: one launch, or four, and torch's products for the weights."""
    rows, d = z.shape
    wa, ba, wf, bf, gamma, beta = params
    tile = fuse_vjp_tile(d, num_groups, z.dtype, x_fuse.dtype)
    gate, q, dx, dgate, dsum, dz = (torch.empty_like(z) for _ in range(6))
    dy = dx if mask is None else torch.empty_like(z)
    gate_input = gate_input_of(z, cell_sum, num_modalities, counts)
    grid = fuse_grid(rows, num_groups, tile)
    sums = z.new_empty(grid[0], 4, d) if want_params else None
    for first, last in stages_of(1, 4, d, num_groups):
        launch(
            _purify_combine_vjp_kernel, grid,
            u, z, x_fuse, gate_input, mask, wa, ba, wf, bf, gamma, beta,
            gate, q, dx, dy, dgate, dsum, dz, sums, counts, rows, num_modalities,
            RELU_LAST=relu_last, FIRST=first, LAST=last,
            **constants(d, num_groups, z.dtype, tile, tol),
        )  # fmt: skip
    if sums is None:
        return FuseGradients(dz, dx, dsum, None)
    dba, dbf, dgamma, dbeta = sums.sum(0)
    dba = num_modalities * dba if counts is None else dba
    weights = dgate.mT @ gate_input, dba, dy.mT @ q
    return FuseGradients(dz, dx, dsum, [*weights, dbf, dgamma, dbeta])
