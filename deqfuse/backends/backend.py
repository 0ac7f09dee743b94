"""What a backend is: one record, made at the end of its module and listed in ``BACKENDS``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from deqfuse.backends.problem import Problem
from deqfuse.solvers.options import SolverOption

Missing = tuple[str, str]  # why something cannot be had here, and what would change that


class Launchers(NamedTuple):
    """What a backend runs for one kind of block; arguments and results as in ``reference.py``."""

    solve: Callable[..., Any]  # -> Solved, or SolvedLayer
    adjoint: Callable[..., Any]  # -> gradients, statistics


@dataclass(frozen=True)
class Backend:
    """A way to run the layer's solves and adjoints, and Anderson's step for any other map.

    Args:
        summary: one line for ``python -m deqfuse.info``.
        unavailable: None, or why it cannot run on this machine and what would change that.
        refuses: None, or why it cannot take this problem.
        cells, fuse, layer: what it runs for each kind of block.
        penalty: the layer's Jacobian penalty, as :func:`deqfuse.backends.penalty.penalty_layer`.
        takes_rows: whether ``anderson`` can run this solve of a map of any kind.
        anderson: Anderson mixing on the rows of any map, ``(f, z0, option) -> Solution``.
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
