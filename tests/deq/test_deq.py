"""``DEQ(f)``: any callable, any state, gradients to everything that f touches."""

from __future__ import annotations

import pytest
import torch
from deq_cases import EXACT, TIGHT, B, Map, N, assert_gradients, dense_gradients, randn
from torch import Tensor, nn

from deqfuse import (
    DEQ,
    Anderson,
    Broyden,
    Implicit,
    Neumann,
    NewtonKrylov,
    OneStep,
    Outcome,
    Picard,
    Unrolled,
)
from deqfuse.solvers.options import LINEAR_SOLVERS, SolverOption


@pytest.mark.parametrize("linear", LINEAR_SOLVERS)
@pytest.mark.parametrize(
    "solver", [TIGHT, Picard(tol=1e-12, max_iter=400), Broyden(tol=1e-12, max_iter=200),
               NewtonKrylov(tol=1e-12)], ids=lambda s: type(s).__name__,
)  # fmt: skip
def test_gradients_reach_arguments_and_parameters(solver: SolverOption, linear: str) -> None:
    f, x, scale = Map(), randn(B, N).requires_grad_(), torch.tensor(1.3, dtype=torch.float64)
    scale.requires_grad_()
    deq = DEQ(f, solver=solver, adjoint=Implicit(solver=linear, tol=1e-12, max_iter=300))
    z, info = deq(torch.zeros(B, N, dtype=torch.float64), x, scale)
    assert info.converged.all()
    torch.testing.assert_close(z, f(z, x, scale), rtol=1e-10, atol=1e-10)
    wanted, g = [x, scale, f.weight, f.bias], randn(B, N, seed=7)
    expected = dense_gradients(lambda z: f(z, x, scale), z.detach(), wanted, g)
    assert_gradients(list(torch.autograd.grad(z, wanted, g)), expected)


def test_closed_over_parameters_of_a_plain_function() -> None:
    weight = (0.1 * randn(N, N)).requires_grad_()
    inner = nn.Linear(N, N).double()
    f = lambda z: torch.tanh(z @ weight) + 0.1 * inner(z.cos())  # noqa: E731
    deq = DEQ(f, solver=TIGHT, adjoint=EXACT)
    z, _ = deq(randn(B, N))
    wanted, g = [weight, inner.weight, inner.bias], randn(B, N, seed=3)
    assert_gradients(
        list(torch.autograd.grad(z, wanted, g)), dense_gradients(f, z.detach(), wanted, g)
    )


def test_a_module_f_is_registered() -> None:
    deq = DEQ(Map())
    assert {name for name, _ in deq.named_parameters()} == {"f.weight", "f.bias"}


@pytest.mark.parametrize("shape", [(2, 3), (1,), (), (2, 1, 2)], ids=str)
def test_tensor_states_of_any_shape(shape: tuple[int, ...]) -> None:
    x = randn(B, *shape).requires_grad_()
    deq = DEQ(lambda z, x: 0.5 * torch.sin(z) + x, solver=TIGHT, adjoint=EXACT)
    z, info = deq(torch.zeros(B, *shape, dtype=torch.float64), x)
    assert z.shape == (B, *shape)
    assert info.fuse.residual.shape == info.converged.shape == info.nfe.shape == (B,)
    assert info.cells is None
    g = randn(B, *shape, seed=4)
    (found,) = torch.autograd.grad(z, x, g)
    torch.testing.assert_close(found, g / (1 - 0.5 * z.detach().cos()), rtol=1e-9, atol=1e-9)


