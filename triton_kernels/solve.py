"""Whole solves: one launch finds the equilibria of all rows of one block kind.

A program owns a tile of whole rows, keeps both weights and the Anderson history at hand, and
iterates until its last row has ended: no other program and no host is asked. For rows of up to
``FUSED_WIDTH`` columns, ``MAX_HISTORY`` residuals and float32 arithmetic. Outcomes, counters and
best iterate as in ``deqfuse.solvers``; a row's answer does not depend on its tile.

Two rules keep the weights in shared memory. The compiler moves their way into registers out of the
loop, and back in only where the loop stores nothing and the weight has no other use: otherwise
kilobytes are spilled. So there is no trace here, and the best iterate waits in registers.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment,name-defined"
# ruff: noqa: F821 - "fp64" is Triton's type of a scalar argument; a float would arrive as float32

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from deqfuse.triton_kernels.anderson import RUNNING
from deqfuse.triton_kernels.cell import cell_vectors, second_weight
from deqfuse.triton_kernels.history import begin, judge, mix, remember, store_statistics
from deqfuse.triton_kernels.launch import launch
from deqfuse.triton_kernels.rowmath import (
    constants,
    dot,
    group_norm,
    load_square,
    load_tile,
    load_vector,
    precision,
    product,
    relu,
    store_tile,
    tile_columns,
    tile_rows,
)
from deqfuse.triton_kernels.tiles import Knobs, columns, solve_tile


@triton.jit(do_not_specialize=["rows", "max_iter"])
def _solve_cells_kernel(
    x_ptr,  # (N, rows, D)
    z0_ptr,  # (N, rows, D) or None for zero
    p_ptr,  # (N, packed_size)
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
    vectors = cell_vectors(p_ptr, cols, real, D, T)
    w1 = load_square(p_ptr, cols, real, D, T)
    w2 = load_square(second_weight(p_ptr, D), cols, real, D, T)
    x = load_tile(x_ptr, r, real_row, cols, real, D, T) + vectors[1]
    z = tl.zeros((BM, GT * C2), T)
    if z0_ptr is not None:
        z = load_tile(z0_ptr, r, real_row, cols, real, D, T)
    tol, beta, lam = tl.full((), tol, T), tl.full((), beta, T), tl.full((), lam, T)
    images, residuals, gram, best, best_at, nfe, outcome = begin(real_row, BM, GT * C2, M, T)
    out = tl.zeros((BM, GT * C2), T)
    step = 0
    running = tl.min(outcome, 0) == RUNNING
    while running:
        step += 1
        y = dot(z, w1, T, PREC) + vectors[0]
        h = relu(group_norm(y, vectors[2], vectors[3], real, C, GT, C2, BM))
        y = group_norm(dot(h, w2, T, PREC) + x, vectors[4], vectors[5], real, C, GT, C2, BM)
        if SKIP:
            y += z
        f = group_norm(relu(y), vectors[6], vectors[7], real, C, GT, C2, BM)
        images, residuals, gram = remember(z, f, images, residuals, gram, M)
        keep, best, best_at, nfe, outcome = judge(
            f, gram[0], step, best, best_at, nfe, outcome, tol, max_iter
        )
        out = tl.where(keep[:, None], f, out)
        z = mix(images, residuals, gram, tl.minimum(step, M), beta, lam, DAMPED, M)
        running = tl.min(outcome, 0) == RUNNING
    store_tile(out_ptr, r, real_row, cols, real, out, D)
    store_statistics(
        residual_ptr + first, nfe_ptr + first, outcome_ptr + first, r, real_row, best, nfe, outcome
    )


@triton.jit
def combine(
    x_ptr,
    cells_ptr,
    weights_ptr,
    bias_ptr,
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
    """``x_f = sum_i w_i x_i (+ bias)`` and ``S = sum_i z_i`` of a tile's rows."""
    x = tl.zeros((BM, N), T)
    total = tl.zeros((BM, N), T)
    plane = rows.to(tl.int64) * D
    for i in range(modalities):
        weight = tl.load(weights_ptr + i).to(T)
        x += weight * load_tile(x_ptr + i * plane, r, real_row, cols, real, D, T)
        total += load_tile(cells_ptr + i * plane, r, real_row, cols, real, D, T)
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
    n = modalities.to(T)
    if weights_ptr is not None:
        x, total = combine(
            x_ptr, cells_ptr + first * D, weights_ptr, bias_ptr,
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
        z = load_tile(z0_ptr, r, real_row, cols, real, D, T)
    tol, beta, lam = tl.full((), tol, T), tl.full((), beta, T), tl.full((), lam, T)
    images, residuals, gram, best, best_at, nfe, outcome = begin(real_row, BM, GT * C2, M, T)
    out = tl.zeros((BM, GT * C2), T)
    step = 0
    running = tl.min(outcome, 0) == RUNNING
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
        images, residuals, gram = remember(z, f, images, residuals, gram, M)
        keep, best, best_at, nfe, outcome = judge(
            f, gram[0], step, best, best_at, nfe, outcome, tol, max_iter
        )
        out = tl.where(keep[:, None], f, out)
        z = mix(images, residuals, gram, tl.minimum(step, M), beta, lam, DAMPED, M)
        running = tl.min(outcome, 0) == RUNNING
    store_tile(out_ptr, r, real_row, cols, real, out, D)
    if copy_ptr is not None:
        store_tile(copy_ptr + first * D, r, real_row, cols, real, out, D)
    store_statistics(
        residual_ptr + first, nfe_ptr + first, outcome_ptr + first, r, real_row, best, nfe, outcome
    )


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
) -> Answer:
    """Equilibria of all N residual cells in float32: one launch."""
    answer = empty_answer(x, x.shape, torch.float32)
    _launch_cells(x, packed, z0, answer, num_groups, skip, knobs)
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
) -> Answer:
    """Equilibrium of the purify-then-combine step in float32: one launch."""
    answer = empty_answer(x_fuse, x_fuse.shape, torch.float32)
    operands = (x_fuse, None, None, None, cell_sum, mask, z0, *params)
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
) -> tuple[Tensor, Answer]:
    """Equilibria of all cells, then of the fuse step: two launches.

    Returns the fused equilibrium (B, d) and, as one answer, the N cells' and it.
    """
    n, rows, d = x.shape
    both = empty_answer(x, (n + 1, rows, d), torch.float32)
    cells, fuse = Answer(*(t[:n] for t in both)), Answer(*(t[n] for t in both))
    z, cell_sum = torch.empty_like(fuse.z), torch.empty_like(fuse.z)
    _launch_cells(x, packed, z0_cells, cells, num_groups, skip, knobs)
    operands = (x, cells.z, weights, bias, cell_sum, mask, z0_fuse, *params)
    _launch_fuse(operands, fuse, z, n, num_groups, relu_last, knobs)
    return z, both


def _launch_cells(
    x: Tensor,
    packed: Tensor,
    z0: Tensor | None,
    answer: Answer,
    num_groups: int,
    skip: bool,
    knobs: Knobs,
) -> None:
    n, rows, d = x.shape
    common = _constants(d, num_groups, knobs)
    launch(
        _solve_cells_kernel, (triton.cdiv(rows, common["BM"]), n),
        x, z0, packed, *answer,
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
