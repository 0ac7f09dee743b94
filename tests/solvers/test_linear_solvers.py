"""Row-wise linear solves ``(I - A) x = b`` against dense solutions, and their honesty."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deqfuse import Implicit, Neumann, OneStep, Outcome, Unrolled
from deqfuse.solvers.adjoint import solve_adjoint
from deqfuse.solvers.linear import gmres, solve_linear
from deqfuse.solvers.options import LINEAR_SOLVERS
from deqfuse.solvers.rows import Solution, row_norm

ITERATIVE = tuple(name for name in LINEAR_SOLVERS if name not in ("auto", "dense"))
DTYPES = pytest.mark.parametrize(
    ("dtype", "tol"), [(torch.float64, 1e-10), (torch.float32, 1e-4)], ids=["f64", "f32"]
)


class Operator:
    """``A`` as a dense matrix per row, counting its applications."""

    def __init__(self, matrix: Tensor) -> None:  # (R, n, n)
        self.matrix, self.calls = matrix, 0

    def __call__(self, v: Tensor) -> Tensor:
        self.calls += 1
        return torch.einsum("rij,rj->ri", self.matrix, v)

    def residual(self, x: Tensor, b: Tensor) -> Tensor:
        """True relative residuals, in float64."""
        x, b = x.double(), b.double()
        ax = torch.einsum("rij,rj->ri", self.matrix.double(), x)
        return row_norm(b - x + ax) / row_norm(b)

    def solve(self, b: Tensor) -> Tensor:
        eye = torch.eye(b.shape[1], dtype=torch.float64)
        pairs = zip(self.matrix.double(), b.double(), strict=True)
        return torch.stack([torch.linalg.solve(eye - m, row) for m, row in pairs])

    def condition(self) -> float:
        """Largest ``|(I - A)^-1| |I - A|`` of a row: what a residual can hide."""
        eye = torch.eye(self.matrix.shape[1], dtype=torch.float64)
        return float(torch.linalg.cond(eye - self.matrix.double()).max())


def random_operator(
    radius: float, rows: int = 7, n: int = 12, dtype: torch.dtype = torch.float64
) -> Operator:
    gen = torch.Generator().manual_seed(2)
    matrix = torch.randn(rows, n, n, generator=gen, dtype=torch.float64)
    matrix *= radius / torch.linalg.eigvals(matrix).abs().amax(1)[:, None, None]
    return Operator(matrix.to(dtype))


def rotation_operator(dtype: torch.dtype = torch.float64) -> Operator:
    """``I - A`` is skew: ``v . (I - A) v = 0`` for every v, so BiCGStab's first scalars vanish."""
    skew = torch.zeros(1, 4, 4, dtype=dtype)
    skew[0, 0, 1], skew[0, 1, 0], skew[0, 2, 3], skew[0, 3, 2] = 1, -1, 2, -2
    return Operator(torch.eye(4, dtype=dtype) - skew)


def rhs(op: Operator, seed: int = 5) -> Tensor:
    gen = torch.Generator().manual_seed(seed)
    shape, dtype = op.matrix.shape[:2], op.matrix.dtype
    return torch.randn(shape, generator=gen, dtype=torch.float64).to(dtype)


def assert_honest(found: Solution, op: Operator, b: Tensor, tol: float) -> None:
    """Outcome and residual agree with the true residual of the returned x."""
    eps = torch.finfo(b.dtype).eps
    truth = op.residual(found.z, b)
    rounding = 20 * eps * (1 + float(row_norm(found.z).max() / row_norm(b).min()))
    converged = found.outcome == Outcome.CONVERGED
    assert (truth[converged] <= tol + rounding).all()
    assert (found.residual[converged] <= tol).all()
    torch.testing.assert_close(found.residual.double(), truth, rtol=0.01, atol=rounding)


@DTYPES
@pytest.mark.parametrize("method", LINEAR_SOLVERS)
def test_contraction(method: str, dtype: torch.dtype, tol: float) -> None:
    op = random_operator(0.7, dtype=dtype)
    b = rhs(op)
    found = solve_linear(op, b, method, tol, 500)
    assert (found.outcome == Outcome.CONVERGED).all()
    assert (op.residual(found.z, b) <= tol + 50 * torch.finfo(dtype).eps).all()
    truth = op.solve(b)
    bound = op.condition() * (tol + 50 * torch.finfo(dtype).eps)
    assert (row_norm(found.z - truth) <= bound * row_norm(truth)).all()


