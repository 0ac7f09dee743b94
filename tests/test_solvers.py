"""Forward solvers on maps with a known fixed point, and the truth of their bookkeeping."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor

from deqfuse import Anderson, Broyden, NewtonKrylov, Outcome, Picard, ResidualCell
from deqfuse.solvers import anderson as anderson_module
from deqfuse.solvers.anderson import mixing_weights
from deqfuse.solvers.options import RESCUE_STEPS, SolverOption
from deqfuse.solvers.rows import Solution, row_norm
from deqfuse.solvers.solve import solve

# Part of the contract, therefore not imported.
FLOOR = 1e-5  # in the residual's denominator
STALL_STEPS = 20


@dataclass
class Affine:
    """``f(z) = M z + c`` per row, with its exact fixed point."""

    matrix: Tensor  # (R, n, n)
    constant: Tensor  # (R, n)

    def __call__(self, z: Tensor) -> Tensor:
        return torch.einsum("rij,rj->ri", self.matrix, z) + self.constant

    @property
    def solution(self) -> Tensor:
        eye = torch.eye(self.constant.shape[1], dtype=self.constant.dtype)
        pairs = zip(self.matrix, self.constant, strict=True)
        return torch.stack([torch.linalg.solve(eye - m, c) for m, c in pairs])

    def error_bound(self, found: Solution) -> Tensor:
        """Largest possible ``|z - z*|`` of the returned ``z = f(best)``, given its residual.

        ``f(b) - z* = -M (I - M)^-1 (f(b) - b)`` and ``|f(b) - b| = residual (|f(b)| + 1e-5)``.
        """
        eye = torch.eye(self.constant.shape[1], dtype=self.constant.dtype)
        gain = torch.stack(
            [torch.linalg.matrix_norm(m @ torch.inverse(eye - m), 2) for m in self.matrix]
        )
        rounding = 100 * torch.finfo(self.constant.dtype).eps * (1 + gain)
        return (gain * found.residual + rounding) * (found.z.norm(dim=1) + FLOOR)


def affine(radius: float, rows: int = 9, n: int = 6, dtype: torch.dtype = torch.float64) -> Affine:
    """Random dense matrices whose spectral radius is exactly ``radius``."""
    gen = torch.Generator().manual_seed(7)
    matrix = torch.randn(rows, n, n, generator=gen, dtype=torch.float64)
    matrix *= radius / torch.linalg.eigvals(matrix).abs().amax(1)[:, None, None]
    return Affine(
        matrix.to(dtype), torch.randn(rows, n, generator=gen, dtype=torch.float64).to(dtype)
    )


def rotation(radius: float = 0.995, rows: int = 5, dtype: torch.dtype = torch.float64) -> Affine:
    """Three planes turned by different angles: complex eigenvalues of modulus ``radius``."""
    angles = torch.linspace(0.3, 2.9, 3, dtype=torch.float64)
    blocks = [torch.stack([a.cos(), -a.sin(), a.sin(), a.cos()]).view(2, 2) for a in angles]
    matrix = (radius * torch.block_diag(*blocks)).expand(rows, 6, 6)
    gen = torch.Generator().manual_seed(3)
    return Affine(
        matrix.to(dtype), torch.randn(rows, 6, generator=gen, dtype=torch.float64).to(dtype)
    )


def cell_at_torch_init(rows: int = 16, dim: int = 32) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    torch.manual_seed(11)
    cell = ResidualCell(dim, init="torch").double().requires_grad_(False)
    x = torch.randn(rows, dim, dtype=torch.float64)
    return lambda z: cell(z, x), torch.zeros_like(x)


ids = lambda option: repr(option)  # noqa: E731

CONTRACTION_SOLVERS: list[SolverOption] = [
    *(Anderson(m=m) for m in range(1, 9)),
    Anderson(beta=0.7),
    Anderson(lam=0.0),
    Anderson(m=8, lam=0.0),
    Anderson(rescue=True),
    Picard(),
    Picard(beta=0.6),
    Broyden(),
    Broyden(m=3),
    NewtonKrylov(),
    NewtonKrylov(restart=2),
]


@pytest.mark.parametrize(
    ("dtype", "tol"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["f64", "f32"]
)
@pytest.mark.parametrize("option", CONTRACTION_SOLVERS, ids=ids)
def test_contraction(option: SolverOption, dtype: torch.dtype, tol: float) -> None:
    problem = affine(0.6, dtype=dtype)
    option = replace(option, tol=tol, max_iter=300)
    found = solve(problem, torch.zeros_like(problem.constant), option)
    assert found.z.dtype == dtype
    assert (found.outcome == Outcome.CONVERGED).all()
    assert (found.residual <= tol).all()
    assert ((found.z - problem.solution).norm(dim=1) <= problem.error_bound(found)).all()


@pytest.mark.parametrize("beta", [0.3, 1.0, 1.2])
def test_anderson_without_history_is_damped_iteration(beta: float) -> None:
    problem = affine(0.8)
    start, common = torch.zeros_like(problem.constant), {"tol": 1e-6, "beta": beta, "trace": True}
    mixed = solve(problem, start, Anderson(m=1, **common))
    damped = solve(problem, start, Picard(**common))
    assert torch.equal(mixed.nfe, damped.nfe)
    torch.testing.assert_close(mixed.z, damped.z)
    torch.testing.assert_close(mixed.trace, damped.trace, equal_nan=True)


def test_broyden_with_a_single_update() -> None:
    problem = affine(0.3)
    found = solve(problem, torch.zeros_like(problem.constant), Broyden(m=1, tol=1e-10))
    assert (found.outcome == Outcome.CONVERGED).all()
    assert ((found.z - problem.solution).norm(dim=1) <= problem.error_bound(found)).all()


# With as many residuals as dimensions, Anderson and Broyden solve an affine problem exactly,
# whatever its spectral radius; GMRES does so inside one Newton step.
EXACT_SOLVERS: list[SolverOption] = [
    Anderson(m=8, lam=0.0),
    Broyden(m=20),
    NewtonKrylov(),
    Anderson(m=2, rescue=True),
]


@pytest.mark.parametrize("option", EXACT_SOLVERS, ids=ids)
@pytest.mark.parametrize("radius", [1.5, 4.0])
def test_beyond_the_unit_circle(option: SolverOption, radius: float) -> None:
    problem = affine(radius)
    found = solve(problem, torch.zeros_like(problem.constant), replace(option, tol=1e-7))
    assert (found.outcome == Outcome.CONVERGED).all()
    assert ((found.z - problem.solution).norm(dim=1) <= problem.error_bound(found)).all()


@pytest.mark.parametrize("option", EXACT_SOLVERS, ids=ids)
def test_rotation_near_the_unit_circle(option: SolverOption) -> None:
    problem = rotation()
    found = solve(problem, torch.zeros_like(problem.constant), replace(option, tol=1e-7))
    assert (found.outcome == Outcome.CONVERGED).all()
    assert ((found.z - problem.solution).norm(dim=1) <= problem.error_bound(found)).all()


def test_rotation_defeats_picard_and_it_says_so() -> None:
    problem = rotation()
    found = solve(problem, torch.zeros_like(problem.constant), Picard(tol=1e-4, max_iter=50))
    assert (found.outcome != Outcome.CONVERGED).all()
    assert (found.residual > 1e-4).all()


def jacobian(f: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:  # (R, n, n)
    """Dense Jacobian of every row."""
    return torch.func.jacrev(lambda rows: f(rows).sum(0))(z).movedim(0, 1)


@pytest.mark.parametrize(
    "option", [Anderson(), Anderson(rescue=True), Broyden(), NewtonKrylov()], ids=ids
)
def test_cell_at_torch_init(option: SolverOption) -> None:
    """As close to an equilibrium, polished by dense Newton steps, as the residual says."""
    f, z0 = cell_at_torch_init()
    found = solve(f, z0, replace(option, tol=1e-8, max_iter=200))
    assert (found.outcome == Outcome.CONVERGED).all()
    polished, eye = found.z, torch.eye(z0.shape[1], dtype=z0.dtype)
    for _ in range(3):
        inverse = torch.stack([torch.inverse(eye - j) for j in jacobian(f, polished)])
        polished = polished + torch.einsum("rij,rj->ri", inverse, f(polished) - polished)
    assert (row_norm(f(polished) - polished) <= 1e-12 * row_norm(polished)).all()
    gain = torch.linalg.matrix_norm(inverse @ jacobian(f, polished), 2)
    bound = 2 * gain * found.residual * row_norm(polished)  # 2: the map is not affine
    assert (row_norm(found.z - polished) <= bound + 1e-11).all()


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
    [*REPLAYED, Anderson(m=2, rescue=True), NewtonKrylov(max_iter=50), NewtonKrylov(restart=3)],
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
    assert (rescued.outcome == Outcome.CONVERGED).all()
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
    """Eight Newton steps of one or two Krylov cycles and a line search, not thousands of JVPs.

    The map has no fixed point and its Newton systems are ill-conditioned: a rescue whose inner
    solves may go on until they converge would go on for ever.
    """
    gen = torch.Generator().manual_seed(0)
    matrix = torch.linalg.qr(torch.randn(100, 100, generator=gen, dtype=torch.float64)).Q
    per_step = 2 * (NewtonKrylov().restart + 1) + 6
    limit, calls = 20 + 1 + RESCUE_STEPS * per_step, 0

    def f(z: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        assert calls <= limit, "the rescue has no end"
        return z.abs() @ matrix + z + 1

    found = solve(f, torch.zeros(1, 100, dtype=torch.float64), Anderson(max_iter=20, rescue=True))
    assert int(found.nfe) == calls


def test_rescue_extends_the_trace() -> None:
    problem = rotation()
    option = Anderson(m=1, tol=1e-8, max_iter=10, rescue=True, trace=True)
    found = solve(problem, torch.zeros_like(problem.constant), option)
    assert found.trace is not None
    assert 10 < len(found.trace) <= option.trace_length
    assert (found.trace.nan_to_num(nan=torch.inf).amin(0) == found.residual).all()


# ---- the small least-squares problem ------------------------------------------------------------


def test_mixing_weights_solve_the_constrained_least_squares() -> None:
    g = torch.randn(6, 4, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gram = g @ g.mT
    for lam in (0.0, 1e-3):
        alpha = mixing_weights(gram, lam)
        for row in range(6):
            a = gram[row] + lam * gram[row].diagonal().max() * torch.eye(4, dtype=torch.float64)
            kkt = torch.zeros(5, 5, dtype=torch.float64)
            kkt[:4, :4], kkt[4, :4], kkt[:4, 4] = a, 1, 1
            rhs = torch.tensor([0.0, 0, 0, 0, 1], dtype=torch.float64)
            torch.testing.assert_close(alpha[row], torch.linalg.solve(kkt, rhs)[:4])


def test_mixing_weights_survive_singular_float32_gram() -> None:
    """Nearly parallel residuals: the Gram matrix is singular to rounding, in any scale."""
    gen = torch.Generator().manual_seed(0)
    rows, k, n = 20_000, 5, 64
    direction = torch.randn(rows, 1, n, generator=gen)
    spread = 10.0 ** -torch.randint(2, 9, (rows, 1, 1), generator=gen)
    scale = 10.0 ** torch.randint(-6, 7, (rows, 1, 1), generator=gen)
    g = (direction + spread * torch.randn(rows, k, n, generator=gen)) * scale
    g[::100] = 0
    g[1::100, 1:] = g[1::100, :1]
    for lam in (0.0, 1e-6):
        alpha = mixing_weights(g @ g.mT, lam)
        assert torch.isfinite(alpha).all()
        rounding = 2 * k * torch.finfo(torch.float32).eps * alpha.abs().sum(1)
        assert ((alpha.sum(1) - 1).abs() <= rounding).all()


@pytest.mark.parametrize("option", [Anderson(), Anderson(m=8), Anderson(lam=0.0)], ids=ids)
def test_float32_at_the_edge_of_rounding_gives_no_nan(option: SolverOption) -> None:
    """3000 rows at a tolerance near float32 rounding: their Gram matrices degenerate."""
    torch.manual_seed(0)
    cell = ResidualCell(32, variant="released").requires_grad_(False)
    x = torch.randn(3000, 32) * torch.logspace(-1, 1, 3000)[:, None]
    found = solve(lambda z: cell(z, x), torch.zeros_like(x), replace(option, tol=1e-6, max_iter=60))
    assert torch.isfinite(found.z).all()
    assert torch.isfinite(found.residual).all()
    assert not (found.outcome == Outcome.NON_FINITE).any()


SCALES = [2.0**-10, 2.0**10]  # powers of two: the arithmetic itself is the same to the last bit


def _scaled_run(scale: float) -> Solution:
    problem = affine(0.9, rows=20, n=30)

    def f(z: Tensor) -> Tensor:
        return scale * torch.sin(problem(z / scale))

    option = Anderson(tol=1e-6, max_iter=200, trace=True)
    return solve(f, torch.zeros(20, 30, dtype=torch.float64), option)


@pytest.mark.parametrize("scale", SCALES)
def test_relative_ridge_is_scale_invariant(scale: float) -> None:
    """All that depends on the scale is the 1e-5 in the residual's denominator."""
    one, scaled = _scaled_run(1.0), _scaled_run(scale)
    assert (one.outcome == Outcome.CONVERGED).all()
    assert torch.equal(one.nfe, scaled.nfe)
    assert one.trace is not None
    assert scaled.trace is not None
    floor = FLOOR / (min(scale, 1.0) * float(one.z.norm(dim=1).min()))
    torch.testing.assert_close(scaled.trace, one.trace, rtol=2 * floor, atol=0, equal_nan=True)


