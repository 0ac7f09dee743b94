"""Problems that the tests of the CUDA adjoint share: on the host policy and on a GPU."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from cpu_cases import Case, flat_cells
from torch import Tensor

from deqfuse.backends import cpu_native, cuda_native

assert cpu_native.module is not None  # cpu_cases has looked
H100, A100 = 227 * 1024, 163 * 1024  # bytes of shared memory for a block
CUTS = ("resident", "streamed", "steps")


@contextlib.contextmanager
def device(
    shared_limit: int = H100, reverse: bool = False, tensor_cores: bool = False
) -> Iterator[None]:
    """The device that the host policy plays."""
    cpu_native.module.host_device(shared_limit, reverse, tensor_cores)
    try:
        yield
    finally:
        cpu_native.module.host_device()


def limit_for(cut: str, case: Case) -> int:
    """Just enough shared memory for a problem to be cut like this."""
    size = 8 if case.dtype == "f64" else 4
    for limit in {"resident": [H100], "streamed": range(0, H100, 512), "steps": [0]}[cut]:
        cpu_native.module.host_device(limit)
        if cpu_native.module.host_plan(case.dim, case.groups, size)["cut"] == cut:
            cpu_native.module.host_device()
            return limit
    raise AssertionError(f"{case} is never cut into {cut}")


@dataclasses.dataclass(frozen=True)
class Machine:
    """What runs the kernels' bodies: the host policy ("cpu"), or a GPU ("cuda").

    ``wide``: the host policy takes a GPU's problems, too: what a test promises of them has been
    tried before there is one.
    """

    device: str
    wide: bool = False

    def __str__(self) -> str:
        return "rehearsal" if self.wide else self.device

    def case(self, cut: str, case: Case) -> Case:
        """One like it that is cut like this: a GPU's memory is what it is, a host's is not."""
        wide = {"streamed": 200, "steps": 300}
        if (self.device == "cpu" and not self.wide) or cut not in wide:
            return case
        return dataclasses.replace(case, dim=wide[cut], groups=4)

    def playing(self, cut: str, case: Case, reverse: bool = False):
        """Inside, the host policy cuts like this."""
        if self.device != "cpu":
            return contextlib.nullcontext()
        return device(limit_for(cut, case), reverse)

    def place(self, value):
        """A tensor, or a collection of them, in this machine's memory. Strides of 0 stay."""
        if isinstance(value, (list, tuple)):
            return type(value)(self.place(v) for v in value)
        if not isinstance(value, Tensor):
            return value
        shared = value.dim() == 3 and len(value) > 1 and value.stride(0) == 0
        return value[0].to(self.device).expand_as(value) if shared else value.to(self.device)

    def run(self, problem: Problem, kind: str, **options):
        """:meth:`Problem.run` there; the results come back."""
        if self.device != "cpu":
            assert cuda_native.load_error() is None, cuda_native.load_error()
        given = self.place(options.pop("given", getattr(problem, kind)))
        found, statistics = problem.run(kind, cuda_native, given=given, **options)
        return {name: t.cpu() for name, t in found.items()}, [t.cpu() for t in statistics]


MACHINES = [
    Machine("cpu"),
    pytest.param(Machine("cpu", wide=True), marks=pytest.mark.slow),
    pytest.param(Machine("cuda"), marks=pytest.mark.gpu),
]


@pytest.fixture(params=MACHINES, ids=["cpu", "rehearsal", "cuda"], name="machine")
def every_machine(request: pytest.FixtureRequest) -> Machine:
    machine: Machine = request.param
    if machine.wide and "cut" not in request.fixturenames:
        pytest.skip("the same problem as without")
    return machine


