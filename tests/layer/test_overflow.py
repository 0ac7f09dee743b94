"""Numbers that overflow: incoming gradients, which pass, and inputs, which are not converged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deqfuse import (
    DEQ,
    Anderson,
    ConvergenceError,
    ConvergenceWarning,
    DEQFusion,
    Implicit,
    ProFusion,
    functional,
)

B, N, D = 4, 2, 16
BACKENDS = ["cpu", "reference"]
backends = pytest.mark.parametrize("backend", BACKENDS)
SPOILT = [torch.inf, -torch.inf, torch.nan]


def layer(backend: str = "cpu", **options: Any) -> DEQFusion:
    torch.manual_seed(0)
    return DEQFusion(D, N, backend=backend, on_failure="raise", **options)


def features(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(B, D, dtype=dtype, requires_grad=True) for _ in range(N)]


# ---- incoming gradients --------------------------------------------------------------------------


def of_layer(backend: str) -> tuple[Tensor, list[Tensor]]:
    module, xs = layer(backend), features()
    return module(xs), [*module.parameters(), *xs]


def of_cells_output(backend: str) -> tuple[Tensor, list[Tensor]]:
    module, xs = layer(backend), features()
    return module(xs, return_cells=True)[1], [*module.cells.parameters(), *xs]


def of_blocks(backend: str) -> tuple[Tensor, list[Tensor]]:
    """The two operators of the functional API, joined by autograd."""
    module, xs = layer(backend), features()
    params = [p for cell in module.cells for p in cell.flat()]
    options: dict[str, Any] = {"backend": backend, "on_failure": "raise"}
    zs, _, _ = functional.solve_cells(torch.stack(xs), params, **options)
    z, _, _ = functional.solve_fuse(
        xs[0] + xs[1], zs.sum(0), module.combine.flat(), num_modalities=N, **options
    )
    return z, [*params, *module.combine.flat(), *xs]


def of_deq(backend: str) -> tuple[Tensor, list[Tensor]]:
    torch.manual_seed(0)
    linear, x = nn.Linear(D, D), features()[0]
    deq = DEQ(lambda z, x: 0.5 * torch.tanh(linear(z)) + x, on_failure="raise")
    return deq(torch.zeros(B, D), x)[0], [*linear.parameters(), x]


def of_profusion(backend: str) -> tuple[Tensor, list[Tensor]]:
    class Join(nn.Module):
        def forward(self, xs: list[Tensor]) -> Tensor:
            return torch.tanh(0.3 * (xs[0] + xs[1]))

    torch.manual_seed(0)
    model = ProFusion(
        [nn.Linear(D, D), nn.Linear(D, D)], Join(), D, solver=Anderson(), on_failure="raise"
    )
    return model(features()), list(model.parameters())


MAKERS: dict[str, Callable[[str], tuple[Tensor, list[Tensor]]]] = {
    "layer": of_layer,
    "cells of a layer": of_cells_output,
    "blocks": of_blocks,
    "DEQ(f)": of_deq,
    "ProFusion": of_profusion,
}


@backends
@pytest.mark.parametrize("value", SPOILT, ids=str)
@pytest.mark.parametrize("maker", MAKERS)
def test_a_spoilt_cotangent_passes_through(
    maker: str, value: float, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``on_failure="raise"``: gradients that are not finite, a warning, and no error."""
    monkeypatch.setenv("DEQFUSE_BACKEND", backend)
    z, wanted = MAKERS[maker](backend)
    g = torch.ones_like(z)
    g.view(-1)[3] = value
    with pytest.warns(ConvergenceWarning, match=r"became NaN or infinite \(check the loss\)"):
        grads = torch.autograd.grad(z, wanted, g, allow_unused=True)
    spoilt = [not grad.isfinite().all() for grad in grads if grad is not None]
    assert spoilt[0]
    assert all(spoilt) or maker == "cells of a layer"  # the other cell has no part in it


@backends
def test_a_finite_cotangent_that_fails_still_raises(backend: str) -> None:
    module = layer(backend, adjoint=Implicit(tol=1e-7, max_iter=3))
    with pytest.raises(ConvergenceError, match="backward solve"):
        module(features()).backward(torch.randn(B, D))
    deq = DEQ(lambda z, x: 0.9 * torch.roll(z, 1, 1) + x, on_failure="raise",
              solver=Anderson(tol=1e-4), adjoint=Implicit(max_iter=3))  # fmt: skip
    x = torch.ones(B, D, requires_grad=True)
    z, _ = deq(10 * torch.ones(B, D), x)
    with pytest.raises(ConvergenceError, match="backward solve"):
        z.backward(torch.randn(B, D))


@pytest.mark.filterwarnings("ignore::deqfuse.ConvergenceWarning")
def test_grad_scaler_skips_the_step_and_goes_on() -> None:
    module = nn.Sequential(nn.Linear(D, D), nn.Linear(D, 1))
    fusion, scaler = layer(), torch.amp.GradScaler("cpu", init_scale=2.0**127)
    params = [*module.parameters(), *fusion.parameters()]
    optimizer = torch.optim.SGD(params, lr=1e-3)
    before = [p.detach().clone() for p in params]
    xs = [x.detach() for x in features()]
    taken = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = 100 * module(fusion(xs)).square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update(None if not taken else 1.0)
        taken.append(any(not torch.equal(a, p) for a, p in zip(before, params, strict=True)))
    assert taken == [False, False, True]
