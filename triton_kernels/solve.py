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

from deqfuse.triton_kernels.anderson import (
    RESIDUAL_FLOOR,
    RUNNING,
    mixing_weights,
    verdict,
)
from deqfuse.triton_kernels.cell import cell_vectors, second_weight
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
from deqfuse.triton_kernels.tiles import columns, solve_tile


@triton.jit
def begin(real_row, BM: tl.constexpr, W: tl.constexpr, M: tl.constexpr, T: tl.constexpr):
    """Empty history (images, residuals, Gram matrix by age) and statistics of a tile's rows."""
    images = ()
    residuals = ()
    gram = ()
    for i in tl.static_range(M):
        images += (tl.zeros((BM, W), T),)
        residuals += (tl.zeros((BM, W), T),)
        for _ in tl.static_range(i + 1):
            gram += (tl.zeros((BM,), T),)
    outcome = tl.where(real_row, RUNNING, 0)
    nothing = tl.zeros((BM,), tl.int32)
    best = tl.full((BM,), float("inf"), T)
    return images, residuals, gram, best, nothing, nothing, outcome


@triton.jit
def remember(z, f, images, residuals, gram, M: tl.constexpr):
    """The history with ``f = f(z)`` as its newest entry: shifted, which costs no move."""
    new_images = (f,)
    new_residuals = (f - z,)
    for i in tl.static_range(M - 1):
        new_images += (images[i],)
        new_residuals += (residuals[i],)
    new_gram = (tl.sum(new_residuals[0] * new_residuals[0], 1),)
    for a in tl.static_range(1, M):
        new_gram += (tl.sum(new_residuals[0] * new_residuals[a], 1),)
        for b in tl.static_range(a):
            new_gram += (gram[(a - 1) * a // 2 + b],)
    return new_images, new_residuals, new_gram


@triton.jit
def judge(f, square, step, best, best_at, nfe, outcome, tol, max_iter):
    """Statistics after evaluation ``step``; which rows keep this image as their answer."""
    active = outcome == RUNNING
    residual = tl.sqrt(square) / (tl.sqrt(tl.sum(f * f, 1)) + RESIDUAL_FLOOR)
    better = active & (residual < best)  # NaN compares false
    best = tl.where(better, residual, best)
    best_at = tl.where(better, step, best_at)
    nfe = tl.where(active, step, nfe)
    # The first image is kept whatever it is: a poisoned row returns NaN and not its start.
    keep = active & ((best_at == step) | (nfe == 1))
    outcome = tl.where(active, verdict(residual, step, best_at, tol, max_iter), outcome)
    return keep, best, best_at, nfe, outcome


@triton.jit
def mix(images, residuals, gram, count, beta, lam, DAMPED: tl.constexpr, M: tl.constexpr):
    """The next iterate."""
    alpha = mixing_weights(gram, count, lam, M)
    z = tl.zeros_like(images[0])
    for i in tl.static_range(M):
        image = images[i]
        if DAMPED:
            image -= (1.0 - beta) * residuals[i]
        z += alpha[i][:, None] * image
    return z


@triton.jit
def store_statistics(residual_ptr, nfe_ptr, outcome_ptr, r, real_row, best, nfe, outcome):
    tl.store(residual_ptr + r, best, mask=real_row)
    tl.store(nfe_ptr + r, nfe, mask=real_row)
    tl.store(outcome_ptr + r, outcome, mask=real_row)


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


@triton.jit(do_not_specialize=["rows", "modalities", "max_iter"])
def _solve_fuse_kernel(
    x_ptr,  # (rows, D)
    sum_ptr,  # (rows, D)
    mask_ptr,  # (rows, D) or None
    z0_ptr,  # (rows, D) or None for zero
    wa_ptr,  # (D, D)
    ba_ptr,  # (D,)
    wf_ptr,  # (D, D)
    bf_ptr,  # (D,)
    gamma_ptr,  # (D,)
    beta_ptr,  # (D,)
    out_ptr,  # (rows, D)
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
    wa = load_square(wa_ptr, cols, real, D, T)
    wf = load_square(wf_ptr, cols, real, D, T)
    constant = product(sum_ptr, r, real_row, wa_ptr, cols, real, True, D, BM, GT * C2, BK, T, PREC)
    constant += n * load_vector(ba_ptr, cols, real, T)
    bf = load_vector(bf_ptr, cols, real, T)
    gamma = load_vector(gamma_ptr, cols, real, T)
    shift = load_vector(beta_ptr, cols, real, T)
    x = load_tile(x_ptr, r, real_row, cols, real, D, T)
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
    store_statistics(
        residual_ptr + first, nfe_ptr + first, outcome_ptr + first, r, real_row, best, nfe, outcome
    )


class Answer(NamedTuple):
    """As the operators return it; statistics have the shape of ``z`` less its last dimension."""

    z: Tensor
    residual: Tensor
    nfe: Tensor  # int32
    outcome: Tensor  # int8


class Knobs(NamedTuple):
    """What the solver is told."""

    tol: float
    max_iter: int
    m: int
    beta: float
    lam: float


def empty_answer(like: Tensor, dtype: torch.dtype) -> Answer:
    """Results to be written. Nothing is filled, so nothing is launched."""
    rows = like.shape[:-1]
    return Answer(
        like.new_empty(like.shape, dtype=dtype),
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
    n, rows, _ = x.shape
    answer, common = _prepare(x, num_groups, knobs)
    launch(
        _solve_cells_kernel, (triton.cdiv(rows, common["BM"]), n),
        x, z0, packed, *answer,
        rows, knobs.max_iter, knobs.tol, knobs.beta, knobs.lam,
        SKIP=skip, **common,
    )  # fmt: skip
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
    rows = x_fuse.shape[0]
    answer, common = _prepare(x_fuse, num_groups, knobs)
    launch(
        _solve_fuse_kernel, (triton.cdiv(rows, common["BM"]),),
        x_fuse, cell_sum, mask, z0, *params, *answer,
        rows, num_modalities, knobs.max_iter, knobs.tol, knobs.beta, knobs.lam,
        RELU_LAST=relu_last, **common,
    )  # fmt: skip
    return answer


def _prepare(x: Tensor, num_groups: int, knobs: Knobs) -> tuple[Answer, dict[str, Any]]:
    """Where the answers go, and what the kernel is compiled for."""
    tensor_cores = precision(torch.float32) == "tf32"
    tile = solve_tile(columns(x.shape[-1], num_groups), knobs.m, tensor_cores)
    common = constants(x.shape[-1], num_groups, torch.float32, tile)
    common |= {"M": knobs.m, "DAMPED": knobs.beta != 1}
    return empty_answer(x, torch.float32), common
