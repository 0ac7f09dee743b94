"""Latency of few rows: single calls, by their median and their 99% quantile.

A request of a service has 1 to 32 rows. What is compared is what such a service can call: the layer
itself, the prepared layer, torchdeq, the step under torch.compile, and a chain of ``F.linear`` over
the products that our solve makes, with the layer's own weights and nothing in between: no norm, no
solver, no answer.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks import floor
from benchmarks.cases import Case, Problem, build
from benchmarks.results import Run
from benchmarks.tables import markdown, number, sizes
from benchmarks.timing import now
from benchmarks.variants import BUILDERS, Answer, fastest_backend, missing

ROWS, DIMS, MODALITIES = (1, 2, 4, 8, 16, 32), (64, 128, 300, 512, 768), (2, 3)
CASES = {
    case.name: case
    for case in (
        Case(f"latency_{rows}_{n}_{dim}", rows, n, dim)
        for n in MODALITIES
        for dim in DIMS
        for rows in ROWS
    )
}
QUICK = ("latency_1_2_128", "latency_8_2_128", "latency_1_3_300", "latency_16_2_768")
THREADS = (1, 2)
CHAIN, PREPARED = "F.linear", "prepared"
# Calls of one variant in a row: a service repeats one and the same call.
VISIT, FEWEST_TURNS = 20, 5

Calls = dict[str, Callable[[], object]]


def products(case: Case, answer: Answer) -> int:
    """Products with a matrix that a batch needs: as many as its slowest row, block by block.

    The first evaluation of a block starts from zero and needs none; the gate's constant is one.
    """
    cells = (answer.nfe_cells.amax(1) - 1).clamp_min(0).sum()
    fuse = (answer.nfe_fuse.amax() - 1).clamp_min(0)
    return int(2 * (cells + fuse)) + 1


def chain(problem: Problem, count: int) -> Callable[[], object]:
    """So many products with the layer's matrices, in turn."""
    pairs = [
        (m.weight.detach(), m.bias.detach())
        for m in problem.layer.modules()
        if isinstance(m, torch.nn.Linear)
    ]
    x = problem.features[0].detach()

    def call() -> object:
        for i in range(count):
            out = F.linear(x, *pairs[i % len(pairs)])
        return out

    return call


def contenders(problem: Problem, full: bool) -> tuple[Calls, Answer]:
    """What is timed, by name, and our answer; torch.compile, which takes long, in full runs."""
    case, ours = problem.case, fastest_backend()
    calls: Calls = {}
    for name in (ours, "torchdeq", *(["compiled"] if full else [])):
        if missing(name) is None:
            fused = BUILDERS[name](problem, case.tol).fused
            calls[name] = lambda fused=fused: fused(problem.features)  # type: ignore[misc]
    contender = BUILDERS[ours](problem, case.tol)
    prepared = contender.fused.prepare()  # type: ignore[attr-defined]
    calls[PREPARED] = lambda: prepared(problem.features)
    answer = contender.answer(problem.features)
    calls[CHAIN] = chain(problem, products(case, answer))
    return calls, answer


@torch.inference_mode()
def measure(case: Case, threads: int, budget: float, full: bool) -> tuple[Any, dict[str, Any]]:
    """Seconds of every single call by variant, in turns, and the floors."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode(False), torch.no_grad():
            problem = build(case)
            for x in problem.features:
                x.requires_grad_(False)
            calls, answer = contenders(problem, full)
        samples = _in_turns(calls, budget, problem.cotangent.device)
        count = products(case, answer)
        moved = 4.0 * count * case.dim**2
        weights = 8 * (case.modalities + 1) * case.dim**2
        return samples, {
            "products": count,
            "flops": floor.forward_flops(case, answer),
            "bytes": moved,
            "rate": floor.linear_rate(1024, 1024, 0.1),
            "bandwidth": floor.bandwidth(3 * weights, 0.1),
        }
    finally:
        torch.set_num_threads(before)


def _in_turns(
    calls: Mapping[str, Callable[[], object]], budget: float, device: torch.device
) -> dict[str, list[float]]:
    samples: dict[str, list[float]] = {name: [] for name in calls}
    order, shuffle = list(calls), random.Random(0).shuffle
    for call in calls.values():
        for _ in range(3):
            call()
    end, turn = now(device) + budget, 0
    while turn < FEWEST_TURNS or now(device) < end:
        shuffle(order)
        for name in order:
            for _ in range(VISIT):
                start = now(device)
                calls[name]()
                samples[name].append(now(device) - start)
        turn += 1
    return samples


def quantile(samples: list[float], share: float) -> float:
    """Of the sorted samples, the one below which this share lies."""
    ordered = sorted(samples)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]


def table(run: Run) -> str:
    """Microseconds, median / 99%; the chain over the prepared layer; both floors."""
    rows = []
    names = list(dict.fromkeys(e.variant for e in run.select("latency")))
    for threads in THREADS:
        for case in run.cases("latency", threads=threads):
            entries = run.by_variant("latency", case, threads=threads)
            own = next(iter(entries.values()))
            row = [sizes(own), str(threads)]
            for name in names:
                row.append(_times(entries[name].samples) if name in entries else "-")
            facts = own.facts
            row.append(number(1e6 * facts["flops"] / facts["rate"]))
            row.append(number(1e6 * facts["bytes"] / facts["bandwidth"]))
            rows.append(row)
    return markdown(
        ["(B, N, d)", "threads", *names, "floor: arithmetic", "floor: memory"],
        rows,
    )


def _times(samples: list[float]) -> str:
    return f"{number(1e6 * quantile(samples, 0.5))} / {number(1e6 * quantile(samples, 0.99))}"
