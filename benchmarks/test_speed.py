"""Forward, backward and training step, with and without the penalty, of every variant and case.

Variants take turns. One that the gate refuses is reported as wrong and not timed; if it is ours,
the run fails.
"""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.arena import REGIMES, Arena
from benchmarks.cases import CASES, QUICK, Case
from benchmarks.variants import BUILDERS, missing

QUANTITIES = {
    "tolerance": ("forward", "step", "backward", "penalty"),
    "equal-error": ("forward", "step"),
    "torch-init": ("forward",),
}
# What `make bench` measures; --full measures every case in every regime.
QUICK_CASES = {"tolerance": tuple(CASES), "equal-error": QUICK, "torch-init": QUICK[:2]}


def grid() -> list[Any]:
    """Case by case, so that only one case's weights are alive."""
    return [
        pytest.param(case, regime, quantity, variant, id=f"{regime}-{name}-{quantity}-{variant}")
        for regime in REGIMES
        for name, case in CASES.items()
        for quantity in QUANTITIES[regime]
        for variant in BUILDERS
    ]


@pytest.mark.parametrize(("case", "regime", "quantity", "variant"), grid())
def test_speed(
    case: Case,
    regime: str,
    quantity: str,
    variant: str,
    full: bool,
    arena: Arena,
    record: Any,
    refuse: Any,
) -> None:
    if missing(variant):
        pytest.skip(f"{variant}: {missing(variant)}")
    if not full and case.name not in QUICK_CASES[regime]:
        pytest.skip("measured with --full (make bench-full)")
    measured = "step" if quantity == "backward" else quantity
    result = arena.results(case, regime, measured).get(variant)
    if result is None:
        pytest.skip(f"{variant} has no {quantity}")
    if result.verdict.reason is not None:
        refuse(variant, case.name, regime, result.verdict.reason)
    seconds = (lambda phases: phases[1]) if quantity == "backward" else sum
    record(
        [seconds(sample) for sample in result.samples],
        group=f"{regime} {case.name} {quantity}",
        kind="speed",
        regime=regime,
        quantity=quantity,
        variant=variant,
        tol=result.tol,
        **result.verdict.facts(),
        **result.facts,
    )


@pytest.mark.parametrize("variant", BUILDERS)
def test_accuracy_against_time(variant: str, arena: Arena, entrant: Any, record: Any) -> None:
    """True error of the forward solve and its time, over a range of tolerances."""
    if missing(variant):
        pytest.skip(f"{variant}: {missing(variant)}")
    entrant(CASES["medium"], variant)
    points = arena.accuracy(CASES["medium"])[variant]
    record(
        [point.seconds for point in points],
        group="accuracy medium",
        kind="accuracy",
        variant=variant,
        case={"name": "medium"},
        tols=[point.tol for point in points],
        errors=[point.error for point in points],
        seconds=[point.seconds for point in points],
    )
