"""What is not arithmetic: operators dispatched, values read back to the host, kernels launched.

Counted by torch's profiler in one solve. A scalar that is read back (``.item()``, a branch on a
tensor) costs nothing much on a CPU; on a GPU each one waits for all work before it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import cases
from benchmarks.arena import Arena
from benchmarks.cases import CASES
from benchmarks.variants import BUILDERS, missing

CASE = CASES["medium"]
COMPILED = ("deqfuse-cpu", "deqfuse-cuda")
FEW_OPERATORS = 5  # the layer is one; the joint solvers dispatch hundreds
READS = ("aten::_local_scalar_dense",)
SYNCHRONISATIONS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernelEx")


def count(call: Callable[[], object]) -> dict[str, int]:
    """Operators without operators inside them, scalar reads, kernel launches, synchronisations."""
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    call()
    with profile(activities=activities, acc_events=True) as profiler:
        call()
    events = profiler.events() or []
    names = [event.name for event in events]
    leaves = [
        e for e in events if "::" in e.name and not any("::" in c.name for c in e.cpu_children)
    ]
    return {
        "operators": len(leaves),
        "scalar_reads": sum(names.count(name) for name in READS),
        "launches": sum(names.count(name) for name in LAUNCHES),
        "synchronisations": sum(names.count(name) for name in SYNCHRONISATIONS),
    }


@pytest.mark.parametrize("quantity", ["forward", "step"])
@pytest.mark.parametrize("variant", BUILDERS)
def test_overhead(variant: str, quantity: str, arena: Arena, entrant: Any, record: Any) -> None:
    if missing(variant):
        pytest.skip(f"{variant}: {missing(variant)}")
    problem, contender = entrant(CASE, variant)
    if quantity == "step" and not contender.differentiable:
        pytest.skip(f"{variant} has no {quantity}")

    def forward() -> None:
        with torch.no_grad():
            contender.fused(problem.features)

    def step() -> None:
        contender.fused(problem.features).backward(problem.cotangent)

    found = count(forward if quantity == "forward" else step)
    result = arena.results(CASE, "tolerance", quantity)[variant]
    record(
        [sum(sample) for sample in result.samples],
        group=f"overhead {quantity}",
        kind="overhead",
        quantity=quantity,
        variant=variant,
        case={"name": CASE.name},
        nfe_cells=result.verdict.nfe_cells,
        nfe_fuse=result.verdict.nfe_fuse,
        **found,
    )
    if quantity != "forward":
        return
    if variant in COMPILED:
        assert found["scalar_reads"] == 0
        if cases.DEVICE == "cpu":
            assert found["operators"] <= FEW_OPERATORS
        else:
            assert found["launches"] > 0
            assert found["synchronisations"] == 0
    elif variant in ("released", "torchdeq"):  # a control: they look at the residual in every step
        assert found["scalar_reads"] > 0
