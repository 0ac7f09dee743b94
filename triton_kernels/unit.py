"""Rows of unit size: an injection divided by its root mean square, and the gradient of that.

    y = s x,  s = 1 / sqrt(mean(x^2)),  and for a cotangent g of y:  s (g - y mean(y g))

A program has some rows and runs over their columns twice: for the sums, then for the answer.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from deqfuse.triton_kernels.launch import launch
from deqfuse.triton_kernels.rowmath import TYPES, tile_rows
from deqfuse.triton_kernels.tiles import power_of_two

LEAST = tl.constexpr(1e-24)  # mean square of what has no direction: 1e-12 squared
COLUMNS = 1024  # of a tile at most
NUMBERS = 2048  # of a tile


@triton.jit(do_not_specialize=["rows"])
def _unit_size_kernel(
    x_ptr,  # (rows, D)
    grad_ptr,  # (rows, D) of the results, or None where these are asked for
    out_ptr,  # (rows, D)
    rows,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    T: tl.constexpr,
):
    first, r, real_row = tile_rows(tl.program_id(0), rows, BM)
    x_ptr += first * D
    out_ptr += first * D
    squares = tl.zeros((BM, BN), T)
    products = tl.zeros((BM, BN), T)
    for start in range(0, D, BN):
        cols = start + tl.arange(0, BN)
        at = r[:, None] * D + cols[None, :]
        real = real_row[:, None] & (cols < D)[None, :]
        x = tl.load(x_ptr + at, mask=real, other=0.0).to(T)
        squares += x * x
        if grad_ptr is not None:
            g = tl.load(grad_ptr + first * D + at, mask=real, other=0.0).to(T)
            products += x * g
    square = tl.sum(squares, 1) / D
    # Rows without a direction become zeros; squares that overflow NaN, since zeros would be an
    # input like any other.
    scale = tl.where(square > LEAST, tl.rsqrt(tl.maximum(square, LEAST)), 0.0)
    scale = tl.where(square < float("inf"), scale, float("nan"))[:, None]
    along = scale * scale * (tl.sum(products, 1) / D)[:, None]
    for start in range(0, D, BN):
        cols = start + tl.arange(0, BN)
        at = r[:, None] * D + cols[None, :]
        real = real_row[:, None] & (cols < D)[None, :]
        x = tl.load(x_ptr + at, mask=real, other=0.0).to(T)
        if grad_ptr is not None:
            g = tl.load(grad_ptr + first * D + at, mask=real, other=0.0).to(T)
            x = g - along * x
        tl.store(out_ptr + at, scale * x, mask=real)


def unit_size(x: Tensor, grad: Tensor | None) -> Tensor:
    """Rows of x (B, d) of unit size, or with ``grad`` (B, d) the gradient; one launch.

    Args:
        x: (B, d), contiguous, any floating dtype.
        grad: (B, d), contiguous, cotangent of the result, or None where this is asked for.

    Returns:
        (B, d) of x's dtype.
    """
    rows, d = x.shape
    out = torch.empty_like(x)
    columns = min(power_of_two(d), COLUMNS)
    tile = NUMBERS // columns
    launch(
        _unit_size_kernel, (triton.cdiv(rows, tile),), x,
        grad, out, rows,
        D=d, BM=tile, BN=columns, T=TYPES.get(x.dtype, tl.float32), num_warps=4, num_stages=1,
    )  # fmt: skip
    return out
