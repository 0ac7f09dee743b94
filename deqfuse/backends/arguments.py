"""Arguments of compiled operators: dtypes, memory layouts, options as numbers; gradients back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from deqfuse.backends.problem import compute_dtype
from deqfuse.solvers.options import GradientOption, Implicit, Neumann

ADJOINT_HISTORY = 6


def prepare(t: Any, like: Tensor) -> Any:
    """Contiguous, in the compute dtype that belongs to ``like``; None stays None."""
    if t is None:
        return None
    dtype = compute_dtype(like.dtype)
    return t if t.dtype is dtype and t.is_contiguous() else t.to(dtype).contiguous()


def prepare_all(tensors: Sequence[Tensor], like: Tensor) -> list[Tensor]:
    """:func:`prepare` for each."""
    dtype = compute_dtype(like.dtype)
    return [
        t if t.dtype is dtype and t.is_contiguous() else t.to(dtype).contiguous() for t in tensors
    ]


def adjoint_numbers(adjoint: GradientOption) -> tuple[int, float, int, int, float, float]:
    """mode, tol, max_iter, history, beta, lam.

    Mode -1: to tolerance; -2: and then those that are left by factors (``csrc/cpu/kernels.h``);
    k >= 0: the series cut there.
    """
    if isinstance(adjoint, Implicit):
        history = 0 if adjoint.solver == "neumann" else ADJOINT_HISTORY
        return (
            -2 if adjoint.solver == "auto" else -1,
            adjoint.tol,
            adjoint.max_iter,
            history,
            1.0,
            1e-6,
        )
    k = adjoint.k if isinstance(adjoint, Neumann) else 0
    return k, 0.0, k, 0, 1.0, 0.0


def like_all(grads: list[Tensor], params: Sequence[Tensor]) -> list[Tensor]:
    """Gradients in the dtypes of what they belong to."""
    return [g if g.dtype is p.dtype else g.to(p.dtype) for g, p in zip(grads, params, strict=False)]