@dataclasses.dataclass
class Problem:
    """The arguments of both operators, at the equilibria."""

    case: Case
    tol: float
    cells: tuple
    fuse: tuple

    def __init__(self, case: Case, mask: bool = False) -> None:
        self.case = case
        double = dataclasses.replace(case, dtype="f64")
        self.tol = 1e-12 if case.dtype == "f64" else 1e-6
        layer, how = double.layer().requires_grad_(False), (200, 5, 1.0, 1e-6, 0)
        x, flat, g = double.draw(case.n), flat_cells(layer), double.draw(case.n)
        drop = 2.0 * (double.draw() > 0).double() if mask else None
        skip, last = case.variant != "paper", case.variant == "released-mmimdb"
        z = cpu_native.solve_cells(x, flat, None, case.groups, skip, 1e-12, *how)[0]
        x_fuse, cell_sum, params = x.sum(0), z.sum(0), layer.combine.flat()
        given = (x_fuse, cell_sum, params, drop)
        fused = cpu_native.solve_fuse(*given, None, case.n, case.groups, last, 1e-12, *how)[0]
        self.cells = self.cast((g, z, x, flat))
        self.fuse = self.cast((g[0], fused, x_fuse, cell_sum, params, drop))

    def cast(self, arguments, dtype: torch.dtype | None = None):
        dtype = dtype or (torch.float64 if self.case.dtype == "f64" else torch.float32)
        return tuple(
            [t.to(dtype) for t in a] if isinstance(a, list) else None if a is None else a.to(dtype)
            for a in arguments
        )

    def run(self, kind: str, backend: ModuleType, want: bool = True, **options):
        """``{name: gradient}`` and the statistics."""
        given = options.pop("given", getattr(self, kind))
        dtype = options.pop("dtype", None)
        given = given if dtype is None else self.cast(given, dtype)
        solve = {"mode": -1, "tol": self.tol, "max_iter": 400, "history": 6, "beta": 1.0}
        tf32 = (options.pop("allow_tf32"),) if "allow_tf32" in options else ()
        tail = (*(solve | options).values(), 1e-6, *tf32)
        case, last = self.case, self.case.variant == "released-mmimdb"
        if kind == "cells":
            how = (case.groups, case.variant != "paper")
            dx, grads, *statistics = backend.adjoint_cells(*given, want, *how, *tail)
            named = {"dx": dx}
        else:
            *given, mask = given
            how = (case.n, case.groups, last)
            dx, dsum, grads, *statistics = backend.adjoint_fuse(*given, want, mask, *how, *tail)
            named = {"dx": dx, "dcell_sum": dsum}
        return named | {f"params[{i}]": g for i, g in enumerate(grads)}, statistics


def own_and_common_numbers(
    case: Case, backend: ModuleType, place: Callable[[Any], Any] = lambda given: given
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Three terms of the fuse step's adjoint, rows with 0 to 3 modalities.

    Returns:
        Gradients of one call that is told each row's number; and those of a call for the rows of
        each number, put together.
    """
    counts = torch.arange(case.rows) % 4  # some have none
    *rows, params, mask = Problem(case, mask=True).fuse
    how = (case.groups, case.variant == "released-mmimdb", 3, 0.0, 3, 0, 1.0, 1e-6, False)

    def run(which: Tensor, n: int, own: Tensor | None) -> dict[str, Tensor]:
        some = place([t[which].contiguous() for t in (*rows, mask)])
        given = (*some[:-1], place(params), True, some[-1], n, *how, place(own))
        dx, dsum, grads, *_ = backend.adjoint_fuse(*given)
        named = {"dx": dx, "dcell_sum": dsum} | {f"params[{i}]": g for i, g in enumerate(grads)}
        return {name: t.cpu() for name, t in named.items()}

    given = run(torch.arange(case.rows), case.n, counts.to(rows[0]))
    expected = {name: torch.zeros_like(t) for name, t in given.items()}
    for n in range(4):
        which = torch.nonzero(counts == n).flatten()
        for name, t in run(which, n, None).items():
            if name.startswith("params"):
                expected[name] += t
            else:
                expected[name][which] = t
    return given, expected


def distance(given: dict, expected: dict) -> float:
    """The largest difference, relative to each gradient's largest entry or 1e-4 of all."""
    assert given.keys() == expected.keys()
    floor = max((float(e.abs().max()) for e in expected.values() if e.numel()), default=0.0)
    worst = 0.0
    for name, wanted in expected.items():
        found = given[name]
        assert found.shape == wanted.shape, name
        assert found.is_contiguous(), name
        if wanted.numel():
            scale = max(float(wanted.abs().max()), 1e-4 * floor, 1e-300)
            worst = max(worst, float((found - wanted).abs().max()) / scale)
    return worst
