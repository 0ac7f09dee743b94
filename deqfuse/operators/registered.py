"""The operators' implementations, fake kernels and gradients, as ``torch.library`` takes them.

This is the form that compilers and exports see. Rules of ``vmap``: ``transforms.py``.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from deqfuse.backends.empty import empty_grads, empty_solved, empty_states, empty_statistics
from deqfuse.backends.problem import compute_dtype
from deqfuse.errors import DoubleBackwardError
from deqfuse.operators import bodies, rule
from deqfuse.operators.blocks import BLOCKS, Block
from deqfuse.solvers.options import from_code


def _solve(block: Block, *inputs: Any) -> tuple[Any, ...]:
    return bodies.solve_body(block, *block.split(inputs))[: block.num_results]


def _adjoint(block: Block, *inputs: Any) -> tuple[Any, ...]:
    rows, params, statistics = block.split_gradients(bodies.adjoint_body(block, *inputs))
    return block.join(rows, params, statistics[:3])


def _fake_solve(block: Block, *inputs: Any) -> tuple[Any, ...]:
    rows, _, _, (_, _, solver, *_) = block.split(inputs)
    option = from_code(solver)
    steps, like = option.max_iter if option.trace else 0, rows[0]
    states = like if block.num_rows is not None else empty_states(rows)
    solved = empty_solved(states, steps, compute_dtype(like.dtype))
    fused = (solved[0].new_empty(like.shape),) if block.num_equilibria == 2 else ()
    return *fused, *solved


def _fake_adjoint(block: Block, *inputs: Any) -> tuple[Any, ...]:
    star, want_params = inputs[block.num_equilibria], inputs[-1]
    rows, params, _, _ = block.split(inputs[block.num_equilibria + 1 :])
    grads = [t.new_empty(t.shape) for t in rows]
    return block.join(grads, empty_grads(params, want_params), empty_statistics(star))


def _setup(block: Block, ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    rule.remember(block, ctx, *block.split(inputs), output)


def _backward(block: Block, ctx: Any, *grads: Any) -> tuple[Any, ...]:
    at = 1 if block.num_rows is None else block.num_rows
    want_params = any(ctx.needs_input_grad[at])
    row_grads, param_grads = rule.gradient(ctx, _call_adjoint, grads, want_params)
    others = [None] * (block.num_others + len(ctx.options))
    return block.join(row_grads, param_grads, others)


def _call_adjoint(block: Block, *operands: Any) -> Any:
    """The adjoint as an operator, which compilers see and which refuses to be differentiated."""
    return block.adjoint(*operands)


def _refuse(ctx: Any, *grads: Any) -> Any:
    raise DoubleBackwardError


for _block in BLOCKS:
    for _operator, _body, _fake in (
        (_block.solve, _solve, _fake_solve),
        (_block.adjoint, _adjoint, _fake_adjoint),
    ):
        _name = _operator.name()
        torch.library.impl(_name, "CompositeExplicitAutograd")(functools.partial(_body, _block))
        torch.library.register_fake(_name)(functools.partial(_fake, _block))
    torch.library.register_autograd(
        _block.solve.name(),
        functools.partial(_backward, _block),
        setup_context=functools.partial(_setup, _block),
    )
    torch.library.register_autograd(_block.adjoint.name(), _refuse)
