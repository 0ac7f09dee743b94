"""Forward solvers on maps with a known fixed point."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from solver_cases import FLOOR, affine, cell_at_torch_init, ids, rotation
from torch import Tensor

from deqfuse import Anderson, Broyden, NewtonKrylov, Outcome, Picard, ResidualCell
from deqfuse.outcome import failed
from deqfuse.solvers import anderson as anderson_module
from deqfuse.solvers.anderson import mixing_weights
from deqfuse.solvers.options import SolverOption
from deqfuse.solvers.rows import Solution, row_norm
from deqfuse.solvers.solve import solve

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
    assert not failed(found.outcome).any()
    assert ((found.z - problem.solution).norm(dim=1) <= problem.error_bound(found)).all()


@pytest.mark.parametrize("option", EXACT_SOLVERS, ids=ids)
def test_rotation_near_the_unit_circle(option: SolverOption) -> None:
    problem = rotation()
    found = solve(problem, torch.zeros_like(problem.constant), replace(option, tol=1e-7))
    assert not failed(found.outcome).any()
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
    assert not failed(found.outcome).any()
    polished, eye = found.z, torch.eye(z0.shape[1], dtype=z0.dtype)
    for _ in range(3):
        inverse = torch.stack([torch.inverse(eye - j) for j in jacobian(f, polished)])
        polished = polished + torch.einsum("rij,rj->ri", inverse, f(polished) - polished)
    assert (row_norm(f(polished) - polished) <= 1e-12 * row_norm(polished)).all()
    gain = torch.linalg.matrix_norm(inverse @ jacobian(f, polished), 2)
    bound = 2 * gain * found.residual * row_norm(polished)  # 2: the map is not affine
    assert (row_norm(found.z - polished) <= bound + 1e-11).all()


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
    expected = r"solver: expected Anderson\(\.\.\.\), .* or NewtonKrylov\(.*got 'anderson'"
    with pytest.raises(TypeError, match=expected):
        solve(lambda z: z, torch.zeros(1, 1), "anderson")  # type: ignore[arg-type]