@DTYPES
@pytest.mark.parametrize("method", ["gmres", "bicgstab", "dense"])
def test_beyond_the_unit_circle(method: str, dtype: torch.dtype, tol: float) -> None:
    op = random_operator(2.5, dtype=dtype)
    b = rhs(op)
    found = solve_linear(op, b, method, tol, 400)
    assert (found.outcome == Outcome.CONVERGED).all()
    bound = op.condition() * (tol + 50 * torch.finfo(dtype).eps)
    assert (row_norm(found.z - op.solve(b)) <= bound * row_norm(op.solve(b))).all()


@pytest.mark.parametrize("method", ITERATIVE)
@pytest.mark.parametrize("max_iter", [1, 2, 3, 4, 9, 25, 60])
def test_outcome_is_honest_and_the_budget_respected(method: str, max_iter: int) -> None:
    """Rows of every radius, some strongly non-normal: an iterate's residual is not its image's."""
    op = random_operator(1.0, rows=12)
    op.matrix *= torch.tensor([0.2, 0.5, 0.9, 0.99, 1.1, 3.0]).repeat(2)[:, None, None]
    op.matrix[:6] += torch.triu(torch.ones(12, 12, dtype=torch.float64), 1) * 2
    b = rhs(op)
    found = solve_linear(op, b, method, 1e-6, max_iter)
    assert (found.nfe <= max_iter).all()
    assert_honest(found, op, b, 1e-6)


@pytest.mark.parametrize("method", ITERATIVE)
@pytest.mark.parametrize("max_iter", [1, 2, 3, 10, 60])
@pytest.mark.parametrize("radius", [0.5, 0.95, 2.0])
def test_nfe_counts_every_application(method: str, max_iter: int, radius: float) -> None:
    """With one row nothing is shared."""
    op = random_operator(radius, rows=1, n=30)
    found = solve_linear(op, rhs(op), method, 1e-8, max_iter)
    assert int(found.nfe) == op.calls <= max_iter


@pytest.mark.parametrize("method", ["gmres", "bicgstab"])
@pytest.mark.parametrize("max_iter", [7, 23, 60])
def test_a_failed_krylov_solve_is_no_worse_than_zero(method: str, max_iter: int) -> None:
    """Whatever the budget, x = 0 has residual 1; an answer worse than that is no answer."""
    op = random_operator(1.3, rows=40, n=60)
    found = solve_linear(op, rhs(op), method, 1e-9, max_iter)
    assert (found.outcome != Outcome.CONVERGED).any()
    assert (op.residual(found.z, rhs(op)) <= 1 + 1e-12).all()


# ---- GMRES --------------------------------------------------------------------------------------


@pytest.mark.parametrize("restart", [1, 2, 5, 11])
def test_gmres_with_a_short_restart(restart: int) -> None:
    op = random_operator(0.8)
    found = gmres(op, rhs(op), 1e-8, 400, restart=restart)
    assert (found.outcome == Outcome.CONVERGED).all()
    assert_honest(found, op, rhs(op), 1e-8)


def test_gmres_is_exact_after_n_applications() -> None:
    op = random_operator(5.0)
    found = gmres(op, rhs(op), 1e-9, 12 + 1)
    assert (found.outcome == Outcome.CONVERGED).all()
    assert (found.nfe <= 12 + 1).all()  # n basis vectors and the true residual


def test_gmres_tolerance_and_budget_per_row() -> None:
    op = random_operator(0.9)
    tol = torch.logspace(-1, -9, 7, dtype=torch.float64)
    found = gmres(op, rhs(op), tol, torch.full((7,), 100))
    assert (op.residual(found.z, rhs(op)) <= tol * (1 + 1e-6)).all()
    assert found.nfe[0] < found.nfe[-1]
    budget = torch.tensor([0, 1, 2, 3, 5, 8, 100])
    found = gmres(op, rhs(op), 1e-9, budget)
    assert (found.nfe <= budget).all()
    assert torch.equal(found.z[:2], torch.zeros(2, 12, dtype=torch.float64))
    assert found.outcome.tolist() == [Outcome.MAX_ITER] * 6 + [Outcome.CONVERGED]


def test_gmres_leaves_inactive_rows_alone() -> None:
    op = random_operator(0.9)
    active = torch.tensor([True, False] * 3 + [True])
    found = gmres(op, rhs(op), 1e-9, 60, active=active)
    assert torch.equal(found.z[~active], torch.zeros(3, 12, dtype=torch.float64))
    assert (found.nfe[~active] == 0).all()
    assert (found.outcome[active] == Outcome.CONVERGED).all()


# ---- breakdowns and special right-hand sides ----------------------------------------------------


