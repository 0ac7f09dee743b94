"""The Anderson history and statistics of a tile's rows, as a whole solve keeps them in registers.

Tuples of tiles that are shifted by renaming, newest first; the contract is that of
``deqfuse.solvers.anderson``.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment"

import triton
import triton.language as tl

from deqfuse.triton_kernels.anderson import RESIDUAL_FLOOR, RUNNING, mixing_weights, verdict
from deqfuse.triton_kernels.rowmath import rounded


@triton.jit
def begin(real_row, BM: tl.constexpr, W: tl.constexpr, M: tl.constexpr, T: tl.constexpr):
    """Empty history (images, residuals, Gram matrix by age), statistics and answers of a tile."""
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
    found = (best, nothing, nothing, outcome)
    return (images, residuals, gram), found, tl.zeros((BM, W), T)


@triton.jit
def any_running(found):
    return tl.min(found[3], 0) == RUNNING


@triton.jit
def advance(
    z,
    f,
    history,
    found,
    out,
    step,
    tol,
    max_iter,
    beta,
    lam,
    DAMPED: tl.constexpr,
    M: tl.constexpr,
):
    """After evaluation ``step`` gave ``f``: the next iterate, with all that a solve carries on."""
    history = remember(z, f, history, M)
    keep, found = judge(f, history[2][0], step, found, tol, max_iter)
    out = tl.where(keep[:, None], f, out)
    z = mix(history, tl.minimum(step, M), beta, lam, DAMPED, M)
    return z, history, found, out


@triton.jit
def remember(z, f, history, M: tl.constexpr):
    """The history with ``f = f(z)`` as its newest entry: shifted, which costs no move."""
    images, residuals, gram = history
    new_images = (f,)
    new_residuals = (f - z,)
    for i in tl.static_range(M - 1):
        new_images += (images[i],)
        new_residuals += (residuals[i],)
    new_gram = (tl.sum(rounded(new_residuals[0], new_residuals[0]), 1),)
    for a in tl.static_range(1, M):
        new_gram += (tl.sum(rounded(new_residuals[0], new_residuals[a]), 1),)
        for b in tl.static_range(a):
            new_gram += (gram[(a - 1) * a // 2 + b],)
    return new_images, new_residuals, new_gram


@triton.jit
def judge(f, square, step, found, tol, max_iter):
    """Which rows keep the image of evaluation ``step`` as their answer, and the statistics."""
    best, best_at, nfe, outcome = found
    active = outcome == RUNNING
    norm = tl.sqrt(tl.sum(rounded(f, f), 1))
    residual = tl.sqrt(square) / (norm + RESIDUAL_FLOOR + (norm - norm))  # NaN if it overflows
    better = active & (residual < best)  # NaN compares false
    best = tl.where(better, residual, best)
    best_at = tl.where(better, step, best_at)
    nfe = tl.where(active, step, nfe)
    # The first image is kept whatever it is: a poisoned row returns NaN and not its start.
    keep = active & ((best_at == step) | (nfe == 1))
    outcome = tl.where(active, verdict(residual, step, best_at, tol, max_iter), outcome)
    return keep, (best, best_at, nfe, outcome)


@triton.jit
def mix(history, count, beta, lam, DAMPED: tl.constexpr, M: tl.constexpr):
    """The next iterate."""
    images, residuals, gram = history
    alpha = mixing_weights(gram, count, lam, M)
    z = tl.zeros_like(images[0])
    for i in tl.static_range(M):
        image = images[i]
        if DAMPED:
            image -= (1.0 - beta) * residuals[i]
        z += alpha[i][:, None] * image
    return z


@triton.jit
def left_out(found, live, residual, HOW: tl.constexpr):
    """Statistics in which rows that are not ``live`` have ended before their first step."""
    best, best_at, nfe, outcome = found
    return tl.where(live, best, residual), best_at, nfe, tl.where(live, outcome, HOW)


@triton.jit
def store_statistics(residual_ptr, nfe_ptr, outcome_ptr, r, real_row, found):
    best, _, nfe, outcome = found
    tl.store(residual_ptr + r, best, mask=real_row)
    tl.store(nfe_ptr + r, nfe, mask=real_row)
    tl.store(outcome_ptr + r, outcome, mask=real_row)
