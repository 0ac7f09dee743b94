"""Jacobian penalty and spectral radius against dense Jacobians."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from deqfuse import DEQ, Anderson, DEQFusion
from deqfuse.diagnostics import jacobian_penalty, spectral_radius

B, D = 3, 8


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def dense_jacobians(f, z: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
    """(..., d, d) Jacobian of every row, differentiable in what f uses."""
    rows = z.detach().requires_grad_()
    fz = f(rows)
    columns = [
        torch.autograd.grad(fz[..., i].sum(), rows, create_graph=True)[0]
        for i in range(z.shape[-1])
    ]
    return torch.stack(columns, dim=-2)


class Tanh(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.2 * randn(D, D, seed=1))

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(z @ self.weight.mT + x)


# ---- penalty ------------------------------------------------------------------------------------


def test_penalty_is_the_mean_squared_frobenius_norm() -> None:
    """``E |J^T v|^2 = |J|_F^2``; the estimator's own spread over probes gives the error bar."""
    torch.manual_seed(0)
    deq = DEQ(Tanh(), solver=Anderson(tol=1e-10))
    x = randn(B, D)
    z, info = deq(torch.zeros_like(x), x)
    exact = dense_jacobians(lambda z: deq.f(z, x), z).square().sum() / (B * D)
    draws = torch.stack([info.jacobian_penalty().detach() for _ in range(400)])
    error = draws.std() / math.sqrt(len(draws))
    assert abs(draws.mean() - exact) < 5 * error  # five standard errors
    assert error < 0.03 * exact, "an error bar wide enough for anything tests nothing"


def test_penalty_averages_over_probes() -> None:
    torch.manual_seed(0)
    matrix = randn(D, D)
    f, z = (lambda z: z @ matrix), randn(B, D, seed=2)
    one = torch.stack([jacobian_penalty([(f, z)], 1) for _ in range(300)])
    many = torch.stack([jacobian_penalty([(f, z)], 16) for _ in range(300)])
    exact = matrix.square().sum() / D
    assert abs(many.mean() - exact) < 5 * many.std() / math.sqrt(300)
    assert many.std() / one.std() == pytest.approx(1 / 4, rel=0.35)  # 1 / sqrt(16); std to 6%


def test_gradient_of_the_penalty() -> None:
    """Compared with autograd of the exact norm, z* held constant, within Monte-Carlo error."""
    torch.manual_seed(0)
    deq = DEQ(Tanh(), solver=Anderson(tol=1e-10))
    x = randn(B, D)
    z, info = deq(torch.zeros_like(x), x)
    exact_value = dense_jacobians(lambda z: deq.f(z, x), z).square().sum() / (B * D)
    (exact,) = torch.autograd.grad(exact_value, deq.f.weight)
    draws = torch.stack(
        [torch.autograd.grad(info.jacobian_penalty(), deq.f.weight)[0] for _ in range(400)]
    )
    error = draws.std(0) / math.sqrt(len(draws))
    assert ((draws.mean(0) - exact).abs() < 6 * error + 1e-12).all()  # 64 entries, six sigma each
    assert error.norm() < 0.1 * exact.norm()


@pytest.mark.parametrize("variant", ["paper", "released", "released-mmimdb"])
def test_penalty_of_the_layer_sums_its_blocks(variant: str) -> None:
    """``(sum_i |J_ii|^2 + |J_ff|^2) / (B (N + 1) d)``."""
    torch.manual_seed(0)
    n = 2
    layer = DEQFusion(D, n, num_groups=2, variant=variant, on_failure="ignore").double()
    xs = [randn(B, D, seed=s) for s in range(n)]
    _, info = layer(xs, return_info=True)
    exact = sum(dense_jacobians(f, z).square().sum() for f, z, *_ in (b() for b in info.blocks))
    exact = exact.detach() / (B * (n + 1) * D)
    draws = torch.stack([info.jacobian_penalty(num_probes=4).detach() for _ in range(150)])
    error = draws.std() / math.sqrt(len(draws))
    assert abs(draws.mean() - exact) < 5 * error
    assert error < 0.05 * exact


def test_penalty_reaches_every_weight_of_the_layer() -> None:
    torch.manual_seed(0)
    layer = DEQFusion(D, 2, num_groups=2).double()
    _, info = layer([randn(B, D, seed=s) for s in range(2)], return_info=True)
    info.jacobian_penalty().backward()
    names = ("cells.0.linear1", "cells.1.linear2", "combine.gate", "combine.fuse")
    parameters = dict(layer.named_parameters())
    for name in names:
        assert parameters[f"{name}.weight"].grad.abs().sum() > 0, name


def test_penalty_lowers_the_jacobian_when_minimised() -> None:
    torch.manual_seed(0)
    layer = DEQFusion(D, 2, num_groups=2, init="torch", on_failure="ignore").double()
    xs = [randn(16, D, seed=s) for s in range(2)]
    optimizer, seen = torch.optim.Adam(layer.parameters(), lr=0.01), []
    for _ in range(25):
        _, info = layer(xs, return_info=True)
        penalty = info.jacobian_penalty(num_probes=4)
        optimizer.zero_grad()
        penalty.backward()
        optimizer.step()
        seen.append(float(penalty.detach()))
    assert sum(seen[-5:]) < 0.8 * sum(seen[:5])


