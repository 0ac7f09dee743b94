"""Which backend runs a problem, or why not.

Every backend is a record (``backend.py``) that its module makes. An explicit request is never
answered by another backend; only "auto" moves on, to the first of ``BACKENDS`` that accepts.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from deqfuse.backends import cpu, cuda, reference
from deqfuse.backends.backend import Backend as Backend
from deqfuse.backends.problem import Problem as Problem
from deqfuse.errors import BackendUnavailable
from deqfuse.solvers.options import SolverOption

__all__ = [
    "BACKENDS",
    "Backend",
    "BackendName",
    "BackendStatus",
    "Problem",
    "choose",
    "describe",
    "for_rows",
    "load",
]

# Fastest first: "auto" takes the first that accepts the problem.
BACKENDS: dict[str, Backend] = {
    "cuda": cuda.BACKEND,
    "cpu": cpu.BACKEND,
    "reference": reference.BACKEND,
}
BackendName = Literal["auto", "cuda", "cpu", "reference"]  # what may be asked for
ENVIRONMENT = "DEQFUSE_BACKEND"

_log = logging.getLogger("deqfuse")
_announced: set[str] = set()


@dataclass(frozen=True)
class BackendStatus:
    """One line of ``python -m deqfuse.info``.

    Args:
        name: of the backend, as in ``BACKENDS``.
        available: whether it can run on this machine.
        reason: why it cannot, or in one line what it is.
        remedy: what would change that; "" where it is available.
    """

    name: str
    available: bool
    reason: str
    remedy: str


def load(name: str) -> Backend:
    """A backend by its name.

    Args:
        name: a key of ``BACKENDS``; not "auto".

    Returns:
        Its record.

    Raises:
        KeyError: there is no such backend.
    """
    return BACKENDS[name]


def describe() -> list[BackendStatus]:
    """Every backend, whether it can run here, and if not, why and what would change that."""
    table = []
    for name, backend in BACKENDS.items():
        missing = backend.unavailable()
        reason, remedy = missing or (backend.summary, "")
        table.append(BackendStatus(name, missing is None, reason, remedy))
    return table


def _objection(name: str, problem: Problem) -> str | None:
    backend = load(name)
    missing = backend.unavailable()
    if missing is not None:
        return f"{missing[0]}. Remedy: {missing[1]}"
    return backend.refuses(problem)


def for_rows(z0: Tensor, solver: SolverOption) -> str:
    """The backend whose Anderson step solves for rows of any map, as ``DEQ(f)`` has it.

    Args:
        z0: (R, n) start.
        solver: options of the forward solve.

    Returns:
        The name that ``DEQFUSE_BACKEND`` says, or the first of ``BACKENDS`` that can; "reference"
        where the named one cannot.

    Raises:
        ValueError: ``DEQFUSE_BACKEND`` names no backend.
    """
    named = _named("auto")
    names = tuple(BACKENDS) if named == "auto" else (named, "reference")
    return next(name for name in names if load(name).takes_rows(z0, solver))


def _named(requested: str) -> str:
    """What is asked for, by the caller or else by the environment."""
    source = "backend"
    if requested == "auto":
        named = os.environ.get(ENVIRONMENT)
        if not named:
            return requested
        source, requested = f"environment variable {ENVIRONMENT}", named
    if requested not in ("auto", *BACKENDS):
        raise ValueError(
            f"{source}: expected 'auto' or one of {', '.join(BACKENDS)}, got {requested!r}"
        )
    return requested


def choose(requested: str, problem: Problem) -> str:
    """The backend that runs ``problem``.

    Args:
        requested: "auto", or a name in ``BACKENDS``. The environment variable ``DEQFUSE_BACKEND``
            takes the place of "auto".
        problem: what is to be solved, and how.

    Returns:
        A name in ``BACKENDS``; for "auto" the first whose backend is available and does not refuse.

    Raises:
        ValueError: an unknown name.
        BackendUnavailable: the requested backend cannot take the problem; says why.
    """
    requested = _named(requested)
    if requested != "auto":
        objection = _objection(requested, problem)
        if objection is not None:
            raise BackendUnavailable(f"backend={requested!r} cannot take this call: {objection}")
        return requested
    name = next(name for name in BACKENDS if _objection(name, problem) is None)
    if not torch.compiler.is_compiling():
        _announce(name, problem)
    return name


def _announce(name: str, problem: Problem) -> None:
    """Log what "auto" took, and once per process that the compiled module is missing.

    An install may leave that module out, which pip does not show; everything still runs, slowly.
    A log entry, as a warning would stop those who make warnings errors.
    """
    if name not in _announced:
        _announced.add(name)
        _log.info("deqfuse: backend=%r for %s", name, problem.device)
    if name == "reference" and "missing" not in _announced:
        compiled = load("cpu")
        missing = compiled.unavailable()
        if missing is not None and compiled.refuses(problem) is None:
            _announced.add("missing")
            _log.warning(
                "deqfuse: backend='auto' runs plain PyTorch, several times slower than C++: %s. "
                "Remedy: %s. DEQFUSE_BACKEND=reference silences this.",
                *missing,
            )
