"""The named ways in which the solve of a row can end."""

from __future__ import annotations

import enum

__all__ = ["Outcome"]


class Outcome(enum.IntEnum):
    """How the solve of one row ended. Stored per row as int8."""

    CONVERGED = 0
    MAX_ITER = 1
    STALLED = 2
    NON_FINITE = 3

    @property
    def sentence(self) -> str:
        """The outcome in words."""
        return _SENTENCES[self]


_SENTENCES = {
    Outcome.CONVERGED: "the relative residual reached the tolerance",
    Outcome.MAX_ITER: "the evaluation budget ran out first",
    Outcome.STALLED: "no new best residual in 20 steps",
    Outcome.NON_FINITE: "the row's map became NaN or infinite",
}
