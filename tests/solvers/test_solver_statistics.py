"""What solvers say about themselves, checked by replaying every call of f; and the rescue."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
import torch
from solver_cases import FLOOR, STALL_STEPS, Affine, affine, ids, rotation
from torch import Tensor

from deqfuse import Anderson, Broyden, NewtonKrylov, Outcome, Picard
from deqfuse.solvers.options import SolverOption
from deqfuse.solvers.rows import row_norm
from deqfuse.solvers.solve import solve

# ---- truthful bookkeeping, checked by replaying every call of f ---------------------------------


@dataclass
class Recorder:
    """Wraps a map and keeps what went in and what came out."""

    f: Callable[[Tensor], Tensor]
    calls: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def __call__(self, z: Tensor) -> Tensor:
        fz = self.f(z)
        self.calls.append((z.detach().clone(), fz.detach().clone()))
        return fz

    def residuals(self) -> Tensor:  # (calls, R)
        return torch.stack([row_norm(fz - z) / (row_norm(fz) + FLOOR) for z, fz in self.calls])


REPLAYED: list[SolverOption] = [
    Anderson(),
    Anderson(m=1),
    Anderson(beta=0.5, m=3),
    Picard(),
    Picard(beta=0.5),
    Broyden(),
    Broyden(m=2),
]
MIXED = torch.tensor([0.0, 0.2, 0.5, 0.9, 0.99, 1.2, 3.0])  # spectral radius per row


def mixed_rows(dtype: torch.dtype = torch.float64, n: int = 24) -> Affine:
    """Rows that end in different ways: at once, early, late, never."""
    base = affine(1.0, rows=len(MIXED), n=n, dtype=dtype)
    return Affine(base.matrix * MIXED.to(dtype)[:, None, None], base.constant)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
@pytest.mark.parametrize("option", REPLAYED, ids=ids)
def test_statistics_are_what_happened(option: SolverOption, dtype: torch.dtype) -> None:
    recorder = Recorder(mixed_rows(dtype))
    option = replace(option, tol=1e-5, max_iter=30, trace=True)
    found = solve(recorder, torch.zeros(len(MIXED), 24, dtype=dtype), option)
    residuals = recorder.residuals()
    assert found.trace is not None
    assert len(recorder.calls) == len(found.trace) == int(found.nfe.max())
    for row, seen in enumerate(residuals.unbind(1)):
        stop, outcome = _expected_end(seen.tolist(), option)
        assert int(found.nfe[row]) == stop, row
        assert int(found.outcome[row]) == outcome, row
        best = int(seen[:stop].nan_to_num(nan=torch.inf).argmin())
        assert float(found.residual[row]) == pytest.approx(float(seen[best]), rel=1e-6)
        assert torch.equal(found.z[row], recorder.calls[best][1][row]), "f(z) of the best iterate"
        torch.testing.assert_close(
            found.trace[:stop, row], seen[:stop], rtol=1e-6, atol=0, equal_nan=True
        )
        assert found.trace[stop:, row].isnan().all()
        for z, _ in recorder.calls[stop:]:
            last = recorder.calls[stop - 1][0][row]
            torch.testing.assert_close(z[row], last, rtol=0, atol=0, equal_nan=True)  # frozen
    assert set(found.outcome.tolist()) > {Outcome.CONVERGED}, "the problem must have failing rows"


def _expected_end(seen: list[float], option: SolverOption) -> tuple[int, int]:
    """How many evaluations a row may use, and its outcome, by the contract in words."""
    best, best_at = float("inf"), 0
    for count, residual in enumerate(seen, start=1):
        if residual < best:
            best, best_at = residual, count
        if residual <= option.tol:
            return count, Outcome.CONVERGED
        if not math.isfinite(residual):
            return count, Outcome.NON_FINITE
        if count == option.max_iter:
            return count, Outcome.MAX_ITER
        if count - best_at >= STALL_STEPS:
            return count, Outcome.STALLED
    raise AssertionError("the solver stopped before the row had a reason to")


@pytest.mark.parametrize(
    "option",
    [*REPLAYED, NewtonKrylov(max_iter=50), NewtonKrylov(restart=3)],
    ids=ids,
)
@pytest.mark.parametrize("radius", [0.0, 0.5, 0.99, 2.0])
def test_nfe_counts_every_call(option: SolverOption, radius: float) -> None:
    """With a single row nothing is shared: calls of f, JVPs included, are exactly ``nfe``."""
    problem, calls = affine(radius, rows=1, n=10), 0

    def counted(z: Tensor) -> Tensor:  # torch.func.jvp calls f once per JVP
        nonlocal calls
        calls += 1
        return torch.tanh(problem(z))

    found = solve(counted, torch.zeros(1, 10, dtype=torch.float64), replace(option, tol=1e-9))
    assert int(found.nfe) == calls


@pytest.mark.parametrize("max_iter", [1, 2, 3, 7, 20, 40])
@pytest.mark.parametrize("option", [Anderson(), Picard(), Broyden(), NewtonKrylov()], ids=ids)
def test_max_iter_is_respected(option: SolverOption, max_iter: int) -> None:
    problem = affine(1.5, rows=12, n=20)
    found = solve(
        lambda z: torch.tanh(problem(z)),
        torch.zeros(12, 20, dtype=torch.float64),
        replace(option, tol=1e-13, max_iter=max_iter),
    )
    assert (found.nfe <= max_iter).all()
    failed = found.outcome != Outcome.CONVERGED
    assert failed.any()
    assert (found.residual[failed] > 1e-13).all()


@pytest.mark.parametrize("option", [NewtonKrylov(), Anderson(m=2, rescue=True)], ids=ids)
def test_newton_reports_the_residual_of_the_iterate_it_returns(option: SolverOption) -> None:
    problem = affine(2.0, rows=6, n=10)
    recorder = Recorder(lambda z: torch.tanh(problem(z)) + problem.constant)
    found = solve(recorder, torch.zeros(6, 10, dtype=torch.float64), replace(option, tol=1e-9))
    # Rows of one call are at different stages: look for the call that produced each row's answer.
    for row in range(6):
        residuals = [
            float((fz - z)[row].norm() / (fz[row].norm() + FLOOR))
            for z, fz in recorder.calls
            if torch.equal(fz[row], found.z[row])
        ]
        assert residuals, "the answer of a row must be some f(z)"
        assert min(residuals) == pytest.approx(float(found.residual[row]), rel=1e-6)


def test_stalled_row_keeps_its_best_iterate() -> None:
    """``z -> 1 - z`` from 0 goes 0, 1, 0, 1: its residual never improves."""
    found = solve(lambda z: 1 - z, torch.zeros(2, 3), Picard(max_iter=100))
    assert (found.outcome == Outcome.STALLED).all()
    assert (found.nfe == STALL_STEPS + 1).all()
    assert torch.equal(found.z, torch.ones(2, 3))  # f(z0)


def test_best_iterate_of_a_diverging_row() -> None:
    found = solve(lambda z: 2 * z + 1, torch.zeros(1, 2), Picard(max_iter=100))
    assert int(found.outcome) == Outcome.STALLED
    # residuals |f - z| / |f| are 1, 2/3, 4/7, ... and fall towards 1/2
    assert float(found.residual) == pytest.approx(0.5, abs=1e-3)


def test_non_finite_row() -> None:
    bad = torch.tensor([[1.0], [torch.nan], [torch.inf]])
    for option in (Anderson(rescue=True), Picard(), Broyden(), NewtonKrylov()):
        found = solve(lambda z: 0.5 * z + bad, torch.zeros(3, 4), option)
        assert found.outcome.tolist() == [Outcome.CONVERGED, Outcome.NON_FINITE, Outcome.NON_FINITE]
        assert torch.isfinite(found.z[0]).all()
        assert not torch.isfinite(found.z[1:]).any(), "a poisoned row must not look like an answer"


@pytest.mark.parametrize("option", [Anderson(), Picard(), Broyden(), NewtonKrylov()], ids=ids)
def test_a_row_that_overflows_later(option: SolverOption) -> None:
    """Divergence to infinity keeps the best finite iterate and is not called converged."""
    found = solve(lambda z: z**3 + z + 1, torch.full((2, 3), 4.0), replace(option, max_iter=100))
    assert (found.outcome != Outcome.CONVERGED).all() or torch.isfinite(found.z).all()
    assert torch.isfinite(found.z).all()


# ---- rescue -------------------------------------------------------------------------------------


def test_rescue_touches_only_rows_left_behind() -> None:
    problem = mixed_rows(n=10)
    z0 = torch.zeros(len(MIXED), 10, dtype=torch.float64)
    plain = solve(problem, z0, Anderson(m=2, tol=1e-8, max_iter=30))
    rescued = solve(problem, z0, Anderson(m=2, tol=1e-8, max_iter=30, rescue=True))
    done = plain.outcome == Outcome.CONVERGED
    assert 0 < int(done.sum()) < len(MIXED)
    assert torch.equal(plain.z[done], rescued.z[done])
    assert torch.equal(plain.nfe[done], rescued.nfe[done])
    assert (rescued.outcome[~done] == Outcome.RESCUED).all()
    assert (rescued.nfe[~done] > plain.nfe[~done]).all()
    assert ((rescued.z - problem.solution).norm(dim=1) <= problem.error_bound(rescued)).all()


def test_rescue_never_makes_a_row_worse() -> None:
    f = lambda z: 4 * torch.sin(3 * z) + 1  # noqa: E731 - chaotic
    z0 = torch.linspace(-3, 3, 40)[:, None].expand(40, 2).clone()
    plain, rescued = (solve(f, z0, Anderson(m=2, rescue=flag)) for flag in (False, True))
    assert (rescued.residual <= plain.residual).all()


def test_a_useless_rescue_leaves_the_answer_as_it_was() -> None:
    """A map with jumps: its Jacobian says nothing, and every point that Newton tries is worse."""

    def f(z: Tensor) -> Tensor:
        return torch.where((z - 0.9).abs() < 1e-3, 1.0, torch.where(z > 0, -10.0, 8.0)) + 0 * z

    plain, rescued = (
        solve(f, torch.full((2, 1), 0.9), Anderson(m=1, rescue=flag)) for flag in (False, True)
    )
    assert (plain.outcome != Outcome.CONVERGED).all()
    assert (rescued.nfe > plain.nfe).all(), "it was tried"
    assert torch.equal(rescued.z, plain.z)
    assert torch.equal(rescued.residual, plain.residual)
    assert torch.equal(rescued.outcome, plain.outcome)


def test_rescue_has_a_bounded_cost() -> None:
    """Of Jacobians, each of which is one product per number of a row, and of evaluations beside."""
    calls = 0

    def f(z: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return (z < 0.5).to(z) + 0 * z  # no fixed point, and a Jacobian that says nothing

    z0 = torch.zeros(1, 7, dtype=torch.float64)
    found = solve(f, z0, Anderson(max_iter=20, rescue=True, max_jacobians=5))
    assert found.outcome.tolist() == [Outcome.MAX_ITER]
    assert calls <= 21 + 5 * 7 + 5 * 30, "a Jacobian, and at most some tens of evaluations for it"


def test_the_rescue_is_not_traced() -> None:
    problem = rotation()
    option = Anderson(m=1, tol=1e-8, max_iter=10, rescue=True, trace=True)
    found = solve(problem, torch.zeros_like(problem.constant), option)
    assert (found.outcome == Outcome.RESCUED).all()
    assert found.trace is not None
    assert len(found.trace) == 10


def test_long_rows_are_refused() -> None:
    with pytest.raises(ValueError, match=r"rows of at most 1024 numbers, got 1025.*NewtonKrylov"):
        solve(torch.cos, torch.zeros(2, 1025), Anderson(max_iter=2, rescue=True))
