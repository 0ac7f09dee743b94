"""Which backend runs a problem, or why not.

Every backend is a module with the same few names: ``unavailable()`` (None, or why it cannot run
here and what would change that), ``refuses(problem)`` (None, or why it cannot take this problem)
and the six functions ``solve_*`` and ``adjoint_*`` for ``cells``, ``fuse`` and ``layer``. An
explicit request is never answered by another backend; only "auto" moves on.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from types import ModuleType

import torch

from deqfuse.backends import cpu, cuda, reference
from deqfuse.backends.problem import Problem as Problem
from deqfuse.errors import BackendUnavailable

__all__ = ["BACKENDS", "BackendStatus", "Problem", "allowed", "choose", "describe", "load"]

# Fastest first: "auto" takes the first that accepts the problem.
_MODULES: dict[str, ModuleType] = {"cuda": cuda, "cpu": cpu, "reference": reference}
BACKENDS = tuple(_MODULES)
ENVIRONMENT = "DEQFUSE_BACKEND"

_log = logging.getLogger("deqfuse")
_announced: set[str] = set()


@dataclass(frozen=True)
class BackendStatus:
    """One line of ``python -m deqfuse.info``."""

    name: str
    available: bool
    reason: str
    remedy: str


def load(name: str) -> ModuleType:
    """The module of a backend."""
    return _MODULES[name]


def describe() -> list[BackendStatus]:
    """Every backend, whether it can run here, and if not, why and what would change that."""
    table = []
    for name in BACKENDS:
        missing = load(name).unavailable()
        reason, remedy = missing or ((load(name).__doc__ or "").partition("\n")[0], "")
        table.append(BackendStatus(name, missing is None, reason, remedy))
    return table


def _objection(name: str, problem: Problem) -> str | None:
    backend = load(name)
    missing = backend.unavailable()
    if missing is not None:
        return f"{missing[0]}. Remedy: {missing[1]}"
    refusal: str | None = backend.refuses(problem)
    return refusal


def allowed(name: str) -> bool:
    """Whether the environment leaves the choice open or names this backend."""
    return (os.environ.get(ENVIRONMENT) or "auto") in ("auto", name)


def choose(requested: str, problem: Problem) -> str:
    """The backend that runs ``problem``.

    Args:
        requested: "auto", or a name in ``BACKENDS``. The environment variable ``DEQFUSE_BACKEND``
            takes the place of "auto".

    Raises:
        ValueError: an unknown name.
        BackendUnavailable: the requested backend cannot take the problem; says why.
    """
    source = "backend"
    if requested == "auto" and os.environ.get(ENVIRONMENT):
        source, requested = f"environment variable {ENVIRONMENT}", os.environ[ENVIRONMENT]
    if requested not in ("auto", *BACKENDS):
        raise ValueError(
            f"{source}: expected 'auto' or one of {', '.join(BACKENDS)}, got {requested!r}"
        )
    if requested != "auto":
        objection = _objection(requested, problem)
        if objection is not None:
            raise BackendUnavailable(f"backend={requested!r} cannot take this call: {objection}")
        return requested
    name = next(name for name in BACKENDS if _objection(name, problem) is None)
    if not torch.compiler.is_compiling() and name not in _announced:
        _announced.add(name)
        _log.info("deqfuse: backend=%r for %s", name, problem.device)
    return name
