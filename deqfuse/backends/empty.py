"""Results of the right shapes and dtypes, not filled in: what fake kernels return."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def empty_solved(x: Tensor, steps: int, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
    """Results of a solve whose equilibria have the shape of ``x``."""
    dtype, rows = dtype or x.dtype, x.shape[:-1]
    return (
        x.new_empty(x.shape, dtype=dtype),
        *empty_statistics(x, dtype),
        x.new_empty((steps, *rows), dtype=dtype),
    )


def empty_statistics(x: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
    """Residuals, evaluations and outcomes of the rows of ``x``."""
    rows = x.shape[:-1]
    kinds = (dtype or x.dtype, torch.int32, torch.int8)
    return tuple(x.new_empty(rows, dtype=kind) for kind in kinds)


def empty_states(x: Sequence[Tensor]) -> Tensor:
    """The equilibria of a layer with these injections."""
    return x[0].new_empty((len(x) + 1, *x[0].shape))


def empty_grads(
    params: Sequence[Tensor], want: bool, dtype: torch.dtype | None = None
) -> list[Tensor]:
    """Gradients of parameters, in their own dtypes if no other is given, or none."""
    return [p.new_empty(p.shape, dtype=dtype or p.dtype) for p in params] if want else []