def test_tuple_state() -> None:
    """Coupled parts of different shapes are one row: the joint Jacobian counts."""
    x, y = randn(B, 3).requires_grad_(), randn(B, 2, 2, seed=1).requires_grad_()

    def f(z: tuple[Tensor, Tensor], x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        a, b = z
        return 0.3 * torch.tanh(a + b.sum((1, 2))[:, None]) + x, 0.3 * torch.sin(
            b * a[:, :1, None]
        ) + y

    deq = DEQ(f, solver=TIGHT, adjoint=EXACT)
    (a, b), info = deq((torch.zeros_like(x), torch.zeros_like(y)), x, y)
    assert isinstance(deq((x, y), x, y)[0], tuple)
    assert info.fuse.residual.shape == (B,)
    for found, again in zip((a, b), f((a, b), x, y), strict=True):
        torch.testing.assert_close(found, again, rtol=1e-10, atol=1e-10)

    def flat(z: Tensor) -> Tensor:
        parts = f((z[:, :3], z[:, 3:].view(-1, 2, 2)), x, y)
        return torch.cat([part.flatten(1) for part in parts], 1)

    ga, gb = randn(B, 3, seed=5), randn(B, 2, 2, seed=6)
    star = torch.cat([a.detach(), b.detach().flatten(1)], 1)
    expected = dense_gradients(flat, star, [x, y], torch.cat([ga, gb.flatten(1)], 1))
    assert_gradients(list(torch.autograd.grad((a, b), [x, y], (ga, gb))), expected)


def test_a_tuple_of_one_stays_a_tuple() -> None:
    z, _ = DEQ(lambda z: (0.5 * z[0],))((randn(B, 2),))
    assert isinstance(z, tuple)
    assert len(z) == 1


def test_unused_part_of_the_output() -> None:
    x = randn(B, 3).requires_grad_()
    f = lambda z, x: (0.5 * z[0] + x, 0.5 * z[1] + 2 * x)  # noqa: E731
    (a, _), _ = DEQ(f, solver=TIGHT, adjoint=EXACT)((torch.zeros_like(x), torch.zeros_like(x)), x)
    g = randn(B, 3, seed=1)
    torch.testing.assert_close(torch.autograd.grad(a, x, g)[0], 2 * g)


# ---- maps that give little to differentiate -----------------------------------------------------


def test_f_that_ignores_its_state() -> None:
    x = randn(B, N).requires_grad_()
    z, info = DEQ(lambda z, x: x.square())(torch.zeros(B, N, dtype=torch.float64), x)
    assert info.converged.all()
    g = randn(B, N, seed=1)
    torch.testing.assert_close(torch.autograd.grad(z, x, g)[0], 2 * x.detach() * g)


def test_f_without_anything_to_differentiate() -> None:
    constant = randn(B, N)
    for f in (lambda z: 0.5 * z + 1, lambda z: constant.clone(), lambda z: (0.5 * z).detach()):
        z, info = DEQ(f)(torch.zeros(B, N, dtype=torch.float64))
        assert info.converged.all()
        if z.requires_grad:  # f depends on z only: nothing else can receive a gradient
            z.backward(randn(B, N))


def test_partly_detached_map() -> None:
    x = randn(B, N).requires_grad_()
    deq = DEQ(lambda z, x: 0.5 * z.detach() + x, solver=TIGHT, adjoint=EXACT)
    z, _ = deq(torch.zeros_like(x), x)
    g = randn(B, N, seed=1)
    torch.testing.assert_close(torch.autograd.grad(z, x, g)[0], g)  # autograd's J is zero


def test_no_gradient_flows_to_the_start() -> None:
    start, x = randn(B, N).requires_grad_(), randn(B, N, seed=1).requires_grad_()
    for adjoint in (Implicit(), OneStep(), Neumann(), Unrolled()):
        z, _ = DEQ(Map(), adjoint=adjoint)(start, x)
        (found,) = torch.autograd.grad(z, start, randn(B, N), allow_unused=True)
        assert found is None


def test_the_same_argument_twice() -> None:
    x = randn(B, N).requires_grad_()
    f = lambda z, a, b: torch.tanh(0.4 * z * a + b)  # noqa: E731
    deq = DEQ(f, solver=TIGHT, adjoint=EXACT)
    z, _ = deq(torch.zeros(B, N, dtype=torch.float64), x, x)
    g = randn(B, N, seed=1)
    expected = dense_gradients(lambda z: f(z, x, x), z.detach(), [x], g)
    assert_gradients(list(torch.autograd.grad(z, [x], g)), expected)


def test_arguments_that_are_no_tensors() -> None:
    deq = DEQ(lambda z, table, name, power: 0.5 * z + table[name] ** power)
    x = randn(B, N).requires_grad_()
    z, _ = deq(torch.zeros_like(x), {"x": x}, "x", 2)
    assert torch.autograd.grad(z, x, randn(B, N))[0].abs().sum() > 0


# ---- the approximations -------------------------------------------------------------------------


@pytest.mark.parametrize("k", [0, 1, 5])
def test_truncated_gradients_equal_their_formula(k: int) -> None:
    """``u = sum_{i <= k} (J^T)^i g``, then one VJP of f at z*."""
    f, x, g = Map(), randn(B, N).requires_grad_(), randn(B, N, seed=1)
    adjoint = OneStep() if k == 0 else Neumann(k=k)
    z, _ = DEQ(f, solver=TIGHT, adjoint=adjoint)(torch.zeros(B, N, dtype=torch.float64), x)
    star = z.detach()
    jacobian = torch.func.jacrev(lambda z: f(z, x).sum(0))(star).movedim(0, 1).detach()
    u = sum(
        torch.einsum("rji,rj->ri", torch.linalg.matrix_power(jacobian, i), g) for i in range(k + 1)
    )
    expected = torch.autograd.grad(f(star, x), [x, f.weight], u)
    found = torch.autograd.grad(z, [x, f.weight], g)
    assert_gradients(list(found), list(expected), tol=1e-9)


def test_truncated_gradients_are_approximations() -> None:
    """The tests above could not tell them from Implicit if J were zero."""
    f, x, g = Map(gain=0.9), randn(B, N).requires_grad_(), randn(B, N, seed=1)
    start, grads = torch.zeros(B, N, dtype=torch.float64), []
    for adjoint in (EXACT, OneStep(), Neumann(k=2)):
        z, _ = DEQ(f, solver=TIGHT, adjoint=adjoint)(start, x)
        grads.append(torch.autograd.grad(z, x, g)[0])
    exact, one, three = grads
    assert (one - exact).norm() > (three - exact).norm() > 1e-3 * exact.norm()


# ---- precision and state ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_is_kept(dtype: torch.dtype) -> None:
    x = randn(B, N).to(dtype).requires_grad_()
    z, info = DEQ(lambda z, x: 0.5 * torch.tanh(z) + x)(torch.zeros_like(x), x)
    assert z.dtype == info.fuse.residual.dtype == dtype
    assert torch.autograd.grad(z, x, torch.ones_like(z))[0].dtype == dtype


def test_non_contiguous_state() -> None:
    x = randn(N, B).mT.requires_grad_()
    start = torch.zeros(N, B, dtype=torch.float64).mT
    z, info = DEQ(lambda z, x: 0.5 * torch.tanh(z) + x)(start, x)
    assert info.converged.all()
    assert torch.autograd.grad(z, x, randn(B, N))[0].shape == (B, N)


def test_the_solve_begins_at_the_start() -> None:
    """``tanh(2 z)`` has one attracting fixed point on each side of 0."""
    start = torch.tensor([[0.5], [-0.5]])
    z, _ = DEQ(lambda z: torch.tanh(2 * z))(start)
    assert z.sign().flatten().tolist() == [1, -1]
    _, info = DEQ(lambda z: torch.tanh(2 * z))(z)
    assert info.nfe.tolist() == [1, 1]


def test_the_start_is_not_written_to() -> None:
    start = randn(B, N)
    kept = start.clone()
    DEQ(Map())(start, randn(B, N))
    assert torch.equal(start, kept)


def test_info_of_a_failed_solve() -> None:
    deq = DEQ(lambda z: 3 * z + 1, solver=Picard(max_iter=5, trace=True), on_failure="ignore")
    z, info = deq(torch.zeros(2, 3))
    assert info.fuse.outcome.tolist() == [Outcome.MAX_ITER] * 2
    assert not info.converged.any()
    assert info.fuse.trace is not None
    assert info.fuse.trace.shape == (5, 2)
    assert z.shape == (2, 3)
    assert info.backend == "reference"


def test_help_text_names_the_options() -> None:
    text = repr(DEQ(Map(), solver=Anderson(tol=0.125)))
    assert "Map" in text


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("linear", LINEAR_SOLVERS)
def test_sixteen_bit_state_is_solved_in_float32(dtype: torch.dtype, linear: str) -> None:
    x = randn(B, N).to(dtype).requires_grad_()
    deq = DEQ(lambda z, x: 0.25 * torch.tanh(z) + x, solver=Anderson(tol=1e-2),
              adjoint=Implicit(solver=linear, tol=1e-2))  # fmt: skip
    z, info = deq(torch.zeros_like(x), x)
    assert info.converged.all()
    assert (z.dtype, info.fuse.residual.dtype) == (dtype, torch.float32)
    (grad,) = torch.autograd.grad(z, x, torch.ones_like(z))
    exact = 1 / (1 - 0.25 * (1 - z.detach().double().tanh() ** 2))
    torch.testing.assert_close(grad.double(), exact, rtol=0.05, atol=0)


@pytest.mark.parametrize("grad", [True, False])
def test_a_map_that_works_in_place(grad: bool) -> None:
    """It must not overwrite the solver's state: f(z) - z would be 0 and every row converged."""
    x = randn(B, N)
    with torch.set_grad_enabled(grad):
        z, info = DEQ(lambda z, x: z.mul_(0.5).add_(x), solver=TIGHT)(torch.zeros_like(x), x)
    assert info.converged.all()
    torch.testing.assert_close(z, 2 * x)


def test_the_answer_may_be_changed_in_place() -> None:
    x = randn(B, N).requires_grad_()
    start = torch.zeros(B, N, dtype=torch.float64)
    z, _ = DEQ(lambda z, x: 0.5 * z + x, solver=TIGHT, adjoint=EXACT)(start, x)
    z.mul_(3)
    torch.testing.assert_close(torch.autograd.grad(z.sum(), x)[0], torch.full_like(x, 6))
