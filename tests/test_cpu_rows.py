"""Rows of the compiled backend: bit for bit the same in any company, on any number of threads; and
the compiled Anderson step of ``DEQ(f)``."""

from __future__ import annotations

import dataclasses
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from deqfuse import (
    DEQ,
    Anderson,
    Broyden,
    DEQFusion,
    Implicit,
    Neumann,
    OneStep,
    Outcome,
    Picard,
    functional,
)
from deqfuse.backends import cpu, native

if (missing := cpu.unavailable()) is not None:
    if os.environ.get("CI", "").lower() == "true":
        pytest.fail(f"CI must test the compiled backend: {missing[0]}", pytrace=False)
    pytest.skip(missing[0], allow_module_level=True)

DIM, N = 20, 2
DTYPES = {"f64": torch.float64, "f32": torch.float32}
each_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
# Rows at which a tile takes two vectors instead of one, for the widest and the narrower ones.
SWITCH = sorted({4 * lanes + k for lanes in (2, 4, 8, 16) for k in (-1, 0, 1)})


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DEQFUSE_BACKEND", raising=False)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


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


def assert_equal(given: list[Tensor], expected: list[Tensor]) -> None:
    for i, (a, b) in enumerate(zip(given, expected, strict=True)):
        assert torch.allclose(a, b, rtol=0, atol=0, equal_nan=True), i


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
    for count in (1, 2, 3):
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
            native.solve_cells(x, params, None, 2, False, 0.0, iterations, 5, 1.0, 1e-6, 0)
            heard, took = ticks[0] - before, time.perf_counter() - begin
            if took > 0.3:
                break
            x = torch.cat([x, x], dim=1)
    finally:
        done.set()
        clock.join()
    assert heard >= 10, f"{heard} ticks of 2 ms in {took:.2f} s: the solve holds the GIL"


# ---- DEQ(f): the compiled Anderson step ----------------------------------------------------------


def both(monkeypatch: pytest.MonkeyPatch, call: Callable[[], tuple]) -> tuple[tuple, tuple]:
    """(z, block) with the compiled step and from the reference."""
    z, info, name = call()
    assert name == "cpu"
    with monkeypatch.context() as patch:
        patch.setenv("DEQFUSE_BACKEND", "reference")
        expected, reference, name = call()
    assert name == "reference"
    return (z, info), (expected, reference)


def assert_same_run(monkeypatch, f, z0, solver, rtol: float = 1e-9) -> tuple:
    """Values and every statistic, NaN in the same places."""

    def call():
        return functional.fixed_point(f, z0, solver=solver, on_failure="ignore")

    (z, info), (expected, reference) = both(monkeypatch, call)
    close = {"rtol": rtol, "atol": rtol, "equal_nan": True}
    torch.testing.assert_close(z, expected, **close)
    torch.testing.assert_close(info.residual, reference.residual, rtol=1e-3, atol=1e-3 * solver.tol)
    assert torch.equal(info.nfe, reference.nfe)
    assert torch.equal(info.outcome, reference.outcome)
    assert (info.trace is None) == (reference.trace is None)
    if info.trace is not None:
        assert info.trace.shape == reference.trace.shape
        close = {"rtol": 1e-3, "atol": 1e-3 * solver.tol, "equal_nan": True}
        torch.testing.assert_close(info.trace, reference.trace, **close)
    return z, info


def rows_map(n: int, dtype: torch.dtype = torch.float64, rows: int = 9) -> tuple[Callable, Tensor]:
    """A map whose rows need different numbers of steps, and a start."""
    gen = torch.Generator().manual_seed(n)
    weight = torch.randn(n, n, generator=gen, dtype=torch.float64) / max(n, 1) ** 0.5
    gain = torch.linspace(0, 0.9, rows, dtype=torch.float64)[:, None]
    shift, z0 = torch.randn(2, rows, n, generator=gen, dtype=torch.float64)
    weight, gain, shift = weight.to(dtype), gain.to(dtype), shift.to(dtype)
    return lambda z: gain * torch.tanh(z @ weight) + shift, z0.to(dtype)


STEP_SOLVERS = [
    *(Anderson(m=m, tol=1e-8, max_iter=150, trace=True) for m in range(1, 9)),
    Anderson(beta=0.5, tol=1e-8, max_iter=150, trace=True),
    Anderson(beta=1.3, m=3, tol=1e-8, max_iter=150, trace=True),
    Anderson(lam=0, tol=1e-8),
    Anderson(max_iter=1, trace=True),
    Anderson(max_iter=4, tol=1e-8, trace=True),
    Anderson(max_iter=6, tol=1e-8, rescue=True, trace=True),
]


@pytest.mark.parametrize("n", [1, 7, 32, 50])
@pytest.mark.parametrize("solver", STEP_SOLVERS, ids=repr)
def test_the_step_is_that_of_the_reference(solver, n, monkeypatch):
    _, info = assert_same_run(monkeypatch, *rows_map(n), solver, rtol=1e-6)
    if solver.max_iter == 150 and n > 1:
        assert info.nfe.max() >= info.nfe.min() + 3, "some rows are frozen early"


