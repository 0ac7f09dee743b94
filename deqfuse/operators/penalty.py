"""The layer's Jacobian penalty as an operator whose value and gradients come out of one call.

The gradient of a scalar is its cotangent times a gradient that does not depend on that cotangent.
So the forward call computes both (``backends/penalty.py`` has the equations), keeps the gradients,
and the backward pass scales them; nothing is evaluated again. The second derivative is refused,
since the gradients that were kept are constants; for that refusal the inputs are kept, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from deqfuse import backends
from deqfuse.backends import presence
from deqfuse.backends.empty import empty_grads
from deqfuse.backends.maps import VARIANTS
from deqfuse.operators.bodies import full_precision
from deqfuse.operators.rule import NoSecond
from deqfuse.operators.transforms import FORWARD_MODE, select
from deqfuse.torch_private import (
    apply_function,
    in_transform_or_forward_mode,
    scaled,
    traced,
)

torch.library.define(
    "deqfuse::penalty_layer",
    "(Tensor probes, Tensor states, Tensor[] x, Tensor[] params, Tensor? mask, Tensor? present, "
    "int num_groups, str variant, str backend, bool want_params) -> (Tensor, Tensor[], Tensor[])",
)
Options = tuple[int, str, str]  # num_groups, variant, backend
_operator = torch.ops.deqfuse.penalty_layer.default


def penalty_layer(
    probes: Tensor,  # (K, N + 1, B, d)
    states: Tensor,  # (N + 1, B, d)
    x: Sequence[Tensor],  # N tensors (B, d)
    params: Sequence[Tensor],
    mask: Tensor | None,  # (B, d)
    present: Tensor | None,  # (N, B, 1)
    options: Options,
) -> Tensor:
    """``sum |J_b^T v|^2`` over blocks, probes and rows, differentiable in x and params.

    Args:
        probes: (K, N + 1, B, d) Gaussian vectors v, ordered as by ``backends.penalty.draw_probes``.
        states: (N + 1, B, d) equilibria, held constant; compute dtype.
        x: N tensors (B, d), injections.
        params: the layer's parameters, as in ``backends/layer.py``.
        mask: (B, d) dropout factors of the solve, or None.
        present: (N, B, 1) bool, which cells there are; None for all.
        options: num_groups, variant, backend.

    Returns:
        A scalar in the compute dtype.
    """
    fixed = (probes, states, mask, present)
    if traced(states):
        want_params = torch.is_grad_enabled() and any(t.requires_grad for t in params)
        total: Tensor = _operator(
            probes, states, list(x), list(params), mask, present, *options, want_params
        )[0]
        return total
    if in_transform_or_forward_mode():
        return _Followed.apply(len(x), options, *fixed, *x, *params)[0]
    if torch.is_grad_enabled():
        total = apply_function(_Penalty, len(x), options, *fixed, *x, *params)
        return total
    return _body(probes, states, list(x), list(params), mask, present, *options, False)[0]


def _body(
    probes: Tensor,
    states: Tensor,
    x: list[Tensor],
    params: list[Tensor],
    mask: Tensor | None,
    present: Tensor | None,
    num_groups: int,
    variant: Any,
    backend: str,
    want_params: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    with full_precision(states.device):
        operands = probes, states, x, params, mask, present
        rows, dx, dparams = presence.penalty_layer(
            backends.load(backend), *operands, num_groups, VARIANTS[variant], want_params
        )
    return rows.sum(), dx, dparams


def _fake(
    probes: Tensor, states: Tensor, x: list[Tensor], params: list[Tensor], *rest: Any
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    dtype = states.dtype
    grads = empty_grads(x, True, dtype), empty_grads(params, rest[-1], dtype)
    return states.new_empty(()), *grads


class _Penalty(torch.autograd.Function):
    """The operator in eager mode; why there is such a second form: ``eager.py``."""

    @staticmethod
    def forward(
        ctx: Any,
        num_x: int,
        options: Options,
        probes: Tensor,
        states: Tensor,
        mask: Any,
        present: Any,
        *tensors: Any,
    ) -> Tensor:
        x, params = list(tensors[:num_x]), list(tensors[num_x:])
        want_params = any(ctx.needs_input_grad[6 + num_x :])
        total, dx, dparams = _body(probes, states, x, params, mask, present, *options, want_params)
        _remember(ctx, tensors, [*dx, *dparams])
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
        return *[None] * 6, *_gradients(ctx, grad)


class _Followed(torch.autograd.Function):
    """The operator in a form that transforms of ``torch.func`` follow."""

    generate_vmap_rule = True
    backward = _Penalty.backward

    @staticmethod
    def forward(
        num_x: int, options: Options, probes: Tensor, states: Tensor, mask: Any, present: Any,
        *tensors: Any,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        x, params = list(tensors[:num_x]), list(tensors[num_x:])
        operands = probes, states, x, params, mask, present
        total, dx, dparams = _operator(*operands, *options, True)
        return total, *dx, *dparams

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(*output[1:])
        _remember(ctx, inputs[6:], output[1:])

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(FORWARD_MODE)


def _remember(ctx: Any, inputs: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    ctx.num_inputs = len(inputs)
    ctx.save_for_backward(*inputs, *grads)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grad: Tensor | None) -> list[Tensor | None]:
    """Of every input, None where it was not computed."""
    if grad is None:
        return [None] * ctx.num_inputs
    saved = ctx.saved_tensors
    inputs, kept = saved[: ctx.num_inputs], saved[ctx.num_inputs :]
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


def _vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    """One call after the other: parameters have gradients of their own in each."""
    calls = [_operator(*select(args, in_dims, i)) for i in range(info.batch_size)]
    total, dx, dparams = zip(*calls, strict=True)
    stacked = [[torch.stack(each) for each in zip(*lists, strict=True)] for lists in (dx, dparams)]
    return (torch.stack(total), *stacked), (0, *([0] * len(each) for each in stacked))


torch.library.impl("deqfuse::penalty_layer", "CompositeExplicitAutograd")(_body)
torch.library.register_fake("deqfuse::penalty_layer")(_fake)
torch.library.register_autograd("deqfuse::penalty_layer", _backward, setup_context=_setup)
torch.library.register_vmap("deqfuse::penalty_layer", _vmap)
