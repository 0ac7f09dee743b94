"""Solves for rows too wide for one program: the step kernels, launched ``max_iter`` times blindly.

Nothing is read back: a kernel whose rows have all ended returns at once. On a CUDA device a kind
that is solved again is replayed as a CUDA graph (``graphs.py``). Under a capture of the caller's it
is not, nor where kernels are long enough to hide the host.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from deqfuse.outcome import Outcome
from deqfuse.triton_kernels import graphs
from deqfuse.triton_kernels.anderson import AndersonState, anderson_step
from deqfuse.triton_kernels.cell import residual_cell
from deqfuse.triton_kernels.fuse import gate_constant, purify_combine
from deqfuse.triton_kernels.rowmath import precision
from deqfuse.triton_kernels.solve import Answer
from deqfuse.triton_kernels.tiles import Knobs

GRAPH_BYTES = 256 << 20  # of one problem's tensors, beyond which no graph is kept

# z, operands, active, where f(z) goes, scratch
Evaluate = Callable[[Tensor, Sequence["Tensor | None"], "Tensor | None", Tensor, Tensor], None]


class _Solve:
    """One problem's operands (injections first), its state, and its steps.

    The last operand says which rows are solved (those above 0), or is None where all are; the
    others end as ABSENT with zeros, or as EMPTY with NaN.
    """

    def __init__(
        self,
        operands: Sequence[Tensor | None],
        dtype: torch.dtype,
        knobs: Knobs,
        trace: bool,
        evaluate: Evaluate,
        rest: Outcome,
    ) -> None:
        x = operands[0]
        assert x is not None
        self.operands, self.knobs, self.evaluate, self.rest = operands, knobs, evaluate, rest
        start = x.new_empty((x.numel() // x.shape[-1], x.shape[-1]), dtype=dtype)
        self.shape, self.rows = x.shape, x.shape[:-1]
        self.state = AndersonState(start, knobs.m, knobs.max_iter if trace else 0)
        self.image, self.scratch = torch.empty_like(start), torch.empty_like(start)

    def start(self, z0: Tensor | None) -> None:
        state = self.state
        state.z.zero_() if z0 is None else state.z.copy_(z0.reshape(state.z.shape))
        if state.trace is not None:
            state.trace.fill_(torch.nan)  # steps of rows that have ended are not written
        if self.operands[-1] is not None:
            empty = torch.nan if self.rest is Outcome.EMPTY else 0.0
            state.choose(self.operands[-1].flatten() > 0, self.rest, empty)

    def steps(self) -> None:
        state, knobs = self.state, self.knobs
        z, image, scratch = (t.view(self.shape) for t in (state.z, self.image, self.scratch))
        active = state.active.view(self.rows)
        for step in range(knobs.max_iter):
            asked = active if step or state.chosen else None
            self.evaluate(z, self.operands, asked, image, scratch)
            anderson_step(
                self.image, state, step,
                tol=knobs.tol, max_iter=knobs.max_iter, beta=knobs.beta, lam=knobs.lam,
            )  # fmt: skip

    def answer(self) -> list[Any]:
        """The fields of an ``Answer``, and the trace."""
        state, rows = self.state, self.rows
        statistics = (state.best_residual, state.nfe, state.outcome)
        trace = None if state.trace is None else state.trace.view(len(state.trace), *rows)
        return [state.best.view(self.shape), *(t.view(rows) for t in statistics), trace]


def _key(
    name: Hashable,
    operands: Sequence[Tensor | None],
    dtype: torch.dtype,
    knobs: Knobs,
    trace: bool,
) -> Hashable | None:
    """What a kept solve is found by; None where a graph is impossible or not worth its memory."""
    x = operands[0]
    assert x is not None
    size = (2 * knobs.m + 4) * x.numel() * dtype.itemsize
    size += sum(t.numel() * t.element_size() for t in operands if t is not None)
    keep = x.is_cuda and x.numel() > 0 and size <= GRAPH_BYTES  # an empty graph cannot be captured
    if not keep or torch.cuda.is_current_stream_capturing():
        return None
    shapes = tuple(None if t is None else (t.shape, t.dtype) for t in operands)
    stream = torch.cuda.current_stream(x.device).cuda_stream
    return (name, x.device, stream, shapes, dtype, knobs, trace, precision(dtype, knobs.tol))


def _solve(
    name: Hashable,
    operands: Sequence[Tensor | None],
    z0: Tensor | None,
    dtype: torch.dtype,
    knobs: Knobs,
    trace: bool,
    evaluate: Evaluate,
    rest: Outcome,
) -> tuple[Answer, Tensor | None]:
    """Run the steps, as a kept graph where that is possible and worth its memory."""

    def make(operands: Sequence[Tensor | None]) -> _Solve:
        return _Solve(operands, dtype, knobs, trace, evaluate, rest)

    key = _key(name, operands, dtype, knobs, trace)
    if key is None:
        solve = make(operands)
        solve.start(z0)
        solve.steps()
        found = solve.answer()
    else:
        found = graphs.run(key, make, operands, z0)
    *answer, evaluations = found
    return Answer(*answer), evaluations


def solve_cells(
    x: Tensor,  # (N, B, d)
    packed: Tensor,  # (N * packed_size(d),)
    z0: Tensor | None,  # (N, B, d)
    num_groups: int,
    skip: bool,
    dtype: torch.dtype,
    knobs: Knobs,
    trace: bool,
    present: Tensor | None = None,  # (N, B) bool
) -> tuple[Answer, Tensor | None]:
    """Equilibria of all N residual cells, or of those present, and the trace (max_iter, N, B)."""

    def evaluate(
        z: Tensor,
        operands: Sequence[Tensor | None],
        active: Tensor | None,
        image: Tensor,
        scratch: Tensor,
    ) -> None:
        x, packed, _ = operands
        assert x is not None
        assert packed is not None
        residual_cell(
            z, x, packed, num_groups, skip,
            active=active, out=image, hidden=scratch, tol=knobs.tol,
        )  # fmt: skip

    name = ("cells", num_groups, skip)
    operands = (x, packed, present)
    return _solve(name, operands, z0, dtype, knobs, trace, evaluate, Outcome.ABSENT)


def solve_fuse(
    x_fuse: Tensor,  # (B, d)
    cell_sum: Tensor,  # (B, d)
    params: Sequence[Tensor],  # FuseParams
    mask: Tensor | None,  # (B, d)
    z0: Tensor | None,  # (B, d)
    num_modalities: int,
    num_groups: int,
    relu_last: bool,
    dtype: torch.dtype,
    knobs: Knobs,
    trace: bool,
    counts: Tensor | None = None,  # (B,) in dtype, rows' own numbers of modalities
) -> tuple[Answer, Tensor | None]:
    """Equilibrium of the purify-then-combine step, and the trace (max_iter, B)."""

    def evaluate(
        z: Tensor,
        operands: Sequence[Tensor | None],
        active: Tensor | None,
        image: Tensor,
        scratch: Tensor,
    ) -> None:
        x, constant, mask, *rest, counts = operands
        assert x is not None
        assert constant is not None
        weights = [t for t in rest if t is not None]
        purify_combine(
            z, x, constant, mask, num_modalities, weights, num_groups, relu_last,
            active=active, out=image, gated=scratch, tol=knobs.tol, counts=counts,
        )  # fmt: skip

    constant = gate_constant(
        cell_sum, num_modalities, params, num_groups, dtype, knobs.tol, counts
    )  # fmt: skip
    name = ("fuse", num_modalities, num_groups, relu_last)
    operands = (x_fuse, constant, mask, *params, counts)
    return _solve(name, operands, z0, dtype, knobs, trace, evaluate, Outcome.EMPTY)
