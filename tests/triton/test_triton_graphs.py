"""Kept solves and their CUDA graphs, on stand-ins for a device; under Triton's interpreter."""

from __future__ import annotations

import contextlib
import gc
import logging
import weakref
from collections.abc import Callable, Iterator
from typing import ClassVar

import pytest
import torch
from torch import is_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton_cases import SolveCase as Case
from triton_cases import poison  # noqa: F401 - a fixture

from deqfuse import Anderson, Implicit
from deqfuse.backends import Problem, cuda
from deqfuse.triton_kernels import graphs, stepped

pytestmark = [pytest.mark.triton, pytest.mark.usefixtures("poison", "kept")]

SOLVER = Anderson(tol=1e-6, max_iter=8)


class Graph:
    """Stands in for a CUDA graph: what was launched while it was captured can be run again."""

    made: ClassVar[list[Graph]] = []
    error: ClassVar[Exception | None] = None  # raised by the capture

    def __init__(self) -> None:
        Graph.made.append(self)
        self.replays = 0

    def capture_begin(self, capture_error_mode: str) -> None:
        assert capture_error_mode == "thread_local"

    def capture_end(self) -> None:
        if Graph.error is not None:
            raise RuntimeError("the capture was invalidated")

    def replay(self) -> None:
        self.replays += 1


class Stream:
    device = torch.device("cuda", 0)
    made = 0  # new ones; without a device it stands for the current stream

    def __init__(self, device: torch.device | None = None) -> None:
        Stream.made += device is not None

    def wait_stream(self, other: Stream) -> None:
        pass


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Stepped solves are kept on the CPU, too, and captured in stand-ins."""
    monkeypatch.setattr(stepped, "_key", lambda name, operands, *rest: (name, operands[0].shape))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: Stream())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(Graph, "made", [])
    monkeypatch.setattr(Stream, "made", 0)
    monkeypatch.setattr(Graph, "error", None)
    monkeypatch.setattr(graphs, "_streams", {})
    monkeypatch.setattr(graphs, "_failed", set())
    graphs.release()
    yield
    graphs.release()


def failing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Captures fail at their first launch, as when another thread synchronises the device."""
    monkeypatch.setattr(Graph, "error", RuntimeError("operation not permitted when capturing"))
    begin = Graph.capture_begin

    def capture_begin(self: Graph, capture_error_mode: str) -> None:
        begin(self, capture_error_mode)
        raise_at_the_next_step(monkeypatch)

    monkeypatch.setattr(Graph, "capture_begin", capture_begin)


def raise_at_the_next_step(monkeypatch: pytest.MonkeyPatch) -> None:
    step = stepped.anderson_step

    def once(*given: object, **how: object) -> None:
        monkeypatch.setattr(stepped, "anderson_step", step)
        raise Graph.error

    monkeypatch.setattr(stepped, "anderson_step", once)


def test_what_was_made_under_inference_mode_serves_training() -> None:
    """A validation pass comes before training; memory made there could not be written later."""
    for solve in Case(rows=3, dim=12).solves(cuda):
        with torch.inference_mode():
            before = solve(SOLVER)
        after = solve(SOLVER)
        assert torch.equal(before.z, after.z)
        assert not after.z.is_inference()


def test_the_second_solve_is_captured_and_later_ones_replay() -> None:
    solve = Case(rows=3, dim=12).solves(cuda)[0]
    first = solve(SOLVER)
    assert not Graph.made
    for _ in range(3):
        again = solve(SOLVER)  # the stand-in's capture runs the steps, its replay nothing
    (graph,) = Graph.made
    assert graph.replays == 3
    assert first.z.data_ptr() != again.z.data_ptr(), "an answer is nobody's memory but the caller's"


def test_captures_share_a_stream() -> None:
    """Every stream is a resource of the driver's; torch hands out 32 and then begins again."""
    for solve in Case(rows=3, dim=12).solves(cuda):
        for _ in range(2):
            solve(SOLVER)
    assert len(Graph.made) == 2
    assert Stream.made == 1


def test_a_capture_that_fails_is_said_once_and_the_steps_go_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    solve = Case(rows=3, dim=12).solves(cuda)[0]
    first = solve(SOLVER)
    failing(monkeypatch)
    with caplog.at_level(logging.WARNING, "deqfuse"):
        answers = [solve(SOLVER) for _ in range(3)]
    assert all(torch.equal(answer.z, first.z) for answer in answers)
    assert len(Graph.made) == 1, "and never again for this kind"
    (record,) = caplog.records
    assert "operation not permitted when capturing" in record.getMessage(), "not what it led to"
    assert not graphs._kept


def test_an_error_of_the_steps_after_a_failed_capture_tells_of_both(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    solve = Case(rows=3, dim=12).solves(cuda)[0]
    solve(SOLVER)
    failing(monkeypatch)
    calls = []
    step = stepped._Solve.steps

    def steps(self: stepped._Solve) -> None:
        calls.append(self)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        step(self)

    monkeypatch.setattr(stepped._Solve, "steps", steps)
    with pytest.raises(RuntimeError, match="out of memory") as caught:
        solve(SOLVER)
    assert caught.value.__context__ is Graph.error


def test_an_error_of_a_first_solve_is_no_failed_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Graph, "error", RuntimeError("does not compile"))
    solve = Case(rows=3, dim=12).solves(cuda)[0]
    raise_at_the_next_step(monkeypatch)
    with pytest.raises(RuntimeError, match="does not compile"):
        solve(SOLVER)
    assert not graphs._failed


def test_released_memory_is_made_anew() -> None:
    solve = Case(rows=3, dim=12).solves(cuda)[0]
    first = solve(SOLVER)
    assert len(graphs._kept) == 1
    cuda.release_graphs()
    assert not graphs._kept
    assert torch.equal(solve(SOLVER).z, first.z)


def test_only_so_many_kinds_are_kept() -> None:
    for rows in range(1, graphs.GRAPHS + 3):
        Case(rows=rows, dim=4).solves(cuda)[0](Anderson(max_iter=1))
    assert len(graphs._kept) == graphs.GRAPHS


class Allocations(TorchDispatchMode):
    """Weak references to the memory of every tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[weakref.ref] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = func(*args, **(kwargs or {}))
        known = {
            t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if is_tensor(t)
        }
        for t in filter(is_tensor, tree_leaves(given)):
            if t.untyped_storage().data_ptr() not in known:  # no view
                self.made.append(weakref.ref(t.untyped_storage()))
        return given


def left_of(run: Callable[[], object]) -> int:
    """How many pieces of memory outlive the results of ``run``."""
    with Allocations() as allocations:
        given = run()
    assert any(storage() is not None for storage in allocations.made)
    del given
    gc.collect()
    return len({id(s()) for s in allocations.made if s() is not None})


def test_nothing_of_a_whole_solve_outlives_its_results() -> None:
    """What a compiler may capture: its graphs use the same memory for the next call."""
    solve = Case(rows=3, dim=12, dtype="f32", n=3).whole_layer(cuda)
    assert left_of(lambda: solve(SOLVER)) == 0


def test_steps_keep_memory_and_so_are_not_captured_by_compilers() -> None:
    case = Case(rows=3, dim=12)
    assert left_of(lambda: case.solves(cuda)[0](SOLVER)) > 0
    asked = Problem(torch.device("cpu"), torch.float64, 12, 2, SOLVER, Implicit())
    assert not cuda.captures_solve(asked)
    assert cuda.captures_solve(asked._replace(dtype=torch.float32))
