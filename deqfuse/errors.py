"""Every error and warning type of deqfuse. `reporting.py` words what a failed solve says."""

from __future__ import annotations

__all__ = ["BackendUnavailable", "ConvergenceError", "ConvergenceWarning", "DoubleBackwardError"]


class ConvergenceWarning(UserWarning):
    """Rows of a solve did not reach their tolerance, forward or backward; ``on_failure="warn"``.

    The message says how many rows of what, in which way they failed, their worst residual, and
    which option to change. On CUDA nothing waits for a solve: the warning comes at the next solve
    or backward pass, or at a look at ``info.converged``.
    """


class ConvergenceError(RuntimeError):
    """Rows of a solve did not reach their tolerance and ``on_failure="raise"``.

    The message is that of :class:`ConvergenceWarning`. ``deqfuse.testing`` raises it, too, where
    what it was given is no equilibrium.
    """


class BackendUnavailable(RuntimeError):
    """A backend that was asked for by name cannot take this call; the message says why and what to
    do.

    ``backend="auto"`` never raises it: it moves on to a backend that accepts.
    """


class DoubleBackwardError(RuntimeError):
    """A second derivative through an implicit gradient or a Jacobian penalty was requested.

    Both give first derivatives only; ``adjoint=Unrolled()`` gives second ones of the layer,
    ``deqfuse.diagnostics.jacobian_penalty`` of the penalty.
    """

    def __init__(self) -> None:
        super().__init__(
            "deqfuse: a second derivative through an implicit gradient or a layer's Jacobian "
            "penalty was requested (create_graph=True or a Hessian). Both give first derivatives "
            "only. Remedy: use adjoint=Unrolled(), which backpropagates through the solver steps "
            "and can be differentiated again; for the penalty diagnostics.jacobian_penalty."
        )
