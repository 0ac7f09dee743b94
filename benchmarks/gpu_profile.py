"""Time of every kernel of a training step, beside its floor: what is left to gain, and where.

    python -m benchmarks.gpu_profile [CASE ...] [--tf32] [--json FILE]
    python -m benchmarks.gpu_profile --once      # one step a case and nothing else, for ncu

The floor of a kernel is the larger of its products over the measured rate of matrix products and
the bytes it must move over the measured rate of copies. Products are those of the evaluations that
rows made (the backward's: the fewest that any linear solver needs; benchmarks/floor.py). Bytes are
counted once per launch that must read or write them: a whole solve reads and writes once, a stepped
one once per evaluation of an active row. What stays in the L2 cache may beat that floor.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import cases, floor
from benchmarks.cases import MAX_ITER, Case, Problem
from benchmarks.variants import BUILDERS, Answer, Contender, fastest_backend
from deqfuse import Anderson
from deqfuse.backends import cuda

# Kernels that share a floor, by what their names on the device contain; the first match counts.
KINDS = {
    "cells": r"_solve_cells_kernel|_residual_cell_kernel",
    "fuse": r"_solve_fuse_kernel|_purify_combine_kernel|_gate_constant_kernel",
    "anderson": r"_anderson_step_kernel",
    "adjoint": r"adjoint_\w+_kernel|vector_gradient_kernel|_vjp_kernel",
    "weight gradients": r"gemm|cutlass|cublas|nvjet",
    "packing and the rest": r"",
}
REPEATS = 10


class Work(NamedTuple):
    """What a kind of kernel cannot do without, in one training step."""

    flops: float
    bytes: float

    def floor(self, rate: float, bandwidth: float) -> float:
        """Seconds."""
        return max(self.flops / rate, self.bytes / bandwidth)


def work(problem: Problem, answer: Answer, tol: float) -> dict[str, Work]:
    """By kind; of what has no entry, nothing can be said."""
    case = problem.case
    b, n, d, m = case.rows, case.modalities, case.dim, case.m
    plane, square = 4.0 * b * d, 4.0 * d * d
    solver = Anderson(tol=tol, max_iter=MAX_ITER, m=m)
    whole = cuda.one_launch(problem.features[0], case.num_groups, solver)
    cells, fuse = answer.nfe_cells.double().cpu(), answer.nfe_fuse.double().cpu()
    total = floor.forward_flops(case, answer)
    own = 4.0 * d * d * float((cells - 1).clamp_min(0).sum())
    if whole:  # features in, equilibria out; the fuse solve also adds up and copies
        moved = 2 * n * plane + 2 * n * square, (2 * n + 3) * plane + 2 * square
        steps = {}
    else:  # z, x (and the gate's constant) in, a row between two launches, f; weights per launch
        moved = (
            5 * 4 * d * float(cells.sum()) + 2 * n * square * float(cells.max()),
            6 * 4 * d * float(fuse.sum()) + 2 * square * float(fuse.max()) + 2 * plane + square,
        )
        steps = {"anderson": Work(0.0, anderson_bytes(torch.cat([cells.flatten(), fuse]), d, m))}
    gradients = 4.0 * d * d * b * (n + 1)
    backward = floor.backward_flops(problem, answer, tol)
    return {
        "cells": Work(own, moved[0]),
        "fuse": Work(total - own, moved[1]),
        **steps,
        "adjoint": Work(backward - gradients, (4 * (n + 1) + 2) * plane + 2 * (n + 1) * square),
        "weight gradients": Work(gradients, (n + 1) * (4 * plane + 2 * square)),
    }


def anderson_bytes(nfe: Tensor, dim: int, m: int) -> float:
    """Of the step after each evaluation of each row.

    f, z, older residuals and all images in; image, residual, best and next z out.
    """
    moved = 0.0
    for k in range(1, int(nfe.max()) + 1):
        count = min(k, m)
        moved += 4.0 * dim * float((nfe >= k).sum()) * (2 + (count - 1) + count + 4)
    return moved


def device_events(call: Callable[[], object], repeats: int) -> list[tuple[str, float]]:
    """Name and seconds of everything that the device ran in ``repeats`` calls."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with profile(activities=activities, acc_events=True) as recorded:
        for _ in range(repeats):
            call()
        torch.cuda.synchronize()
    return [
        (event.name, event.time_range.elapsed_us() / 1e6)
        for event in recorded.events()
        if event.device_type.name == "CUDA"
    ]


