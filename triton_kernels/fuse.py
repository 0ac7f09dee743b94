"""One step of purify-then-combine (Eqs. 9-12) with the gate collapsed.

    gate = n Wa z + constant,  constant = Wa S + n ba        S the sum of the cells
    z <- GN(relu(Wf (z * gate) + bf + x))                   "relu_last": relu(GN(.))

n is N, or where rows lack modalities the row's own of ``counts``. Stages and launches as in
``cell``. Dropout's mask multiplies the output of Wf.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from deqfuse.triton_kernels.launch import launch
from deqfuse.triton_kernels.rowmath import (
    any_active,
    constants,
    load_tile,
    load_vector,
    modalities_of,
    normalize,
    product,
    relu,
    store_tile,
    tile_columns,
    tile_rows,
)
from deqfuse.triton_kernels.tiles import TF32_TOL, Tile, stages_of, step_tile


@triton.jit(do_not_specialize=["rows", "modalities"])
def _gate_constant_kernel(
    sum_ptr,  # (rows, D)
    wa_ptr,  # (D, D)
    ba_ptr,  # (D,)
    counts_ptr,  # (rows,) or None
    out_ptr,  # (rows, D)
    rows,
    modalities,
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
    sum_ptr += first * D
    out_ptr += first * D
    cols, real = tile_columns(tl.program_id(1) * GT, D, C, GT, C2)
    y = product(sum_ptr, r, real_row, wa_ptr, cols, real, True, D, BM, GT * C2, BK, T, PREC)
    n = modalities_of(counts_ptr, modalities, first, r, real_row, T)
    y += n * load_vector(ba_ptr, cols, real, T)
    store_tile(out_ptr, r, real_row, cols, real, y, D)


def gate_constant(
    cell_sum: Tensor,  # (B, d)
    num_modalities: int,
    params: Sequence[Tensor],  # FuseParams
    num_groups: int,
    dtype: torch.dtype,
    tol: float = TF32_TOL,  # of the solve that it serves
    counts: Tensor | None = None,  # (B,), compute dtype; in place of num_modalities
) -> Tensor:  # (B, d)
    """``Wa S + n ba``, the part of the gate that a solve holds fixed: one launch."""
    rows, d = cell_sum.shape
    out = cell_sum.new_empty(rows, d, dtype=dtype)
    tile = step_tile(d, num_groups, dtype)
    launch(
        _gate_constant_kernel, fuse_grid(rows, num_groups, tile),
        cell_sum, params[0], params[1], counts, out, rows, num_modalities,
        **constants(d, num_groups, dtype, tile, tol),
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["rows", "modalities"])
def _purify_combine_kernel(
    z_ptr,  # (rows, D)
    x_ptr,  # (rows, D)
    constant_ptr,  # (rows, D)
    mask_ptr,  # (rows, D) or None
    wa_ptr,  # (D, D)
    wf_ptr,  # (D, D)
    bf_ptr,  # (D,)
    gamma_ptr,  # (D,)
    beta_ptr,  # (D,)
    q_ptr,  # (rows, D) from stage 1 to stage 2
    out_ptr,  # (rows, D)
    active_ptr,  # (rows,) or None: tiles without an active row are left as they are
    counts_ptr,  # (rows,) or None
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
    if active_ptr is not None:  # noqa: SIM102 - known when compiling
        if not any_active(active_ptr + first, r, real_row):
            return
    z_ptr += first * D
    x_ptr += first * D
    constant_ptr += first * D
    if mask_ptr is not None:
        mask_ptr += first * D
    q_ptr += first * D
    out_ptr += first * D
    cols, real = tile_columns(tl.program_id(1) * GT, D, C, GT, C2)
    if FIRST == 1:
        y = product(z_ptr, r, real_row, wa_ptr, cols, real, True, D, BM, GT * C2, BK, T, PREC)
        n = modalities_of(counts_ptr, modalities, first, r, real_row, T)
        gate = n * y + load_tile(constant_ptr, r, real_row, cols, real, D, T)
        q = load_tile(z_ptr, r, real_row, cols, real, D, T) * gate
        store_tile(q_ptr, r, real_row, cols, real, q, D)
    if FIRST != LAST:
        tl.debug_barrier()  # threads read what others of the program wrote
    if LAST == 2:
        e = product(q_ptr, r, real_row, wf_ptr, cols, real, True, D, BM, GT * C2, BK, T, PREC)
        e += load_vector(bf_ptr, cols, real, T)
        if mask_ptr is not None:
            e *= load_tile(mask_ptr, r, real_row, cols, real, D, T)
        e += load_tile(x_ptr, r, real_row, cols, real, D, T)
        if not RELU_LAST:
            e = relu(e)
        x_hat, _ = normalize(e, real, C, GT, C2, BM)
        f = x_hat * load_vector(gamma_ptr, cols, real, T) + load_vector(beta_ptr, cols, real, T)
        if RELU_LAST:
            f = relu(f)
        store_tile(out_ptr, r, real_row, cols, real, f, D)


def purify_combine(
    z: Tensor,  # (B, d), compute dtype
    x_fuse: Tensor,  # (B, d)
    constant: Tensor,  # (B, d), from gate_constant
    mask: Tensor | None,  # (B, d)
    num_modalities: int,
    params: Sequence[Tensor],  # FuseParams
    num_groups: int,
    relu_last: bool,
    *,
    active: Tensor | None = None,  # (B,) bool
    out: Tensor | None = None,  # (B, d)
    gated: Tensor | None = None,  # (B, d) scratch
    tol: float = TF32_TOL,  # of the solve that the step serves
    counts: Tensor | None = None,  # (B,), compute dtype; in place of num_modalities
) -> Tensor:  # (B, d), compute dtype
    """One step: one launch where a program can hold a whole row, else two."""
    rows, d = z.shape
    wa, _, wf, bf, gamma, beta = params
    out = torch.empty_like(z) if out is None else out
    gated = torch.empty_like(z) if gated is None else gated
    tile = step_tile(d, num_groups, z.dtype)
    for first, last in stages_of(1, 2, d, num_groups):
        launch(
            _purify_combine_kernel, fuse_grid(rows, num_groups, tile),
            z, x_fuse, constant, mask, wa, wf, bf, gamma, beta, gated, out, active, counts,
            rows, num_modalities, RELU_LAST=relu_last, FIRST=first, LAST=last,
            **constants(d, num_groups, z.dtype, tile, tol),
        )  # fmt: skip
    return out


def fuse_grid(rows: int, num_groups: int, tile: Tile) -> tuple[int, int]:
    return triton.cdiv(rows, tile.rows), triton.cdiv(num_groups, tile.groups)


def gate_input_of(
    z: Tensor,  # (B, d), compute dtype
    cell_sum: Tensor,  # (B, d)
    num_modalities: int,
    counts: Tensor | None,  # (B,)
) -> Tensor:  # (B, d)
    """``n z + S``: one launch."""
    if counts is None:
        return torch.add(cell_sum, z, alpha=num_modalities)
    return torch.addcmul(cell_sum, z, counts[:, None])