@pytest.mark.parametrize(("method", "tol"), [("gmres", 1e-9), ("anderson", 1e-4), ("dense", 1e-9)])
def test_skew_system(method: str, tol: float) -> None:
    op = rotation_operator()
    found = solve_linear(op, rhs(op), method, tol, 60)
    assert (found.outcome == Outcome.CONVERGED).all()
    assert_honest(found, op, rhs(op), tol)


@DTYPES
@pytest.mark.parametrize("tilt", [0.0, 1e-14, 1e-7, 1e-3])
def test_bicgstab_breakdown_is_reported(tilt: float, dtype: torch.dtype, tol: float) -> None:
    """Vanishing inner products end in a finite answer with a true residual, never in NaN."""
    op = rotation_operator(dtype)
    op.matrix = op.matrix - tilt * torch.eye(4, dtype=dtype)
    found = solve_linear(op, rhs(op), "bicgstab", tol, 60)
    assert torch.isfinite(found.z).all()
    assert not (found.outcome == Outcome.NON_FINITE).any()
    assert_honest(found, op, rhs(op), tol)


def test_bicgstab_shadow_residual_restart() -> None:
    """A cyclic shift: the second residual is orthogonal to the first shadow residual."""
    shift = torch.roll(torch.eye(6, dtype=torch.float64), 1, 0)
    op = Operator(torch.eye(6, dtype=torch.float64)[None] - (0.2 * torch.eye(6) + shift)[None])
    b = torch.zeros(1, 6, dtype=torch.float64)
    b[0, 0] = 1
    found = solve_linear(op, b, "bicgstab", 1e-8, 400)
    assert_honest(found, op, b, 1e-8)
    assert torch.isfinite(found.z).all()


@pytest.mark.parametrize("method", LINEAR_SOLVERS)
def test_singular_system_is_not_called_solved(method: str) -> None:
    """``I - A = 0`` in one row: no x exists, which is an outcome and not a crash."""
    matrix = torch.stack([torch.eye(3), 0.5 * torch.eye(3)]).double()
    found = solve_linear(Operator(matrix), torch.ones(2, 3, dtype=torch.float64), method, 1e-6, 40)
    assert found.outcome[0] != Outcome.CONVERGED
    assert found.outcome[1] == Outcome.CONVERGED
    torch.testing.assert_close(found.z[1], torch.full((3,), 2.0).double(), rtol=2e-6, atol=0)


@pytest.mark.parametrize("method", LINEAR_SOLVERS)
def test_dense_and_all_others_report_against_tol(method: str) -> None:
    """Nearly singular rows in float32: for every method CONVERGED means ``residual <= tol``."""
    gen = torch.Generator().manual_seed(0)
    q = torch.linalg.qr(torch.randn(40, 16, 16, generator=gen, dtype=torch.float64)).Q
    scales = torch.logspace(0, -9, 16, dtype=torch.float64)
    op = Operator(
        (torch.eye(16, dtype=torch.float64) - q @ torch.diag(scales) @ q.mT.roll(1, 0)).float()
    )
    b = rhs(op)
    found = solve_linear(op, b, method, 1e-6, 60)
    converged = found.outcome == Outcome.CONVERGED
    assert (found.residual[converged] <= 1e-6).all()


@pytest.mark.parametrize("method", LINEAR_SOLVERS)
def test_zero_right_hand_side(method: str) -> None:
    op = random_operator(0.9)
    b = rhs(op)
    b[::2] = 0
    found = solve_linear(op, b, method, 1e-9, 300)
    assert torch.equal(found.z[::2], torch.zeros_like(b[::2]))
    assert (found.outcome == Outcome.CONVERGED).all()
    assert (found.residual[::2] == 0).all()


