"""The Jacobian penalty of the purify-then-combine step and its gradients, in eight stages.

Stages as in ``cell_penalty``: 1 and 2 evaluate the map at z, 3 to 5 compute w = 2 J^T v for a probe
v, 6 and 7 go back along the same way, 8 through the evaluation. The gate's constant is held fixed.
"""
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
    add_to_tile,
    constants,
    load_tile,
    load_vector,
    modalities_of,
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
from deqfuse.triton_kernels.tiles import fuse_vjp_tile, stages_of


@triton.jit(
    do_not_specialize=["rows", "modalities", "probe"],
    # Slices of the layer's probes and states, and of sums: where they begin depends on the batch.
    do_not_specialize_on_alignment=[
        "v_ptr", "u_ptr", "z_ptr", "value_ptr", "probe_sums_ptr", "sums_ptr",
    ],
)  # fmt: skip
def _purify_combine_penalty_kernel(
    v_ptr,  # (rows, D)
    u_ptr,  # (rows, D): v where the last relu passes it on; v itself without RELU_LAST
    z_ptr,  # (rows, D)
    x_ptr,  # (rows, D)
    input_ptr,  # (rows, D): n z + S, the gate's input
    mask_ptr,  # (rows, D) or None
    wa_ptr,  # (D, D)
    ba_ptr,  # (D,)
    wf_ptr,  # (D, D)
    bf_ptr,  # (D,)
    gamma_ptr,  # (D,)
    beta_ptr,  # (D,)
    gate_ptr,  # (rows, D) scratch
    q_ptr,  # (rows, D): z * gate, which dWf needs
    e_ptr,  # (rows, D) scratch: what comes into the norm and the relu
    t_ptr,  # (rows, D) scratch: cotangent of e
    tm_ptr,  # (rows, D): of Wf's output; t where there is no mask
    y_ptr,  # (rows, D) scratch: of q
    yz_ptr,  # (rows, D): of the gate
    w_ptr,  # (rows, D): gradient with respect to J^T v
    dy_ptr,  # (rows, D): with respect to y
    dgate_ptr,  # (rows, D): with respect to the gate, summed over probes
    dx_ptr,  # (rows, D): with respect to e and x, summed over probes
    dc_ptr,  # (rows, D): with respect to Wf's output; dx where there is no mask
    value_ptr,  # (column tiles, rows): |J^T v|^2
    probe_sums_ptr,  # (row tiles, 4, D) or None: gradient of gamma of this probe, per tile
    sums_ptr,  # (row tiles, 4, D) or None: of ba / N, bf, through the evaluation
    counts_ptr,  # (rows,) or None: rows' own n, with which the first sum is ba's gradient
    rows,
    modalities,
    probe,
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
    value_ptr += tl.program_id(1).to(tl.int64) * rows + first
    v_ptr += first * D
    u_ptr += first * D
    z_ptr += first * D
    x_ptr += first * D
    input_ptr += first * D
    if mask_ptr is not None:
        mask_ptr += first * D
    gate_ptr += first * D
    q_ptr += first * D
    e_ptr += first * D
    t_ptr += first * D
    tm_ptr += first * D
    y_ptr += first * D
    yz_ptr += first * D
    w_ptr += first * D
    dy_ptr += first * D
    dgate_ptr += first * D
    dx_ptr += first * D
    dc_ptr += first * D
    cols, real = tile_columns(tl.program_id(1) * GT, D, C, GT, C2)
    if sums_ptr is not None:
        probe_sums_ptr += tl.program_id(0).to(tl.int64) * (4 * D)
        sums_ptr += tl.program_id(0).to(tl.int64) * (4 * D)
    if FIRST == 1:
        gate = product(
            input_ptr, r, real_row, wa_ptr, cols, real, True, D, BM, GT * C2, BK, T, PREC
        )  # fmt: skip
        n = modalities_of(counts_ptr, modalities, first, r, real_row, T)
        gate += n * load_vector(ba_ptr, cols, real, T)
        q = load_tile(z_ptr, r, real_row, cols, real, D, T) * gate
        store_tile(gate_ptr, r, real_row, cols, real, gate, D)
        store_tile(q_ptr, r, real_row, cols, real, q, D)
    if (FIRST == 1) & (LAST > 1):
        tl.debug_barrier()  # threads read what others of the program wrote
    if (FIRST <= 2) & (LAST >= 2):
        e = product(q_ptr, r, real_row, wf_ptr, cols, real, True, D, BM, GT * C2, BK, T, PREC)
        e += load_vector(bf_ptr, cols, real, T)
        if mask_ptr is not None:
            e *= load_tile(mask_ptr, r, real_row, cols, real, D, T)
        e += load_tile(x_ptr, r, real_row, cols, real, D, T)
        store_tile(e_ptr, r, real_row, cols, real, e, D)
    if FIRST < LAST:
        tl.debug_barrier()
    if (FIRST <= 3) & (LAST >= 3):
        e = load_tile(e_ptr, r, real_row, cols, real, D, T)
        gamma = load_vector(gamma_ptr, cols, real, T)
        u = load_tile(v_ptr, r, real_row, cols, real, D, T)
        if RELU_LAST:
            x_hat, rstd = normalize(e, real, C, GT, C2, BM)
            u = tl.where(x_hat * gamma + load_vector(beta_ptr, cols, real, T) > 0, u, 0.0)
            store_tile(u_ptr, r, real_row, cols, real, u, D)
            t = symmetric(u * gamma, x_hat, rstd, C, GT, C2, BM)
        else:
            x_hat, rstd = normalize(relu(e), real, C, GT, C2, BM)
            t = symmetric(u * gamma, x_hat, rstd, C, GT, C2, BM)
            t = tl.where(e > 0, t, 0.0)
        store_tile(t_ptr, r, real_row, cols, real, t, D)
        if mask_ptr is not None:
            t *= load_tile(mask_ptr, r, real_row, cols, real, D, T)
            store_tile(tm_ptr, r, real_row, cols, real, t, D)
    if FIRST < LAST:
        tl.debug_barrier()
    if (FIRST <= 4) & (LAST >= 4):
        y = product(tm_ptr, r, real_row, wf_ptr, cols, real, False, D, BM, GT * C2, BK, T, PREC)
        store_tile(y_ptr, r, real_row, cols, real, y, D)
        y *= load_tile(z_ptr, r, real_row, cols, real, D, T)
        store_tile(yz_ptr, r, real_row, cols, real, y, D)
    if FIRST < LAST:
        tl.debug_barrier()
    if (FIRST <= 5) & (LAST >= 5):
        w = product(yz_ptr, r, real_row, wa_ptr, cols, real, False, D, BM, GT * C2, BK, T, PREC)
        y = load_tile(y_ptr, r, real_row, cols, real, D, T)
        of_z = y * load_tile(gate_ptr, r, real_row, cols, real, D, T)
        w = of_z + modalities_of(counts_ptr, modalities, first, r, real_row, T) * w
        store_squares(value_ptr, r, real_row, w)
        w *= 2
        store_tile(w_ptr, r, real_row, cols, real, w, D)
        if sums_ptr is not None:
            add_to_tile(dgate_ptr, r, real_row, cols, real, w * y, probe > 0, D, T)
    if FIRST < LAST:
        tl.debug_barrier()
    if (FIRST <= 6) & (LAST >= 6):
        dy = product(w_ptr, r, real_row, wa_ptr, cols, real, True, D, BM, GT * C2, BK, T, PREC)
        n = modalities_of(counts_ptr, modalities, first, r, real_row, T)
        dy *= n * load_tile(z_ptr, r, real_row, cols, real, D, T)
        w = load_tile(w_ptr, r, real_row, cols, real, D, T)
        dy += load_tile(gate_ptr, r, real_row, cols, real, D, T) * w
        store_tile(dy_ptr, r, real_row, cols, real, dy, D)
    if FIRST < LAST:
        tl.debug_barrier()
    if (FIRST <= 7) & (LAST >= 7):
        p = product(dy_ptr, r, real_row, wf_ptr, cols, real, True, D, BM, GT * C2, BK, T, PREC)
        if mask_ptr is not None:
            p *= load_tile(mask_ptr, r, real_row, cols, real, D, T)
        e = load_tile(e_ptr, r, real_row, cols, real, D, T)
        u = load_tile(u_ptr, r, real_row, cols, real, D, T)
        s = u * load_vector(gamma_ptr, cols, real, T)
        t = load_tile(t_ptr, r, real_row, cols, real, D, T)
        if RELU_LAST:
            x_hat, rstd = normalize(e, real, C, GT, C2, BM)
            p, de = slope(p, s, t, x_hat, rstd, C, GT, C2, BM)
        else:
            x_hat, rstd = normalize(relu(e), real, C, GT, C2, BM)
            p, de = slope(tl.where(e > 0, p, 0.0), s, t, x_hat, rstd, C, GT, C2, BM)
            de = tl.where(e > 0, de, 0.0)
        de = add_to_tile(dx_ptr, r, real_row, cols, real, de, probe > 0, D, T)
        if mask_ptr is not None:
            de *= load_tile(mask_ptr, r, real_row, cols, real, D, T)
            store_tile(dc_ptr, r, real_row, cols, real, de, D)
        if sums_ptr is not None:
            store_sum(probe_sums_ptr + 2 * D, rounded(u, p), cols, real)
    if FIRST < LAST:
        tl.debug_barrier()
    if LAST == 8:
        y = product(dc_ptr, r, real_row, wf_ptr, cols, real, False, D, BM, GT * C2, BK, T, PREC)
        y *= load_tile(z_ptr, r, real_row, cols, real, D, T)
        dgate = add_to_tile(dgate_ptr, r, real_row, cols, real, y, True, D, T)
        if counts_ptr is not None:
            dgate = rounded(dgate, modalities_of(counts_ptr, modalities, first, r, real_row, T))
        store_sum(sums_ptr, dgate, cols, real)
        store_sum(sums_ptr + D, load_tile(dc_ptr, r, real_row, cols, real, D, T), cols, real)


class FusePenalty(NamedTuple):
    """Values, and gradients of their sum. Those of parameters are None when not wanted."""

    value: Tensor  # (B,)
    dx_fuse: Tensor  # (B, d)
    params: list[Tensor] | None  # in the order of FuseParams


def purify_combine_penalty(
    probes: Tensor,  # (K, B, d), compute dtype; each probe contiguous
    z: Tensor,  # (B, d), compute dtype
    x_fuse: Tensor,  # (B, d)
    cell_sum: Tensor,  # (B, d)
    mask: Tensor | None,  # (B, d)
    num_modalities: int,
    params: Sequence[Tensor],  # FuseParams
    num_groups: int,
    relu_last: bool,
    want_params: bool,
    counts: Tensor | None = None,  # (B,), compute dtype; in place of num_modalities
) -> FusePenalty:
    """``sum_k |J^T v_k|^2`` per row, J at the state z, and its gradients.

    Launches as in :func:`cell_penalty.residual_cell_penalty`.
    """
    rows, d = z.shape
    tile = fuse_vjp_tile(d, num_groups, z.dtype, params[0].dtype)
    grid = fuse_grid(rows, num_groups, tile)
    gate, q, e, t, y, yz, w, dy, dgate, dx = (torch.empty_like(z) for _ in range(10))
    tm, dc = (t, dx) if mask is None else (torch.empty_like(z), torch.empty_like(z))
    signed = torch.empty_like(z) if relu_last else None
    gate_input = gate_input_of(z, cell_sum, num_modalities, counts)
    value = z.new_empty(len(probes), grid[1], rows)
    dwa, dwf = (z.new_empty(d, d) for _ in range(2)) if want_params else (None, None)
    sums = z.new_zeros(len(probes) + 1, grid[0], 4, d) if want_params else None
    for k, v in enumerate(probes):
        begin = 1 if k == 0 else 3
        end = 8 if want_params and k == len(probes) - 1 else 7
        of_probe, of_evaluation = (None, None) if sums is None else (sums[k], sums[-1])
        for first, last in stages_of(begin, end, d, num_groups):
            launch(
                _purify_combine_penalty_kernel, grid,
                v, v if signed is None else signed, z, x_fuse, gate_input, mask, *params,
                gate, q, e, t, tm, y, yz, w, dy, dgate, dx, dc,
                value[k], of_probe, of_evaluation, counts, rows, num_modalities, k,
                RELU_LAST=relu_last, FIRST=first, LAST=last,
                **constants(d, num_groups, z.dtype, tile),
            )  # fmt: skip
        if dwa is not None and dwf is not None:
            if counts is None:
                dwa.addmm_(yz.mT, w, beta=min(k, 1), alpha=num_modalities)
            else:
                dwa.addmm_((counts[:, None] * yz).mT, w, beta=min(k, 1))
            dwf.addmm_(tm.mT, dy, beta=min(k, 1))
    if dwa is None or dwf is None or sums is None:
        return FusePenalty(value.sum((0, 1)), dx, None)
    dwa.addmm_(dgate.mT, gate_input)
    dwf.addmm_(dc.mT, q)
    dba, dbf, dgamma, dbeta = sums.sum((0, 1))
    dba = num_modalities * dba if counts is None else dba
    return FusePenalty(value.sum((0, 1)), dx, [dwa, dba, dwf, dbf, dgamma, dbeta])
