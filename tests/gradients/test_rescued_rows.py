"""Gradients at rows whose equilibrium repels: no iteration of the adjoint converges there."""

from __future__ import annotations

import dataclasses
import warnings

import pytest
import torch

from deqfuse import DEQ, Anderson, ConvergenceWarning, DEQFusion, Implicit, Outcome, backends
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
def test_what_cannot_be_solved_says_its_condition_number(backend: str) -> None:
    """A tolerance below rounding stands for a singular I - J: the number is that of the matrix."""
    fusion, xs = fusion_of({"num_modalities": 1}, backend)
    fusion.adjoint = Implicit(tol=1e-300)
    with pytest.warns(
        ConvergenceWarning, match=r"singular I - J \(condition number up to \de\+"
    ) as seen:
        fusion([x[:1] for x in xs]).sum().backward()
    told = float(str(seen[0].message).split("up to ")[1].split(")")[0])
    at = xs[0][:1].detach()
    z, info = fusion([at], return_info=True)
    _, fuse = (block() for block in info.blocks)
    jacobian = torch.func.jacrev(lambda v: fuse.f(v[None])[0])(z[0].detach())
    true = float(torch.linalg.cond(torch.eye(16, dtype=torch.float64) - jacobian.detach()))
    assert 0.3 * true <= told <= 1.1 * true, "an estimate from below, one digit in the text"


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
