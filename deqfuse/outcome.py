"""The named ways in which the solve of a row can end."""

from __future__ import annotations

import enum

__all__ = ["Outcome"]


class Outcome(enum.IntEnum):
    """How the solve of one row ended. Stored per row as int8.

    Attributes:
        CONVERGED: 0, the relative residual reached the tolerance.
        MAX_ITER: 1, the budget of evaluations ran out first.
        STALLED: 2, there was no new best residual in 20 steps.
        NON_FINITE: 3, the row's map became NaN or infinite.
        COUPLED: 4, it had converged, but later steps of other rows moved its residual off the
            tolerance: the map is not row-wise.
    """

    CONVERGED = 0
    MAX_ITER = 1
    STALLED = 2
    NON_FINITE = 3
    COUPLED = 4
