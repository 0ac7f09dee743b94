"""Rows of the compiled backend: bit for bit the same in any company, on any number of threads; and
the compiled Anderson step of ``DEQ(f)``."""

from __future__ import annotations

import dataclasses
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cpu_cases import assert_equal
from torch import Tensor

from deqfuse import (
    Anderson,
    DEQFusion,
    Implicit,
    Neumann,
    OneStep,
    Outcome,
    Picard,
    functional,
)
from deqfuse.backends import cpu_native

DIM, N = 20, 2
DTYPES = {"f64": torch.float64, "f32": torch.float32}
each_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
# Rows at which a tile takes two vectors instead of one, for the widest and the narrower ones.
SWITCH = sorted({4 * lanes + k for lanes in (2, 4, 8, 16) for k in (-1, 0, 1)})


def layer(dtype: torch.dtype, **options) -> DEQFusion:
    """At torch's init rows end in every way, and lanes are refilled at different times."""
    torch.manual_seed(0)
    given = {"num_groups": 2, "init": "torch", "backend": "cpu", "on_failure": "ignore"}
    return DEQFusion(DIM, N, **{**given, **options}).to(dtype)


def features(dtype: torch.dtype, rows: int) -> list[Tensor]:
    gen = torch.Generator().manual_seed(1)
    sizes = 10 ** torch.empty(rows, 1, dtype=torch.float64).uniform_(-0.5, 1, generator=gen)
    drawn = (torch.randn(rows, DIM, generator=gen, dtype=torch.float64) for _ in range(N))
    return [(sizes * x).to(dtype) for x in drawn]


def starts(dtype: torch.dtype, rows: int) -> tuple[Tensor, Tensor]:
    gen = torch.Generator().manual_seed(2)
    drawn = torch.randn(N + 1, rows, DIM, generator=gen, dtype=torch.float64).to(dtype)
    return drawn[0], drawn[1:]


def cotangent(dtype: torch.dtype, rows: int) -> Tensor:
    gen = torch.Generator().manual_seed(3)
    return torch.randn(rows, DIM, generator=gen, dtype=torch.float64).to(dtype)


@dataclasses.dataclass(frozen=True)
class Answer:
    """Of a forward and a backward pass; per row, then per parameter."""

    rows: list[Tensor]  # z, every statistic and the input gradients, rows first
    params: list[Tensor]

    def __getitem__(self, index) -> list[Tensor]:
        return [t[index] for t in self.rows]


def run(
    fusion: DEQFusion, xs: list[Tensor], g: Tensor, z0: tuple[Tensor, Tensor] | None = None
) -> Answer:
    xs = [x.clone().requires_grad_() for x in xs]
    z, info = fusion(xs, z0=z0, return_info=True)
    assert info.backend == fusion.backend
    grads = torch.autograd.grad(z, [*xs, *fusion.parameters()], g)
    blocks = (info.fuse.residual, info.fuse.nfe, info.fuse.outcome)
    cells = (info.cells.residual.T, info.cells.nfe.T, info.cells.outcome.T)
    return Answer([z.detach(), *blocks, *cells, *grads[:N]], list(grads[N:]))


def pick(index, xs: list[Tensor], g: Tensor, z0=None) -> tuple:
    starts = None if z0 is None else (z0[0][index], z0[1][:, index])
    return [x[index] for x in xs], g[index], starts


# ---- batch invariance ----------------------------------------------------------------------------

SOLVERS = [Anderson(), Anderson(m=2, beta=0.8), Anderson(m=8), Picard(beta=0.7)]


@pytest.mark.parametrize("warm", [False, True], ids=["zero", "warm"])
@each_dtype
@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_a_row_is_the_same_in_any_company(solver, dtype, warm):
    rows, fusion = 150, layer(dtype, solver=solver)
    whole = features(dtype, rows), cotangent(dtype, rows), starts(dtype, rows) if warm else None
    together = run(fusion, *whole)
    assert len(set(together.rows[3].tolist())) > 1, "all rows ended alike: no lane was refilled"
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(4))
    parts = [slice(0, 1), slice(0, 7), slice(5, 22), slice(70, 140), slice(149, 150), order]
    parts += [slice(row, row + 1) for row in range(20, 60, 5)]
    for part in parts:
        assert_equal(run(fusion, *pick(part, *whole)).rows, together[part])


@each_dtype
def test_a_row_is_the_same_around_the_switch_of_the_tile_width(dtype):
    fusion, most = layer(dtype), SWITCH[-1]
    whole = features(dtype, most), cotangent(dtype, most)
    together = run(fusion, *whole)
    for rows in SWITCH:
        part = slice(most - rows, most)
        assert_equal(run(fusion, *pick(part, *whole)).rows, together[part])


@each_dtype
@pytest.mark.parametrize("adjoint", [Implicit(solver="neumann"), OneStep(), Neumann(3)], ids=repr)
def test_gradients_of_a_row_are_the_same_in_any_company(adjoint, dtype):
    rows, fusion = 70, layer(dtype, adjoint=adjoint)
    whole = features(dtype, rows), cotangent(dtype, rows)
    together = run(fusion, *whole)
    for part in (slice(0, 1), slice(3, 20), slice(69, 70), slice(5, 70)):
        assert_equal(run(fusion, *pick(part, *whole)).rows, together[part])


@pytest.mark.parametrize("rows", [1, 33, 150])
@each_dtype
def test_answers_do_not_depend_on_the_number_of_threads(dtype, rows, threads):
    fusion, answers = layer(dtype), []
    for count in (1, 2, 3, 64):
        threads(count)
        answers.append(run(fusion, features(dtype, rows), cotangent(dtype, rows)))
    for answer in answers[1:]:
        assert_equal(answer.rows, answers[0].rows)
        assert_equal(answer.params, answers[0].params)


