"""One Anderson step of all rows in one launch, for a map that is evaluated elsewhere.

Residual, new row of the Gram matrix, small solve, mix, best iterate, outcome: one program per row,
which returns at once if its row has ended. The contract is that of ``deqfuse.solvers.anderson``.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment,misc,name-defined"
# ruff: noqa: F821 - "fp64" is Triton's type of a scalar argument; a float would arrive as float32

import torch
import triton
import triton.language as tl
from torch import Tensor

from deqfuse.outcome import Outcome
from deqfuse.triton_kernels.launch import launch
from deqfuse.triton_kernels.rowmath import TYPES
from deqfuse.triton_kernels.tiles import power_of_two

PIVOT_FLOOR = tl.constexpr(2.4e-7)  # as in deqfuse.solvers, which lies above this package
RESIDUAL_FLOOR = tl.constexpr(1e-5)
STALL_STEPS = tl.constexpr(20)
TINY = tl.constexpr(1e-30)
CONVERGED = tl.constexpr(int(Outcome.CONVERGED))
MAX_ITER = tl.constexpr(int(Outcome.MAX_ITER))
STALLED = tl.constexpr(int(Outcome.STALLED))
NON_FINITE = tl.constexpr(int(Outcome.NON_FINITE))
ABSENT = tl.constexpr(int(Outcome.ABSENT))
EMPTY = tl.constexpr(int(Outcome.EMPTY))
RUNNING = tl.constexpr(-1)
BLOCK_BYTES = 4096  # of a row that a program looks at at once


@triton.jit
def mixing_weights(gram, count, lam, M: tl.constexpr):
    """Weights with sum 1 that minimise ``|sum_i alpha_i g_i|``, newest first.

    ``gram``: lower triangle row by row, a tuple of M (M + 1) / 2 scalars or vectors over rows; of
    it, the newest ``count`` residuals are there. Cholesky with a relative ridge and pivot floor.
    """
    zero = tl.zeros_like(gram[0])
    largest = zero
    for i in tl.static_range(M):
        largest = tl.where(i < count, tl.maximum(largest, gram[i * (i + 1) // 2 + i]), largest)
    ridge = lam * largest
    floor = PIVOT_FLOOR * largest + TINY
    lower = ()  # with inverse pivots on the diagonal
    for i in tl.static_range(M):
        for j in tl.static_range(i + 1):
            a = tl.where(i < count, gram[i * (i + 1) // 2 + j], zero)
            if i == j:
                a += ridge
            for k in tl.static_range(j):
                a -= lower[i * (i + 1) // 2 + k] * lower[j * (j + 1) // 2 + k]
            if i == j:
                a = tl.rsqrt(tl.maximum(a, floor))
            else:
                a *= lower[j * (j + 1) // 2 + j]
            lower += (a,)
    y = ()
    for i in tl.static_range(M):
        a = tl.where(i < count, zero + 1.0, zero)
        for k in tl.static_range(i):
            a -= lower[i * (i + 1) // 2 + k] * y[k]
        y += (tl.where(i < count, a * lower[i * (i + 1) // 2 + i], zero),)
    backwards = ()  # alpha_{M-1}, ..., alpha_0
    total = zero
    for ii in tl.static_range(M):
        a = y[M - 1 - ii]
        for k in tl.static_range(ii):
            a -= lower[(M - 1 - k) * (M - k) // 2 + M - 1 - ii] * backwards[k]
        a *= lower[(M - 1 - ii) * (M - ii) // 2 + M - 1 - ii]
        a = tl.where(M - 1 - ii < count, a, zero)
        total += a
        backwards += (a,)
    alpha = ()
    for i in tl.static_range(M):
        alpha += (backwards[M - 1 - i] / total,)
    return alpha


@triton.jit
def verdict(residual, nfe, best_at, tol, max_iter):
    """How a row ends after evaluation ``nfe``, or RUNNING. The first reason counts."""
    out = tl.where(nfe - best_at >= STALL_STEPS, STALLED, RUNNING)
    out = tl.where(nfe >= max_iter, MAX_ITER, out)
    out = tl.where(residual < float("inf"), out, NON_FINITE)  # NaN compares false
    return tl.where(residual <= tol, CONVERGED, out)


@triton.jit(do_not_specialize=["rows", "step", "max_iter"])  # n: whole vectors are loaded
def _anderson_step_kernel(
    fz_ptr,  # (rows, n): f(z)
    z_ptr,  # (rows, n): the iterate, replaced by the next one
    best_ptr,  # (rows, n): f of the best iterate
    images_ptr,  # (M, rows, n): f of the last M iterates, a ring
    residuals_ptr,  # (M, rows, n)
    gram_ptr,  # (rows, M, M), by place in the ring
    best_residual_ptr,  # (rows,)
    nfe_ptr,  # (rows,) int32
    best_at_ptr,  # (rows,) int32
    outcome_ptr,  # (rows,) int8
    active_ptr,  # (rows,) bool
    trace_ptr,  # (steps, rows) or None
    rows,
    n,
    step,  # 0 begins: no state but z is read
    max_iter,
    tol: "fp64",
    beta: "fp64",
    lam: "fp64",
    M: tl.constexpr,
    DAMPED: tl.constexpr,
    CHOSEN: tl.constexpr,  # active says from the beginning which rows are solved
    T: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if CHOSEN:  # noqa: SIM102 - known when compiling
        if tl.load(active_ptr + row) == 0:
            return
    if step > 0:  # noqa: SIM102 - a ring without state must not be read
        if tl.load(active_ptr + row) == 0:
            return
    # Every thread reads these and one replaces them, behind the barrier.
    best = tl.load(best_residual_ptr + row, mask=step > 0, other=float("inf"))
    best_at = tl.load(best_at_ptr + row, mask=step > 0, other=0)
    slot = step % M
    count = tl.minimum(step + 1, M)
    z_ptr += row * n
    fz_ptr += row * n
    plane = rows.to(tl.int64) * n  # of one place in the ring
    images_ptr += row * n
    residuals_ptr += row * n
    square = tl.zeros((BLOCK,), T)
    sums = ()
    for _ in tl.static_range(M):
        sums += (tl.zeros((BLOCK,), T),)
    for start in range(0, n, BLOCK):
        i = start + tl.arange(0, BLOCK)
        inside = i < n
        f = tl.load(fz_ptr + i, mask=inside, other=0.0).to(T)
        g = f - tl.load(z_ptr + i, mask=inside, other=0.0)
        tl.store(images_ptr + slot * plane + i, f, mask=inside)
        tl.store(residuals_ptr + slot * plane + i, g, mask=inside)
        square += f * f
        new = (sums[0] + g * g,)
        for age in tl.static_range(1, M):
            old_ptr = residuals_ptr + ((slot - age + M) % M) * plane
            old = tl.load(old_ptr + i, mask=i < tl.where(age < count, n, 0), other=0.0)
            new += (sums[age] + g * old,)
        sums = new
    gram_ptr += row * (M * M)
    gram = (tl.sum(sums[0], 0),)
    tl.store(gram_ptr + slot * M + slot, gram[0])
    for a in tl.static_range(1, M):
        at = (slot - a + M) % M
        dot = tl.sum(sums[a], 0)
        tl.store(gram_ptr + slot * M + at, dot, mask=a < count)
        tl.store(gram_ptr + at * M + slot, dot, mask=a < count)
        gram += (dot,)
        for b in tl.static_range(1, a + 1):
            older = gram_ptr + at * M + (slot - b + M) % M
            gram += (tl.load(older, mask=a < count, other=0.0),)

    norm = tl.sqrt(tl.sum(square, 0))
    residual = tl.sqrt(gram[0]) / (norm + RESIDUAL_FLOOR + (norm - norm))  # NaN if it overflows
    better = residual < best
    best_at = tl.where(better, step + 1, best_at)
    ended = verdict(residual, step + 1, best_at, tl.full((), tol, T), max_iter)
    tl.debug_barrier()  # sums over the lanes of a single warp hold none
    tl.store(best_residual_ptr + row, tl.where(better, residual, best))
    tl.store(best_at_ptr + row, best_at)
    tl.store(nfe_ptr + row, step + 1)
    tl.store(outcome_ptr + row, ended)  # RUNNING rows go on, so none is left with it
    tl.store(active_ptr + row, ended == RUNNING)
    if trace_ptr is not None:
        tl.store(trace_ptr + step.to(tl.int64) * rows + row, residual)

    alpha = mixing_weights(gram, count, tl.full((), lam, T), M)
    damp = 1.0 - tl.full((), beta, T)
    # The first image is kept whatever it is: a poisoned row returns NaN and not its start.
    kept = tl.where((best_at == step + 1) | (step == 0), n, 0)
    moved = tl.where(ended == RUNNING, n, 0)
    # Threads read images that others of the program wrote, in front of the same barrier.
    for start in range(0, n, BLOCK):
        i = start + tl.arange(0, BLOCK)
        f = tl.load(images_ptr + slot * plane + i, mask=i < n, other=0.0)
        tl.store(best_ptr + row * n + i, f, mask=i < kept)
        mixed = tl.zeros((BLOCK,), T)
        for age in tl.static_range(M):
            place = ((slot - age + M) % M) * plane + i
            there = i < tl.where(age < count, n, 0)
            image = tl.load(images_ptr + place, mask=there, other=0.0)
            if DAMPED:
                image -= damp * tl.load(residuals_ptr + place, mask=there, other=0.0)
            mixed += alpha[age] * image
        tl.store(z_ptr + i, mixed, mask=i < moved)


class AndersonState:
    """Tensors of one solve over rows (R, n), in their compute dtype. Nothing is filled."""

    def __init__(self, z0: Tensor, m: int, steps: int) -> None:
        self.chosen = False  # whether rows have been left out by :meth:`choose`
        rows, n = z0.shape
        new = z0.new_empty
        self.z, self.best = new(rows, n), new(rows, n)
        self.images, self.residuals = new(m, rows, n), new(m, rows, n)
        self.gram, self.best_residual = new(rows, m, m), new(rows)
        self.nfe, self.best_at = (new(rows, dtype=torch.int32) for _ in range(2))
        self.outcome = new(rows, dtype=torch.int8)
        self.active = new(rows, dtype=torch.bool)
        self.trace = new(steps, rows) if steps else None

    def choose(self, rows: Tensor, rest: Outcome, empty: float) -> None:
        """Leave out all but ``rows`` (R,) bool: before the first step they have ended as ``rest``.

        Their answer and their residual are ``empty``.
        """
        self.chosen = True
        self.active.copy_(rows)
        self.best.fill_(empty)
        self.best_residual.fill_(empty)
        self.nfe.zero_()
        self.outcome.fill_(int(rest))


def anderson_step(
    fz: Tensor,  # (R, n)
    state: AndersonState,  # its z, images, best, statistics are updated
    step: int,
    *,
    tol: float,
    max_iter: int,
    beta: float,
    lam: float,
) -> None:
    """Judge ``fz = f(state.z)`` and move every row that goes on to its next iterate."""
    rows, n = state.z.shape
    block = min(power_of_two(n), BLOCK_BYTES // state.z.element_size())
    launch(
        _anderson_step_kernel, (rows,),
        fz, state.z, state.best, state.images, state.residuals, state.gram, state.best_residual,
        state.nfe, state.best_at, state.outcome, state.active, state.trace,
        rows, n, step, max_iter, tol, beta, lam,
        M=state.images.shape[0], DAMPED=beta != 1, CHOSEN=state.chosen,
        T=TYPES[state.z.dtype], BLOCK=block,
        num_warps=4 if block > 128 else 1, num_stages=1,
    )  # fmt: skip
