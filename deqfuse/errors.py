"""Every error and warning type of deqfuse. `reporting.py` words what a failed solve says."""

from __future__ import annotations

__all__ = ["BackendUnavailable", "ConvergenceError", "ConvergenceWarning", "DoubleBackwardError"]


class ConvergenceWarning(UserWarning):
    """Rows of a solve did not reach their tolerance; the message has the numbers and the knob."""


class ConvergenceError(RuntimeError):
    """Raised instead of :class:`ConvergenceWarning` when ``on_failure="raise"``."""


class BackendUnavailable(RuntimeError):
    """A backend that was asked for cannot take this call; the message says why and what to do."""


class DoubleBackwardError(RuntimeError):
    """A second derivative through an implicit gradient was requested; see ``Unrolled``."""

    def __init__(self) -> None:
        super().__init__(
            "deqfuse: a second derivative through an implicit gradient was requested "
            "(create_graph=True or a Hessian). The implicit rule gives first derivatives only. "
            "Remedy: use adjoint=Unrolled(), which backpropagates through the solver steps and can "
            "be differentiated again."
        )
