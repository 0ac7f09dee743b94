"""Few rows of the C++ backend against the same rows in a large batch, bit for bit.

Run as a program, ``few_rows_cases.py MOST``, it tries the cases of up to so many features with the
instruction set that ``DEQFUSE_ISA`` says, prints its name and what differs.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Iterator

import torch
from parameters import scatter_injection, scatter_norms
from torch import Tensor

from deqfuse import Anderson, DEQFusion, Picard
from deqfuse.backends import cpu_native
from deqfuse.backends.maps import VARIANTS
from deqfuse.solvers.options import SolverOption

MANY = 1000
DTYPES = {"f32": torch.float32, "f64": torch.float64}
# (d, groups): less than a vector, no whole number of vectors or of pairs, groups that begin
# anywhere; more than one segment of integers (csrc/cpu/vnni.h) at 300.
SIZES = ((6, 2), (12, 4), (33, 3), (35, 5), (65, 1), (130, 5), (300, 4))
COUNTS = (1, 2, 3, 4, 5, 7, 8, 9, 16)
SOLVERS = (Anderson(), Anderson(m=2, beta=0.8), Anderson(m=8, tol=1e-6), Picard(beta=0.7))


@dataclasses.dataclass(frozen=True)
class Few:
    dim: int
    groups: int
    dtype: str = "f32"
    variant: str = "paper"
    n: int = 2
    extra: str = ""  # "mask", "present", "poison", "warm"
    solver: SolverOption = SOLVERS[0]

    def layer(self) -> DEQFusion:
        """At torch's init rows end in every way, after different numbers of steps."""
        torch.manual_seed(self.dim)
        options = {"init": "torch", "on_failure": "ignore", "backend": "cpu"}
        layer = DEQFusion(
            self.dim, self.n, num_groups=self.groups, variant=self.variant,
            solver=dataclasses.replace(self.solver, max_iter=25), **options,
        )  # fmt: skip
        scatter_norms(layer)
        scatter_injection(layer)
        return layer.to(DTYPES[self.dtype])


def cases() -> list[Few]:
    """All sizes and dtypes; everything else at one odd size and at one with integers."""
    found = [Few(d, g, t) for (d, g), t in itertools.product(SIZES, DTYPES)]
    for dim, groups, dtype in ((35, 5, "f32"), (130, 5, "f32"), (35, 5, "f64")):
        for extra in ("mask", "present", "poison", "warm"):
            found.append(Few(dim, groups, dtype, n=3, extra=extra))
        found += [Few(dim, groups, dtype, v) for v in ("released", "released-mmimdb")]
        found += [Few(dim, groups, dtype, solver=s) for s in SOLVERS[1:]]
    return found


def rows_of(case: Few) -> dict[str, Tensor | None]:
    """Operands of the kernel, rows in front of the last dimension of each."""
    gen = torch.Generator().manual_seed(1)
    dtype, shape = DTYPES[case.dtype], (case.n, MANY, case.dim)
    x = torch.randn(shape, generator=gen, dtype=torch.float64).to(dtype)
    x *= 10 ** (torch.rand(MANY, 1, generator=gen) * 1.5 - 0.5).to(dtype)
    mask = 1.25 * (torch.rand(shape[1:], generator=gen) > 0.2).to(dtype)
    present = torch.rand(case.n, MANY, 1, generator=gen) > 0.4
    start = torch.randn(case.n + 1, *shape[1:], generator=gen).to(dtype)
    if case.extra == "poison":
        x[0, 3::7, 1], x[-1, 5::11, -1] = torch.nan, torch.inf
    return {
        "x": x,
        "mask": mask if case.extra == "mask" else None,
        "z0_fuse": start[-1] if case.extra == "warm" else None,
        "z0_cells": start[:-1] if case.extra == "warm" else None,
        "present": present if case.extra == "present" else None,
    }


def solve(layer: DEQFusion, rows: dict[str, Tensor | None], part: slice) -> list[Tensor]:
    """States and statistics of some of the rows, (N + 1, rows, ...), by the kernel itself."""
    x, *others = (None if t is None else t[..., part, :].contiguous() for t in rows.values())
    params, solver = layer._equations().flat(), layer.solver
    number = solver.m if isinstance(solver, Anderson) else 0
    lam = solver.lam if isinstance(solver, Anderson) else 0.0
    variant = VARIANTS[layer.variant].skip, VARIANTS[layer.variant].relu_last
    assert x is not None
    found = cpu_native.solve_layer(
        list(x), params, *others, layer.num_groups, *variant,
        solver.tol, solver.max_iter, number, solver.beta, lam, solver.max_iter,
    )  # fmt: skip
    trace = found[5].movedim(0, -1)  # (N + 1, rows, steps)
    return [*found[1:5], trace]


def parts(counts: tuple[int, ...] = COUNTS) -> Iterator[slice]:
    """Runs of so many rows, at different places."""
    return (slice(17 * i, 17 * i + count) for i, count in enumerate(counts))


@torch.no_grad()
def differing(case: Few) -> list[str]:
    """Which runs of rows do not have the bits that they have in company; [] if all do."""
    layer, rows = case.layer(), rows_of(case)
    together = solve(layer, rows, slice(0, MANY))
    wrong = []
    for part in parts():
        alone = solve(layer, rows, part)
        names = ("z", "residual", "nfe", "outcome", "trace")
        for name, a, b in zip(names, alone, together, strict=True):
            if not torch.equal(bits(a), bits(b[:, part])):
                wrong.append(f"{case}: {name} of rows {part.start} to {part.stop - 1}")
    return wrong


def bits(t: Tensor) -> Tensor:
    """With one NaN for all of them: which of two NaN a sum keeps is not said anywhere."""
    return torch.where(t.isnan(), 12345.0, t) if t.is_floating_point() else t


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(cpu_native.module.build_info()["instruction_set"])  # type: ignore[union-attr]
    small = [case for case in cases() if case.dim <= int(sys.argv[1])]
    failures = [text for case in small for text in differing(case)]
    print("\n".join(failures))