@each_dtype
def test_the_same_call_twice_gives_the_same_bits(dtype):
    fusion = layer(dtype)
    first, second = (run(fusion, features(dtype, 70), cotangent(dtype, 70)) for _ in range(2))
    assert_equal(second.rows + second.params, first.rows + first.params)


# ---- poison --------------------------------------------------------------------------------------


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("warm", [False, True], ids=["zero", "warm"])
@each_dtype
def test_a_poisoned_row_stays_alone(dtype, warm, poison):
    rows, fusion = 70, layer(dtype, init="contractive")
    xs, g = features(dtype, rows), cotangent(dtype, rows)
    z0 = starts(dtype, rows) if warm else None
    clean = run(fusion, xs, g, z0)
    bad = [0, 4, 33, 69]
    xs[1][bad, 3] = poison
    dirty = run(fusion, xs, g, z0)
    reference = run(layer(dtype, init="contractive", backend="reference"), xs, g, z0)
    others = [row for row in range(rows) if row not in bad]
    assert_equal(dirty[others], clean[others])
    z, _, _, fuse_outcome, _, _, cell_outcome, *dxs = dirty[bad]
    assert (fuse_outcome == Outcome.NON_FINITE).all()
    assert (cell_outcome[:, 1] == Outcome.NON_FINITE).all()
    assert (cell_outcome[:, 0] == Outcome.CONVERGED).all(), "the other modality's cell is fine"
    assert z.isnan().any(-1).all()
    assert dxs[1].isnan().any(-1).all()
    for p, (name, _), wanted in zip(
        dirty.params, fusion.named_parameters(), reference.params, strict=True
    ):  # sums over rows show the poison
        assert torch.equal(p.isnan().any(), wanted.isnan().any()), name


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, 1e200], ids=str)
@pytest.mark.parametrize("adjoint", [Implicit(), OneStep(), Neumann(3)], ids=repr)
def test_a_poisoned_cotangent_stays_in_its_row(adjoint, poison):
    """1e200 is finite and its square is not: the row must not come back as a zero gradient."""
    rows, fusion = 70, layer(torch.float64, adjoint=adjoint, init="contractive")
    xs, g = features(torch.float64, rows), cotangent(torch.float64, rows)
    clean = run(fusion, xs, g)
    g[33, 3] = poison
    dirty = run(fusion, xs, g)
    others = [row for row in range(rows) if row != 33]
    assert_equal(dirty[others], clean[others])
    for dx in dirty[33][-N:]:
        assert dx.isnan().any() or dx.abs().max() > 1e100


@pytest.mark.parametrize("block", ["cells", "fuse"])
def test_a_poisoned_parameter_shows(block):
    """Also a weight that the free first evaluation at z = 0 does not touch."""
    fusion = layer(torch.float64, init="contractive").requires_grad_(False)
    x = torch.stack(features(torch.float64, 5))
    flat = [t for cell in fusion.cells for t in cell.flat()]
    for i in range(len(flat) if block == "cells" else 6):
        params = [t.clone() for t in (flat if block == "cells" else fusion.combine.flat())]
        params[i].view(-1)[1] = torch.nan
        common = {"num_groups": 2, "on_failure": "ignore", "backend": "cpu"}
        if block == "cells":
            z, info, _ = functional.solve_cells(x, params, **common)
            z, outcome = z[i // 10], info.outcome[i // 10]
        else:
            z, info, _ = functional.solve_fuse(x[0], x[1], params, num_modalities=N, **common)
            outcome = info.outcome
        assert z.isnan().any(-1).all(), f"params[{i}]"
        assert (outcome == Outcome.NON_FINITE).all(), f"params[{i}]"


# ---- Python threads ------------------------------------------------------------------------------


def test_solves_at_the_same_time_do_not_disturb_each_other():
    def problem(i: int) -> tuple:
        dtype, rows = (torch.float32, 70) if i % 2 else (torch.float64, 40)
        fusion = layer(dtype, solver=Anderson(m=1 + i % 5), variant="released")
        return fusion, [(1 + i) * x for x in features(dtype, rows)], cotangent(dtype, rows)

    def answer(problem: tuple) -> list[Tensor]:
        found = run(*problem)
        return found.rows + found.params

    problems = [problem(i) for i in range(8)]
    alone = [answer(problem) for problem in problems]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            for given, expected in zip(pool.map(answer, problems), alone, strict=True):
                assert_equal(given, expected)


def test_python_runs_on_during_a_solve():
    fusion = layer(torch.float64).requires_grad_(False)
    x = torch.stack(features(torch.float64, 4000))
    params = [t for cell in fusion.cells for t in cell.flat()]
    ticks, done = [0], threading.Event()

    def tick() -> None:
        while not done.wait(0.002):
            ticks[0] += 1

    clock = threading.Thread(target=tick)
    clock.start()
    try:
        iterations = 100
        while True:  # until the solve is long enough for the clock to be heard
            before, begin = ticks[0], time.perf_counter()
            # Nothing is ever good enough here, so every row takes its evaluations or stalls.
            cpu_native.solve_cells(x, params, None, 2, False, 0.0, iterations, 5, 1.0, 1e-6, 0)
            heard, took = ticks[0] - before, time.perf_counter() - begin
            if took > 0.3:
                break
            x = torch.cat([x, x], dim=1)
    finally:
        done.set()
        clock.join()
    assert heard >= 10, f"{heard} ticks of 2 ms in {took:.2f} s: the solve holds the GIL"
