"""What is said about rows that did not converge: at once, late, or not at all, as asked."""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from deqfuse import (
    DEQ,
    Anderson,
    Broyden,
    ConvergenceError,
    ConvergenceWarning,
    DEQFusion,
    Implicit,
    Neumann,
    NewtonKrylov,
    OneStep,
    Outcome,
    Picard,
    reporting,
)
from deqfuse.solvers.options import SolverOption


@pytest.fixture(autouse=True)
def empty_queue() -> Iterator[None]:
    reporting._after_fork()
    yield
    reporting._after_fork()


def rotating(slopes: list[float]) -> Any:
    """Rows turned by 90 degrees and stretched: Picard converges for |slope| < 1 only."""
    size = torch.tensor(slopes)[:, None]

    def f(z: Tensor, x: Tensor) -> Tensor:
        return size * torch.stack([-z[:, 1], z[:, 0]], 1) + x

    return f


X = torch.tensor([[1.0, 2.0], [3.0, -1.0], [0.5, 0.5]])
START = torch.zeros(3, 2)
SLOPES = [0.1, 1.0, 2.0]  # the first row converges


def failing(on_failure: str, **options: Any) -> DEQ:
    solver = Picard(tol=1e-3, max_iter=12)
    return DEQ(rotating(SLOPES), **{"solver": solver, "on_failure": on_failure, **options})


# ---- forward ------------------------------------------------------------------------------------


def test_warning_names_rows_residual_tolerance_and_knob() -> None:
    with pytest.warns(ConvergenceWarning) as caught:
        _, info = failing("warn", adjoint=OneStep())(START, X)
    (message,) = [str(w.message) for w in caught]
    worst = float(info.fuse.residual[~info.converged].max())
    assert "2 of 3 rows" in message
    assert "2 used up their evaluations" in message
    assert f"{worst:.1e}" in message
    assert "tol 1.0e-03" in message
    assert "Picard(max_iter=24)" in message
    assert "on_failure='ignore'" in message


def test_raise_carries_the_same_message() -> None:
    with pytest.raises(
        ConvergenceError, match=r"2 of 3 rows .* tol 1\.0e-03.*Picard\(max_iter=24\)"
    ):
        failing("raise")(START, X)


def test_ignore_is_silent_and_info_is_true() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, info = failing("ignore")(START, X)
    assert info.converged.tolist() == [True, False, False]


@pytest.mark.parametrize("on_failure", ["warn", "raise", "ignore"])
def test_silence_when_all_rows_converge(on_failure: str) -> None:
    deq = DEQ(rotating([0.1, 0.2, 0.3]), on_failure=on_failure)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        z, info = deq(START, X.clone().requires_grad_())
        z.backward(torch.randn(3, 2, generator=torch.Generator().manual_seed(0)))
    assert info.converged.all()


@pytest.mark.parametrize(
    ("solver", "knob"),
    [
        (Anderson(max_iter=3, m=1), "Anderson(max_iter=6)"),
        (Picard(max_iter=3), "Picard(max_iter=6)"),
        (Broyden(max_iter=3), "Broyden(max_iter=6)"),
        (NewtonKrylov(max_iter=3), "NewtonKrylov(max_iter=6)"),
    ],
)
def test_the_knob_is_that_of_the_solver(solver: SolverOption, knob: str) -> None:
    with pytest.warns(ConvergenceWarning) as caught:
        failing("warn", solver=solver)(START, X)
    assert knob in str(caught[0].message)


def test_each_way_to_fail_is_told_apart() -> None:
    x = X.clone()
    x[0, 0] = torch.nan
    with pytest.warns(ConvergenceWarning) as caught:
        _, info = failing("warn", solver=Picard(max_iter=500))(START, x)
    assert info.fuse.outcome.tolist() == [Outcome.NON_FINITE, Outcome.STALLED, Outcome.STALLED]
    message = str(caught[0].message)
    assert "3 of 3 rows" in message
    assert "2 stalled" in message
    assert "1 became NaN or infinite (check the input)" in message
    assert "nan" not in message.split("residual")[1], "the worst residual is that of a finite row"


def test_layer_names_its_blocks() -> None:
    torch.manual_seed(0)
    solver = Anderson(tol=1e-7, max_iter=1, rescue=False)
    layer = DEQFusion(8, 2, num_groups=2, solver=solver)
    xs = [torch.randn(5, 8) for _ in range(2)]
    with pytest.warns(ConvergenceWarning) as caught:
        layer(xs)
    messages = [str(w.message) for w in caught]
    assert any("10 of 10 rows of the modality cells" in m for m in messages)
    assert any("5 of 5 rows of the fuse block" in m for m in messages)
    layer.on_failure = "raise"
    with pytest.raises(ConvergenceError, match="10 of 10 rows of the modality cells"):
        layer(xs)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_reports_do_not_depend_on_the_mode(training: bool, grad: bool) -> None:
    deq = failing("warn", adjoint=OneStep()).train(training)
    with torch.set_grad_enabled(grad), pytest.warns(ConvergenceWarning, match="2 of 3 rows"):
        z, _ = deq(START, X.clone().requires_grad_())
    assert z.requires_grad == grad


