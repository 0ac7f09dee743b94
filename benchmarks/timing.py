"""Interleaved measurement: variants of a case take turns in one process, in a changing order.

A turn visits every variant once. A visit repeats a short call until it has lasted a few
milliseconds and yields one sample, the mean of its calls. Sample i of one variant and sample i of
another are from the same turn, hence paired: drift of the machine cancels in their ratio.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch

from benchmarks.cases import PENALTY_WEIGHT, Problem
from benchmarks.variants import Contender

VISIT = 5e-3  # seconds that a visit lasts at least
Phases = tuple[float, ...]  # seconds of the parts of one call
Call = Callable[[], Phases]


class Spread(NamedTuple):
    """Median and quartiles."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles of some samples (of one sample: itself)."""
    if len(values) < 2:
        return Spread(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, low, high)


def paired_ratio(slow: Sequence[float], fast: Sequence[float]) -> Spread:
    """How many times as long ``slow`` takes, from samples of the same turns."""
    return spread([a / b for a, b in zip(slow, fast, strict=True)])


def now(device: torch.device) -> float:
    """Seconds, after all work that was given to the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def forward_call(problem: Problem, contender: Contender) -> Call:
    """A forward solve without gradients."""
    device = problem.cotangent.device

    def call() -> Phases:
        with torch.no_grad():
            start = now(device)
            contender.fused(problem.features)
            return (now(device) - start,)

    return call


def step_call(problem: Problem, contender: Contender) -> Call:
    """Forward and backward of a training step: two phases. Gradients start as None, untimed."""
    device, leaves = problem.cotangent.device, list(problem.leaves().values())

    def call() -> Phases:
        for leaf in leaves:
            leaf.grad = None
        start = now(device)
        z = contender.fused(problem.features)
        middle = now(device)
        z.backward(problem.cotangent)
        return middle - start, now(device) - middle

    return call


def penalty_call(problem: Problem, contender: Contender) -> Call:
    """The same with ``PENALTY_WEIGHT`` times the Jacobian penalty in the loss."""
    device, leaves = problem.cotangent.device, list(problem.leaves().values())
    assert contender.penalized is not None
    run, weight = contender.penalized.run, torch.tensor(PENALTY_WEIGHT, device=device)

    def call() -> Phases:
        for leaf in leaves:
            leaf.grad = None
        start = now(device)
        outputs = run(problem.features)
        middle = now(device)
        torch.autograd.backward(outputs, (problem.cotangent, weight))
        return middle - start, now(device) - middle

    return call


# What is timed of a variant, by the name of the quantity.
MAKERS = {"forward": forward_call, "step": step_call, "penalty": penalty_call}


def interleave(
    calls: Mapping[str, Call],
    budget: float,
    turns: tuple[int, int] = (5, 40),
    seed: int = 0,
) -> dict[str, list[Phases]]:
    """One sample of every call per turn.

    Args:
        budget: seconds that all turns together may take, as long as there are enough of them.
        turns: fewest and most turns.

    Returns:
        Samples by name, in the order of the turns: equal indices belong together.
    """
    repeats, total = {}, 0.0
    for name, call in calls.items():
        call()  # allocations, thread pools, compilation
        seconds = sum(call())
        repeats[name] = max(1, min(200, round(VISIT / max(seconds, 1e-9))))
        total += seconds * repeats[name]
    count = max(turns[0], min(turns[1], int(budget / max(total, 1e-9))))
    order, shuffle = list(calls), random.Random(seed).shuffle
    samples: dict[str, list[Phases]] = {name: [] for name in calls}
    collecting = gc.isenabled()
    gc.collect()
    gc.freeze()  # so that collecting between turns looks at what the turns left behind only
    try:
        for _ in range(count):
            shuffle(order)
            gc.collect()
            gc.disable()
            for name in order:
                visits = [calls[name]() for _ in range(repeats[name])]
                samples[name].append(tuple(map(statistics.fmean, zip(*visits, strict=True))))
            gc.enable()
    finally:
        gc.unfreeze()
        (gc.enable if collecting else gc.disable)()
    return samples