@pytest.mark.parametrize("n", [1, 3, 4, 5, 15, 16, 17, 31, 63, 64, 65, 257])
@each_dtype
def test_the_step_at_any_width(n, dtype, monkeypatch):
    tol, rtol = (1e-9, 1e-7) if dtype == torch.float64 else (1e-4, 3e-3)
    f, z0 = rows_map(n, dtype)

    def call():
        return functional.fixed_point(f, z0, solver=Anderson(tol=tol, max_iter=100))

    (z, info), (expected, reference) = both(monkeypatch, call)
    torch.testing.assert_close(z, expected, rtol=rtol, atol=rtol)
    assert (info.nfe - reference.nfe).abs().max() <= 1
    assert info.outcome.eq(Outcome.CONVERGED).all()


@pytest.mark.parametrize("shape", [(0, 5), (0, 0), (3, 0), (1, 1), (200, 3)], ids=str)
def test_the_step_at_odd_shapes(shape, monkeypatch):
    z0 = torch.zeros(shape, dtype=torch.float64)
    assert_same_run(monkeypatch, lambda z: 0.5 * z.cos(), z0, Anderson(trace=True))


@pytest.mark.parametrize(
    "z0",
    [
        torch.linspace(-1, 1, 63, dtype=torch.float64).view(7, 9).T,
        torch.linspace(-1, 1, 126, dtype=torch.float64).view(9, 14)[:, ::2],
        torch.linspace(-1, 1, 7, dtype=torch.float64).expand(9, 7),
    ],
    ids=["transposed", "strided", "expanded"],
)
def test_strides_of_the_start_and_of_f(z0, monkeypatch):
    f, _ = rows_map(7)
    solver, before = Anderson(tol=1e-8, max_iter=150, trace=True), z0.clone()
    plain, info = assert_same_run(monkeypatch, f, z0, solver, rtol=1e-6)
    assert torch.equal(z0, before), "the start is the caller's"
    assert info.outcome.eq(Outcome.CONVERGED).all()
    turned, _ = assert_same_run(monkeypatch, lambda z: f(z).T.contiguous().T, z0, solver, rtol=1e-6)
    torch.testing.assert_close(turned, plain, rtol=1e-6, atol=1e-6)


def test_f_may_return_its_argument_or_write_into_it(monkeypatch):
    z0 = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    z, info = assert_same_run(monkeypatch, lambda z: z, z0, Anderson())
    assert torch.equal(z, z0)
    assert (info.nfe == 1).all()
    z, info = assert_same_run(monkeypatch, lambda z: z.cos(), z0, Anderson(tol=1e-8))

    def overwrite(z: Tensor) -> Tensor:
        return z.cos_()

    with torch.no_grad():
        given, *_ = functional.fixed_point(overwrite, z0.clone(), solver=Anderson(tol=1e-8))
    assert torch.equal(given, z)


def test_f_may_answer_from_one_buffer(monkeypatch):
    f, z0 = rows_map(7)
    buffer = torch.empty_like(z0)

    def reuse(z: Tensor) -> Tensor:
        return buffer.copy_(f(z))

    solver = Anderson(tol=1e-8, max_iter=150)
    expected, _ = assert_same_run(monkeypatch, f, z0, solver, rtol=1e-6)
    with torch.no_grad():
        assert torch.equal(functional.fixed_point(reuse, z0, solver=solver)[0], expected)


@pytest.mark.parametrize("when", [0, 3])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf], ids=str)
def test_a_row_that_becomes_non_finite_stays_alone(poison, when, monkeypatch):
    f, z0 = rows_map(7)

    def poisoned() -> Callable[[Tensor], Tensor]:
        count = iter(range(1000))
        late = torch.zeros_like(z0)
        late[6, 2] = poison
        return lambda z: f(z) + late if next(count) >= when else f(z)

    def call(make=poisoned):
        return functional.fixed_point(
            make(), z0, solver=Anderson(tol=1e-8, max_iter=150, trace=True), on_failure="ignore"
        )

    with torch.no_grad():
        (z, info), (expected, reference) = both(monkeypatch, call)
        clean, healthy, _ = call(lambda: f)
    assert info.outcome[6] == reference.outcome[6] == Outcome.NON_FINITE
    assert torch.equal(info.nfe, reference.nfe)
    torch.testing.assert_close(z, expected, rtol=1e-6, atol=1e-6, equal_nan=True)
    assert bool(z[6].isfinite().all()) == (when > 0), "the best finite iterate, if there was one"
    others = [row for row in range(len(z0)) if row != 6]
    assert torch.equal(z[others], clean[others])
    assert torch.equal(info.nfe[others], healthy.nfe[others])


