"""Peak memory of a training step over resting memory, each variant in a process of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import cases, memory
from benchmarks.cases import CASES
from benchmarks.variants import BUILDERS, fastest_backend, missing

CASE, STEPS = "brca", (5, 10, 20, 40)
# The allocator's own slack differs from run to run. One saved state of one block per step would be
# 5 MB more per step here: 170 MB from the first to the last.
SAME = 1.1
PENALTY = 1.25  # times the memory of a step without it, at most


@pytest.mark.parametrize("variant", BUILDERS)
@pytest.mark.parametrize("name", CASES)
def test_peak(name: str, variant: str, full: bool, entrant: Any, record: Any) -> None:
    skip_what_is_not_measured(name, variant, full)
    entrant(CASES[name], variant)
    found = memory.measure(name, variant, "step", cases.DEVICE, torch.get_num_threads())
    record(
        [found["seconds"]],
        group=f"memory {name}",
        kind="memory",
        variant=variant,
        case={"name": name},
        **found,
    )


def skip_what_is_not_measured(name: str, variant: str, full: bool) -> None:
    if missing(variant):
        pytest.skip(f"{variant}: {missing(variant)}")
    if variant == "compiled":
        pytest.skip("compiling takes more memory than the layer; its own is that of the reference")
    if variant == "cuda-graph":
        pytest.skip("forward only, and its memory is the graph's pool")
    if not full and name != CASE:
        pytest.skip("measured with --full (make bench-full)")


@pytest.mark.parametrize("variant", BUILDERS)
@pytest.mark.parametrize("name", CASES)
def test_peak_with_penalty(name: str, variant: str, full: bool, entrant: Any, record: Any) -> None:
    """Beside the step without it: each in a process of its own, one after the other."""
    skip_what_is_not_measured(name, variant, full)
    entrant(CASES[name], variant, "penalty")
    options = (cases.DEVICE, torch.get_num_threads())
    without = memory.measure(name, variant, "step", *options)
    found = memory.measure(name, variant, "penalty", *options)
    record(
        [found["seconds"]],
        group=f"memory with penalty {name}",
        kind="penalty-memory",
        variant=variant,
        case={"name": name},
        without=without["extra"],
        **found,
    )
    if variant == fastest_backend() and name == CASE:
        assert found["extra"] <= PENALTY * without["extra"]


def test_peak_does_not_grow_with_solver_steps(record: Any) -> None:
    """The tolerance is out of reach: rows make evaluations until the budget ends or they stall."""
    found = [
        memory.measure(
            CASE, fastest_backend(), "step", cases.DEVICE, torch.get_num_threads(), max_iter=k
        )
        for k in STEPS
    ]
    record(
        [f["seconds"] for f in found],
        group="memory steps",
        kind="memory-steps",
        variant=fastest_backend(),
        case={"name": CASE},
        steps=[f["nfe"] for f in found],
        extra=[f["extra"] for f in found],
    )
    # Rows that all stalled early would prove nothing.
    assert found[-1]["nfe"] >= 4 * found[0]["nfe"]
    assert found[-1]["extra"] <= SAME * found[0]["extra"]
