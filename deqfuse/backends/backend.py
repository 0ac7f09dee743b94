"""What a backend is: one record, made at the end of its module and listed in ``BACKENDS``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deqfuse.backends.problem import Problem
from deqfuse.solvers.options import GradientOption, SolverOption

Missing = tuple[str, str]  # why something cannot be had here, and what would change that


class Launchers(NamedTuple):
    """What a backend runs for one kind of block; a launcher is one of these two functions.

    Arguments and results are those of the functions in ``reference.py`` for the same block. Shapes
    and options have been checked when a launcher is called. A layer's parameters have not: a
    launcher that cannot use them fails with a RuntimeError, TypeError or AttributeError, and
    ``functional.py`` then says what is wrong with them. Tensors may have any strides, except the
    equilibrium that an adjoint is given, which is contiguous. Results share no memory with
    arguments.

    Attributes:
        solve: returns :class:`Solved`, or :class:`SolvedLayer` for a layer.
        adjoint: returns gradients of the rows operands, gradients of the parameters, statistics.
    """

    solve: Callable[..., Any]
    adjoint: Callable[..., Any]


def _never(*what: Any) -> bool:
    """False.

    Args:
        *what: whatever is asked about.

    Returns:
        False.
    """
    return False


@dataclass(frozen=True, eq=False)
class Backend:
    """A way to run the layer's solves and adjoints, and Anderson's step for any other map.

    ``BACKENDS`` in ``backends/__init__.py`` lists the records; docs/how-to/extend.md says how to
    add one.

    Args:
        summary: one line for ``python -m deqfuse.info``.
        unavailable: () -> None, or why it cannot run on this machine and what would change that.
        refuses: (problem) -> None, or why it cannot take this problem, as the end of a sentence
            that begins "backend='name' cannot take this call:".
        cells: what it runs for the residual cells.
        fuse: what it runs for the purify-then-combine step.
        layer: what it runs for both at once; ``layer.py`` makes it of the others.
        penalty: the layer's Jacobian penalty; arguments and results as those of
            :func:`deqfuse.backends.penalty.penalty_layer`.
        takes_rows: (z0, solver) -> whether ``anderson`` can run this solve of a map of any kind
            from z0 (R, n).
        anderson: Anderson mixing on the rows of any map, ``(f, z0, option) -> Solution`` with z0
            (R, n). Only called where ``takes_rows`` says so.
        captures_solve: (problem) -> whether a CUDA graph can hold the solve: it never asks the
            device how far it is, and keeps no memory beyond its results.
        captures_adjoint: (device, gradient option) -> the same of the adjoint.
        solve_present: the solve of a layer whose rows lack modalities, in one call: ``(x, params,
            mask, z0_fuse, z0_cells, present (N, B, 1), *how) -> SolvedLayer``, or None where the
            blocks' launchers have to do it (``backends/presence.py``), as they do where there is
            no such function.
        adjoint_present: its adjoint, in the same way: ``(grad_z, grad_cells, states, x, params,
            mask, present, *how)``, results as of ``layer.adjoint`` or None.
        penalty_present: its Jacobian penalty, in the same way: ``(probes, states, x, params, mask,
            present, *how)``, results as of ``penalty`` or None.
        prepare: ``(params, num_groups, variant, solver) -> solve(x, present)``, a layer's solve
            for many calls with parameters that stay as they are, or None where there is nothing to
            gain by it. That solve may return None, where ``layer.solve`` has to do it.
    """

    summary: str
    unavailable: Callable[[], Missing | None]
    refuses: Callable[[Problem], str | None]
    cells: Launchers
    fuse: Launchers
    layer: Launchers
    penalty: Callable[..., Any]
    takes_rows: Callable[[Tensor, SolverOption], bool]
    anderson: Callable[..., Any]
    captures_solve: Callable[[Problem], bool] = _never
    captures_adjoint: Callable[[torch.device, GradientOption], bool] = _never
    solve_present: Callable[..., Any] | None = None
    adjoint_present: Callable[..., Any] | None = None
    penalty_present: Callable[..., Any] | None = None
    prepare: Callable[..., Any] | None = None
