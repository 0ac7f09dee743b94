"""The whole and the stepped solves behind the cuda backend; under Triton's interpreter."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from triton_cases import SolveCase as Case
from triton_cases import poison  # noqa: F401 - a fixture

from deqfuse import Anderson, Outcome, Picard
from deqfuse.backends import cuda, reference
from deqfuse.backends.problem import Solved
from deqfuse.outcome import failed
from deqfuse.triton_kernels.launch import counted

pytestmark = [pytest.mark.triton, pytest.mark.usefixtures("poison")]


def both(case: Case, solver) -> list[tuple]:
    """Without the rescue, which the reference has by default and a GPU has not."""
    solver = solver.settled(rescue=False)
    pairs = zip(case.solves(cuda), case.solves(reference), strict=True)
    return [(mine(solver), wanted(solver)) for mine, wanted in pairs]


def assert_same(given, expected, solver, steps: int = 1) -> None:
    """Each answer lies within a few of its own residuals of the equilibrium.

    ``|z_a - z_b| <= L / (1 - L) (r_a + r_b) |z|``; the contraction factors L met here are below
    0.8. Rounding may move the end of a row by ``steps`` evaluations.
    """
    for mine, wanted in zip(given, expected, strict=True):
        assert (mine.shape, mine.dtype) == (wanted.shape, wanted.dtype)
    assert (expected.outcome == Outcome.CONVERGED).all()
    assert (given.outcome == Outcome.CONVERGED).all()
    assert (given.residual <= solver.tol).all()
    assert (given.nfe - expected.nfe).abs().max() <= steps
    limit = 4 * (given.residual + expected.residual)
    assert ((given.z - expected.z).norm(dim=-1) <= limit * expected.z.norm(dim=-1)).all()


WHOLE = [
    *(Case(dtype="f32", rows=r, n=n) for r, n in ((1, 1), (8, 2), (17, 3))),
    *(
        Case(dtype="f32", rows=5, dim=d, groups=g)
        for d, g in ((20, 5), (50, 2), (64, 1), (96, 4), (128, 4))
    ),
    *(Case(dtype=t, variant=v) for t in ("bf16", "f16") for v in ("paper", "released")),
    Case(dtype="f32", variant="released", mask=True, start=True),
    Case(dtype="f32", variant="released-mmimdb", mask=True, start=True),
]
STEPPED = [
    Case(rows=2, dim=160, groups=10, dtype="bf16", mask=True, start=True),
    Case(rows=3, variant="released", start=True),
    Case(rows=3, variant="released-mmimdb", mask=True),
    pytest.param(Case(rows=3, dim=300, groups=4, dtype="f32"), marks=pytest.mark.slow),
    pytest.param(Case(rows=35), marks=pytest.mark.slow),
]


@pytest.mark.parametrize("case", WHOLE, ids=str)
def test_whole_solves(case: Case) -> None:
    solver = Anderson(tol=1e-5)
    assert cuda.one_launch(case.draw(), case.groups, solver)
    for given, expected in both(case, solver):
        assert_same(given, expected, solver)


@pytest.mark.parametrize("case", STEPPED, ids=str)
def test_stepped_solves(case: Case) -> None:
    solver = Anderson(tol=1e-8 if case.dtype == "f64" else 1e-5, max_iter=40)
    assert not cuda.one_launch(case.draw(), case.groups, solver)
    for given, expected in both(case, solver):
        assert_same(given, expected, solver)


LAYERS = [
    Case(dtype="f32", rows=17, n=3, dim=50, groups=2),
    Case(dtype="f32", rows=9, n=1, variant="released", start=True, mask=True),
    Case(dtype="bf16", rows=3, variant="released-mmimdb", mask=True),
    Case(rows=3, variant="released"),  # float64: block by block
]


@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_the_whole_layer(case: Case) -> None:
    solver = Anderson(tol=1e-5)
    given = case.whole_layer(cuda)(solver)
    expected = case.whole_layer(reference)(solver)
    assert_same(Solved(*given[1:6]), Solved(*expected[1:6]), solver)
    assert torch.equal(given.z, given.states[-1])
    assert given.z.data_ptr() != given.states[-1].data_ptr()


SOLVERS = [
    *(Anderson(m=m, tol=1e-5) for m in (1, 2, 3, 4)),
    Anderson(beta=0.6, tol=1e-5),
    Anderson(lam=1e-3, tol=1e-5),
    Picard(tol=1e-5),
    Picard(beta=0.7, tol=1e-5),
]


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_whole_solvers(solver) -> None:
    for given, expected in both(Case(dtype="f32", rows=9), solver):
        assert_same(given, expected, solver)


@pytest.mark.parametrize("dtype", ["f32", "f64"], ids=["whole", "stepped"])
@pytest.mark.parametrize(
    "solver", [Anderson(max_iter=8), Anderson(max_iter=1), Picard(max_iter=6)], ids=repr
)
def test_statistics_are_those_of_the_reference(solver, dtype) -> None:
    """At torch's init rows end in several ways. Over 8 steps rounding stays small."""
    rtol = 1e-6 if dtype == "f64" else 1e-2
    rows = 16 if dtype == "f32" else 6  # one tile: the interpreter takes as long for two rows
    case = Case(rows=rows, dim=20, groups=5, dtype=dtype, init="torch")
    for given, expected in both(case, solver):
        steady = torch.isclose(given.residual, expected.residual, rtol=rtol, atol=0)
        assert steady.double().mean() >= 0.9
        assert torch.equal(given.nfe[steady], expected.nfe[steady])
        assert torch.equal(given.outcome[steady], expected.outcome[steady])
        near = (given.z - expected.z).norm(dim=-1) <= rtol * expected.z.norm(dim=-1)
        assert near[steady].all()