def step(problem: Problem, contender: Contender) -> None:
    """Forward and backward, with gradients of all weights and inputs."""
    for leaf in problem.leaves().values():
        leaf.grad = None
    contender.fused(problem.features).backward(problem.cotangent)


def profile_case(case: Case, rate: float, bandwidth: float, repeats: int) -> dict[str, Any]:
    """One training step of a case: kernels by kind, and the wall clock."""
    problem = cases.build(case)
    contender = BUILDERS[fastest_backend()](problem, case.tol)
    for _ in range(4):  # compiles, captures
        step(problem, contender)
    wall = floor.best_seconds(lambda: step(problem, contender))
    events = device_events(lambda: step(problem, contender), repeats)
    with torch.no_grad():
        answer = contender.answer(problem.features)
    least = work(problem, answer, case.tol)
    kinds: dict[str, Any] = {}
    for name, seconds in events:
        kind = next(kind for kind, pattern in KINDS.items() if re.search(pattern, name))
        entry = kinds.setdefault(kind, {"seconds": 0.0, "launches": 0.0, "kernels": {}})
        entry["seconds"] += seconds / repeats
        entry["launches"] += 1 / repeats
        entry["kernels"][name] = entry["kernels"].get(name, 0.0) + seconds / repeats
    for kind, entry in kinds.items():
        if kind in least:
            entry |= least[kind]._asdict() | {"floor": least[kind].floor(rate, bandwidth)}
    return {"case": case.name, "sizes": case.sizes, "wall": wall, "kinds": kinds}


def table(profiles: list[dict[str, Any]]) -> str:
    """Microseconds of a training step, by kind."""
    lines = ["| case | kernels | launches | time, us | floor, us | bound by | time / floor |"]
    lines += ["|---|---|---:|---:|---:|---|---:|"]
    for one in profiles:
        busy = sum(entry["seconds"] for entry in one["kinds"].values())
        name = f"{one['case']} {one['sizes']}"
        for kind, entry in sorted(one["kinds"].items(), key=lambda item: -item[1]["seconds"]):
            row = [name, kind, f"{entry['launches']:.0f}", f"{entry['seconds'] * 1e6:.1f}"]
            if "floor" in entry:
                moving = entry["floor"] == entry["bytes"] / one["bandwidth"]
                row += [f"{entry['floor'] * 1e6:.2f}", "bytes" if moving else "products"]
                row += [f"{entry['seconds'] / entry['floor']:.1f}"]
            else:
                row += ["", "", ""]
            lines.append(f"| {' | '.join(row)} |")
        idle = one["wall"] - busy
        lines.append(f"| {name} | whole step; {idle * 1e6:.0f} us of it the device waits "
                     f"| | {one['wall'] * 1e6:.1f} | | | |")  # fmt: skip
    return "\n".join(lines)


def main() -> int:
    """Command line entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", metavar="CASE", help="default: all")
    parser.add_argument("--tf32", action="store_true", help="products in TF32")
    parser.add_argument("--once", action="store_true", help="one step a case, no measurement")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if unknown := [name for name in args.cases if name not in cases.CASES]:
        parser.error(f"CASE: expected one of {', '.join(cases.CASES)}, got {unknown[0]!r}")
    cases.DEVICE = args.device
    if args.tf32:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
    chosen = [case for name, case in cases.CASES.items() if not args.cases or name in args.cases]
    if args.once:
        for case in chosen:
            problem = cases.build(case)
            step(problem, BUILDERS[fastest_backend()](problem, case.tol))
        return 0
    small = args.device == "cpu"  # a machine that only shows that this runs
    rate = floor.linear_rate(512 if small else 8192, 512 if small else 8192)
    bandwidth = floor.bandwidth(3 * 2 ** (20 if small else 31))
    print(f"products: {rate / 1e12:.3g} TFLOP/s, copies: {bandwidth / 1e12:.3g} TB/s", flush=True)
    profiles = []
    for case in chosen:
        profiles.append(profile_case(case, rate, bandwidth, REPEATS))
        profiles[-1] |= {"rate": rate, "bandwidth": bandwidth, "tf32": args.tf32}
        if args.json:  # after each: a run that is cut off has lost nothing
            args.json.write_text(json.dumps(profiles, indent=1) + "\n", encoding="utf-8")
    print(table(profiles))
    return 0


if __name__ == "__main__":
    sys.exit(main())