@pytest.mark.parametrize("scale", [2.0**-27, 2.0**-40, 2.0**27, 2.0**40], ids="{:.0e}".format)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
@pytest.mark.parametrize("method", LINEAR_SOLVERS)
def test_scale_of_the_right_hand_side_is_irrelevant(
    method: str, dtype: torch.dtype, scale: float
) -> None:
    """Powers of two change no digit: counts are equal and solutions scale, as gradients must."""
    op = random_operator(0.7, dtype=dtype)
    b = rhs(op)
    one, scaled = (solve_linear(op, c * b, method, 1e-4, 80) for c in (1.0, scale))
    assert (one.outcome == Outcome.CONVERGED).all()
    assert torch.equal(one.nfe, scaled.nfe)
    torch.testing.assert_close(scaled.z / scale, one.z, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", ["right-hand side", "operator"])
@pytest.mark.parametrize("method", LINEAR_SOLVERS)
def test_poisoned_row(method: str, where: str, poison: float) -> None:
    """It is reported, its answer is poisoned too, and the other rows do not notice."""
    op, clean = random_operator(0.6), random_operator(0.6)
    b = rhs(op)
    others = torch.arange(7) != 2
    expected = solve_linear(clean, b, method, 1e-8, 100)
    if where == "operator":
        op.matrix[2, 0, 0] = poison
    else:
        b[2, 3] = poison
    found = solve_linear(op, b, method, 1e-8, 100)
    assert int(found.outcome[2]) == Outcome.NON_FINITE
    assert not torch.isfinite(found.z[2]).all(), (
        "a zero here would hide a NaN from the training loop"
    )
    assert torch.equal(found.z[others], expected.z[others])
    assert torch.equal(found.nfe[others], expected.nfe[others])
    assert torch.equal(found.outcome[others], expected.outcome[others])


@pytest.mark.parametrize("method", LINEAR_SOLVERS)
def test_a_row_does_not_depend_on_the_others(method: str) -> None:
    op = random_operator(0.8)
    b = rhs(op)
    together = solve_linear(op, b, method, 1e-9, 200)
    for row in range(7):
        alone = solve_linear(
            Operator(op.matrix[row : row + 1]), b[row : row + 1], method, 1e-9, 200
        )
        torch.testing.assert_close(alone.z[0], together.z[row], rtol=1e-10, atol=1e-12)
        assert torch.equal(alone.nfe[0], together.nfe[row])


@pytest.mark.parametrize("shape", [(0, 3), (3, 0)], ids=str)
@pytest.mark.parametrize("method", LINEAR_SOLVERS)
def test_empty_systems(method: str, shape: tuple[int, int]) -> None:
    found = solve_linear(lambda v: 0.5 * v, torch.zeros(shape), method, 1e-6, 10)
    assert found.z.shape == shape
    assert (found.outcome == Outcome.CONVERGED).all()


# ---- the approximations of the gradient ---------------------------------------------------------


def test_truncated_adjoints_follow_their_formulas() -> None:
    op = random_operator(0.7)
    g = rhs(op)
    one = solve_adjoint(op, g, OneStep())
    assert torch.equal(one.z, g)
    assert (one.nfe == 0).all()
    for k in (1, 4):
        found = solve_adjoint(op, g, Neumann(k=k))
        powers = [torch.linalg.matrix_power(op.matrix, i) for i in range(k + 1)]
        torch.testing.assert_close(found.z, torch.einsum("rij,rj->ri", sum(powers), g))
        assert (found.nfe == k).all()
        assert found.residual.isnan().all(), "no tolerance, no residual"


@pytest.mark.parametrize("method", LINEAR_SOLVERS)
def test_implicit_uses_its_own_options(method: str) -> None:
    op = random_operator(0.7)
    option = Implicit(solver=method, tol=1e-7, max_iter=90)
    found = solve_adjoint(op, rhs(op), option)
    expected = solve_linear(op, rhs(op), method, 1e-7, 90)
    assert torch.equal(found.z, expected.z)


def test_unrolled_has_no_adjoint_solve() -> None:
    with pytest.raises(TypeError, match="adjoint: expected Implicit, OneStep, Neumann"):
        solve_adjoint(lambda v: v, torch.zeros(1, 1), Unrolled())


@pytest.mark.parametrize("method", LINEAR_SOLVERS)
@pytest.mark.parametrize("sizes", [(1, 1e-3, 1e-6, 1e-2, 1), (1, 1e-3, 1e-14, 1e-30, 0)], ids=str)
def test_rows_that_see_each_other_are_solved_in_one_scale(
    method: str, sizes: tuple[float, ...]
) -> None:
    """Each divided by its own size, they would be rows of another matrix: converged, and wrong."""
    generator = torch.Generator().manual_seed(0)
    mix = 0.02 * torch.rand(5, 5, dtype=torch.float64, generator=generator)
    b = torch.randn(5, 3, dtype=torch.float64, generator=generator)
    b = b * torch.tensor(sizes, dtype=torch.float64)[:, None]
    found = solve_linear(lambda x: mix @ x, b, method, 1e-10, 60)
    exact = torch.linalg.solve(torch.eye(5, dtype=torch.float64) - mix, b)
    failed = found.outcome != Outcome.CONVERGED
    # The norm of (I - mix)^-1 is below 1.2; twice the tolerance is what a converged row may have.
    error = (found.z - exact).norm() / b.norm()
    assert failed.any() or error <= 1.2 * 2e-10 * len(b)