def test_traces_are_those_of_the_reference() -> None:
    solver = Anderson(max_iter=8, trace=True)
    for given, expected in both(Case(rows=5, dim=20, groups=5, init="torch"), solver):
        assert torch.equal(given.trace.isfinite().sum(0), given.nfe)
        torch.testing.assert_close(
            given.trace, expected.trace, rtol=1e-6, atol=1e-9, equal_nan=True
        )


def test_a_row_that_finds_nothing_better_has_stalled() -> None:
    solver, case = Picard(max_iter=60), Case(rows=24, dtype="f32", init="torch")
    given, expected = (case.solves(backend)[1](solver) for backend in (cuda, reference))
    stalled = expected.outcome == Outcome.STALLED
    assert stalled.any()
    agree = (given.outcome == Outcome.STALLED) == stalled
    assert agree.double().mean() >= 0.9, "rounding decides a few"


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy's
@pytest.mark.parametrize("dtype", ["f32", "f64"], ids=["whole", "stepped"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
def test_a_poisoned_row_stays_alone(value, dtype) -> None:
    solver = Anderson(tol=1e-5, max_iter=6, rescue=False)
    for clean, mine, wanted in zip(
        Case(rows=5, dtype=dtype, n=1).solves(cuda),
        Case(rows=5, dtype=dtype, n=1).solves(cuda),
        Case(rows=5, dtype=dtype, n=1).solves(reference),
        strict=True,
    ):
        mine.args[0][..., 3, 1] = wanted.args[0][..., 3, 1] = value
        given, expected, healthy = mine(solver), wanted(solver), clean(solver)
        assert (given.outcome[..., 3] == Outcome.NON_FINITE).all()
        assert torch.equal(given.outcome, expected.outcome)
        assert torch.equal(given.nfe[..., 3], expected.nfe[..., 3])
        assert given.z[..., 3, :].isnan().any()
        assert torch.equal(given.z.isnan(), expected.z.isnan())
        others = [0, 1, 2, 4]
        assert torch.equal(given.z[..., others, :], healthy.z[..., others, :])


@pytest.mark.parametrize("dim", [20, 160], ids=["whole", "stepped"])
def test_a_row_does_not_depend_on_its_batch(dim: int) -> None:
    case = Case(rows=21, dim=dim, groups=5, dtype="f32", n=1)
    solver = Anderson(max_iter=8 if dim == 20 else 2)
    for solve in case.solves(cuda):
        together = solve(solver)
        for part in (slice(0, 1), slice(15, 18)):
            pick = [
                t[..., part, :] if isinstance(t, torch.Tensor) and t.shape[-2] == 21 else t
                for t in solve.args
            ]
            alone = solve.func(*pick, solver)
            assert torch.equal(alone.z, together.z[..., part, :])
            assert torch.equal(alone.nfe, together.nfe[..., part])


@pytest.mark.parametrize("dtype", ["f32", "f64"], ids=["whole", "stepped"])
def test_rescue_takes_over_what_is_left(dtype) -> None:
    case = Case(rows=6, dtype=dtype, init="torch")
    solver = Anderson(max_iter=5, rescue=True, trace=dtype == "f64")
    for solve in case.solves(cuda):
        before, after = solve(dataclasses.replace(solver, rescue=False)), solve(solver)
        left = failed(before.outcome)
        assert left.any()
        assert (after.outcome[left] == Outcome.RESCUED).all()
        assert torch.equal(after.z[~left], before.z[~left])
        assert len(after.trace) == (solver.max_iter if solver.trace else 0)


def test_strides_do_not_matter() -> None:
    case, solver = Case(dtype="f32", mask=True, start=True), Anderson()
    for solve in case.solves(cuda):

        def strange(t):
            if isinstance(t, list):
                return [strange(p) for p in t]
            if not isinstance(t, torch.Tensor) or t.dim() < 2:
                return t
            return torch.stack([t.mT, t.mT], dim=-1)[..., 1].mT

        plain, other = solve(solver), solve.func(*map(strange, solve.args), solver)
        assert torch.equal(other.z, plain.z)


@pytest.mark.parametrize("dtype", ["f32", "f64"], ids=["whole", "stepped"])
def test_no_rows(dtype) -> None:
    for solve in Case(rows=0, dtype=dtype).solves(cuda):
        with counted() as names:
            solved = solve(Anderson())
        assert names == []
        assert solved.z.shape[-2] == 0
        assert solved.outcome.shape == solved.z.shape[:-1]


def test_anderson_on_rows_of_any_map() -> None:
    x = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    option = Anderson(tol=1e-9, trace=True)
    given = cuda.anderson(lambda z: 0.5 * z.cos() + x, torch.zeros_like(x), option)
    expected = reference.anderson(lambda z: 0.5 * z.cos() + x, torch.zeros_like(x), option)
    torch.testing.assert_close(given.z, expected.z, rtol=1e-9, atol=1e-9)
    assert torch.equal(given.nfe, expected.nfe)
    torch.testing.assert_close(given.trace, expected.trace, rtol=1e-6, atol=1e-12, equal_nan=True)
