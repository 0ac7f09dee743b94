"""What the kernels share: tile columns, products, GroupNorm and its Jacobian. No kernels here.

Compile-time names: ``D`` features, ``C`` channels per group, ``C2`` their columns, ``GT`` groups in
the tile, ``BM`` rows, ``T`` the compute type. Columns beyond a group's channels are masked wherever
they would count; weights and affine parameters read as 0 there. Tensors of 16 bits are cast right
after the load: the interpreter computes with the bits of a bfloat16 otherwise.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from typing import Any

import torch
import triton
import triton.language as tl

from deqfuse.triton_kernels.tiles import TF32_TOL, Tile

EPS = tl.constexpr(1e-5)  # GroupNorm's
WIDE = tl.constexpr(512)  # columns; tiles of more have 512 threads, of 128 registers at most

TYPES = {torch.float32: tl.float32, torch.float64: tl.float64}


def precision(dtype: torch.dtype, tol: float = TF32_TOL) -> str:
    """Of float32 products: TF32 where torch's own switch allows it and it can reach ``tol``."""
    # allow_tf32, the older name of the switch, raises once the newer one has been used.
    allowed = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if allowed and dtype != torch.float64 and tol >= TF32_TOL else "ieee"


def constants(
    dim: int, num_groups: int, dtype: torch.dtype, tile: Tile, tol: float = TF32_TOL
) -> dict[str, Any]:
    """What every kernel is compiled for; ``tol`` of the solve that it serves."""
    limit = {"maxnreg": tile.registers} if tile.registers else {}
    return {
        **limit,
        "D": dim,
        "C": dim // num_groups,
        "GT": tile.groups,
        "C2": tile.padded,
        "BM": tile.rows,
        "BK": tile.inner,
        "T": TYPES[dtype],
        "PREC": precision(dtype, tol),
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


@triton.jit
def relu(y):
    """Unlike the default maximum, NaN stays NaN."""
    return tl.maximum(y, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def tile_columns(first_group, D: tl.constexpr, C: tl.constexpr, GT: tl.constexpr, C2: tl.constexpr):
    """Feature of each column of a tile that starts at ``first_group``; whether there is one."""
    j = tl.arange(0, GT * C2)
    if (C == C2) & (D % (GT * C) == 0):
        cols = first_group * C + j
        real = tl.full((GT * C2,), 1, tl.int1)  # known when compiling: no mask is kept
    elif (C2 > WIDE) & (GT == 1):  # the compiler sees neighbours in memory: fewer addresses
        cols = first_group * C + j
        real = j < C
    else:
        k = j % C2
        cols = (first_group + j // C2) * C + k
        real = (k < C) & (cols < D)
    return cols, real


@triton.jit
def tile_rows(tile, rows, BM: tl.constexpr):
    """First row of a tile, the rows from there on, and which of them exist.

    Offsets of large batches exceed 31 bits. Kernels move their pointers to the first row, one
    number of 64 bits, so that the offsets within a tile take half the registers.
    """
    first = tile.to(tl.int64) * BM
    r = tl.arange(0, BM)
    return first, r, r < rows - first


@triton.jit
def load_tile(ptr, r, real_row, cols, real, D: tl.constexpr, T: tl.constexpr):
    """(BM, columns) of a row-major (rows, D) tensor, zeros where there is nothing."""
    at = ptr + r[:, None] * D + cols[None, :]
    return tl.load(at, mask=real_row[:, None] & real[None, :], other=0.0).to(T)


@triton.jit
def store_tile(ptr, r, real_row, cols, real, value, D: tl.constexpr):
    at = ptr + r[:, None] * D + cols[None, :]
    tl.store(at, value, mask=real_row[:, None] & real[None, :])


@triton.jit
def load_vector(ptr, cols, real, T: tl.constexpr):
    """(1, columns) of a parameter."""
    return tl.load(ptr + cols, mask=real, other=0.0).to(T)[None, :]


@triton.jit
def modalities_of(counts_ptr, modalities, first, r, real_row, T: tl.constexpr):
    """How many modalities a row has: (BM, 1) of ``counts`` (rows,), or for all of them a number."""
    if counts_ptr is not None:
        n = tl.load(counts_ptr + first + r, mask=real_row, other=0.0).to(T)[:, None]
    else:
        n = modalities.to(T)
    return n


@triton.jit
def load_square(ptr, cols, real, D: tl.constexpr, T: tl.constexpr):
    """A whole weight transposed, (inputs, outputs), both in the order of a tile's columns."""
    at = ptr + cols[None, :] * D + cols[:, None]
    return tl.load(at, mask=real[:, None] & real[None, :], other=0.0).to(T)


@triton.jit
def store_groups(
    ptr,
    r,
    real_row,
    first_group,
    value,
    D: tl.constexpr,
    C: tl.constexpr,
    GT: tl.constexpr,
):
    """(BM, GT) of a row-major (rows, D / C) tensor."""
    g = first_group + tl.arange(0, GT)
    at = ptr + r[:, None] * (D // C) + g[None, :]
    tl.store(at, value, mask=real_row[:, None] & (g < D // C)[None, :])


@triton.jit
def load_groups(
    ptr,
    r,
    real_row,
    first_group,
    D: tl.constexpr,
    C: tl.constexpr,
    GT: tl.constexpr,
    T: tl.constexpr,
):
    g = first_group + tl.arange(0, GT)
    at = ptr + r[:, None] * (D // C) + g[None, :]
    return tl.load(at, mask=real_row[:, None] & (g < D // C)[None, :], other=0.0).to(T)


@triton.jit
def store_sum(ptr, terms, cols, real):
    """The sum over a tile's rows."""
    tl.store(ptr + cols, tl.sum(terms, 0), mask=real)


@triton.jit
def rounded(a, b):
    """The product of what is to be summed up over threads, rounded.

    Several threads may hold the same numbers: at the end each has the sum, and on the way to memory
    any of them may be taken. A product that the compiler merged with the sum's next addition would
    be rounded in one thread and not in the other; as an ``fma`` of its own it is the same in both.
    """
    return tl.fma(a, b, 0.0)


@triton.jit
def store_squares(ptr, r, real_row, terms):
    """Each row's sum of squares over a tile's columns, those without a feature being 0."""
    tl.store(ptr + r, tl.sum(rounded(terms, terms), 1), mask=real_row)


@triton.jit
def add_to_tile(
    ptr,
    r,
    real_row,
    cols,
    real,
    value,
    more,
    D: tl.constexpr,
    T: tl.constexpr,
):
    """Store ``value``, or what is there and ``value`` where there is ``more``; returns the sum."""
    value += load_tile(ptr, r, real_row & more, cols, real, D, T)
    tl.debug_barrier()  # several threads may hold a number that one of them replaces
    store_tile(ptr, r, real_row, cols, real, value, D)
    return value


@triton.jit
def dot(a, b, T: tl.constexpr, PREC: tl.constexpr):
    return tl.dot(a, b, input_precision=PREC, out_dtype=T)


@triton.jit
def product(
    a_ptr,
    r,
    real_row,
    w_ptr,
    cols,
    real,
    TRANSPOSE: tl.constexpr,
    D: tl.constexpr,
    BM: tl.constexpr,
    N: tl.constexpr,
    BK: tl.constexpr,
    T: tl.constexpr,
    PREC: tl.constexpr,
):
    """Columns ``cols`` of ``a W^T`` (``TRANSPOSE``) or ``a W``, the inner dimension in blocks."""
    total = tl.zeros((BM, N), T)
    for k0 in range(0, D, BK):
        k = k0 + tl.arange(0, BK)
        inside = k < D
        a = load_tile(a_ptr, r, real_row, k, inside, D, T)
        at = k[:, None] + cols[None, :] * D if TRANSPOSE else k[:, None] * D + cols[None, :]
        w = tl.load(w_ptr + at, mask=inside[:, None] & real[None, :], other=0.0).to(T)
        if BK == 1:  # without shared memory, where tl.dot's least block, 16, does not fit
            total += a * w
        else:
            total = tl.dot(a, w, total, input_precision=PREC, out_dtype=T)
    return total


@triton.jit
def normalize(
    y,
    real,
    C: tl.constexpr,
    GT: tl.constexpr,
    C2: tl.constexpr,
    BM: tl.constexpr,
):
    """``x_hat`` (BM, GT * C2) and ``rstd`` (BM, GT). Two passes, so that no digits cancel.

    NaN where the variance overflows: 0 would make a huge input look like none.
    """
    y = tl.reshape(y, (BM, GT, C2))
    centred = y - (tl.sum(y, 2) * (1.0 / C))[:, :, None]
    if C != C2:
        centred = tl.where(tl.reshape(real, (1, GT, C2)), centred, 0.0)
    variance = tl.sum(centred * centred, 2) * (1.0 / C)
    rstd = tl.rsqrt(variance + EPS) + (variance - variance)
    return tl.reshape(centred * rstd[:, :, None], (BM, GT * C2)), rstd


@triton.jit
def group_norm(
    y,
    gamma,
    beta,
    real,
    C: tl.constexpr,
    GT: tl.constexpr,
    C2: tl.constexpr,
    BM: tl.constexpr,
):
    x_hat, _ = normalize(y, real, C, GT, C2, BM)
    return x_hat * gamma + beta


@triton.jit
def symmetric(
    t,
    x_hat,
    rstd,
    C: tl.constexpr,
    GT: tl.constexpr,
    C2: tl.constexpr,
    BM: tl.constexpr,
):
    """``rstd (t - mean(t) - x_hat mean(t x_hat))`` per group: GroupNorm's Jacobian less gamma.

    ``t`` must be 0 in columns without a feature; the result is not.
    """
    t = tl.reshape(t, (BM, GT, C2))
    x = tl.reshape(x_hat, (BM, GT, C2))
    mean = tl.sum(t, 2) * (1.0 / C)
    along = tl.sum(t * x, 2) * (1.0 / C)
    out = rstd[:, :, None] * (t - mean[:, :, None] - x * along[:, :, None])
    return tl.reshape(out, (BM, GT * C2))


@triton.jit
def slope(
    t,
    s,
    s_pulled,
    x_hat,
    rstd,
    C: tl.constexpr,
    GT: tl.constexpr,
    C2: tl.constexpr,
    BM: tl.constexpr,
):
    """``S t`` of :func:`symmetric`, and the gradient of ``<t, S s>`` in what was normalised.

    ``-rstd (x_hat mean(t S s) + mean(s x_hat) S t + mean(t x_hat) S s)`` per group. ``t`` and ``s``
    must be 0 in columns without a feature; the results are not. ``s_pulled``, ``S s``, may be 0
    where ``t`` is, if only these entries of the gradient are wanted.
    """
    t_pulled = symmetric(t, x_hat, rstd, C, GT, C2, BM)
    t = tl.reshape(t, (BM, GT, C2))
    x = tl.reshape(x_hat, (BM, GT, C2))
    s_ = tl.reshape(s_pulled, (BM, GT, C2))
    both = tl.sum(t * s_, 2) * (1.0 / C)
    s_along = tl.sum(tl.reshape(s, (BM, GT, C2)) * x, 2) * (1.0 / C)
    t_along = tl.sum(t * x, 2) * (1.0 / C)
    out = x * both[:, :, None] + t_along[:, :, None] * s_
    out += s_along[:, :, None] * tl.reshape(t_pulled, (BM, GT, C2))
    return t_pulled, tl.reshape(-rstd[:, :, None] * out, (BM, GT * C2))


@triton.jit
def any_active(active_ptr, r, real_row):
    """Whether the solver still wants any row of the tile."""
    flags = tl.load(active_ptr + r, mask=real_row, other=0).to(tl.int32)
    return tl.max(flags, 0) != 0
