"""What an option of a solver or of the gradient is; and the options of the gradient.

The options of a forward solver stand in that solver's file. Every option is a small frozen
dataclass that checks its fields when it is built and knows a compact text form (``code``), in which
it travels through the operator schemas; :func:`from_code` turns that back into the object.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch

from deqfuse import scalars

__all__ = [
    "GradientOption",
    "Implicit",
    "Neumann",
    "OneStep",
    "SolverOption",
    "Unrolled",
    "from_code",
    "knob",
]

LinearSolver = Literal["auto", "gmres", "bicgstab", "anderson", "neumann", "dense"]
LINEAR_SOLVERS: tuple[LinearSolver, ...] = get_args(LinearSolver)


def _linear_solver(name: str, value: Any) -> Any:
    scalars.one_of(name, value, LINEAR_SOLVERS)
    return value


_TYPES: dict[str, type[_Option]] = {}  # by name, for from_code


def knob(default: Any, check: Callable[[str, Any], Any]) -> Any:
    """A field of an option, and the check that gives its value back as a plain Python one.

    Args:
        default: the field's default.
        check: ``(name, value) -> value``, or an error that names the field; ``scalars.py`` has
            them.

    Returns:
        What a dataclass takes as a field's default.
    """
    return dataclasses.field(default=default, metadata={"check": check})


@dataclass(frozen=True)
class _Option:
    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        known = _TYPES.get(cls.__name__)
        # Defined once more, by a notebook's cell or a reload, it takes its own place.
        if known is not None and (known.__module__, known.__qualname__) != (
            cls.__module__,
            cls.__qualname__,
        ):
            raise TypeError(
                f"{cls.__name__}: expected a name of its own, as an operator carries options by "
                f"name; {known.__module__} has one. Remedy: rename the class"
            )
        _TYPES[cls.__name__] = cls

    def __post_init__(self) -> None:
        for spec in dataclasses.fields(self):
            name = f"{type(self).__name__}({spec.name}=...)"
            # As a plain Python value, which JSON can carry.
            value = spec.metadata["check"](name, getattr(self, spec.name))
            object.__setattr__(self, spec.name, value)
        values = {"type": type(self).__name__, **dataclasses.asdict(self)}
        object.__setattr__(self, "_code", json.dumps(values))

    @property
    def code(self) -> str:
        """The option as text (JSON), the form that operator schemas carry."""
        code: str = self._code  # type: ignore[attr-defined]
        return code


@functools.lru_cache(maxsize=256)
def from_code(code: str) -> Any:
    """The option object that ``option.code`` described.

    Args:
        code: the text, as :attr:`SolverOption.code` gives it.

    Returns:
        An option equal to the one that the text came from.
    """
    values = json.loads(code)
    return _TYPES[values.pop("type")](**values)


@dataclass(frozen=True)
class SolverOption(_Option):
    r"""What all forward solvers have in common; a solver's own options are a subclass of it.

    A subclass is a frozen dataclass whose fields are :func:`knob`\s, in the file of its solver.

    Args:
        tol: relative residual at which a row stops: ``|f(z) - z| / (|f(z)| + 1e-5) <= tol``.
        max_iter: evaluations of f per row, JVPs included, after which a row stops in any case.
        trace: whether to record the residual of every row at every step (``info.*.trace``).

    Raises:
        TypeError: a value of a wrong type.
        ValueError: a value out of range.
    """

    tol: float = knob(1e-4, scalars.positive_float)
    max_iter: int = knob(50, scalars.positive_int)
    trace: bool = knob(False, scalars.flag)

    @property
    def unrolls(self) -> bool:
        """Whether autograd can follow the solver's steps, as ``Unrolled()`` asks."""
        return True

    def rescues(self, device: torch.device) -> bool:
        """Whether rows of the layer's own maps that the solver gives up are solved otherwise.

        Args:
            device: of the features.

        Returns:
            False unless the solver has such a rescue.
        """
        return False

    def settled(self, rescue: bool) -> SolverOption:
        """The option with what it leaves open decided.

        Args:
            rescue: whether rows that the solver gives up are solved otherwise.

        Returns:
            An option that leaves nothing open; the same one where it did not.
        """
        return self

    def remedies(self) -> list[str]:
        """What to try where rows did not converge, as code."""
        return [f"{type(self).__name__}(max_iter={2 * self.max_iter})"]