def test_no_report_for_an_empty_batch() -> None:
    deq = DEQ(lambda z: z, on_failure="raise")
    deq(torch.zeros(0, 2))


# ---- backward -----------------------------------------------------------------------------------


def backward(on_failure: str, adjoint: Any, slopes: list[float] = SLOPES) -> Tensor:
    """A forward solve that starts at its solution, and one backward pass."""
    f = rotating(slopes)
    turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]])
    star = torch.stack(
        [torch.linalg.solve(torch.eye(2) - s * turn, x) for s, x in zip(slopes, X, strict=True)]
    )
    x = X.clone().requires_grad_()
    z, info = DEQ(f, adjoint=adjoint, on_failure=on_failure)(star, x)
    assert info.converged.all()
    (grad,) = torch.autograd.grad(z, x, torch.tensor([[1.0, 2.0], [0.3, 1.0], [1.0, -1.0]]))
    return grad


SHORT = Implicit(solver="neumann", tol=1e-4, max_iter=8)


def test_backward_warning() -> None:
    with pytest.warns(ConvergenceWarning) as caught:
        backward("warn", SHORT)
    (message,) = [str(w.message) for w in caught]
    assert "2 of 3 rows of the backward solve" in message
    assert "tol 1.0e-04" in message
    assert "gradient is inexact" in message
    assert "Implicit(max_iter=16)" in message


def test_backward_raise_and_ignore() -> None:
    with pytest.raises(ConvergenceError, match="2 of 3 rows of the backward solve"):
        backward("raise", SHORT)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.isfinite(backward("ignore", SHORT)).all()


@pytest.mark.parametrize("adjoint", [Implicit(), Implicit(solver="dense")], ids=repr)
def test_backward_is_silent_when_solved(adjoint: Implicit) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backward("warn", adjoint)


