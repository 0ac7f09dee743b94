"""What the stability study does to a layer, against dense Jacobians and dense gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from deqfuse import Anderson, DEQFusion, Implicit, SolveInfo, testing
from deqfuse.experiments.mmdynamics import MMDynamics
from deqfuse.experiments.stability import RECIPE
from deqfuse.experiments.training import _optimizer
from deqfuse.experiments.treatments import TREATMENTS, radius_penalty, treat

DIM, N = 12, 2
TIGHT = {"solver": Anderson(tol=1e-12, max_iter=500), "adjoint": Implicit(tol=1e-12)}


def make() -> DEQFusion:
    """In float64, with norms and biases away from ones and zeros."""
    torch.manual_seed(0)
    layer = DEQFusion(DIM, N, num_groups=3, on_failure="ignore", dtype=torch.float64, **TIGHT)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return layer


def draw(rows: int, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, DIM, generator=generator, dtype=torch.float64) for _ in range(N)]


def jacobians(info: SolveInfo) -> list[Tensor]:
    """Dense (d, d) of every block of the only row."""
    found = []
    for f, z, *_ in (block() for block in info.blocks or ()):
        whole = torch.autograd.functional.jacobian(f, z).reshape(z.numel(), z.numel())
        found += [whole[i : i + DIM, i : i + DIM] for i in range(0, z.numel(), DIM)]
    return found


def test_the_radius_penalty_is_the_mean_square_of_the_radii() -> None:
    """Where the dominant eigenvalue is real, so that power iteration ends."""
    layer, counted = make(), 0
    for seed in range(20):
        info = layer(draw(1, seed), return_info=True)[1]
        sizes, real = [], True
        for jacobian in jacobians(info):
            values = torch.linalg.eigvals(jacobian)
            values = values[values.abs().argsort(descending=True)]
            # 200 products leave (0.9)^200 = 7e-10 of the other directions.
            real &= bool(values[0].imag == 0) and bool(values[1].abs() < 0.9 * values[0].abs())
            sizes.append(values[0].abs().square())
        if real:
            counted += 1
            torch.manual_seed(seed)
            given = radius_penalty(info, 200)
            torch.testing.assert_close(given, torch.stack(sizes).mean(), rtol=1e-6, atol=0)
    assert counted >= 3


def test_its_gradient_is_that_of_a_double_backward_with_the_same_vectors() -> None:
    layer, xs = make(), [x.requires_grad_() for x in draw(5)]
    info, leaves = layer(xs, return_info=True)[1], [*layer.parameters(), *xs]
    torch.manual_seed(3)
    keep = {"materialize_grads": True, "retain_graph": True}  # the division of injections is shared
    given = torch.autograd.grad(radius_penalty(info, 4), leaves, **keep)
    torch.manual_seed(3)
    total, rows = xs[0].new_zeros(()), 0
    for f, z, *_ in (block() for block in info.blocks or ()):
        z = z.detach().requires_grad_()
        fz, v = f(z), torch.randn_like(z)
        for _ in range(4):
            v = torch.autograd.grad(fz, z, v, retain_graph=True)[0]
            v = v / v.norm(dim=-1, keepdim=True)
        (pulled,) = torch.autograd.grad(fz, z, v, create_graph=True)
        total, rows = total + pulled.square().sum(), rows + z[..., 0].numel()
    expected = torch.autograd.grad(total / rows, leaves, **keep)
    scale = max(float(e.abs().max()) for e in expected)
    assert scale > 0
    for a, b in zip(given, expected, strict=True):
        assert (a - b).abs().max() <= 1e-10 * scale


@pytest.mark.parametrize("key", ["norm one", "norm drawn"])
def test_gradients_through_spectral_normalisation_are_exact(key: str) -> None:
    """Also in training mode, where each look at a weight moves its singular vectors: one a call."""
    layer, xs = make(), draw(4)
    treat(layer, TREATMENTS[key])
    g = torch.randn(4, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    found = []
    for training in (True, False):  # the second with the vectors that the first one left
        z = layer.train(training)(xs)
        found.append((z.detach(), torch.autograd.grad(z, [*layer.parameters()], g)))
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-12)
    # Solves stop at 1e-12, and condition numbers met here are below 1e3.
    errors = testing.gradient_errors(layer, xs)
    assert sum("parametrizations" in name for name in errors) == N + 2
    assert max(errors.values()) <= 1e-8, errors


def test_spectral_norms_are_held() -> None:
    drawn, layers = make(), {key: make() for key in ("norm one", "norm drawn")}
    for key, layer in layers.items():
        treat(layer, TREATMENTS[key])
        for _ in range(300):  # power iterations
            layer.combine.gate.weight  # noqa: B018
        norm = torch.linalg.matrix_norm(drawn.combine.gate.weight, 2)
        expected = drawn.combine.gate.weight / (norm if key == "norm one" else 1.0)
        torch.testing.assert_close(layer.combine.gate.weight, expected, rtol=1e-4, atol=1e-6)
        parts = [*(cell.linear2 for cell in layer.cells), layer.combine.fuse, layer.combine.gate]
        assert all(nn.utils.parametrize.is_parametrized(part, "weight") for part in parts)


def test_gain_and_rate_concern_the_layer_alone() -> None:
    model = MMDynamics([5, 3], 2, "deq", dim=8)
    assert model.fusion is not None
    treat(model.fusion, TREATMENTS["gain"])
    norms = [*(cell.norm3 for cell in model.fusion.cells), model.fusion.combine.norm]
    assert all((norm.weight == 0.5).all() for norm in norms)
    assert (model.fusion.cells[0].norm1.weight == 1).all()
    optimizer = _optimizer(model, replace(RECIPE, layer_rate=TREATMENTS["rate"].rate))
    rest, layer = optimizer.param_groups
    assert (rest["lr"], layer["lr"]) == (RECIPE.learning_rate, 0.1 * RECIPE.learning_rate)
    assert {*map(id, layer["params"])} == {*map(id, model.fusion.parameters())}
    assert len(rest["params"]) + len(layer["params"]) == len([*model.parameters()])
