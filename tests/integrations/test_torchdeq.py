"""A torchdeq program and the same program with ``DEQ``: what docs/how-to/torchdeq.md promises."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deqfuse import DEQ, Anderson, Implicit, Neumann, OneStep

torchdeq: Any = pytest.importorskip("torchdeq", reason="needs torchdeq: pip install torchdeq")
TOL = 1e-10  # in float64
DIM, ROWS = 32, 8


class Map(nn.Module):
    """A map that contracts by about 0.3."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(DIM, DIM, dtype=torch.float64)
        nn.init.normal_(self.inner.weight, std=0.3 / DIM**0.5)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.inner(z) + x)


def theirs(f: Map, x: Tensor, **options: Any) -> Tensor:
    deq = torchdeq.get_deq(
        f_solver="anderson", b_solver="anderson", f_max_iter=100, b_max_iter=100,
        f_tol=TOL, b_tol=TOL, f_stop_mode="rel", b_stop_mode="rel", **options,
    )  # fmt: skip
    answers, _ = deq(lambda z: f(z, x), torch.zeros_like(x))
    found: Tensor = answers[-1]
    return found


def gradient_of(f: Map, z: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(z.sin().sum(), f.inner.weight)
    return gradient


@pytest.mark.parametrize(
    ("options", "adjoint"),
    [({"ift": True}, Implicit(tol=TOL)), ({"grad": 1}, OneStep()), ({"grad": 4}, Neumann(3))],
)
def test_answers_and_gradients_are_the_same(options: dict[str, Any], adjoint: Any) -> None:
    torch.manual_seed(0)
    f, x = Map(), torch.randn(ROWS, DIM, dtype=torch.float64)
    solver = Anderson(tol=TOL, max_iter=100)
    z, _ = DEQ(f, solver=solver, adjoint=adjoint)(torch.zeros_like(x), x)
    want = theirs(f, x, **options)
    # Both are within tol / (1 - 0.3) of the equilibrium, gradients likewise.
    torch.testing.assert_close(z, want, rtol=0, atol=10 * TOL * want.norm().item())
    expected, found = gradient_of(f, want), gradient_of(f, z)
    assert (found - expected).norm() <= 100 * TOL * expected.norm()


def test_the_penalty_is_the_same_quantity() -> None:
    torch.manual_seed(0)
    f, x = Map().float(), torch.randn(ROWS, DIM)
    z, info = DEQ(f, solver=Anderson(tol=1e-6))(torch.zeros_like(x), x)
    state = z.detach().requires_grad_()
    torch.manual_seed(1)
    want = torchdeq.loss.jac_reg(f(state, x), state)
    torch.manual_seed(1)  # the same probe: torchdeq draws in float32
    torch.testing.assert_close(info.jacobian_penalty(), want)
