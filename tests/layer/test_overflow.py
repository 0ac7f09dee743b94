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
    Broyden,
    ConvergenceError,
    ConvergenceWarning,
    DEQFusion,
    Implicit,
    NewtonKrylov,
    Outcome,
    Picard,
    ProFusion,
    functional,
)
from deqfuse.solvers.options import SolverOption

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
    module = layer(backend, adjoint=Implicit(solver="anderson", tol=1e-7, max_iter=3))
    with pytest.raises(ConvergenceError, match="backward solve"):
        module(features()).backward(torch.randn(B, D))
    deq = DEQ(lambda z, x: 0.9 * torch.roll(z, 1, 1) + x, on_failure="raise",
              solver=Anderson(tol=1e-4), adjoint=Implicit(solver="gmres", max_iter=3))  # fmt: skip
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


# ---- inputs whose squares overflow ---------------------------------------------------------------

LAYERS: dict[str, dict[str, Any]] = {
    "default": {},
    "released": {"variant": "released"},
    "released-mmimdb": {"variant": "released-mmimdb"},
    "papers' equations": {"injection_norm": False},
    "identity cells": {"cell": "identity"},
    "no gate": {"gate": False},
    "sum": {"combine": "sum"},
    "weighted sum": {"combine": "weighted_sum", "injection_norm": False},
    "weight-tied steps": {"weight_tied_steps": 3},
}


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", LAYERS)
def test_what_is_called_converged_is_right(kind: str, dtype: torch.dtype, backend: str) -> None:
    """Huge inputs beside ordinary ones. In float64 the same inputs are ordinary, too.

    From 1e20 on the square of most entries is beyond float32. Rounding to bfloat16 costs 2^-8.
    """
    torch.manual_seed(0)
    options: dict[str, Any] = {"on_failure": "ignore", **LAYERS[kind]}
    module = DEQFusion(D, N, backend=backend, **options).to(dtype)
    exact = DEQFusion(D, N, backend="reference", **options).double()
    exact.load_state_dict(module.state_dict())
    sizes = torch.tensor([1e2, 1e6, 1e12, 1e17, 1e20, 1e25, 1e30, 1e37], dtype=torch.float64)
    shared = torch.randn(N, 1, D, dtype=torch.float64)
    xs = list((shared * sizes[:, None]).to(dtype))
    with torch.no_grad():
        z, info = module(xs, return_info=True)
        truth = exact([x.double() for x in xs])
    if kind == "weighted sum":  # which has no squares
        assert info.converged.all()
    else:
        assert (info.outcome[sizes >= 1e20] == Outcome.NON_FINITE).all()
        assert z[sizes >= 1e20].isnan().all()
    for found, right, size in zip(z.double(), truth, sizes, strict=True):
        if size < 1e20 or kind == "weighted sum":
            # Both are solved to 1e-4, by maps that contract by ten or so.
            assert (found - right).norm() <= (
                1e-3 if dtype == torch.float32 else 0.02
            ) * right.norm()


def test_a_closed_form_of_an_overflow_is_no_answer() -> None:
    module = DEQFusion(D, N, combine="weighted_sum", injection_norm=False)
    xs = [torch.full((3, D), 1.0), torch.full((3, D), 1.0)]
    xs[0][1] = xs[1][1] = 3e38
    _, info = module(xs, return_info=True)
    assert info.outcome.tolist() == [0, Outcome.NON_FINITE, 0]
    assert info.residual.isnan().tolist() == [False, True, False]


@backends
@pytest.mark.parametrize(
    "solver", [Anderson(), Picard(), Broyden(), NewtonKrylov(), Anderson(max_iter=2, rescue=True)],
    ids=repr,
)  # fmt: skip
def test_a_state_whose_norm_overflows_is_not_converged(
    solver: SolverOption, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEQFUSE_BACKEND", backend)
    x = torch.tensor([[1.0], [1e19]]).expand(2, D)
    f = lambda z, x: 0.5 * z + x  # noqa: E731
    start = 1.9 * x  # so near that the difference has a norm and f(z) has none
    _, info = DEQ(f, solver=solver, on_failure="ignore")(start, x)
    assert info.converged.tolist() == [True, False]
    assert info.outcome[1] == Outcome.NON_FINITE
