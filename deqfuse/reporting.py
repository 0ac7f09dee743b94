"""Saying that a solve did not converge: at once on the CPU, without a synchronisation on a GPU."""

from __future__ import annotations

import os
import sys
import threading
import warnings
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from deqfuse.errors import ConvergenceError, ConvergenceWarning
from deqfuse.outcome import Outcome, failed
from deqfuse.solvers.options import GradientOption, SolverOption

OnFailure = Literal["warn", "raise", "ignore"]
ON_FAILURE: tuple[OnFailure, ...] = get_args(OnFailure)


class Part(NamedTuple):
    """What is solved, in words, and which part of the statistics belongs to it.

    Attributes:
        name: as a message has it.
        at: index into the statistics.
        joint: for a map that the user gave, the remedy where its rows see each other, as code; ""
            for the layer's own maps, whose rows never do.
    """

    name: str
    at: Any
    joint: str = ""


Parts = tuple[Part, ...]
_LAYER_NAMES = ("the modality cells", "the fuse block")
CELLS: Parts = (Part(_LAYER_NAMES[0], ...),)
FUSE: Parts = (Part(_LAYER_NAMES[1], ...),)
LAYER: Parts = (Part(_LAYER_NAMES[0], slice(None, -1)), Part(_LAYER_NAMES[1], -1))
FIXED_POINT: Parts = (Part("the fixed point", ..., "DEQ(f, rows='joint')"),)  # of any callable
FINE = (Outcome.CONVERGED, Outcome.RESCUED, Outcome.ABSENT)
FAILURES = tuple(kind for kind in Outcome if kind not in FINE)
NEAR_ROUNDING = 1e-5  # where float32 residuals of wide layers end
COUPLED = (
    "The map lets rows see each other (batch statistics, attention or a product over the batch, "
    "random draws), so their answers and gradients are wrong. Remedy: {joint}, or a map of each "
    "row alone."
)
JOINT = " If the map lets rows see each other: {joint}."
ROUNDING = "That is near float32 rounding. Remedy: a larger tol, or float64."


class _Statistics(NamedTuple):
    """A block's outcomes and residuals on their way to the host, to be looked at once there."""

    outcome: Tensor
    residual: Tensor


class _Failures(NamedTuple):
    """What is said of a block: rows, how many ended in which failure, the worst of them."""

    total: int
    counts: dict[Outcome, int]
    residual: float
    condition: float  # of I - J, in a backward solve

    @classmethod
    def of(cls, statistics: _Statistics) -> _Failures:
        outcome, residual = statistics
        counts: dict[Outcome, int] = {}
        for kind in FAILURES:
            counts[kind] = int((outcome == int(kind)).sum())
        singular = outcome == int(Outcome.SINGULAR)
        judged = failed(outcome) & ~singular & residual.isfinite()
        worst = [torch.where(rows, residual, 0.0) for rows in (judged, singular)]
        return cls(outcome.numel(), counts, *(float(r.amax()) if r.numel() else 0.0 for r in worst))


@dataclass
class _Late:
    """A report on its way from the device, to be made once it has arrived."""

    statistics: _Statistics
    arrived: Any  # torch.cuda.Event
    part: Part
    option: SolverOption | GradientOption


LATE = 64  # reports that wait at most: the host may be far ahead of the device

_late: deque[_Late] = deque()
_dropped = 0  # reports that had no place there since the last look
_lock = threading.Lock()


def _after_fork() -> None:
    """A child has no use of its parent's events, and CUDA fails if it asks one."""
    global _lock, _dropped
    _lock, _dropped = threading.Lock(), 0  # another thread of the parent may have held the lock
    _late.clear()


if hasattr(os, "register_at_fork"):  # Windows does not fork
    os.register_at_fork(after_in_child=_after_fork)


def backward(parts: Parts) -> Parts:
    """The names of the backward solves, in their order: the last block comes first."""
    return tuple(p._replace(name=f"the backward solve of {p.name}") for p in reversed(parts))


def report(
    parts: Parts,
    outcome: Tensor,  # int8, any shape
    residual: Tensor,  # the same shape
    option: SolverOption | GradientOption,
    on_failure: str,
    *,
    all_converged: bool = False,  # known already
    cotangents: Sequence[Tensor | None] = (),  # of a backward solve, as they came
) -> None:
    """Warn or raise when rows of a solve failed.

    A backward whose incoming cotangents are not finite warns where it would raise: nothing failed
    here, and ``GradScaler`` counts on such gradients to arrive, in order to skip their step.

    Args:
        parts: names of what was solved, and where its statistics are in the tensors.
        outcome, residual: per row, as in ``BlockInfo``.
        option: the solver or gradient option, whose knobs the message names.
        on_failure: "warn", "raise" or "ignore". Under ``torch.compile``, and while a CUDA graph is
            captured, always "ignore".
        all_converged: whether the caller knows that no row failed.
        cotangents: what a backward solve was given; () for a forward one.
    """
    if torch.compiler.is_compiling():
        return
    flush()
    if all_converged or on_failure == "ignore" or outcome.numel() == 0:
        return
    if outcome.is_cuda:
        if _capturing():
            return  # a replayed graph runs none of this
        if on_failure == "warn":
            _report_late(parts, outcome, residual, option)
            return
    if outcome.any():  # CONVERGED is 0; the summary is for those who need it
        if isinstance(option, SolverOption) and not any(part.joint for part in parts):
            option = option.settled(rescue=option.rescues(outcome.device))
        if on_failure == "raise" and any(
            g is not None and not g.isfinite().all() for g in cotangents
        ):
            on_failure = "warn"
        outcome, residual = outcome.cpu(), residual.detach().cpu()
        for part in parts:
            statistics = _Statistics(outcome[part.at], residual[part.at])
            _say(part, _Failures.of(statistics), option, on_failure)


