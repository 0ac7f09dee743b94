"""The layer's Jacobian penalty as an operator whose value and gradients come out of one call.

The gradient of a scalar is its cotangent times a gradient that does not depend on that cotangent.
So the forward call computes both (``backends/penalty.py`` has the equations), keeps the gradients,
and the backward pass scales them: nothing of the evaluation is kept or repeated. The second
derivative is refused, since the gradients that were kept are constants.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from deqfuse import backends
from deqfuse.backends.maps import VARIANTS
from deqfuse.operators.bodies import full_precision
from deqfuse.operators.rule import NoSecond
from deqfuse.torch_private import apply_function, scaled, traced

torch.library.define(
    "deqfuse::penalty_layer",
    "(Tensor probes, Tensor states, Tensor[] x, Tensor[] params, Tensor? mask, "
    "int num_groups, str variant, str backend, bool want_params) -> (Tensor, Tensor[], Tensor[])",
)
_operator = torch.ops.deqfuse.penalty_layer.default


def penalty_layer(
    probes: Tensor,  # (K, N + 1, B, d)
    states: Tensor,  # (N + 1, B, d)
    x: Sequence[Tensor],  # N tensors (B, d)
    params: Sequence[Tensor],
    mask: Tensor | None,  # (B, d)
    options: tuple[int, str, str],
) -> Tensor:
    """``sum |J_b^T v|^2`` over blocks, probes and rows, differentiable in x and params.

    Args:
        probes: (K, N + 1, B, d) Gaussian vectors v, ordered as by ``backends.penalty.draw_probes``.
        states: (N + 1, B, d) equilibria, held constant; compute dtype.
        x: N tensors (B, d), injections.
        params: the layer's parameters, as in ``backends/layer.py``.
        mask: (B, d) dropout factors of the solve, or None.
        options: num_groups, variant, backend.

    Returns:
        A scalar in the compute dtype.
    """
    fixed = (probes, states, mask, *options)
    if traced(states):
        return _operator(*_arguments(fixed, x, params, _any_requires_grad(params)))[0]
    if torch.is_grad_enabled():
        result: Tensor = apply_function(_Penalty, len(x), fixed, *x, *params)
        return result
    return _body(*_arguments(fixed, x, params, False))[0]


def _any_requires_grad(tensors: Sequence[Tensor]) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _arguments(
    fixed: tuple[Any, ...], x: Sequence[Tensor], params: Sequence[Tensor], want_params: bool
) -> tuple[Any, ...]:
    """In the operator's order."""
    probes, states, mask, *options = fixed
    return probes, states, list(x), list(params), mask, *options, want_params


def _body(
    probes: Tensor,
    states: Tensor,
    x: list[Tensor],
    params: list[Tensor],
    mask: Tensor | None,
    num_groups: int,
    variant: Any,
    backend: str,
    want_params: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    with full_precision(states.device):
        rows, dx, dparams = backends.load(backend).penalty(
            probes, states, x, params, mask, num_groups, VARIANTS[variant], want_params
        )
    return rows.sum(), dx, dparams


def _fake(
    probes: Tensor, states: Tensor, x: list[Tensor], params: list[Tensor], *rest: Any
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    def like(tensors: Sequence[Tensor]) -> list[Tensor]:
        return [t.new_empty(t.shape, dtype=states.dtype) for t in tensors]

    return states.new_empty(()), like(x), like(params) if rest[-1] else []


class _Penalty(torch.autograd.Function):
    """The operator in eager mode; why there is such a second form: ``eager.py``."""

    @staticmethod
    def forward(ctx: Any, num_x: int, fixed: tuple[Any, ...], *tensors: Tensor) -> Tensor:
        x, params = tensors[:num_x], tensors[num_x:]
        want_params = any(ctx.needs_input_grad[2 + num_x :])
        total, dx, dparams = _body(*_arguments(fixed, x, params, want_params))
        _remember(ctx, tensors, [*dx, *dparams])
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return None, None, *_gradients(ctx, grad)


def _remember(ctx: Any, inputs: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    ctx.num_inputs = len(inputs)
    ctx.save_for_backward(*inputs, *grads)


def _gradients(ctx: Any, grad: Tensor) -> list[Tensor | None]:
    """Of every input, None where it was not computed."""
    inputs, kept = ctx.saved_tensors[: ctx.num_inputs], ctx.saved_tensors[ctx.num_inputs :]
    grads = [g.to(t.dtype) for g, t in zip(scaled(kept, grad), inputs, strict=False)]
    if torch.is_grad_enabled():  # with create_graph=True
        grads = list(NoSecond.apply(len(grads), *grads, grad, *inputs))
    return [*grads, *[None] * (len(inputs) - len(grads))]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    _, _, x, params, *ctx.rest = inputs
    _, dx, dparams = output
    ctx.num_x = len(x)
    ctx.mark_non_differentiable(*dx, *dparams)
    _remember(ctx, [*x, *params], [*dx, *dparams])


def _backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    grads = _gradients(ctx, grad)
    return None, None, grads[: ctx.num_x], grads[ctx.num_x :], *[None] * len(ctx.rest)


torch.library.impl("deqfuse::penalty_layer", "CompositeExplicitAutograd")(_body)
torch.library.register_fake("deqfuse::penalty_layer")(_fake)
torch.library.register_autograd("deqfuse::penalty_layer", _backward, setup_context=_setup)
