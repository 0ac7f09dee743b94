"""Options of the forward solvers and of the gradient, as small frozen dataclasses.

Every option object checks itself when it is built, and knows a compact text form (``code``) in
which it travels through the operator schemas; :func:`from_code` turns that back into the object.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from deqfuse import scalars

__all__ = [
    "Anderson",
    "Broyden",
    "GradientOption",
    "Implicit",
    "Neumann",
    "NewtonKrylov",
    "OneStep",
    "Picard",
    "SolverOption",
    "Unrolled",
    "from_code",
]

LinearSolver = Literal["auto", "gmres", "bicgstab", "anderson", "neumann", "dense"]
LINEAR_SOLVERS: tuple[LinearSolver, ...] = get_args(LinearSolver)


@dataclass(frozen=True)
class _Option:
    def __post_init__(self) -> None:
        for spec in dataclasses.fields(self):
            check = _CHECKS.get(spec.name)
            if check is not None:
                name = f"{type(self).__name__}({spec.name}=...)"
                # As a plain Python value, which JSON can carry.
                object.__setattr__(self, spec.name, check(name, getattr(self, spec.name)))
        values = {"type": type(self).__name__, **dataclasses.asdict(self)}
        object.__setattr__(self, "_code", json.dumps(values))

    @property
    def code(self) -> str:
        """The option as text (JSON), the form that operator schemas carry."""
        code: str = self._code  # type: ignore[attr-defined]
        return code


def _linear_solver(name: str, value: Any) -> Any:
    scalars.one_of(name, value, LINEAR_SOLVERS)
    return value


_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "tol": scalars.positive_float,
    "max_iter": scalars.positive_int,
    "m": scalars.positive_int,
    "beta": scalars.mixing,
    "lam": scalars.non_negative_float,
    "rescue": scalars.flag,
    "trace": scalars.flag,
    "restart": scalars.positive_int,
    "k": scalars.positive_int,
    "solver": _linear_solver,
}


@dataclass(frozen=True)
class SolverOption(_Option):
    """Common part of the forward solvers: ``tol``, ``max_iter``, ``trace``.

    Args:
        tol: a row stops when ``|f(z) - z| / (|f(z)| + 1e-5) <= tol``.
        max_iter: evaluations of f per row, JVPs included.
        trace: record the residual of every row at every step (``info.*.trace``).
    """

    tol: float = 1e-4
    max_iter: int = 50
    trace: bool = False

    @property
    def trace_length(self) -> int:
        """Upper bound on the number of steps that a trace can hold."""
        return self.max_iter


RESCUE_STEPS = 8


@dataclass(frozen=True)
class Anderson(SolverOption):
    """Anderson mixing over the last ``m`` residuals (Walker & Ni 2011), per row. The default.

    On the ``cpu`` backend a layer's start from zero begins with plain steps (beta = 1, max_iter
    above 8, tol 1e-6 or looser), until a row's next evaluation is expected to solve it, while each
    halves the residual, four evaluations at most. They count, but no row ends there.

    Args:
        m: history length; m = 1 is plain (damped) iteration.
        beta: mixing factor, ``z <- sum_i alpha_i (z_i + beta (f(z_i) - z_i))``.
        lam: ridge *relative* to the largest diagonal entry of the Gram matrix. An absolute ridge
            swamps the Gram matrix as soon as residuals are small and turns the method into
            averaging.
        rescue: rows that did not converge get up to 8 Newton-Krylov steps from their best iterate.
    """

    m: int = 5
    beta: float = 1.0
    lam: float = 1e-6
    rescue: bool = False

    @property
    def trace_length(self) -> int:
        return self.max_iter + (RESCUE_STEPS + 1 if self.rescue else 0)


@dataclass(frozen=True)
class Picard(SolverOption):
    """Damped fixed-point iteration ``z <- z + beta (f(z) - z)``."""

    beta: float = 1.0


@dataclass(frozen=True)
class Broyden(SolverOption):
    """Limited-memory "good" Broyden on ``f(z) - z = 0``, per row, with the last ``m`` updates."""

    m: int = 20


@dataclass(frozen=True)
class NewtonKrylov(SolverOption):
    """Newton steps by GMRES on matrix-free JVPs, with a backtracking line search, per row.

    The robust choice for rows near or beyond spectral radius 1. ``max_iter`` counts evaluations,
    JVPs included, so its default is larger; ``restart`` is the GMRES restart length.
    """

    max_iter: int = 200
    restart: int = 20


@dataclass(frozen=True)
class GradientOption(_Option):
    """Base of the options that say how gradients pass through an equilibrium."""

    reports: ClassVar[bool] = False  # whether a failed backward solve is reported

    def for_forward(self, solver: SolverOption) -> GradientOption:
        """The option actually used with this forward solver."""
        return self


@dataclass(frozen=True)
class Implicit(GradientOption):
    """The implicit function theorem: solve ``(I - J^T) u = g`` per row and per block.

    Args:
        solver: "auto" (the backend's best), "gmres", "bicgstab", "anderson", "neumann" (the series,
            to tolerance) or "dense" (exact, O(d^3) per row: small d and tests only).
        tol: per row, ``|g + J^T u - u| <= tol |g|``; the forward tolerance if that is tighter.
        max_iter: applications of J^T per row.
    """

    solver: LinearSolver = "auto"
    tol: float = 1e-4
    max_iter: int = 60
    reports: ClassVar[bool] = True

    def for_forward(self, solver: SolverOption) -> GradientOption:
        return dataclasses.replace(self, tol=min(self.tol, solver.tol))


@dataclass(frozen=True)
class OneStep(GradientOption):
    """Jacobian-free backpropagation: ``u = g``, the gradient of one step at the equilibrium."""


@dataclass(frozen=True)
class Neumann(GradientOption):
    """``u = sum_{i<=k} (J^T)^i g``: the Neumann series cut after k applications ("phantom")."""

    k: int = 5


@dataclass(frozen=True)
class Unrolled(GradientOption):
    """Backpropagation through the solver's own steps. Memory grows with the number of steps."""


_TYPES: dict[str, type[_Option]] = {
    cls.__name__: cls
    for cls in (Anderson, Picard, Broyden, NewtonKrylov, Implicit, OneStep, Neumann, Unrolled)
}


@functools.lru_cache(maxsize=256)
def from_code(code: str) -> Any:
    """The option object that ``option.code`` described."""
    values = json.loads(code)
    return _TYPES[values.pop("type")](**values)
