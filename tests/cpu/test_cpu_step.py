"""The compiled Anderson step of DEQ(f) against the reference."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cpu_cases import assert_equal
from torch import Tensor

from deqfuse import (
    DEQ,
    Anderson,
    Broyden,
    Implicit,
    Neumann,
    Outcome,
    Picard,
    functional,
)

DTYPES = {"f64": torch.float64, "f32": torch.float32}
each_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


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

    for count in (1, 2, 3, 64):
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