def _report_late(
    parts: Parts, outcome: Tensor, residual: Tensor, option: SolverOption | GradientOption
) -> None:
    """Two copies to pinned memory and an event, 5 bytes a row and block: no kernel, no waiting.

    Counting on the device would take more launches than the layer's forward has.
    """
    stream = torch.cuda.current_stream(outcome.device)
    outcome, residual = (t.to("cpu", non_blocking=True) for t in (outcome, residual))
    arrived = torch.cuda.Event()
    arrived.record(stream)
    for part in parts:
        statistics = _Statistics(outcome[part.at], residual[part.at])
        _enqueue(_Late(statistics, arrived, part, option))


def _enqueue(item: _Late) -> None:
    """The oldest report makes room for a new one."""
    global _dropped
    with _lock:
        _late.append(item)
        if len(_late) > LATE:
            _late.popleft()
            _dropped += 1


def flush() -> None:
    """Report what has arrived from devices since the last look. Never waits.

    Does nothing while the current stream is captured: asking an event would end the capture.
    """
    global _dropped
    if torch.compiler.is_compiling() or not _late or _capturing():
        return
    while True:
        with _lock:
            if not _late or not _late[0].arrived.query():
                return
            item = _late.popleft()
            dropped, _dropped = _dropped, 0
        if dropped:
            warnings.warn(
                f"deqfuse: {dropped} older reports about solves on the GPU were dropped unread, "
                "since the host was far ahead of the device. Remedy: look at info.converged now "
                "and then, or synchronise. on_failure='ignore' silences this.",
                ConvergenceWarning,
                stacklevel=_callers_level(),
            )
        _say(item.part, _Failures.of(item.statistics), item.option, "warn")


def _capturing() -> bool:
    """Whether the current stream's work goes into a CUDA graph. False without CUDA."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def _say(
    part: Part,
    failures: _Failures,
    option: SolverOption | GradientOption,
    on_failure: str,
) -> None:
    total, counts, worst, condition = failures
    lost = sum(counts.values())
    if lost == 0:
        return
    source = "loss" if isinstance(option, GradientOption) else "input"
    texts = {
        Outcome.MAX_ITER: "used up their evaluations",
        Outcome.STALLED: "stalled",
        Outcome.NON_FINITE: f"became NaN or infinite (check the {source})",
        Outcome.COUPLED: "had converged and changed with later steps of other rows",
        Outcome.EMPTY: "have no modality present",
        Outcome.SINGULAR: f"have a singular I - J (condition number up to {condition:.0e})",
    }
    parts = [f"{counts[kind]} {text}" for kind, text in texts.items() if counts[kind]]
    message = f"deqfuse: {lost} of {total} rows of {part.name} did not converge: "
    message += ", ".join(parts)
    if counts[Outcome.COUPLED]:  # no solver option makes separate rows of these
        message += f"; worst relative residual {worst:.1e}. "
        message += COUPLED.format(joint=part.joint)
    elif counts[Outcome.MAX_ITER] or counts[Outcome.STALLED]:
        tol = getattr(option, "tol", float("nan"))
        message += f"; worst relative residual {worst:.1e}, tol {tol:.1e}. "
        message += ROUNDING if tol < worst < NEAR_ROUNDING else _remedy(part.name, option)
        if part.joint and total > 1:
            message += JOINT.format(joint=part.joint)
    elif counts[Outcome.SINGULAR]:
        message += ". Their gradient is unbounded. Remedy: info.jacobian_penalty() in the loss."
    else:  # for rows that are merely poisoned no solver option is a remedy
        message += "."
    message += " on_failure='ignore' silences this."
    if on_failure == "raise":
        raise ConvergenceError(message)
    warnings.warn(message, ConvergenceWarning, stacklevel=_callers_level())


def _callers_level() -> int:
    """``stacklevel`` of the nearest frame outside deqfuse and torch: the user's own line."""
    frame, level = sys._getframe(1), 1
    while frame.f_globals.get("__name__", "").partition(".")[0] in ("deqfuse", "torch"):
        if frame.f_back is None:  # the autograd engine's own thread
            break
        frame, level = frame.f_back, level + 1
    return level


def _remedy(what: str, option: SolverOption | GradientOption) -> str:
    if isinstance(option, GradientOption):
        return f"Their gradient is inexact. {option.remedy()}."
    remedies = option.remedies()
    if what in _LAYER_NAMES:
        remedies.append("init='contractive' where it is 'torch'")
    return f"Remedies: {', '.join(remedies)}, or info.jacobian_penalty() in the loss."
