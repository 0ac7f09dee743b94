"""One small problem for each kernel, on the emulator: its answer, other schedules, a barrier less.

Run by test_ptxsim.py in a process of its own, with the plugin, which looks for findings in every
test: ``PYTHONPATH=tests/ptxsim pytest -p plugin tests/ptxsim/emulated.py``.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable

import launches
import pytest
import torch
from emulator import faults
from launches import reseed
from torch import Tensor
from triton_cases import Case, SolveCase, stacked, tupled, upcast

from deqfuse import Anderson, operators
from deqfuse.backends import cuda, maps, penalty, reference
from deqfuse.backends.linearization import CellLinearization, FuseLinearization
from deqfuse.backends.maps import VARIANTS
from deqfuse.triton_kernels import cell, cell_penalty, cell_vjp, fuse, fuse_penalty, fuse_vjp, unit
from deqfuse.triton_kernels.anderson import AndersonState, anderson_step

NARROW, PADDED = (20, 5), (50, 2)  # features and groups: 32 columns, and 64 of which 50 are there
WIDE = (160, 10)  # each stage is a launch
Answer = tuple[list[Tensor], list[Tensor], float]  # given, float64's, how far they may be apart


def solved(kind: int, dim: int, groups: int, variant: str) -> Answer:
    """A residual is at most ``tol``, and the map contracts by 0.8 at least: 5 of it, twice."""
    solver = Anderson(tol=1e-5, max_iter=30)
    case = SolveCase(rows=9, dim=dim, groups=groups, n=1, dtype="f32", variant=variant, mask=True)
    given, exact = (case.solves(b)[kind](solver) for b in (cuda, reference))
    assert torch.equal(given.outcome, exact.outcome)
    assert (given.nfe - exact.nfe).abs().max() <= 1
    return [given.z], [exact.z], 10 * solver.tol


def operands(dim: int, groups: int, variant: str) -> tuple[Case, list[Tensor], list[Tensor]]:
    case = Case(rows=9, dim=dim, groups=groups, n=1, dtype="f32", variant=variant, mask=True)
    torch.manual_seed(dim)
    return case, [case.draw(1) for _ in range(3)], case.cells()


def cells(dim: int, groups: int, variant: str) -> Answer:
    _, (u, z, x), params = operands(dim, groups, variant)
    packed, skip = cell.pack_cells(params), variant != "paper"
    step = cell.residual_cell(z, x, packed, groups, skip)
    given = cell_vjp.residual_cell_vjp(u, z, x, packed, groups, skip)
    u, z, x, params = upcast((u, z, x, params), torch.float64)
    at = CellLinearization(z, x, stacked(params), groups, VARIANTS[variant])
    dx, grads = at.vjp_operands(u, True)
    vectors = torch.stack([grads.linear1_bias, grads.linear2_bias, *grads[4:]], 1)
    exact = maps.residual_cell(z, x, stacked(params), groups, VARIANTS[variant])
    wanted = [exact, at.vjp(u), dx, grads.linear1_weight, grads.linear2_weight, vectors]
    return [step, *given], wanted, 1e-4


def combination(dim: int, groups: int, variant: str) -> Answer:
    case, tensors, _ = operands(dim, groups, variant)
    (u, z, x), params, mask = (t[0] for t in tensors), case.fuse(), case.drop()
    last = variant == "released-mmimdb"
    constant = fuse.gate_constant(u, 2, params, groups, z.dtype)
    step = fuse.purify_combine(z, x, constant, mask, 2, params, groups, last)
    given = fuse_vjp.purify_combine_vjp(u, z, x, u, mask, 2, params, groups, last)
    u, z, x, mask, params = upcast((u, z, x, mask, params), torch.float64)
    p, how = tupled(params), (groups, VARIANTS[variant])
    at = FuseLinearization(z, x, u, mask, 2, p, *how)
    dx, dsum, grads = at.vjp_operands(u, True)
    c = maps.gate_constant(u, 2, p)
    wanted = [c, maps.purify_combine(z, x, c, mask, 2, p, *how), at.vjp(u), dx, dsum, *grads]
    return [constant, step, *given[:3], *given.params], wanted, 1e-4


def penalised(kind: int, dim: int, groups: int, variant: str) -> Answer:
    case, (v, z, x), params = operands(dim, groups, variant)
    probes = torch.stack([v, z.roll(1, -1)])
    how = VARIANTS[variant]
    if kind == 0:
        packed = cell.pack_cells(params)
        given = cell_penalty.residual_cell_penalty(probes, z, x, packed, groups, how.skip, True)
        mine = [given.value, given.dx, given.weight1, given.weight2, given.vectors]
        exact = upcast((probes, z, x, params), torch.float64)
        value, dx, flat = penalty.of_cells(*exact, groups, how, True)
        vectors = [flat[1], flat[3], *flat[4:]]
        return mine, [value, dx, flat[0][None], flat[2][None], torch.stack(vectors)[None]], 1e-4
    params, mask = case.fuse(), case.drop()
    given = (probes[:, 0], z[0], x[0], v[0])
    mine = fuse_penalty.purify_combine_penalty(
        *given, mask, 2, params, groups, how.relu_last, True
    )  # fmt: skip
    *exact, params, mask = upcast((*given, params, mask), torch.float64)
    value, dx, flat = penalty.of_fuse(*exact, params, mask, 2, groups, how, True)
    return [mine.value, mine.dx_fuse, *mine.params], [value, dx, *flat], 1e-4


def mixed(n: int) -> Answer:
    """Three steps of Anderson's method on rows of ``n`` numbers."""
    torch.manual_seed(n)
    x, gain = torch.randn(5, n), torch.linspace(0.1, 0.6, 5)[:, None]

    def f(z: Tensor) -> Tensor:
        return gain.to(z) * torch.cos(z.roll(1, 1)) + x.to(z)

    state = AndersonState(x, 3, 0)
    state.z.zero_()
    for step in range(6):
        anderson_step(
            f(state.z), state, step, tol=1e-6, max_iter=50, beta=0.9, lam=1e-6
        )  # fmt: skip
    exact = reference.anderson(f, torch.zeros(5, n).double(), Anderson(tol=1e-12, max_iter=100))
    return [state.best], [exact.z], 1e-2


