"""Peak memory of one call, in a process of its own: high-water mark minus what rested before.

    python -m benchmarks.memory brca torchdeq step

On the CPU: the resident set's high-water mark (VmHWM, reset just before the call), minus the
resident set after warm imports and a small step of the same variant. On a GPU: the allocator's
peak minus what is allocated. Gradients are part of the call, weights and inputs are not.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import gc
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def measure(
    case: str, variant: str, quantity: str, device: str, threads: int, max_iter: int | None = None
) -> dict[str, Any]:
    """Peak over resting memory in bytes, measured in a child process.

    Args:
        max_iter: the forward budget (deqfuse only), at a tolerance that no row reaches; then "nfe"
            in the result is the mean of the evaluations that rows made, counted afterwards.
    """
    command = [sys.executable, "-m", "benchmarks.memory", case, variant, quantity]
    command += ["--device", device, "--threads", str(threads)]
    command += [] if max_iter is None else ["--max-iter", str(max_iter)]
    found = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    if found.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{found.stderr}")
    facts: dict[str, Any] = json.loads(found.stdout.splitlines()[-1])
    return facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("case")
    parser.add_argument("variant")
    parser.add_argument("quantity", choices=("forward", "step", "penalty"))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int)
    parser.add_argument("--max-iter", type=int)
    args = parser.parse_args()

    import torch

    from benchmarks import cases

    cases.DEVICE = args.device
    if args.threads:
        torch.set_num_threads(args.threads)
    case = cases.CASES[args.case]
    warm = cases.build(dataclasses.replace(case, rows=4, dim=16, num_groups=2))
    _call(warm, args)()  # imports, thread pools, lazily made tables
    problem = cases.build(case)
    facts = (_on_gpu if args.device == "cuda" else _on_cpu)(_call(problem, args))
    if args.max_iter is not None:
        with torch.no_grad():
            answer = _contender(problem, args).answer(problem.features)
        used = torch.cat([answer.nfe_cells.flatten(), answer.nfe_fuse.flatten()])
        facts |= {"max_iter": args.max_iter, "nfe": float(used.double().mean())}
    print(json.dumps(facts))


def _contender(problem: Any, args: argparse.Namespace) -> Any:
    from benchmarks.variants import BUILDERS
    from deqfuse import Anderson

    contender = BUILDERS[args.variant](problem, problem.case.tol)
    if args.max_iter is not None:
        layer: Any = contender.fused
        layer.solver = Anderson(tol=1e-30, max_iter=args.max_iter, rescue=False)
    return contender


def _call(problem: Any, args: argparse.Namespace) -> Any:
    from benchmarks.timing import MAKERS

    return MAKERS[args.quantity](problem, _contender(problem, args))


def _on_cpu(call: Any) -> dict[str, Any]:
    gc.collect()
    # Freed memory that the allocator kept would hide as much of the call's own.
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
    if CLEAR.exists() and os.access(CLEAR, os.W_OK):
        CLEAR.write_text("5")  # VmHWM starts again at what is resident
    resting = _resident("VmRSS")
    start = time.perf_counter()
    call()
    seconds = time.perf_counter() - start
    return {"extra": _resident("VmHWM") - resting, "resting": resting, "seconds": seconds}


def _resident(name: str) -> int:
    """Bytes of an entry of /proc/self/status."""
    for line in STATUS.read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{STATUS} has no {name}: memory on the CPU is measured on Linux only")


def _on_gpu(call: Any) -> dict[str, Any]:
    import torch

    call()  # workspaces of libraries
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    resting = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    extra = torch.cuda.max_memory_allocated() - resting
    return {"extra": extra, "resting": resting, "seconds": seconds}


if __name__ == "__main__":
    main()
