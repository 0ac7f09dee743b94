"""The layer in other precisions, at other scales, and what it says of rows that fail."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deqfuse import (
    Anderson,
    ConvergenceError,
    ConvergenceWarning,
    DEQFusion,
    Implicit,
)

DIM, N, ROWS = 12, 2, 4


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_failure_is_reported_both_ways(direction):
    torch.manual_seed(0)
    solver = Anderson(tol=1e-8, max_iter=2 if direction == "forward" else 100, rescue=False)
    adjoint = Implicit(solver="anderson", tol=1e-8, max_iter=2 if direction == "backward" else 100)
    fusion = DEQFusion(DIM, N, num_groups=2, solver=solver, adjoint=adjoint).double()
    xs = [torch.randn(ROWS, DIM, dtype=torch.float64) for _ in range(N)]
    g = torch.randn(ROWS, DIM, dtype=torch.float64)
    with pytest.warns(ConvergenceWarning, match=r"rows of .* did not converge.*max_iter=4"):
        fusion(xs).backward(g)
    fusion.on_failure = "raise"
    with pytest.raises(
        ConvergenceError, match="the backward solve" if "b" in direction else "rows"
    ):
        fusion(xs).backward(g)
    fusion.on_failure = "ignore"
    fusion(xs).backward(g)


def test_autocast_does_not_reach_into_the_solve():
    """In a bf16 region only what surrounds the solves is rounded; the loop keeps float32."""
    torch.manual_seed(0)
    fusion = DEQFusion(DIM, N, num_groups=2, solver=Anderson(tol=1e-6, max_iter=100))
    xs = [torch.randn(ROWS, DIM, requires_grad=True) for _ in range(N)]
    g = torch.randn(ROWS, DIM)
    z = fusion(xs)
    expected = torch.autograd.grad(z, [*xs, *fusion.parameters()], g)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside, info = fusion(xs, return_info=True)
    assert inside.dtype == torch.float32
    assert info.converged.all()  # 1e-6 is out of reach of bf16
    torch.testing.assert_close(inside, z)
    given = torch.autograd.grad(inside, [*xs, *fusion.parameters()], g)
    for a, b in zip(given, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_autocast_after_a_bf16_encoder():
    """The usual training region: encoders in bf16, projections inside, a loss outside."""
    torch.manual_seed(0)
    encoders = torch.nn.ModuleList(torch.nn.Linear(5, 7) for _ in range(N))
    fusion = DEQFusion(DIM, N, in_dims=[7, 7], num_groups=2)
    xs = [torch.randn(ROWS, 5) for _ in range(N)]

    def run(enabled: bool) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            return fusion([e(x) for e, x in zip(encoders, xs, strict=True)])

    z, truth = run(True).float(), run(False)
    assert z.shape == truth.shape
    # Three roundings of relative size 2^-8 on the way in, a layer of Lipschitz constant a few.
    torch.testing.assert_close(z, truth, rtol=0, atol=0.1)
    z.square().mean().backward()
    used = (*encoders.parameters(), *fusion.parameters())
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in used)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [{}, {"weight_tied_steps": 3}, {"weight_tied_steps": 3, "gate": False}, {"cell": "identity"},
     {"weight_tied_steps": 3, "cell": "identity"}],
    ids=str,
)  # fmt: skip
def test_sixteen_bit_layers(options, dtype):
    torch.manual_seed(0)
    layer = DEQFusion(16, 2, num_groups=2, **options).to(dtype)
    z, info = layer([torch.randn(3, 16, dtype=dtype) for _ in range(2)], return_info=True)
    assert z.dtype == dtype
    (z * torch.randn_like(z)).sum().backward()
    assert all(p.grad.dtype == dtype for p in layer.combine.parameters())
    info.jacobian_penalty()
    info.spectral_radius(2)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30], ids="{:g}".format)
def test_gradients_are_linear_in_the_cotangent(scale):
    """float32, whose squares under- and overflow at the outer two."""
    torch.manual_seed(0)
    fusion = DEQFusion(DIM, N, num_groups=2)
    xs = [torch.randn(ROWS, DIM, requires_grad=True) for _ in range(N)]
    g = torch.randn(ROWS, DIM)
    plain = torch.autograd.grad(fusion(xs), xs, g)
    scaled = torch.autograd.grad(fusion(xs), xs, scale * g)
    for a, b in zip(scaled, plain, strict=True):
        # Both solves end at 1e-4; scaling only rounds.
        torch.testing.assert_close(a / scale, b, rtol=0, atol=1e-3 * b.abs().max().item())