def test_a_frozen_row_is_shown_to_f_unchanged():
    f, z0 = rows_map(7)
    seen: list[Tensor] = []

    def watched(z: Tensor) -> Tensor:
        seen.append(z.clone())
        return f(z)

    with torch.no_grad():
        _, info, _ = functional.fixed_point(watched, z0, solver=Anderson(tol=1e-8, max_iter=150))
    assert len(seen) == int(info.nfe.max())
    for row, nfe in enumerate(info.nfe.tolist()):
        for late in seen[nfe:]:
            assert torch.equal(late[row], seen[nfe - 1][row])


def test_the_step_does_not_depend_on_threads_or_company(threads):

    shift = torch.randn(64, 600, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    solver, runs = Anderson(tol=1e-8, max_iter=60), []

    def elementwise(part: slice) -> tuple:  # bitwise invariant itself, unlike a matrix product
        gain = torch.linspace(0, 0.9, 64, dtype=torch.float64)[part, None]
        x = shift[part]
        return functional.fixed_point(
            lambda z: gain * torch.cos(z.roll(1, 1)) + x, torch.zeros_like(x), solver=solver
        )[:2]

    for count in (1, 2, 3):
        threads(count)
        runs.append(elementwise(slice(None)))
    z, info = runs[0]
    for other, block in runs[1:]:
        assert_equal([other, block.nfe, block.residual], [z, info.nfe, info.residual])
    for part in (slice(0, 1), slice(5, 12), slice(63, 64)):
        alone, block = elementwise(part)
        assert_equal(
            [alone, block.nfe, block.residual], [z[part], info.nfe[part], info.residual[part]]
        )


def test_under_autocast_f_may_answer_in_sixteen_bits(monkeypatch):
    """Autocast lowers f's products; state and norms stay in float32."""
    gen = torch.Generator().manual_seed(0)
    weight, x = 0.05 * torch.randn(32, 32, generator=gen), torch.randn(9, 32, generator=gen)

    def call():
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            return functional.fixed_point(
                lambda z: torch.nn.functional.linear(z, weight) + x.bfloat16(),
                torch.zeros_like(x),
                solver=Anderson(tol=2e-2),
                on_failure="ignore",
            )

    (z, info), (expected, reference) = both(monkeypatch, call)
    assert z.dtype == expected.dtype
    assert torch.equal(info.outcome, reference.outcome)
    torch.testing.assert_close(z, expected, rtol=5e-2, atol=5e-2)


def test_info_names_the_backend_and_other_solvers_stay_on_the_reference():
    f, z0 = torch.cos, torch.zeros(3, 4)
    solvers = {Anderson(): "cpu", Anderson(m=9): "reference", Broyden(): "reference"}
    for solver, name in {**solvers, Picard(): "reference"}.items():
        _, info = DEQ(f, solver=solver)(z0)
        assert info.backend == name, solver
    z, info = DEQ(f, solver=Anderson(tol=0.05))(z0.bfloat16())
    assert (info.backend, z.dtype, info.fuse.residual.dtype) == (
        "cpu",
        torch.bfloat16,
        torch.float32,
    )


@pytest.mark.parametrize("adjoint", [Implicit(), Implicit(solver="gmres"), Neumann(4)], ids=repr)
def test_gradients_of_any_callable(adjoint, monkeypatch):
    gen = torch.Generator().manual_seed(0)
    weight = (0.2 * torch.randn(7, 7, generator=gen, dtype=torch.float64)).requires_grad_()
    x, g = torch.randn(2, 5, 7, generator=gen, dtype=torch.float64)
    x.requires_grad_()
    deq = DEQ(lambda z, x: torch.tanh(z @ weight + x), solver=Anderson(tol=1e-11), adjoint=adjoint)

    def call():
        z, info = deq(torch.zeros(5, 7, dtype=torch.float64), x)
        return torch.autograd.grad(z, [x, weight], g), info, info.backend

    (given, _), (expected, _) = both(monkeypatch, call)
    for a, b in zip(given, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def test_gradcheck_of_any_callable():
    gen = torch.Generator().manual_seed(0)
    weight = (0.2 * torch.randn(7, 7, generator=gen, dtype=torch.float64)).requires_grad_()
    x = torch.randn(3, 7, generator=gen, dtype=torch.float64).requires_grad_()
    tight = {"solver": Anderson(tol=1e-13, max_iter=200), "adjoint": Implicit(tol=1e-13)}

    def call(x: Tensor, weight: Tensor) -> Tensor:
        z, info = DEQ(lambda z: torch.tanh(z @ weight + x), **tight)(torch.zeros_like(x))
        assert info.backend == "cpu"
        return z

    assert torch.autograd.gradcheck(call, (x, weight), fast_mode=True)


def test_a_tuple_state_takes_the_compiled_step():
    a, b = torch.zeros(4, 3, dtype=torch.float64), torch.zeros(4, 2, 5, dtype=torch.float64)
    deq = DEQ(lambda z: (0.5 * z[0].cos(), 0.3 * z[1].sin() + 1), solver=Anderson(tol=1e-10))
    (a, b), info = deq((a, b))
    assert info.backend == "cpu"
    torch.testing.assert_close(a, 0.5 * a.cos(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(b, 0.3 * b.sin() + 1, rtol=1e-9, atol=1e-9)
