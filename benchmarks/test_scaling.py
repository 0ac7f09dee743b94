"""Time per evaluation against rows and width: linear in B, quadratic in d.

Slopes are fitted in log-log over the last sizes, measured in turns: a fixed cost flattens the first
ones. Time is divided by the mean evaluations of a row, since wider layers need slightly fewer.
"""

from __future__ import annotations

import math
import statistics
from typing import Any

import pytest

from benchmarks.cases import SWEEPS, Case, build
from benchmarks.gate import find_truth, judge
from benchmarks.timing import forward_call, interleave, spread
from benchmarks.variants import BUILDERS, OURS, fastest_backend, missing

LAST = 3
# Below: what is measured is not the products. Above: it grows faster than they do. What is left of
# fixed and of row-wise cost flattens d's slope, and above d = 512 weights leave the second-level
# cache, which may cost a fifth per doubling at most.
BOUNDS = {"rows": (0.85, 1.1), "dim": (1.6, 2.25)}


def slope(sizes: list[int], seconds: list[float]) -> float:
    """Least squares of log seconds against log size, over the last sizes."""
    x, y = [[math.log(v) for v in values[-LAST:]] for values in (sizes, seconds)]
    return statistics.linear_regression(x, y).slope


@pytest.mark.parametrize("variant", [*OURS, "torchdeq"])
@pytest.mark.parametrize("axis", SWEEPS)
def test_scaling(axis: str, variant: str, full: bool, record: Any, refuse: Any) -> None:
    if missing(variant):
        pytest.skip(f"{variant}: {missing(variant)}")
    if not full and (axis not in BOUNDS or variant != fastest_backend()):
        pytest.skip("measured with --full (make bench-full)")
    cases: list[Case] = SWEEPS[axis]
    calls, evaluations = {}, {}
    for case in cases:
        problem = build(case)
        contender = BUILDERS[variant](problem, case.tol)
        verdict = judge(problem, contender, find_truth(problem))
        if verdict.reason is not None:
            refuse(variant, case.name, "tolerance", verdict.reason)
        # Of the N + 1 blocks, weighted as they occur.
        n = case.modalities
        evaluations[case.name] = (n * verdict.nfe_cells + verdict.nfe_fuse) / (n + 1)
        calls[case.name] = forward_call(problem, contender)
    samples = interleave(calls, budget=3.0, turns=(5, 20))
    seconds = {name: spread([sum(s) for s in taken]).median for name, taken in samples.items()}
    sizes = [int(getattr(case, axis)) if axis in BOUNDS else i for i, case in enumerate(cases)]
    fitted = None
    if axis in BOUNDS:
        fitted = slope(sizes, [seconds[c.name] / evaluations[c.name] for c in cases])
    record(
        [sum(sample) for sample in samples[cases[-1].name]],
        group=f"scaling {axis}",
        kind="scaling",
        variant=variant,
        axis=axis,
        values=[getattr(case, axis) for case in cases],
        seconds=list(seconds.values()),
        evaluations=list(evaluations.values()),
        slope=fitted,
    )
    if fitted is not None and variant == fastest_backend():
        low, high = BOUNDS[axis]
        assert low <= fitted <= high
