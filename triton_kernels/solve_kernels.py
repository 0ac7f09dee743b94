"""The whole-solve kernels: one program iterates a tile of rows until its last row has ended.

Two rules keep the weights in shared memory. The compiler moves their way into registers out of the
loop, and back in only where the loop stores nothing and the weight has no other use: otherwise
kilobytes are spilled. So there is no trace here, and the best iterate waits in registers.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment,name-defined"
# ruff: noqa: F821 - "fp64" is Triton's type of a scalar argument; a float would arrive as float32

import triton
import triton.language as tl

from deqfuse.triton_kernels.anderson import ABSENT, EMPTY
from deqfuse.triton_kernels.cell import cell_vectors, second_weight
from deqfuse.triton_kernels.history import (
    advance,
    any_running,
    begin,
    left_out,
    store_statistics,
)
from deqfuse.triton_kernels.rowmath import (
    dot,
    group_norm,
    load_square,
    load_tile,
    load_vector,
    modalities_of,
    product,
    relu,
    store_tile,
    tile_columns,
    tile_rows,
)


@triton.jit(do_not_specialize=["rows", "max_iter"])
def _solve_cells_kernel(
    x_ptr,  # (N, rows, D)
    z0_ptr,  # (N, rows, D) or None for zero
    p_ptr,  # (N, packed_size)
    present_ptr,  # (N, rows) bool or None: rows without the modality are not read, and answered 0
    out_ptr,  # (N, rows, D)
    residual_ptr,  # (N, rows)
    nfe_ptr,  # (N, rows) int32
    outcome_ptr,  # (N, rows) int8
    rows,
    max_iter,
    tol: "fp64",
    beta: "fp64",
    lam: "fp64",
    SKIP: tl.constexpr,
    M: tl.constexpr,
    DAMPED: tl.constexpr,
    D: tl.constexpr,
    C: tl.constexpr,
    GT: tl.constexpr,
    C2: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    T: tl.constexpr,
    PREC: tl.constexpr,
):
    modality = tl.program_id(1).to(tl.int64)
    first, r, real_row = tile_rows(tl.program_id(0), rows, BM)
    first += modality * rows
    x_ptr += first * D
    if z0_ptr is not None:
        z0_ptr += first * D
    out_ptr += first * D
    p_ptr += modality * (2 * D * D + 8 * D)
    cols, real = tile_columns(0, D, C, GT, C2)
    live = real_row
    if present_ptr is not None:
        live = real_row & (tl.load(present_ptr + first + r, mask=real_row, other=0) != 0)
    vectors = cell_vectors(p_ptr, cols, real, D, T)
    w1 = load_square(p_ptr, cols, real, D, T)
    w2 = load_square(second_weight(p_ptr, D), cols, real, D, T)
    x = load_tile(x_ptr, r, live, cols, real, D, T) + vectors[1]
    z = tl.zeros((BM, GT * C2), T)
    if z0_ptr is not None:
        z = load_tile(z0_ptr, r, live, cols, real, D, T)
    tol, beta, lam = tl.full((), tol, T), tl.full((), beta, T), tl.full((), lam, T)
    history, found, out = begin(live, BM, GT * C2, M, T)
    step = 0
    running = any_running(found)
    while running:
        step += 1
        y = dot(z, w1, T, PREC) + vectors[0]
        h = relu(group_norm(y, vectors[2], vectors[3], real, C, GT, C2, BM))
        y = group_norm(dot(h, w2, T, PREC) + x, vectors[4], vectors[5], real, C, GT, C2, BM)
        if SKIP:
            y += z
        f = group_norm(relu(y), vectors[6], vectors[7], real, C, GT, C2, BM)
        z, history, found, out = advance(
            z, f, history, found, out, step, tol, max_iter, beta, lam, DAMPED, M
        )
        running = any_running(found)
    if present_ptr is not None:
        found = left_out(found, live, 0.0, ABSENT)
    store_tile(out_ptr, r, real_row, cols, real, out, D)
    store_statistics(residual_ptr + first, nfe_ptr + first, outcome_ptr + first, r, real_row, found)


@triton.jit
def combine(
    x_ptr,
    cells_ptr,
    weights_ptr,
    bias_ptr,
    present_ptr,
    r,
    real_row,
    cols,
    real,
    rows,
    modalities,
    D: tl.constexpr,
    BM: tl.constexpr,
    N: tl.constexpr,
    T: tl.constexpr,
):
    """``x_f = sum_i w_i x_i (+ bias)`` and ``S = sum_i z_i`` over what a tile's rows have."""
    x = tl.zeros((BM, N), T)
    total = tl.zeros((BM, N), T)
    plane = rows.to(tl.int64) * D
    for i in range(modalities):
        weight = tl.load(weights_ptr + i).to(T)
        live = real_row
        if present_ptr is not None:
            here = tl.load(present_ptr + i * rows.to(tl.int64) + r, mask=real_row, other=0)
            live = real_row & (here != 0)
        x += weight * load_tile(x_ptr + i * plane, r, live, cols, real, D, T)
        total += load_tile(cells_ptr + i * plane, r, live, cols, real, D, T)
    if bias_ptr is not None:
        x = tl.where(real[None, :], x + tl.load(bias_ptr).to(T), 0.0)
    return x, total


