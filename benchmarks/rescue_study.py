"""What continuation makes of the rows that Anderson leaves: share of rows solved, and time.

    python -m benchmarks.rescue_study grid --dims 16 64 --rows 1024     torch's initialisation
    python -m benchmarks.rescue_study zero                              all-zero injections
    python -m benchmarks.rescue_study time                              a batch, and single rows

Every solved row is recomputed with the plain equations; the largest residual over the tolerance is
printed beside the counts.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from deqfuse import Anderson, DEQFusion, Outcome
from deqfuse.backends import cpu
from deqfuse.backends.layer import LayerParams, fuse_injection
from deqfuse.backends.maps import (
    CellParams,
    FuseParams,
    gate_constant,
    purify_combine,
    residual_cell,
)
from deqfuse.backends.problem import Solved

GROUPS = 4


def left(found: Solved) -> int:
    return int((found.outcome != int(Outcome.CONVERGED)).sum())


def mended_residual(before: Solved, after: Solved, f: Callable[[Tensor], Tensor]) -> float:
    """The largest naive residual of the rows that were mended."""
    image = f(after.z)
    residual = (image - after.z).norm(dim=-1) / (image.norm(dim=-1) + 1e-5)
    rows = (before.outcome != after.outcome) & (after.outcome == int(Outcome.CONVERGED))
    return float(residual[rows].max()) if rows.any() else 0.0


class Layer:
    """A layer's blocks, solved by Anderson and then mended."""

    def __init__(self, dim: int, n: int, init: str, seed: int, dtype: torch.dtype) -> None:
        torch.manual_seed(seed)
        self.layer = DEQFusion(dim, n, num_groups=GROUPS, init=init).to(dtype).requires_grad_(False)
        flat = [t for cell in self.layer.cells for t in cell.flat()] + self.layer.combine.flat()
        self.params = LayerParams.split([*flat, self.layer.modality_weights], n)
        self.n = n

    def cells(self, x: Tensor, solver: Anderson) -> tuple[Solved, Solved, float, float]:
        before = cpu.solve_cells(x, self.params.cells, None, GROUPS, "paper", solver)
        start = time.perf_counter()
        after = cpu.rescue_cells(before, x, self.params.cells, GROUPS, "paper", solver)
        taken = time.perf_counter() - start
        params = CellParams.stack(self.params.cells)
        worst = mended_residual(before, after, lambda z: residual_cell(z, x, params, GROUPS))
        return before, after, taken, worst

    def fuse(self, x: Tensor, cells: Tensor, solver: Anderson, rows: Tensor | None = None):  # type: ignore[no-untyped-def]
        x_fuse, total = fuse_injection(x, self.params.weights, None), cells.sum(0)
        rest = (self.params.fuse, None, self.n, GROUPS, "paper", solver)
        before = cpu.solve_fuse(x_fuse, total, *rest[:2], None, *rest[2:])
        if rows is not None:
            x_fuse, total = x_fuse[rows], total[rows]
            before = Solved(*(t[rows] for t in before[:4]), before.trace)
        start = time.perf_counter()
        after = cpu.rescue_fuse(before, x_fuse, total, *rest)
        taken = time.perf_counter() - start
        params = FuseParams(*self.params.fuse)
        constant = gate_constant(total, self.n, params)
        worst = mended_residual(
            before,
            after,
            lambda z: purify_combine(z, x_fuse, constant, None, self.n, params, GROUPS),
        )
        return before, after, taken, worst


def line(what: str, before: Solved, after: Solved, taken: float, worst: float, tol: float) -> str:
    rows = before.outcome != int(Outcome.CONVERGED)
    work = (after.nfe - before.nfe)[rows].double()
    median, largest = (int(work.median()), int(work.max())) if len(work) else (0, 0)
    return (
        f"{what}: {left(before)} of {before.outcome.numel()} rows left, then {left(after)}; work "
        f"{median} in the median, {largest} at most; {taken:.2f} s; residual {worst / tol:.2f} tol"
    )


def grid(options: argparse.Namespace) -> None:
    dtype, solver = getattr(torch, options.dtype), Anderson(tol=options.tol, max_iter=100)
    for dim in options.dims:
        for n in options.modalities:
            for rms in (0.3, 1.0, 10.0):
                for rectified in (False, True):
                    block = Layer(dim, n, "torch", dim + n, dtype)
                    x = torch.randn(n, options.rows, dim, dtype=dtype)
                    x = x.relu() if rectified else x
                    x = x * (rms / x.square().mean((1, 2), keepdim=True).sqrt())
                    what = f"d={dim} N={n} RMS {rms} {'rectified' if rectified else 'Gaussian'}"
                    cells = block.cells(x, solver)
                    print(line(f"{what} cells", *cells, options.tol), flush=True)
                    fuse = block.fuse(x, cells[1].z, solver)
                    print(line(f"{what} fuse", *fuse, options.tol), flush=True)


def zero(options: argparse.Namespace) -> None:
    dtype, solver = getattr(torch, options.dtype), Anderson(tol=options.tol, max_iter=100)
    for dim in options.dims:
        for init in ("contractive", "torch"):
            counts = torch.zeros(3, dtype=torch.int64)
            for seed in range(12):
                block = Layer(dim, 3, init, seed, dtype)
                before, after, *_ = block.cells(torch.zeros(3, 1, dim, dtype=dtype), solver)
                counts += torch.tensor([before.outcome.numel(), left(before), left(after)])
            total, first, last = counts.tolist()
            print(f"x = 0, init {init}, d={dim}: {first} of {total} cells left, then {last}")


def timing(options: argparse.Namespace) -> None:
    dtype, solver = getattr(torch, options.dtype), Anderson(tol=options.tol, max_iter=100)
    torch.set_num_threads(2)
    block, x = Layer(64, 3, "torch", 0, dtype), torch.randn(3, 512, 64, dtype=dtype)
    cells = block.cells(x, solver)
    print(line("512 rows, N=3, d=64, two threads", *block.fuse(x, cells[1].z, solver), options.tol))
    torch.set_num_threads(1)
    for dim, rows in ((300, 256), (500, 256)):
        block, x = Layer(dim, 3, "torch", 0, dtype), torch.randn(3, rows, dim, dtype=dtype)
        cells = block.cells(x, solver)[1].z
        before = block.fuse(x, cells, solver)[0]
        hard = torch.nonzero(before.outcome != int(Outcome.CONVERGED)).flatten()
        times = sorted(1e3 * block.fuse(x, cells, solver, row[None])[2] for row in hard)
        print(
            f"single rows, d={dim}, one thread: {len(times)} rows, median "
            f"{statistics.median(times):.0f} ms, nine in ten below "
            f"{times[len(times) * 9 // 10]:.0f} ms, at most {times[-1]:.0f} ms"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("study", choices=("grid", "zero", "time"))
    parser.add_argument("--dims", type=int, nargs="+", default=[16, 64, 128, 300])
    parser.add_argument("--modalities", type=int, nargs="+", default=[2, 3, 6])
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float64")
    parser.add_argument("--tol", type=float, default=1e-5)
    options = parser.parse_args()
    {"grid": grid, "zero": zero, "time": timing}[options.study](options)


if __name__ == "__main__":
    main()
