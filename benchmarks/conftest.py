"""Options, the arena, and what a saved run says about the machine.

    python -m pytest benchmarks --benchmark-json=run.json [--full] [--threads N] [--device cuda]

Times are measured in turns by benchmarks/timing.py and handed to pytest-benchmark through a clock
that replays them, one benchmark per variant: its tables, JSON and comparisons all work.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

from benchmarks import cases, floor, variants
from benchmarks.arena import Arena, Refused
from benchmarks.machine import describe

# Seconds per case and quantity; fewest and most turns.
QUICK, FULL = (1.0, (5, 30)), (6.0, (9, 60))

_refused: list[dict[str, str]] = []
_rates: list[tuple[dict[str, float], float]] = []


class ReplayedClock:
    """A clock that moves only when a recorded sample is played."""

    time = 0.0

    def __call__(self) -> float:
        return self.time


_clock = ReplayedClock()


def replayed_time() -> float:
    """The timer of every benchmark here."""
    return _clock()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("deqfuse")
    group.addoption("--full", action="store_true", help="all cases, regimes and sweeps")
    group.addoption("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    group.addoption("--threads", type=int, help="torch threads, for every variant")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--threads"):
        torch.set_num_threads(config.getoption("--threads"))
    cases.DEVICE = config.getoption("--device") or ("cuda" if torch.cuda.is_available() else "cpu")
    if config.getoption("--full"):
        variants.ONE_GRAPH = False
    # What torch.compile and torchdeq deprecate is not ours to fix; our own warnings stay errors.
    config.addinivalue_line("filterwarnings", "ignore::UserWarning:torch")
    # A test that fails before it has a time to save.
    config.addinivalue_line("filterwarnings", "ignore:Benchmark fixture was not used")
    config.addinivalue_line("filterwarnings", "ignore::SyntaxWarning:torchdeq")
    config.addinivalue_line("filterwarnings", "ignore::DeprecationWarning")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=replayed_time))


@pytest.fixture(scope="session")
def full(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--full"))


@pytest.fixture(scope="session")
def arena(full: bool) -> Iterator[Arena]:
    measure_rates()
    yield Arena(*(FULL if full else QUICK))
    measure_rates()


def measure_rates() -> None:
    """Before and after: the best of both counts, so that a slow minute does not flatter us."""
    _rates.append((floor.matmul_rates(), floor.bandwidth()))


@pytest.fixture
def record(benchmark: Any) -> Any:
    """``record(samples, kind=..., variant=..., ...)`` saves seconds and facts as one benchmark."""

    def save(samples: Sequence[float], *, group: str, **facts: Any) -> None:
        benchmark.group = group
        benchmark.extra_info.update(facts)
        left = iter(samples)

        def play() -> None:
            _clock.time += next(left)

        _clock.time = 0.0
        benchmark.pedantic(play, rounds=len(samples))

    return save


@pytest.fixture
def refuse() -> Any:
    """``refuse(variant, case, regime, reason)``: noted in the run; an error if it is ours."""

    def note(variant: str, case: str, regime: str, reason: str) -> None:
        _refused.append({"variant": variant, "case": case, "regime": regime, "reason": reason})
        text = f"{variant} is wrong on {case} ({regime}): {reason}"
        (pytest.fail if variant in variants.OURS else pytest.skip)(text)

    return note


@pytest.fixture
def entrant(arena: Arena, refuse: Any) -> Any:
    """``entrant(case, variant)``: its problem and contender; what the gate refuses is not used.

    With "penalty" as a third argument, what it refuses with the penalty is not used either.
    """

    def enter(case: cases.Case, variant: str, quantity: str = "") -> Any:
        try:
            return arena.entrant(case, variant, quantity)
        except Refused as refused:
            return refuse(variant, case.name, "tolerance", str(refused))

    return enter


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    machine_info["cpu"] = {"brand_raw": machine_info["cpu"].get("brand_raw", "")}
    machine_info.pop("node", None)
    machine_info["deqfuse"] = describe(_rates)


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_json(output_json: dict[str, Any]) -> None:
    # Forward, backward and step of one case find the same fault: it is said once.
    output_json["refused"] = [dict(t) for t in dict.fromkeys(tuple(r.items()) for r in _refused)]
