"""The named ways in which the solve of a row can end."""

from __future__ import annotations

import enum

from torch import Tensor

__all__ = ["Outcome"]


class Outcome(enum.IntEnum):
    """How the solve of one row ended. Stored per row as int8.

    CONVERGED and RESCUED are answers; the others are failures (:func:`failed`).

    Attributes:
        CONVERGED: 0, the relative residual reached the tolerance.
        MAX_ITER: 1, the budget of evaluations ran out first.
        STALLED: 2, there was no new best residual in 20 steps.
        NON_FINITE: 3, the row's map became NaN or infinite.
        COUPLED: 4, it had converged, but later steps of other rows moved its residual off the
            tolerance: the map is not row-wise.
        RESCUED: 5, the solver gave up, and continuation reached the tolerance
            (``Anderson(rescue=...)``).
        SINGULAR: 6, of a backward solve: I - J is singular to rounding, the gradient unbounded. The
            row's residual is then the condition number of I - J.
    """

    CONVERGED = 0
    MAX_ITER = 1
    STALLED = 2
    NON_FINITE = 3
    COUPLED = 4
    RESCUED = 5
    SINGULAR = 6


def failed(outcome: Tensor) -> Tensor:
    """Which rows have no answer that meets the tolerance.

    Args:
        outcome: (...) int8, values of :class:`Outcome`.

    Returns:
        (...) bool.
    """
    return (outcome != int(Outcome.CONVERGED)) & (outcome != int(Outcome.RESCUED))


def left_behind(outcome: Tensor) -> Tensor:
    """Which rows a solver gave up although their map is finite, and which others may solve.

    Args:
        outcome: (...) int8, values of :class:`Outcome`.

    Returns:
        (...) bool.
    """
    return (outcome == int(Outcome.MAX_ITER)) | (outcome == int(Outcome.STALLED))