def units(dim: int) -> Answer:
    """Injections of unit size and their gradient."""
    torch.manual_seed(dim)
    x, grad = torch.randn(2, 9, dim)
    given = [unit.unit_size(x, None), unit.unit_size(x, grad)]
    exact = x.double().requires_grad_()
    (y,) = operators.unit_size([exact], "reference")
    return given, [y.detach(), *torch.autograd.grad(y, exact, grad.double())], 1e-5


KERNELS: dict[str, tuple[tuple[str, ...], Callable[[], Answer]]] = {
    "whole cells": (("_solve_cells_kernel",), lambda: solved(0, *NARROW, "paper")),
    "whole cells, padded": (("_solve_cells_kernel",), lambda: solved(0, *PADDED, "released")),
    "whole fuse": (("_solve_fuse_kernel",), lambda: solved(1, *NARROW, "released-mmimdb")),
    "whole fuse, padded": (("_solve_fuse_kernel",), lambda: solved(1, *PADDED, "paper")),
    "cell step and VJP": (
        ("_residual_cell_kernel", "_residual_cell_vjp_kernel"), lambda: cells(*NARROW, "released"),
    ),
    "cell, wide": (("_residual_cell_vjp_kernel",), lambda: cells(*WIDE, "paper")),
    "fuse step and VJP": (
        ("_purify_combine_kernel", "_purify_combine_vjp_kernel", "_gate_constant_kernel"),
        lambda: combination(*NARROW, "released-mmimdb"),
    ),
    "fuse, wide": (("_purify_combine_vjp_kernel",), lambda: combination(*WIDE, "paper")),
    "cell penalty": (
        ("_residual_cell_penalty_kernel",), lambda: penalised(0, *NARROW, "released"),
    ),
    "fuse penalty": (
        ("_purify_combine_penalty_kernel",), lambda: penalised(1, *NARROW, "released-mmimdb"),
    ),
    "unit size": (("_unit_size_kernel",), lambda: units(300)),
    "Anderson step, one warp": (("_anderson_step_kernel",), lambda: mixed(30)),
    "Anderson step, four warps": (("_anderson_step_kernel",), lambda: mixed(300)),
}  # fmt: skip


@pytest.mark.parametrize("name", KERNELS)
def test_answers_and_no_findings(name: str) -> None:
    """Gradients of these small problems are some hundred units in the last place off at most."""
    given, wanted, tolerance = KERNELS[name][1]()
    for i, (mine, exact) in enumerate(zip(given, wanted, strict=True)):
        error = (mine.double() - exact.double()).norm() / exact.double().norm().clamp_min(1e-9)
        assert error <= tolerance, (i, float(error))


@pytest.mark.parametrize("name", KERNELS)
def test_no_schedule_changes_a_bit(name: str) -> None:
    """Which warp runs when, and which of several threads with the same number stores it last."""
    runs = []
    for seed in (2, 3, 8, 15):
        reseed(1000 * seed)
        runs.append(KERNELS[name][1]()[0])
    for other in runs[1:]:
        for mine, again in zip(runs[0], other, strict=True):
            assert torch.equal(mine, again)


BARRIER = re.compile(r"\tbar\.(?:warp\.)?sync\s+[^;]*;")


@pytest.mark.parametrize(
    ("name", "kernel"),
    [
        (name, kernel)
        for name, (kernels, _) in KERNELS.items()
        for kernel in kernels
        # One product and its epilogue: the only barriers are those of the compiler's own moves.
        if kernel != "_gate_constant_kernel"
    ],
)
def test_a_barrier_less_is_noticed(name: str, kernel: str) -> None:
    """One after the other is removed from the compiled kernel until one is missed."""
    KERNELS[name][1]()
    text = launches.texts[kernel]
    assert not faults(launches.found)
    places = [match.span() for match in BARRIER.finditer(text)]
    assert places, "a kernel without a barrier"
    try:
        for begin, end in places[:: max(1, len(places) // 8)]:
            mutant = text[:begin] + text[end:]
            launches.change = lambda name, text, new=mutant: new if name == kernel else text
            launches.forget()
            with contextlib.suppress(AssertionError):  # its answer may be wrong as well
                KERNELS[name][1]()
            if faults(launches.found):
                return
        pytest.fail(f"none of {len(places)} barriers was missed")
    finally:
        launches.change = lambda name, text: text
        launches.forget()
        launches.found.clear()