@pytest.mark.parametrize("adjoint", [OneStep(), Neumann(k=2)], ids=repr)
def test_approximations_have_nothing_to_report(adjoint: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backward("raise", adjoint)


def test_backward_tolerance_is_never_looser_than_the_forward() -> None:
    """The message shows the tolerance in force: the forward's 1e-9, not the adjoint's 1e-2."""
    deq = DEQ(
        lambda z, x: torch.tanh(0.9 * z + x),
        solver=Anderson(tol=1e-9, max_iter=200),
        adjoint=Implicit(solver="neumann", tol=1e-2, max_iter=3),
    )
    x = torch.full((2, 2), 0.1, dtype=torch.float64, requires_grad=True)
    z, _ = deq(torch.zeros_like(x), x)
    with pytest.warns(ConvergenceWarning, match=r"tol 1\.0e-09"):
        z.backward(torch.ones_like(z))


def test_layer_reports_its_backward_blocks() -> None:
    torch.manual_seed(0)
    adjoint = Implicit(solver="anderson", max_iter=2)
    layer = DEQFusion(8, 2, num_groups=2, solver=Anderson(tol=1e-5), adjoint=adjoint)
    z = layer([torch.randn(5, 8) for _ in range(2)])
    with pytest.warns(ConvergenceWarning) as caught:
        z.backward(torch.randn(5, 8))
    text = " ".join(str(w.message) for w in caught)
    assert "the backward solve of the fuse block" in text
    assert "the backward solve of the modality cells" in text
    assert "Implicit(max_iter=4)" in text


def test_layer_raises_in_backward() -> None:
    torch.manual_seed(0)
    layer = DEQFusion(
        8,
        2,
        num_groups=2,
        solver=Anderson(tol=1e-5),
        adjoint=Implicit(solver="anderson", max_iter=2),
        on_failure="raise",
    )
    z = layer([torch.randn(5, 8) for _ in range(2)])
    with pytest.raises(ConvergenceError, match="backward solve of the fuse block"):
        z.backward(torch.randn(5, 8))


def test_nan_cotangent_is_reported() -> None:
    x = X.clone().requires_grad_()
    z, _ = DEQ(rotating([0.1, 0.2, 0.3]))(START, x)
    g = torch.ones(3, 2)
    g[1, 0] = torch.nan
    with pytest.warns(ConvergenceWarning, match="1 of 3 rows.*1 became NaN or infinite"):
        z.backward(g)


# ---- late reports: from a device that nobody waits for ------------------------------------------


class Event:
    """Stands for ``torch.cuda.Event``: arrived when told so."""

    def __init__(self, arrived: bool = False) -> None:
        self.arrived, self.asked = arrived, 0

    def query(self) -> bool:
        self.asked += 1
        return self.arrived

    def synchronize(self) -> None:
        raise AssertionError("a late report must never wait")


def enqueue(event: Event, failed: int, what: str = "the fuse block") -> None:
    outcome = torch.zeros(8, dtype=torch.int8)
    outcome[:failed] = int(Outcome.MAX_ITER)
    statistics = reporting._Statistics(outcome, torch.full((8,), 0.25))
    option = Anderson(tol=1e-4, max_iter=50)
    late = reporting._Late(statistics, event, reporting.Part(what, ...), option)
    reporting._enqueue(late)


def messages_of(action: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        action()
    return [str(w.message) for w in caught if issubclass(w.category, ConvergenceWarning)]


def test_late_report_waits_for_its_event() -> None:
    event = Event()
    enqueue(event, failed=3)
    assert messages_of(reporting.flush) == []
    assert len(reporting._late) == 1
    event.arrived = True
    (message,) = messages_of(reporting.flush)
    assert "3 of 8 rows of the fuse block" in message
    assert "2.5e-01" in message
    assert "Anderson(max_iter=100)" in message
    assert messages_of(reporting.flush) == [], "said once"


def test_late_reports_come_in_order_and_stop_at_the_first_pending() -> None:
    first, second, third = Event(True), Event(False), Event(True)
    for event, what in ((first, "one"), (second, "two"), (third, "three")):
        enqueue(event, 1, what)
    assert ["of one" in m for m in messages_of(reporting.flush)] == [True]
    assert third.asked == 0, "events of one stream arrive in order"
    second.arrived = True
    assert [m.split("rows of ")[1].split(" did")[0] for m in messages_of(reporting.flush)] == [
        "two", "three",
    ]  # fmt: skip


def test_late_success_says_nothing() -> None:
    enqueue(Event(True), failed=0)
    assert messages_of(reporting.flush) == []
    assert not reporting._late


def test_the_queue_is_bounded_and_tells_how_much_it_dropped() -> None:
    for i in range(200):
        enqueue(Event(True), 1, f"solve {i}")
    assert len(reporting._late) == 64
    assert reporting._late[-1].part.name == "solve 199"
    said = messages_of(reporting.flush)
    assert len(said) == 65
    assert "136 older reports about solves on the GPU were dropped" in said[0]
    enqueue(Event(True), 1)
    assert len(messages_of(reporting.flush)) == 1, "that is said once"


class ParentsEvent(Event):
    """An event of CUDA's: whoever asks it in another process gets an error."""

    def __init__(self) -> None:
        super().__init__(True)
        self.process = os.getpid()

    def query(self) -> bool:
        if os.getpid() != self.process:
            raise RuntimeError("CUDA error: initialization error")
        return super().query()


def test_a_forked_child_leaves_its_parents_reports_alone() -> None:
    """A DataLoader's worker that solves something; another thread may hold the lock meanwhile."""
    enqueue(ParentsEvent(), 1)
    enqueue(ParentsEvent(), 1)
    with reporting._lock:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                signal.alarm(20)  # whoever waits for the lock waits for ever
                status = int(messages_of(reporting.flush) != [])
                enqueue(Event(True), 1)
                status += int(len(messages_of(reporting.flush)) != 1)
            finally:
                os._exit(status)
    _, status = os.waitpid(child, 0)
    assert status == 0
    assert len(messages_of(reporting.flush)) == 2, "the parent still says them"


@pytest.mark.parametrize("when", ["next call", "ignored call", "backward", "info.converged"])
def test_late_reports_come_out_at_the_next_look(when: str) -> None:
    x = X.clone().requires_grad_()
    z, info = DEQ(rotating([0.1, 0.2, 0.3]))(START, x)
    enqueue(Event(True), failed=2)
    looks = {
        "next call": lambda: DEQ(rotating([0.1] * 3))(START, X),
        "ignored call": lambda: DEQ(rotating([0.1] * 3), on_failure="ignore")(START, X),
        "backward": lambda: z.backward(torch.ones(3, 2)),
        "info.converged": lambda: info.converged,
    }
    assert any("2 of 8 rows" in m for m in messages_of(looks[when]))


def test_a_failure_that_is_raised_from_a_warning_filter_leaves_the_queue_usable() -> None:
    enqueue(Event(True), 1, "one")
    enqueue(Event(True), 1, "two")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ConvergenceWarning, match="of one"):
            reporting.flush()
    assert any("of two" in m for m in messages_of(reporting.flush))


@pytest.mark.gpu
def test_warn_on_a_gpu_comes_late_and_raise_at_once() -> None:
    deq = failing("warn", adjoint=OneStep())
    x, start = X.cuda(), START.cuda()
    deq.f = lambda z, x: 3 * z + x
    deq(start, x)
    torch.cuda.synchronize()
    assert any("3 of 3 rows" in m for m in messages_of(reporting.flush))
    deq.on_failure = "raise"
    with pytest.raises(ConvergenceError, match="3 of 3 rows"):
        deq(start, x)