@dataclass(frozen=True)
class GradientOption(_Option):
    """Base of the options that say how gradients pass through an equilibrium.

    Attributes:
        reports: whether a backward solve that failed is reported; a property of the class.
    """

    reports: ClassVar[bool] = False  # whether a failed backward solve is reported

    def for_forward(self, solver: SolverOption) -> GradientOption:
        """The option actually used with this forward solver.

        Args:
            solver: the options of the forward solve.

        Returns:
            The option itself, or one that is never looser than the forward solve.
        """
        return self

    def remedy(self) -> str:
        """What to try where rows of the backward solve did not converge, in words."""
        return ""


@dataclass(frozen=True)
class Implicit(GradientOption):
    """The implicit function theorem: solve ``(I - J^T) u = g`` per row and per block. The default.

    Theorem 1 of arXiv 2306.16645: g is the incoming gradient (cotangent) of the equilibrium, J the
    Jacobian of the block's map there, u what one VJP of the map turns into all gradients.

    Args:
        solver: "auto" (the backend's best, and LU factors of I - J^T for the rows that it leaves:
            on the backend ``cpu``, and up to 1024 features on ``reference``), "gmres", "bicgstab",
            "anderson", "neumann" (the series, to tolerance) or "dense" (exact, O(d^3) per row:
            small d and tests only).
        tol: per row, ``|g + J^T u - u| <= tol |g|``; the forward tolerance if that is tighter.
        max_iter: applications of J^T per row after which the iteration stops in any case.

    Raises:
        TypeError: a value of a wrong type.
        ValueError: a value out of range.
    """

    solver: LinearSolver = knob("auto", _linear_solver)
    tol: float = knob(1e-4, scalars.positive_float)
    max_iter: int = knob(60, scalars.positive_int)
    reports: ClassVar[bool] = True

    def for_forward(self, solver: SolverOption) -> GradientOption:
        return dataclasses.replace(self, tol=min(self.tol, solver.tol))

    def remedy(self) -> str:
        if self.solver == "dense":
            return "I - J is singular there"
        return f"Remedy: Implicit(max_iter={2 * self.max_iter}), a looser tol"


@dataclass(frozen=True)
class OneStep(GradientOption):
    """Jacobian-free backpropagation: ``u = g``, the gradient of one step at the equilibrium.

    The cheapest approximation of :class:`Implicit` (Fung et al., arXiv 2103.12803): exact where the
    Jacobian J of the map vanishes. It has no tolerance, and is never reported as failed.
    """


@dataclass(frozen=True)
class Neumann(GradientOption):
    """``u = sum_{i<=k} (J^T)^i g``: the Neumann series cut off ("phantom gradient").

    An approximation of :class:`Implicit` (Geng et al., arXiv 2111.05177), for maps whose Jacobian J
    contracts. It has no tolerance, and is never reported as failed.

    Args:
        k: applications of J^T, at least 1.

    Raises:
        TypeError: ``k`` is no integer.
        ValueError: ``k`` is less than 1.
    """

    k: int = knob(5, scalars.positive_int)


@dataclass(frozen=True)
class Unrolled(GradientOption):
    """Backpropagation through the solver's own steps. Memory grows with the number of steps.

    The only choice that has second derivatives. It runs on the ``reference`` backend, and not with
    solvers whose steps autograd cannot follow: ``NewtonKrylov()``, ``Anderson(rescue=True)``.
    """