def test_penalty_without_grad_mode_is_a_number() -> None:
    x = randn(B, D)
    deq = DEQ(Tanh())
    with torch.no_grad():
        _, info = deq(torch.zeros_like(x), x)
        assert not info.jacobian_penalty().requires_grad
    assert info.jacobian_penalty().requires_grad


@pytest.mark.parametrize(
    "f", [lambda z: torch.ones_like(z), lambda z: z.detach() * 0.5], ids=["constant", "detached"]
)
def test_map_without_a_graph(f) -> None:  # type: ignore[no-untyped-def]
    _, info = DEQ(f)(torch.zeros(B, D))
    assert info.jacobian_penalty().item() == 0
    assert (info.spectral_radius() < 1e-20).all()


def test_map_that_ignores_its_state() -> None:
    x = randn(B, D).requires_grad_()
    _, info = DEQ(lambda z, x: 2 * x)(torch.zeros(B, D, dtype=torch.float64), x)
    assert info.jacobian_penalty().item() == 0
    assert (info.spectral_radius() < 1e-20).all()


def test_closed_form_layers_have_nothing_to_measure() -> None:
    xs = [randn(B, D, seed=s) for s in range(2)]
    for options in ({"combine": "weighted_sum"}, {"cell": "identity", "gate": False}):
        layer = DEQFusion(D, 2, num_groups=2, **options).double()  # type: ignore[arg-type]
        _, info = layer(xs, return_info=True)
        assert info.jacobian_penalty().item() == 0
        assert info.spectral_radius().shape == (0, B)


def test_empty_batch() -> None:
    layer = DEQFusion(D, 2, num_groups=2)
    _, info = layer([torch.zeros(0, D)] * 2, return_info=True)
    assert info.jacobian_penalty().item() == 0
    assert info.spectral_radius().shape == (3, 0)


# ---- spectral radius ----------------------------------------------------------------------------


def test_radius_of_diagonal_matrices() -> None:
    torch.manual_seed(0)
    diagonal = torch.tensor([[0.9, 0.1, -0.3], [0.2, -1.5, 0.4], [0.0, 0.0, 0.05]]).double()
    found = spectral_radius(lambda z: diagonal * z, randn(3, 3), num_iters=100)
    torch.testing.assert_close(found, diagonal.abs().amax(1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("radius", [0.3, 0.99, 1.7])
@pytest.mark.parametrize("angle", [0.01, 0.7, math.pi / 2, 3.0])
def test_radius_of_rotations(radius: float, angle: float) -> None:
    """Complex pairs: the growth per step of a rotation is exactly its modulus."""
    c, s = radius * math.cos(angle), radius * math.sin(angle)
    matrix = torch.tensor([[c, -s], [s, c]], dtype=torch.float64)
    found = spectral_radius(lambda z: z @ matrix, randn(4, 2))
    torch.testing.assert_close(
        found, torch.full((4,), radius, dtype=torch.float64), rtol=1e-10, atol=0
    )


def test_radius_of_an_oblique_rotation() -> None:
    """A complex pair in skewed coordinates: growth oscillates, its mean does not."""
    torch.manual_seed(0)
    basis = torch.tensor([[1.0, 0.9], [0.0, 0.4]], dtype=torch.float64)
    turn = 0.8 * torch.tensor([[math.cos(1.0), -math.sin(1.0)], [math.sin(1.0), math.cos(1.0)]])
    matrix = basis @ turn.double() @ torch.inverse(basis)
    found = spectral_radius(lambda z: z @ matrix.mT, randn(5, 2), num_iters=400)
    # Over k counted steps the oscillation is worth at most cond(basis)^(1/k), k = 200.
    slack = float(torch.linalg.cond(basis)) ** (1 / 200)
    assert (found < 0.8 * slack).all()
    assert (found > 0.8 / slack).all()


def test_radius_of_a_nilpotent_matrix_is_zero() -> None:
    matrix = torch.diag(torch.ones(D - 1, dtype=torch.float64), 1)
    assert (spectral_radius(lambda z: z @ matrix, randn(2, D)) < 1e-12).all()


def test_radius_of_the_layer_per_block_and_row() -> None:
    torch.manual_seed(0)
    layer = DEQFusion(D, 2, num_groups=2, init="torch", on_failure="ignore").double()
    xs = [randn(2, 3, D, seed=s) for s in range(2)]
    _, info = layer(xs, return_info=True)
    found = info.spectral_radius(num_iters=600)
    assert found.shape == (3, 2, 3)  # two cells, the fuse block
    exact = torch.cat(
        [
            torch.linalg.eigvals(dense_jacobians(f, z).detach()).abs().amax(-1).reshape(-1, 2, 3)
            for f, z, *_ in (block() for block in info.blocks)
        ]
    )
    torch.testing.assert_close(found, exact, rtol=0.03, atol=1e-6)  # cond^(1/300) of the eigenbasis


def test_radius_leaves_no_graph() -> None:
    deq, x = DEQ(Tanh()), randn(B, D).requires_grad_()
    _, info = deq(torch.zeros(B, D, dtype=torch.float64), x)
    radius = info.spectral_radius()
    assert radius.shape == (1, B)
    assert not radius.requires_grad
    assert deq.f.weight.grad is None
