"""The fused Anderson step against the reference solver; under Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from triton_cases import poison  # noqa: F401 - a fixture

from deqfuse import Outcome
from deqfuse.solvers import anderson as reference
from deqfuse.solvers import rows
from deqfuse.solvers.anderson import Anderson
from deqfuse.solvers.rows import Solution
from deqfuse.triton_kernels import anderson as kernels
from deqfuse.triton_kernels.anderson import AndersonState, anderson_step
from deqfuse.triton_kernels.launch import counted
from deqfuse.triton_kernels.tiles import MAX_STEP_HISTORY

pytestmark = [pytest.mark.triton, pytest.mark.usefixtures("poison")]

each_dtype = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])


def rows_map(n: int, dtype: torch.dtype, count: int = 5):
    """Rows with gains from 0 to beyond 1: they end in every way."""
    gen = torch.Generator().manual_seed(n)
    gain = torch.linspace(0, 1.6, count, dtype=torch.float64).to(dtype)[:, None]
    x, z0 = torch.randn(2, count, n, generator=gen, dtype=torch.float64).to(dtype)
    return (lambda z: gain * torch.cos(1.3 * z.roll(1, 1)) + x), z0


def solve(f, z0: Tensor, option: Anderson) -> Solution:
    state = AndersonState(z0, option.m, option.max_iter if option.trace else 0)
    state.z.copy_(z0)
    step = 0
    while step == 0 or state.active.any():
        knobs = {"tol": option.tol, "max_iter": option.max_iter}
        anderson_step(f(state.z), state, step, beta=option.beta, lam=option.lam, **knobs)
        step += 1
    trace = None
    if state.trace is not None:
        there = torch.arange(step)[:, None] < state.nfe
        trace = torch.where(there, state.trace[:step], torch.nan)
    return Solution(state.best, state.best_residual, state.nfe, state.outcome, trace)


def assert_same(given: Solution, expected: Solution, rtol: float) -> None:
    torch.testing.assert_close(given.z, expected.z, rtol=rtol, atol=rtol, equal_nan=True)
    torch.testing.assert_close(given.residual, expected.residual, rtol=1e3 * rtol, atol=rtol)
    assert torch.equal(given.nfe, expected.nfe)
    assert torch.equal(given.outcome, expected.outcome)
    if expected.trace is not None:
        torch.testing.assert_close(
            given.trace, expected.trace, rtol=1e3 * rtol, atol=rtol, equal_nan=True
        )


OPTIONS = [
    *(Anderson(m=m) for m in range(1, MAX_STEP_HISTORY + 1)),
    Anderson(m=1, beta=0.5),
    Anderson(m=4, beta=0.7),
    Anderson(m=3, beta=1.3),
    Anderson(lam=0.0),
    Anderson(lam=1e-3),
]


@pytest.mark.parametrize("option", OPTIONS, ids=repr)
def test_the_step_is_that_of_the_reference(option: Anderson) -> None:
    """Rows that wander amplify rounding: over 10 steps 1e-16 stays below 1e-9."""
    option = Anderson(
        tol=1e-2, max_iter=10, m=option.m, beta=option.beta, lam=option.lam, trace=True
    )
    f, z0 = rows_map(30, torch.float64)
    expected = reference.anderson(f, z0, option)
    assert len(set(expected.outcome.tolist())) > 1
    assert_same(solve(f, z0, option), expected, rtol=1e-9)


@pytest.mark.parametrize("n", [1, 5, 300])
def test_float32(n: int) -> None:
    """Residuals of one number are collinear: the ridge alone decides about some weights, which
    rounding moves by eps / lam, a tenth of what the images differ by.
    """
    option = Anderson(tol=1e-4, max_iter=6, trace=True)
    f, z0 = rows_map(n, torch.float32)
    rtol = 1e-3 if n == 1 else 1e-4
    assert_same(solve(f, z0, option), reference.anderson(f, z0, option), rtol)


@each_dtype
def test_rows_longer_than_a_block(dtype: torch.dtype) -> None:
    option = Anderson(tol=1e-5, max_iter=6, m=3)
    f, z0 = rows_map(kernels.BLOCK_BYTES // dtype.itemsize + 3, dtype, count=3)
    rtol = 1e-9 if dtype == torch.float64 else 1e-4
    assert_same(solve(f, z0, option), reference.anderson(f, z0, option), rtol)


def test_a_row_that_finds_nothing_better_has_stalled() -> None:
    f, z0 = rows_map(6, torch.float64)
    option = Anderson(m=1, tol=1e-10, max_iter=60)
    expected = reference.anderson(f, z0, option)
    assert (expected.outcome == Outcome.STALLED).any()
    given = solve(f, z0, option)
    assert torch.equal(given.outcome, expected.outcome)
    assert torch.equal(given.nfe, expected.nfe)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy's
@pytest.mark.parametrize("when", [0, 3])
@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
def test_a_row_that_becomes_non_finite_stays_alone(value: float, when: int) -> None:
    f, z0 = rows_map(6, torch.float64)
    option = Anderson(tol=1e-8, max_iter=6, trace=True)

    def poisoned():
        steps, late = iter(range(1000)), torch.zeros_like(z0)
        late[3, 2] = value
        return lambda z: f(z) + late if next(steps) >= when else f(z)

    given, expected = solve(poisoned(), z0, option), reference.anderson(poisoned(), z0, option)
    assert given.outcome[3] == expected.outcome[3] == Outcome.NON_FINITE
    assert_same(given, expected, rtol=1e-6)
    assert bool(given.z[3].isfinite().all()) == (when > 0), "the best finite iterate, if any"
    clean = solve(f, z0, option)
    others = [0, 1, 2, 4]
    assert torch.equal(given.z[others], clean.z[others])


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    f, z0 = rows_map(9, torch.float32)
    option = Anderson(tol=1e-5, max_iter=12)
    together = solve(f, z0, option)
    state = AndersonState(z0[2:3], option.m, 0)
    state.z.copy_(z0[2:3])
    for step in range(int(together.nfe[2])):
        image = f(state.z.expand(5, 9))[2:3]
        anderson_step(image, state, step, tol=1e-5, max_iter=12, beta=1.0, lam=option.lam)
    assert torch.equal(state.best[0], together.z[2])
    assert not state.active.any()


def test_a_frozen_row_keeps_its_iterate() -> None:
    f, z0 = rows_map(9, torch.float64)
    state, seen = AndersonState(z0, 5, 0), []
    state.z.copy_(z0)
    for step in range(12):
        seen.append(state.z.clone())
        anderson_step(f(state.z), state, step, tol=1e-6, max_iter=12, beta=1.0, lam=1e-6)
    assert state.nfe.min() < 6
    for row, nfe in enumerate(state.nfe.tolist()):
        for late in seen[nfe:]:
            assert torch.equal(late[row], seen[nfe - 1][row])


def test_one_launch_a_step_and_none_without_rows() -> None:
    f, z0 = rows_map(9, torch.float64)
    knobs = {"tol": 1e-6, "max_iter": 5, "beta": 1.0, "lam": 1e-6}
    state = AndersonState(z0, 3, 0)
    state.z.copy_(z0)
    with counted() as names:
        anderson_step(f(z0), state, 0, **knobs)
        anderson_step(z0[:0], AndersonState(z0[:0], 3, 0), 0, **knobs)
    assert names == ["_anderson_step_kernel"]


def test_constants_are_those_of_the_solvers() -> None:
    assert kernels.PIVOT_FLOOR.value == reference.PIVOT_FLOOR
    assert kernels.TINY.value == reference.TINY
    assert kernels.RESIDUAL_FLOOR.value == rows.RESIDUAL_FLOOR
    assert kernels.STALL_STEPS.value == rows.STALL_STEPS
