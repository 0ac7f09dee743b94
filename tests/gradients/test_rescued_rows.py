"""Gradients at rows whose equilibrium repels: no iteration of the adjoint converges there."""

from __future__ import annotations

import dataclasses
import warnings

import pytest
import torch

from deqfuse import (
    DEQ,
    Anderson,
    ConvergenceWarning,
    DEQFusion,
    Implicit,
    Outcome,
    backends,
    functional,
)
from deqfuse.backends.linearization import FuseLinearization
from deqfuse.backends.maps import PAPER, CellParams, FuseParams, residual_cell
from deqfuse.solvers.derivatives import columns_of
from deqfuse.testing import dense_implicit_gradients

BACKENDS = [name for name in ("cpu", "reference") if backends.load(name).unavailable() is None]
CASES = {
    "paper": {},
    "released": {"variant": "released"},
    "released-mmimdb": {"variant": "released-mmimdb"},
    "dropout": {"dropout": 0.2},
    "N=1": {"num_modalities": 1},
    "odd d": {"dim": 33, "num_groups": 3},
    "d=64": {"dim": 64},
}


def fusion_of(case: dict, backend: str) -> tuple[DEQFusion, list[torch.Tensor]]:
    torch.manual_seed(0)
    options = {"dim": 16, "num_modalities": 3, "init": "torch", **case}
    solver = Anderson(tol=1e-12, max_iter=40)
    fusion = DEQFusion(**options, solver=solver, backend=backend, adjoint=Implicit(tol=1e-12))
    count = options["num_modalities"]
    xs = [torch.randn(24, options["dim"], dtype=torch.float64) for _ in range(count)]
    return fusion.double(), [x.requires_grad_() for x in xs]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_against_dense_gradients(name: str, backend: str) -> None:
    fusion, xs = fusion_of(CASES[name], backend)
    fusion.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        z, cells, info = fusion(xs, return_cells=True, return_info=True)
        assert info.rescued.any()
        assert info.converged.all()
        assert (info.spectral_radius()[:, info.rescued].amax(0) > 1).any()
        g, g_cells = torch.randn_like(z), torch.randn_like(cells)
        torch.autograd.backward((z, cells), (g, g_cells))
    exact = dense_implicit_gradients(fusion, xs, g, g_cells)
    leaves = {
        **dict(fusion.named_parameters()), **{f"features[{i}]": x for i, x in enumerate(xs)}
    }  # fmt: skip
    largest = max(float(e.abs().max()) for e in exact.values())
    for leaf, expected in exact.items():
        error = (leaves[leaf].grad - expected).abs().max()
        assert error <= 1e-8 * max(float(expected.abs().max()), 1e-4 * largest), (
            leaf,
            float(error),
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_solver_by_name_is_what_it_says(backend: str) -> None:
    """Only "auto" factorises: who asks for the iteration gets it, and hears how it ended."""
    fusion, xs = fusion_of({}, backend)
    fusion.adjoint = Implicit(solver="anderson", tol=1e-12, max_iter=5)
    with pytest.warns(ConvergenceWarning, match="backward solve"):
        fusion(xs).sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_singular_rows_fail(backend: str) -> None:
    """Nearly a thousand cells at a tolerance that is close to rounding, against dense solves."""
    torch.manual_seed(0)
    fusion = DEQFusion(16, 1, init="torch").double()
    x = torch.randn(1, 900 if backend == "cpu" else 150, 16, dtype=torch.float64)
    flat = [t.detach() for t in fusion.cells[0].flat()]
    how = {"solver": Anderson(tol=1e-12), "adjoint": Implicit(tol=1e-12), "backend": backend}
    leaf = x.clone().requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        z, info, _ = functional.solve_cells(leaf, flat, **how, on_failure="warn")
        g = torch.randn_like(z)
        (grad,) = torch.autograd.grad(z, leaf, g)
    good = info.converged[0]
    assert good.double().mean() > 0.99
    params = CellParams.stack(flat)
    map_ = lambda z, x: residual_cell(z[None, None], x[None, None], params, 4)[0, 0]  # noqa: E731
    at = z[0].detach(), x[0]
    by_z, by_x = (torch.func.vmap(torch.func.jacrev(map_, k))(*at) for k in (0, 1))
    matrix = torch.eye(16, dtype=torch.float64) - by_z
    exact = torch.stack([
        torch.linalg.solve(m.mT, row) @ j for m, row, j in zip(matrix, g[0], by_x, strict=True)
    ])  # fmt: skip
    regular = good & (torch.stack([torch.linalg.cond(m) for m in matrix]) < 1e6)
    error = (grad[0] - exact).norm(dim=1) / exact.norm(dim=1)
    assert error[regular].max() <= 1e-8


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_singular_row_says_its_condition_number(backend: str) -> None:
    """The fuse step at a given state: J is linear in the norm's weight, so that one eigenvalue of
    it can be made 1."""
    d, n = 16, 2
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64)  # noqa: E731
    for seed in range(20):  # until an eigenvalue is real
        torch.manual_seed(seed)
        params = [draw(d, d) / 4, draw(d), draw(d, d) / 4, draw(d), torch.ones(d).double(), draw(d)]
        z, x, total, g = draw(1, d), draw(1, d), draw(1, d), draw(1, d)
        at = FuseLinearization(z, x, total, None, n, FuseParams(*params), 4, PAPER)
        values = torch.linalg.eigvals(columns_of(lambda _: at.jvp)(z, [0])[0])  # noqa: B023
        real = values[(values.imag.abs() < 1e-9) & (values.abs() > 0.1)].real
        if len(real):
            break
    params[4] = params[4] / real[0]
    code = Implicit(tol=1e-8).code
    *_, residual, _, outcome = torch.ops.deqfuse.adjoint_fuse(
        g, z, x, total, params, None, None, n, 4, "paper", code, backend, True
    )
    assert outcome.tolist() == [Outcome.SINGULAR]
    assert residual.item() > 1e13


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled(backend: str) -> None:
    """A rescue inside of a compiled graph: the operator's body may use no transform of torch's."""
    fusion, xs = fusion_of({}, backend)
    z, info = fusion(xs, return_info=True)
    assert info.rescued.any()
    compiled = torch.compile(lambda xs: fusion(xs), backend="aot_eager", fullgraph=True)(xs)
    torch.testing.assert_close(compiled, z, rtol=1e-9, atol=1e-9)
    for a, b in zip(
        torch.autograd.grad(compiled.sum(), xs), torch.autograd.grad(z.sum(), xs), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-7)


def test_singular_maps_of_ones_own() -> None:
    """z_0 <- z_0 + x_0 has equilibria at x_0 = 0 only, and I - J has no inverse there."""
    weight = torch.tensor([[1.0, 0.0], [0.0, 0.5]])
    deq = DEQ(lambda z, x: z @ weight + x)
    x = torch.tensor([[0.0, 1.0]], requires_grad=True)
    z, info = deq(torch.zeros(1, 2), x)
    assert info.converged.all()
    with pytest.warns(ConvergenceWarning, match="singular I - J .condition number up to inf"):
        z.sum().backward()


def test_no_work_for_rows_that_converge() -> None:
    """The bits of a contractive layer are those without a rescue."""
    for backend in BACKENDS:
        fusion = DEQFusion(16, 2, backend=backend)
        xs = [torch.randn(9, 16) for _ in range(2)]
        results = []
        for rescue in (None, False):
            fusion.solver = dataclasses.replace(Anderson(), rescue=rescue)
            z, info = fusion(xs, return_info=True)
            assert (info.outcome == Outcome.CONVERGED).all()
            results.append((z, info.nfe))
        assert torch.equal(results[0][0], results[1][0])
        assert torch.equal(results[0][1], results[1][1])