@pytest.mark.parametrize("scale", SCALES)
def test_absolute_ridge_would_not_be(scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The property above is one of the ridge: with the customary absolute 1e-4 it is lost."""

    def absolute(gram: Tensor, lam: float) -> Tensor:
        eye = torch.eye(gram.shape[1], dtype=gram.dtype)
        return mixing_weights(gram + 1e-4 * eye, 0.0)

    monkeypatch.setattr(anderson_module, "mixing_weights", absolute)
    assert not torch.equal(_scaled_run(1.0).nfe, _scaled_run(scale).nfe)


# ---- starts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", [Anderson(), Picard(), Broyden(), NewtonKrylov()], ids=ids)
def test_start_at_the_solution_costs_one_evaluation(option: SolverOption) -> None:
    problem = affine(0.5)
    found = solve(problem, problem.solution, option)
    assert (found.nfe == 1).all()
    assert (found.outcome == Outcome.CONVERGED).all()


@pytest.mark.parametrize("option", [Anderson(), Picard(), Broyden(), NewtonKrylov()], ids=ids)
def test_constant_map(option: SolverOption) -> None:
    constant = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    found = solve(lambda z: constant.clone(), torch.zeros(3, 4), option)
    assert torch.equal(found.z, constant)
    assert (found.outcome == Outcome.CONVERGED).all()


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0)], ids=str)
@pytest.mark.parametrize(
    "option", [Anderson(rescue=True, trace=True), Picard(), Broyden(), NewtonKrylov()], ids=ids
)
def test_empty_problems(option: SolverOption, shape: tuple[int, int]) -> None:
    found = solve(lambda z: 0.5 * z, torch.zeros(shape), option)
    assert found.z.shape == shape
    assert found.residual.shape == found.nfe.shape == found.outcome.shape == shape[:1]


def test_unknown_solver_is_refused() -> None:
    with pytest.raises(
        TypeError, match="solver: expected Anderson, Picard, Broyden or NewtonKrylov"
    ):
        solve(lambda z: z, torch.zeros(1, 1), "anderson")  # type: ignore[arg-type]
