"""Reports that come late: from a device that nobody waits for."""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from report_cases import START, X, failing, rotating

from deqfuse import (
    DEQ,
    Anderson,
    ConvergenceError,
    ConvergenceWarning,
    OneStep,
    Outcome,
    reporting,
)


@pytest.fixture(autouse=True)
def empty_queue() -> Iterator[None]:
    reporting._after_fork()
    yield
    reporting._after_fork()


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
