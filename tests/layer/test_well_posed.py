"""The default init makes an equilibrium that every row reaches: a few cases of the study.

``python -m benchmarks.convergence_study`` prints the whole of it.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deqfuse import Anderson, ConvergenceWarning, DEQFusion, NewtonKrylov

TOL, ROWS = 1e-5, 256


def inputs(dim: int, n: int, rms: float, rectified: bool) -> list[Tensor]:
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(n, ROWS, dim, generator=gen)
    if rectified:
        x = x.relu() * 2**0.5
    return list(x * rms)


def shares(layer: DEQFusion, xs: list[Tensor]) -> tuple[float, float]:
    """Share of converged rows: of the worst cell, of the fuse block."""
    with torch.no_grad():
        _, info = layer(xs, return_info=True)
    return float(info.cells.converged.double().mean(1).min()), float(
        info.fuse.converged.double().mean()
    )


CASES = [(64, 6, 0.3), (64, 2, 10.0), (300, 3, 1.0), (500, 2, 0.3)]
SLOW = [pytest.param(d, n, r, marks=pytest.mark.slow)
        for d in (64, 300, 500, 512) for n in (2, 3, 6) for r in (0.3, 1.0, 3.0, 10.0)
        if (d, n, r) not in CASES]  # fmt: skip


ANY = [(64, 6, 0.01), (300, 3, 100.0), (500, 2, None)]  # None: mixed
ANY += [pytest.param(d, n, r, marks=pytest.mark.slow)
        for d in (64, 300, 500) for n in (2, 3, 6) for r in (0.01, 1.0, 100.0, None)
        if (d, n, r) not in ANY]  # fmt: skip
each_kind = pytest.mark.parametrize("rectified", [False, True], ids=["gaussian", "rectified"])


@each_kind
@pytest.mark.parametrize(("dim", "n", "rms"), ANY)
def test_default_layer_converges_at_any_scale(
    dim: int, n: int, rms: float | None, rectified: bool
) -> None:
    """Mixed: from the first modality to the last, one is a thousand times as large."""
    torch.manual_seed(0)
    solver = Anderson(tol=TOL, max_iter=50, rescue=False)
    layer = DEQFusion(dim, n, solver=solver, on_failure="ignore")
    xs = inputs(dim, n, 1.0 if rms is None else rms, rectified)
    if rms is None:
        xs = [x * 10 ** (3 * i / (n - 1) - 1.5) for i, x in enumerate(xs)]
    assert min(shares(layer, xs)) >= 0.996  # of 256 rows all but one; the study has more of them


@each_kind
@pytest.mark.parametrize(("dim", "n", "rms"), [*CASES, *SLOW])
def test_default_init_converges_with_the_papers_equations(
    dim: int, n: int, rms: float, rectified: bool
) -> None:
    torch.manual_seed(0)
    solver = Anderson(tol=TOL, max_iter=50)
    layer = DEQFusion(dim, n, injection_norm=False, solver=solver, on_failure="ignore")
    assert min(shares(layer, inputs(dim, n, rms, rectified))) >= 0.999


@pytest.mark.parametrize("injection_norm", [False, True])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_zeros_in_place_of_a_modality_are_settled_or_said(dim: int, injection_norm: bool) -> None:
    """That cell is driven by its biases alone, and at the default init may settle nowhere near.

    Whatever it is called must be true: one more step, in float64, agrees with ``converged``. The
    other blocks, and a constant of ordinary size in place of the zeros, converge as ever.
    """
    solver = Anderson(tol=TOL, max_iter=50)
    for seed in range(4):
        torch.manual_seed(seed)
        layer = DEQFusion(dim, 3, solver=solver, injection_norm=injection_norm, on_failure="ignore")
        xs = [x[:32] for x in inputs(dim, 3, 1.0, rectified=False)]
        filled = [0.5 * torch.randn(dim).expand(32, dim), *xs[1:]]
        xs[0] = torch.zeros(32, dim)  # the same problem in every row
        with torch.no_grad():
            _, cells, info = layer(xs, return_cells=True, return_info=True)
            z, x = cells[0].double(), xs[0].double()
            moved = (layer.cells[0].double()(z, x) - z).norm(dim=1) / z.norm(dim=1)
        settled = info.cells.converged[0]
        # f(z) is returned, whose residual is below |J| times that of z.
        assert (moved[settled] <= 100 * TOL).all()
        assert (info.cells.residual[0][~settled] > TOL).all()
        assert info.cells.converged[1:].all()
        assert info.fuse.converged.all()
        layer.cells[0].float()
        assert min(shares(layer, filled)) == 1.0
        if not settled.all():
            layer.on_failure = "warn"
            with pytest.warns(ConvergenceWarning, match="modality cells"):
                layer(xs)


def test_torch_init_is_not_well_posed_and_says_so() -> None:
    """What the default init is for: without it rows fail, and are reported as failed."""
    torch.manual_seed(0)
    solver = Anderson(tol=TOL, max_iter=50, rescue=False)
    layer = DEQFusion(64, 3, init="torch", solver=solver, on_failure="ignore")
    _, fuse = shares(layer, inputs(64, 3, 1.0, rectified=False))
    assert fuse < 0.99


def test_rescue_finds_rows_that_anderson_lost() -> None:
    torch.manual_seed(0)
    xs, found = inputs(16, 3, 0.3, rectified=True), []
    for rescue in (False, True):
        torch.manual_seed(0)
        solver = Anderson(tol=TOL, max_iter=50, rescue=rescue)
        layer = DEQFusion(16, 3, injection_norm=False, solver=solver, on_failure="ignore")
        with torch.no_grad():
            _, info = layer(xs, return_info=True)
        found.append(int(info.converged.sum()))
    assert found[0] < ROWS
    assert found[1] == ROWS


def test_the_rescue_goes_on_to_starts_that_succeed() -> None:
    """One of these rows is solved from none of the first eight starts."""
    torch.manual_seed(0)
    solver = Anderson(tol=TOL, max_iter=50)
    layer = DEQFusion(16, 2, init="torch", injection_norm=False, solver=solver).double()
    xs = list(torch.randn(2, 1024, 16).relu().double() * 0.3 * 2**0.5)
    with torch.no_grad():
        _, info = layer(xs, return_info=True)
    assert info.converged.all()
    assert info.rescued.double().mean() > 0.1


def test_newton_solves_the_cells_at_torch_init() -> None:
    """Plain iteration solves 99% of them; the robust solver must not do worse."""
    torch.manual_seed(0)
    layer = DEQFusion(
        64, 3, init="torch", solver=NewtonKrylov(tol=TOL, max_iter=200), on_failure="ignore"
    )
    cells, _ = shares(layer, inputs(64, 3, 1.0, rectified=False))
    assert cells >= 0.99
