"""Injections of unit size: rows divided by their root mean square, and the gradient of that.

Eager mode takes a backend's kernel for all injections at once; in torch's operations, a dozen for
each, they cost as much as a small solve. Compilers and transforms are given these operations, which
they can fuse and follow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from deqfuse import backends
from deqfuse.backends.problem import compute_dtype
from deqfuse.torch_private import apply_function, in_transform_or_forward_mode, traced

LEAST_RMS = 1e-12  # whose squares float32 can still hold


def unit_size(x: Sequence[Tensor], backend: str) -> list[Tensor]:
    """Each row over its root mean square; NaN where its squares overflow.

    A norm that is infinite would leave a row of zeros, an input like any other. Rows of zeros, and
    those too small to have a direction, become zeros without a gradient, which would be huge.

    Args:
        x: N tensors (B, d) of one dtype.
        backend: whose kernel to take, if it has one.

    Returns:
        N tensors (B, d).
    """
    launch = backends.load(backend).unit_size
    if launch is None or traced(x[0]) or in_transform_or_forward_mode():
        return [(t * _scale(t)).to(t.dtype) for t in x]
    if torch.is_grad_enabled() and any(t.requires_grad for t in x):
        return list(apply_function(_UnitSize, launch, *x))
    return launch(list(x), [])


def _scale(x: Tensor) -> Tensor:
    dtype, width = compute_dtype(x.dtype), math.sqrt(x.shape[-1])
    norm, least = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=dtype), LEAST_RMS * width
    scale = torch.where(norm > least, width / norm.clamp_min(least), 0.0)
    return torch.where(norm < math.inf, scale, math.nan)


def _gradient(x: Tensor, grad: Tensor) -> Tensor:
    """For y = s x, with s the scale: ``s (g - y mean(y g))``."""
    scale = _scale(x)
    wide, grad = x.to(scale.dtype), grad.to(scale.dtype)  # products of 16 bits could overflow
    along = (wide * grad).mean(-1, keepdim=True)
    return (scale * (grad - scale * scale * along * wide)).to(x.dtype)


class _UnitSize(torch.autograd.Function):
    """A backend's kernel in both directions; a second derivative is that of torch's operations."""

    @staticmethod
    def forward(ctx: Any, launch: Callable[..., list[Tensor]], *x: Tensor) -> tuple[Tensor, ...]:
        ctx.launch = launch
        ctx.save_for_backward(*x)
        return tuple(launch(list(x), []))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x = ctx.saved_tensors
        if torch.is_grad_enabled():  # with create_graph=True
            return None, *map(_gradient, x, grads)
        return None, *ctx.launch(list(x), list(grads))
