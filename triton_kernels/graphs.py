"""Stepped solves that are kept and replayed as CUDA graphs: one launch from the host.

The first solve of a kind runs its steps, which compiles the kernels; the second is captured, and
later ones replay that. A kind whose capture failed runs its steps for ever after.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from typing import Any, Protocol

import torch
from torch import Tensor

GRAPHS = 8  # kinds that are kept

_log = logging.getLogger("deqfuse")


class Steps(Protocol):
    """A problem's operands, its state, and its steps."""

    operands: Sequence[Tensor | None]

    def start(self, z0: Tensor | None) -> None:
        """Set the state to ``z0``, or to zero."""

    def steps(self) -> None:
        """Launch everything; nothing is allocated or read back."""

    def answer(self) -> list[Any]:
        """Tensors of the state, or None."""


class _Kept:
    """Steps that are used again: they own their operands, so that a graph may refer to them."""

    def __init__(self, solve: Steps) -> None:
        self.solve = solve
        self.graph: torch.cuda.CUDAGraph | None = None
        self.compiled = False  # by the steps of the first run; a capture may not compile

    def load(self, operands: Sequence[Tensor | None], z0: Tensor | None) -> None:
        for mine, given in zip(self.solve.operands, operands, strict=True):
            if mine is not None and given is not None:
                mine.copy_(given)
        self.solve.start(z0)

    def run(self) -> None:
        if self.graph is None and self.compiled:
            self.graph = _captured(self.solve.steps)
        self.solve.steps() if self.graph is None else self.graph.replay()
        self.compiled = True


_kept: OrderedDict[Hashable, _Kept] = OrderedDict()
_failed: set[Hashable] = set()  # kinds that cannot be captured
_streams: dict[torch.device, torch.cuda.Stream] = {}  # on which captures are made
_lock = threading.Lock()  # from loading a kept solve's operands to reading its answer


def run(
    key: Hashable,
    make: Callable[[Sequence[Tensor | None]], Steps],
    operands: Sequence[Tensor | None],
    z0: Tensor | None,
) -> list[Any]:
    """The answer of ``make(operands)``, a ``Steps``, by what is kept under ``key``.

    Args:
        key: equal for problems that differ in the numbers only.
        make: operands -> the ``Steps`` of a problem with these operands.
        operands: tensors of any shape, or None.
        z0: the start, in a shape that the state takes; None for zero.

    Returns:
        Copies of what ``Steps.answer`` gives.
    """
    with _lock:
        kept = _kept.pop(key, None) or _Kept(_own(make, operands))
        if key not in _failed:
            _kept[key] = kept
        while len(_kept) > GRAPHS:
            _kept.popitem(last=False)
        kept.load(operands, z0)
        try:
            kept.run()
        except RuntimeError as error:
            if not kept.compiled or kept.graph is not None:
                raise  # no capture: the steps or the replay themselves
            _failed.add(key)
            del _kept[key]
            _log.warning(
                "deqfuse: a solve could not be captured as a CUDA graph and runs its steps one by "
                "one from now on, which keeps the host busy: %s. Remedy: no other thread that "
                "synchronises the device at the second solve of a kind, or more free memory.",
                error,
            )
            kept.solve.steps()  # in here, so that an error of its own tells of the first one
        return [None if t is None else t.clone() for t in kept.solve.answer()]


def release() -> None:
    """Free the memory of all kept solves. The next solve of each kind makes it anew."""
    with _lock:
        _kept.clear()


def _own(
    make: Callable[[Sequence[Tensor | None]], Steps], operands: Sequence[Tensor | None]
) -> Steps:
    """Steps on tensors that later calls may write: none are made under ``inference_mode``."""
    with torch.inference_mode(False):
        return make([None if t is None else torch.empty_like(t) for t in operands])


def _captured(steps: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """``torch.cuda.graph`` would synchronise the device; nothing is allocated here, so no need."""
    graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    side = _streams.get(current.device)
    if side is None:
        side = _streams[current.device] = torch.cuda.Stream(current.device)
    side.wait_stream(current)
    with torch.cuda.stream(side):
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            steps()
        except BaseException:
            with suppress(RuntimeError):  # the capture is void already; the first error counts
                graph.capture_end()
            raise
        graph.capture_end()
    current.wait_stream(side)
    return graph