@triton.jit(
    do_not_specialize=["rows", "modalities", "max_iter"],
    # Slices of the layer's results, aligned or not as the batch has it: no reason to recompile.
    do_not_specialize_on_alignment=["out_ptr", "residual_ptr", "nfe_ptr", "outcome_ptr"],
)
def _solve_fuse_kernel(
    x_ptr,  # (rows, D); with weights the modalities' own (N, rows, D)
    cells_ptr,  # (N, rows, D) with weights, else None
    weights_ptr,  # (N,) or None
    bias_ptr,  # (1,) or None
    present_ptr,  # (N, rows) bool with weights, or None: absent features are not read
    counts_ptr,  # (rows,) or None: rows' own number of modalities; without any, the answer is NaN
    sum_ptr,  # (rows, D): the cells' sum; with weights it is written here first
    mask_ptr,  # (rows, D) or None
    z0_ptr,  # (rows, D) or None for zero
    wa_ptr,  # (D, D)
    ba_ptr,  # (D,)
    wf_ptr,  # (D, D)
    bf_ptr,  # (D,)
    gamma_ptr,  # (D,)
    beta_ptr,  # (D,)
    out_ptr,  # (rows, D)
    copy_ptr,  # (rows, D) or None: the answer once more
    residual_ptr,  # (rows,)
    nfe_ptr,  # (rows,) int32
    outcome_ptr,  # (rows,) int8
    rows,
    modalities,
    max_iter,
    tol: "fp64",
    beta: "fp64",
    lam: "fp64",
    RELU_LAST: tl.constexpr,
    M: tl.constexpr,
    DAMPED: tl.constexpr,
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
    x_ptr += first * D
    sum_ptr += first * D
    if mask_ptr is not None:
        mask_ptr += first * D
    if z0_ptr is not None:
        z0_ptr += first * D
    out_ptr += first * D
    cols, real = tile_columns(0, D, C, GT, C2)
    n = modalities_of(counts_ptr, modalities, first, r, real_row, T)
    live = real_row
    if counts_ptr is not None:
        live = real_row & (tl.load(counts_ptr + first + r, mask=real_row, other=0.0) > 0)
    if present_ptr is not None:
        present_ptr += first
    if weights_ptr is not None:
        x, total = combine(
            x_ptr, cells_ptr + first * D, weights_ptr, bias_ptr, present_ptr,
            r, real_row, cols, real, rows, modalities, D, BM, GT * C2, T,
        )  # fmt: skip
        store_tile(sum_ptr, r, real_row, cols, real, total, D)
        tl.debug_barrier()  # threads read what others of the program wrote
    else:
        x = load_tile(x_ptr, r, real_row, cols, real, D, T)
    wa = load_square(wa_ptr, cols, real, D, T)
    wf = load_square(wf_ptr, cols, real, D, T)
    constant = product(sum_ptr, r, real_row, wa_ptr, cols, real, True, D, BM, GT * C2, BK, T, PREC)
    constant += n * load_vector(ba_ptr, cols, real, T)
    bf = load_vector(bf_ptr, cols, real, T)
    gamma = load_vector(gamma_ptr, cols, real, T)
    shift = load_vector(beta_ptr, cols, real, T)
    if mask_ptr is not None:
        mask = load_tile(mask_ptr, r, real_row, cols, real, D, T)
        x += mask * bf
    else:
        x += bf
    z = tl.zeros((BM, GT * C2), T)
    if z0_ptr is not None:
        z = load_tile(z0_ptr, r, live, cols, real, D, T)
    tol, beta, lam = tl.full((), tol, T), tl.full((), beta, T), tl.full((), lam, T)
    history, found, out = begin(live, BM, GT * C2, M, T)
    step = 0
    running = any_running(found)
    while running:
        step += 1
        q = z * (n * dot(z, wa, T, PREC) + constant)
        e = dot(q, wf, T, PREC)
        if mask_ptr is not None:
            e *= mask
        e += x
        if RELU_LAST:
            f = relu(group_norm(e, gamma, shift, real, C, GT, C2, BM))
        else:
            f = group_norm(relu(e), gamma, shift, real, C, GT, C2, BM)
        z, history, found, out = advance(
            z, f, history, found, out, step, tol, max_iter, beta, lam, DAMPED, M
        )
        running = any_running(found)
    if counts_ptr is not None:
        out = tl.where(live[:, None], out, float("nan"))
        found = left_out(found, live, float("nan"), EMPTY)
    store_tile(out_ptr, r, real_row, cols, real, out, D)
    if copy_ptr is not None:
        store_tile(copy_ptr + first * D, r, real_row, cols, real, out, D)
    store_statistics(residual_ptr + first, nfe_ptr + first, outcome_ptr + first, r, real_row, found)
